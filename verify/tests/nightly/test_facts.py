"""What a night says of HARD failures: new or old, and whether a second run shows them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ci.nightly.facts import of_night
from verify.record.index import open_index
from verify.record.reading import write_record
from verify.record.schema import Record
from verify.tests.samples import checks, record, result, simulated

NAME = "p4.oracle.n33"


def _night(day: int, verdict: str = "PASS", target: str = "sm90", **fields: object) -> Record:
    results = [result(one.id, verdict if one.id == NAME else "PASS") for one in checks() if one.applies_to(target)]
    return record(target, results, day=day, **fields)


def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *nights: Record) -> dict[str, Any]:
    """The facts of the last of these nights."""
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    for one in nights:
        write_record(one, tmp_path / "nights" / one.run_id / "record.json")
    with open_index([tmp_path / "nights"]) as index:
        return of_night(index, checks(), "2026-11-20T05:00:00Z", {nights[-1].run_id})


@pytest.mark.parametrize(
    ("verdicts", "kind", "confirmed"),
    [
        ("PF", "newly failing", False),
        ("PFF", "still failing", True),
        ("PFPF", "newly failing", False),
        ("PFPFF", "still failing", True),  # flaky as well, which must not hide that it failed twice in a row
        ("F", "newly failing", False),
    ],
)
def test_a_failure_that_the_night_before_showed_too_is_confirmed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verdicts: str, kind: str, confirmed: bool
) -> None:
    words = {"P": "PASS", "F": "FAIL"}
    nights = [_night(day, words[letter]) for day, letter in enumerate(verdicts, start=1)]
    (one,) = facts(tmp_path, monkeypatch, *nights)["failing"]
    assert (one["kind"], one["confirmed"], one["checks"]) == (kind, confirmed, [NAME])
    assert (one["place"], one["run"]) == ("sm90", nights[-1].run_id)


@pytest.mark.parametrize(("again", "confirmed"), [("FAIL", True), ("PASS", False)])
def test_a_run_that_tries_it_again_confirms_it_if_it_fails_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, again: str, confirmed: bool
) -> None:
    first = _night(2, "FAIL")
    second = record("sm90", [result(NAME, again)], day=3, run_id="second", confirms=first.run_id)
    found = facts(tmp_path, monkeypatch, _night(1), second, first)
    (one,) = found["failing"]
    assert (one["kind"], one["confirmed"]) == ("newly failing", confirmed)
    # the second run is not a run of its own
    assert found["passing"].keys() == {"sm90"}
    assert NAME not in found["passing"]["sm90"]["checks"]


def test_a_run_of_another_night_and_a_run_beside_the_others_say_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = _night(3, "FAIL", run_id="beside", beside="newest")
    found = facts(tmp_path, monkeypatch, _night(1, "FAIL"), beside, _night(2, target="sm120"))
    assert (found["failing"], found["passing"].keys()) == ([], {"sm120"})


def test_what_failed_without_the_gpu_has_a_place_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = simulated("sm120", [result(NAME, "FAIL", "simulated")])
    (found,) = facts(tmp_path, monkeypatch, one)["failing"]
    assert found["place"] == "sm120 simulated"
