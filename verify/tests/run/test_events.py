"""What a run leaves on disk: whole lines, one owner, and a record at any time."""

from __future__ import annotations

from pathlib import Path

import pytest

from verify.errors import ConfigurationError
from verify.record.reading import read_record
from verify.record.schema import CheckResult, Verdict
from verify.run import events
from verify.run.manifest import freeze, survey
from verify.subject.find import find_subject
from verify.tests.tree import make_tree


def _result(check_id: str, verdict: str = "PASS", *, gate: str = "hard", by: str | None = None) -> CheckResult:
    return CheckResult(
        id=check_id, gate=gate, verdict=Verdict(verdict), by=by,
        evidence="emulated", seed=0, duration_s=0, message="made", repeat="made",
    )  # fmt: skip


def test_half_a_line_is_not_an_event_and_does_not_spoil_the_next(tmp_path: Path) -> None:
    events.append_result(tmp_path, _result("p1.a.x"))
    with (tmp_path / events.EVENTS).open("a") as stream:
        stream.write('{"event": "resu')
    assert list(events.read_results(tmp_path)) == ["p1.a.x"]
    events.drop_torn_line(tmp_path)
    events.append_result(tmp_path, _result("p1.a.y"))
    assert list(events.read_results(tmp_path)) == ["p1.a.x", "p1.a.y"]


@pytest.mark.parametrize("damage", ["{", "[]", '{"event": "other"}', '{"event": "result", "result": {"id": 1}}', ""])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, damage: str) -> None:
    events.append_start(tmp_path, "p1.a.x")
    with (tmp_path / events.EVENTS).open("a") as stream:
        stream.write(damage + "\n")
    events.append_result(tmp_path, _result("p1.a.x"))
    with pytest.raises(ConfigurationError, match=r"events\.jsonl, line 2, is damaged; start a new run$"):
        events.read_results(tmp_path)


def test_a_follower_sees_each_event_once(tmp_path: Path) -> None:
    events.append_start(tmp_path, "p1.a.x")
    follower = events.Follower(tmp_path)
    assert follower.new() == []
    events.append_start(tmp_path, "p1.a.y")
    assert [event["id"] for event in follower.new()] == ["p1.a.y"]
    assert follower.new() == []


@pytest.mark.parametrize(
    ("needs", "expected"),
    [
        (("p1.failed.x",), "p1.failed.x"),
        (("p1.failed",), "p1.failed.x"),
        (("p1.blocked",), "p1.failed.x"),
        (("p1.passed", "p1.absent"), None),
        (("p1.soft",), "p1.soft.x"),
        (("p1.fail",), None),
    ],
)
def test_blocker(needs: tuple[str, ...], expected: str | None) -> None:
    made = [
        _result("p1.failed.x", "FAIL"),
        _result("p1.blocked.x", "BLOCKED", by="p1.failed.x"),
        _result("p1.passed.x"),
        _result("p1.soft.x", "FAIL", gate="soft"),
    ]
    assert events.blocker(needs, {result.id: result for result in made}) == expected


def test_a_run_has_one_owner(tmp_path: Path) -> None:
    with events.lock(tmp_path), pytest.raises(ConfigurationError, match="is still running"):
        events.lock(tmp_path)
    events.lock(tmp_path).close()


def test_a_damaged_manifest_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"run\.json cannot be read \(No such file"):
        events.read_manifest(tmp_path)
    (tmp_path / events.MANIFEST).write_text("{")
    with pytest.raises(ConfigurationError, match=r"run\.json is damaged"):
        events.read_manifest(tmp_path)


def test_another_card_is_refused_with_both_names(tmp_path: Path) -> None:
    make_tree(tmp_path)
    with pytest.raises(ConfigurationError, match="--expect sm90, but this machine has no GPU that torch can use"):
        survey("cpu", find_subject("bundled", tmp_path), tmp_path, expect=90)


def test_a_record_is_there_from_the_start_and_names_a_local_model_by_its_directory(tmp_path: Path) -> None:
    make_tree(tmp_path)
    (tmp_path / "tiny-model").mkdir()
    subject = find_subject("bundled", tmp_path)
    surroundings = survey("cpu", subject, tmp_path)
    manifest = freeze(
        surroundings,
        device="cpu",
        subject=subject,
        model=str(tmp_path / "tiny-model"),
        seed=3,
        selection="all",
        selected=(),
    )
    events.create(tmp_path / "run", manifest)
    assert events.read_manifest(tmp_path / "run") == manifest
    record = read_record(tmp_path / "run" / events.RECORD)
    assert (record.state, record.model, record.seed) == ("running", "tiny-model", 3)
    surroundings.refuse(survey("cpu", subject, tmp_path), "same")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("torch", "0.1", r"torch was \S+ and is now 0\.1"),
        ("python", "3.99", r"python was \S+ and is now 3\.99"),
        ("ptxas", {}, r"ptxas ptxas was \S+ and is now unset"),
        ("variables", {"CUDA_X": "1"}, r"[A-Z0-9_]+ was \S+ and is now unset"),
    ],
)
def test_a_run_is_not_resumed_elsewhere(tmp_path: Path, field: str, value: object, words: str) -> None:
    make_tree(tmp_path)
    frozen = survey("cpu", find_subject("bundled", tmp_path), tmp_path)
    other = frozen.environment.model_copy(update={field: value})
    with pytest.raises(ConfigurationError, match=f"^run r1 cannot be resumed: {words}; start a new run$"):
        frozen.refuse(frozen.model_copy(update={"environment": other}), "r1")


def test_another_instrument_is_refused(tmp_path: Path) -> None:
    make_tree(tmp_path)
    subject = find_subject("bundled", tmp_path)
    frozen = survey("cpu", subject, tmp_path)
    (tmp_path / "phases" / "tests").mkdir()
    (tmp_path / "phases" / "tests" / "test_x.py").write_text("a test of the instrument measures nothing\n")
    frozen.refuse(survey("cpu", subject, tmp_path), "same")
    (tmp_path / "phases" / "p1_more.py").write_text("more = 1\n")
    with pytest.raises(ConfigurationError, match=r"the suite's own source was \w{12} and is now \w{12}"):
        frozen.refuse(survey("cpu", subject, tmp_path), "r1")
