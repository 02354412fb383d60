"""The steps between plan and collect: a GPU's job, the watch over jobs without a runner, and the weekly waivers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import pytest

from ci.nightly import NightlyError, waivers
from ci.nightly.github import Api
from ci.nightly.gpus import Gpu
from ci.nightly.job import Outcome, carry_out, unfit
from ci.nightly.watch import watch
from verify.tests.fake_github import TOKEN, serving

ROW = {"name": "sm90", "gpus": 1, "driver": "570", "options": ["--expect", "sm90", "-m", "not slow"]}


class Machine:
    """Runs no command: each leaves a record, and ends with the next of ``codes``."""

    def __init__(self, runs: Path, *codes: int, records: bool = True) -> None:
        self.runs, self.codes, self.records = runs, [*codes], records
        self.commands: list[list[str]] = []

    def __call__(self, command: Sequence[str]) -> tuple[int, str]:
        self.commands.append([*command][3:])
        if self.records:
            place = self.runs / f"run-{len(self.commands)}"
            place.mkdir(parents=True)
            (place / "record.json").write_text("{}")
        return self.codes.pop(0), "the last line"


def test_hard_failures_are_tried_again_and_the_first_exit_code_counts(tmp_path: Path) -> None:
    machine = Machine(tmp_path, 1, 0)
    assert carry_out(ROW, ["580.95.05"], tmp_path, machine) == Outcome("sm90", 1, "the last line", 0)
    assert machine.commands == [
        ["run", "--expect", "sm90", "-m", "not slow"],
        ["run", "--confirm", "run-1"],
    ]


@pytest.mark.parametrize("code", [0, 2, 3, 4])
def test_nothing_else_is_tried_again(tmp_path: Path, code: int) -> None:
    machine = Machine(tmp_path, code)
    assert carry_out(ROW, ["570.10"], tmp_path, machine).confirmed is None
    assert len(machine.commands) == 1


def test_a_run_that_died_without_a_record_has_nothing_to_confirm(tmp_path: Path) -> None:
    assert carry_out(ROW, ["570"], tmp_path, Machine(tmp_path, 1, records=False)) == Outcome("sm90", 1, "the last line")


@pytest.mark.parametrize(
    ("drivers", "words"),
    [
        ([], "the machine has 0 GPUs, and ci/gpus.toml expects 1"),
        (["580.1", "580.1"], "the machine has 2 GPUs, and ci/gpus.toml expects 1"),
        (["565.57.01"], "the driver is 565.57.01, and ci/gpus.toml expects 570 or newer"),
    ],
)
def test_a_machine_that_is_not_the_one_described_is_not_verified(
    tmp_path: Path, drivers: list[str], words: str
) -> None:
    machine = Machine(tmp_path)
    assert carry_out(ROW, drivers, tmp_path, machine) == Outcome("sm90", 3, words)
    assert machine.commands == []
    assert unfit(ROW, ["600.1"]) == ""


class Clock:
    def __init__(self, *states: dict[str, str]) -> None:
        self.states, self.minutes, self.cancelled = [*states], 0.0, 0

    def jobs(self) -> list[dict[str, str]]:
        found = self.states.pop(0) if len(self.states) > 1 else self.states[0]
        return [{"name": name, "status": status} for name, status in found.items()]

    def watch(self, **limits: int) -> list[str]:
        def cancel() -> None:
            self.cancelled += 1

        def pause(seconds: float) -> None:
            self.minutes += seconds / 60
            assert self.minutes < 1000

        return watch(self.jobs, limits, cancel, lambda: 60 * self.minutes, pause)


def test_jobs_that_all_began_are_left_alone() -> None:
    clock = Clock(
        {"a": "queued"}, {"a": "in_progress", "b": "queued"}, {"a": "completed", "b": "in_progress", "plan": "queued"}
    )
    assert clock.watch(a=5, b=5) == []
    assert clock.cancelled == 0


def test_a_job_that_no_runner_takes_is_cancelled_when_the_others_have_ended() -> None:
    running = {"a": "in_progress", "b": "queued"}
    clock = Clock(*[running] * 20, {"a": "completed", "b": "queued"})
    assert clock.watch(a=5, b=5) == ["b"]
    assert (clock.cancelled, clock.minutes) == (1, 20)


def test_a_job_that_may_still_wait_keeps_the_others_waiting() -> None:
    clock = Clock({"a": "queued", "b": "queued"})
    assert clock.watch(a=5, b=30) == ["a", "b"]
    assert clock.minutes == 31


def test_other_jobs_of_the_run_are_not_cancelled_with_it() -> None:
    beside = {"b": "queued", "compile": "in_progress", "collect": "queued"}
    clock = Clock(*[beside] * 9, beside | {"compile": "completed"})
    assert clock.watch(b=5) == ["b"]
    assert clock.minutes == 9


def test_a_poll_that_fails_is_not_the_end() -> None:
    states = iter([{"a": "queued"}, None, None, {"a": "in_progress"}])

    def jobs() -> list[dict[str, str]]:
        if (found := next(states)) is None:
            raise NightlyError("502")
        return [{"name": name, "status": status} for name, status in found.items()]

    def never() -> list[dict[str, str]]:
        raise NightlyError("502")

    assert watch(jobs, {"a": 5}, lambda: None, lambda: 0.0, lambda _: None) == []
    with pytest.raises(NightlyError):
        watch(never, {"a": 5}, lambda: None, lambda: 0.0, lambda _: None)


def test_the_run_is_cancelled_at_github() -> None:
    with serving() as github:
        Api(github.address, "owner/suite", TOKEN).post("/actions/runs/7/cancel")
    assert github.cancelled == ["7"]


_ENTRY = """
[[known_failure]]
checks = ["p4.repeat.b"]
{when}
reason = "Two warps differ."
issue = "https://example.org/1"
owner = "@me"
added = 2026-12-01
expires = 2026-12-20
probe = "python -m verify run --phases 4"
"""
GPU = Gpu(name="x", sm=120, labels=("self-hosted", "sm120"), gpus=1, level="usual", timeout_min=9, start_within_min=5)


def test_a_probe_runs_where_its_gpu_is() -> None:
    found = waivers.entries(_ENTRY.format(when="when = { sm = [90, 120] }") + _ENTRY.format(when=""), [GPU])
    assert [one["labels"] for one in found] == [["self-hosted", "sm120"], ["ubuntu-24.04"]]
    assert json.loads(json.dumps(found)) == found
    with pytest.raises(NightlyError, match=r"entry 1 is for sm80, and ci/gpus\.toml has no runner"):
        waivers.entries(_ENTRY.format(when="when = { sm = [80] }"), [GPU])
    assert waivers.entries("", [GPU]) == []


def test_a_probe_runs_as_if_no_failure_were_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "known_failures.toml"
    file.write_text("some")
    monkeypatch.setattr(waivers, "FILE", file)
    assert waivers.probed(f"test -s {file}") == 1
    assert file.read_text() == "some"


@pytest.mark.parametrize(
    ("fixed", "today", "words"),
    [
        (True, date(2026, 12, 2), "is fixed: its probe passes; remove it from ci/known_failures.toml"),
        (False, date(2026, 12, 21), "expired on 2026-12-20 and is not fixed"),
        (False, date(2026, 12, 10), "expires in 10 days and is not fixed"),
        (False, date(2026, 12, 2), ""),
    ],
)
def test_what_must_be_done_about_a_known_failure_is_said(fixed: bool, today: date, words: str) -> None:
    (entry,) = waivers.entries(_ENTRY.format(when=""), [GPU])
    told = waivers.judge(entry, fixed, today)
    assert words in told
    assert bool(told) == bool(words)
