"""Which node tries which job, on a cluster that is made up here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from verify.fleet.course import Course

WAIT_S = 10.0


@dataclass
class Made:
    """A cluster in which the test decides what happens, and what time it is."""

    nodes: dict[str, set[str]]
    time_s: float = 0.0
    outcomes: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    submitted: list[tuple[str, str]] = field(default_factory=list)
    cancelled: list[tuple[str, str]] = field(default_factory=list)

    def offering(self, target: str) -> list[str]:
        return [node for node, targets in self.nodes.items() if target in targets]

    def submit(self, job: Mapping[str, Any], node: str, attempt: int) -> tuple[str, str]:
        self.submitted.append((job["target"], node))
        return job["target"], node

    def outcome(self, task: tuple[str, str]) -> dict[str, Any] | None:
        return self.outcomes.get(task)

    def cancel(self, task: tuple[str, str]) -> None:
        self.cancelled.append(task)

    def course(self, *targets: str) -> Course:
        return Course([{"target": target} for target in targets], self, WAIT_S, lambda: self.time_s)


def _steps(course: Course, made: Made, seconds: float = 0.0) -> None:
    made.time_s += seconds
    for _ in range(3):
        course.step()


def _absent(course: Course, target: str) -> tuple[str, str]:
    result = course.legs[target].result
    assert result is not None
    return result["absent"], result["why"]


def test_each_job_goes_to_a_node_that_offers_it_and_has_the_least_to_do() -> None:
    made = Made({"a": {"sm90", "sm120"}, "b": {"sm90"}})
    course = made.course("sm120", "sm90")
    _steps(course, made)
    assert made.submitted == [("sm120", "a"), ("sm90", "b")]
    for task in made.submitted:
        made.outcomes[task] = {"code": 0, "files": {}, "tail": ""}
    _steps(course, made)
    assert course.ended
    assert course.legs["sm90"].result == {"code": 0, "files": {}, "tail": ""}


def test_a_job_of_a_lost_node_is_tried_on_another_and_the_other_jobs_go_on() -> None:
    made = Made({"a": {"sm90"}, "b": {"sm120"}})
    course = made.course("sm90", "sm120")
    _steps(course, made)
    course.told("sm90", 1, "")
    del made.nodes["a"]
    made.outcomes["sm90", "a"] = {"lost": "was lost (NodeDiedError)"}
    made.outcomes["sm120", "b"] = {"code": 1, "files": {}, "tail": ""}
    _steps(course, made)
    assert course.notes == ["sm90: node a was lost (NodeDiedError)"]
    assert course.legs["sm90"].words == "waits for another node with sm90"
    made.nodes["c"] = {"sm90"}
    _steps(course, made)
    assert made.submitted == [("sm90", "a"), ("sm120", "b"), ("sm90", "c")]
    assert course.legs["sm120"].result == {"code": 1, "files": {}, "tail": ""}


def _begun_and_ended(outcome: dict[str, Any]) -> tuple[Made, Course]:
    """The course of one GPU that the only node began and ended with ``outcome``, after the time to wait for another."""
    made = Made({"a": {"sm90"}})
    course = made.course("sm90")
    _steps(course, made)
    course.told("sm90", 1, "")
    made.outcomes["sm90", "a"] = outcome
    _steps(course, made)
    _steps(course, made, WAIT_S)
    return made, course


def test_a_lost_node_without_another_leaves_no_record() -> None:
    _, course = _begun_and_ended({"lost": "was lost (NodeDiedError)"})
    why = "node a was lost (NodeDiedError); no other node with the resource sm90 within 10 s"
    assert _absent(course, "sm90") == ("NO_RECORD", why)


def test_a_gpu_that_no_node_offers_has_no_runner() -> None:
    made = Made({"a": {"sm90"}})
    course = made.course("sm80")
    _steps(course, made, WAIT_S - 1)
    assert not course.ended
    _steps(course, made, 1)
    assert _absent(course, "sm80") == ("NO_RUNNER", "no node with the resource sm80 within 10 s")


def test_a_node_that_refuses_is_not_asked_again() -> None:
    made, course = _begun_and_ended({"refused": "offers sm90, but its GPU is an sm86"})
    assert made.submitted == [("sm90", "a")]
    kind, why = _absent(course, "sm90")
    assert kind == "NO_RECORD"
    assert why.startswith("node a offers sm90, but its GPU is an sm86; ")


def test_a_node_that_does_not_begin_is_given_up() -> None:
    made = Made({"a": {"sm90"}, "b": {"sm90"}})
    course = made.course("sm90")
    _steps(course, made)
    _steps(course, made, 61)
    assert made.cancelled == [("sm90", "a")]
    assert made.submitted == [("sm90", "a"), ("sm90", "b")]
    assert course.notes == ["sm90: node a had no room for it within 60 s"]


def test_a_run_that_was_interrupted_on_its_node_is_tried_on_another() -> None:
    made = Made({"a": {"sm90"}, "b": {"sm90"}})
    course = made.course("sm90")
    _steps(course, made)
    made.outcomes["sm90", "a"] = {"code": 2, "files": {}, "tail": ""}
    _steps(course, made)
    assert made.submitted == [("sm90", "a"), ("sm90", "b")]


def test_progress_of_an_attempt_that_is_over_is_not_shown() -> None:
    made = Made({"a" * 12: {"sm90"}, "b" * 12: {"sm90"}})
    course = made.course("sm90")
    _steps(course, made)
    made.outcomes["sm90", "a" * 12] = {"lost": "was lost"}
    _steps(course, made)
    course.told("sm90", 1, "phase 7, 300 of 342")
    assert course.legs["sm90"].words == "waits for node bbbbbbbb"
    course.told("sm90", 2, "phase 1, 0 of 342")
    assert course.legs["sm90"].words == "node bbbbbbbb: phase 1, 0 of 342"


def test_what_is_finished_stays_when_a_run_is_stopped() -> None:
    made = Made({"a": {"sm90"}, "b": {"sm120"}})
    course = made.course("sm90", "sm120", "sm80")
    _steps(course, made)
    made.outcomes["sm120", "b"] = {"code": 0, "files": {}, "tail": ""}
    _steps(course, made)
    course.stop()
    assert made.cancelled == [("sm90", "a")]
    made.outcomes["sm90", "a"] = {"lost": "was lost (TaskCancelledError)"}
    _steps(course, made)
    assert course.ended
    assert course.legs["sm120"].result == {"code": 0, "files": {}, "tail": ""}
    assert course.legs["sm90"].result == course.legs["sm80"].result == {"stopped": True}


def test_a_task_that_does_not_end_does_not_keep_a_stopped_run() -> None:
    made = Made({"a": {"sm90"}})
    course = made.course("sm90")
    _steps(course, made)
    course.stop()
    _steps(course, made, 61)
    assert course.ended
