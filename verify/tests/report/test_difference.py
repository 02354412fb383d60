"""What changed between two runs, and the trend of many."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from verify import cli
from verify.record.index import Point
from verify.record.schema import CheckResult, Record
from verify.report.difference import Change, compare
from verify.tests.samples import compiled, measured, passing, record, result, waived, write


def changes(before: Record, after: Record, past: list[Point] = ()) -> dict[str, Change]:
    return {one.id: one for one in compare(before, after, lambda name, target: past)}


def run(*results, **fields) -> Record:
    return record("sm120", results, **fields)


@pytest.mark.parametrize(
    ("was", "now", "kind", "worse"),
    [
        ("PASS", "FAIL", "newly failing", True),
        ("PASS", "BLOCKED", "newly failing", True),
        ("SKIP", "CRASH", "newly failing", True),
        ("PASS", "SKIP", "changed", True),
        ("FAIL", "CRASH", "changed", False),
        ("FAIL", "PASS", "newly passing", False),
        ("SKIP", "PASS", "newly passing", False),
        ("FAIL", "WAIVED", "changed", False),
        ("PASS", "WAIVED", "changed", False),
        ("WAIVED", "FAIL", "newly failing", True),
        ("WAIVED", "PASS", "newly passing", False),
    ],
)
def test_a_verdict_that_changed_is_told_and_a_hard_one_that_fell_is_worse(was, now, kind, worse) -> None:
    def made(check_id: str, verdict: str) -> CheckResult:
        return waived(check_id) if verdict == "WAIVED" else result(check_id, verdict)

    for check_id, hard in (("p4.oracle.n1", True), ("p8.kernel.ms", False)):
        (found,) = changes(run(made(check_id, was)), run(made(check_id, now))).values()
        assert (found.kind, found.worse) == (kind, worse and hard)
        assert ("WAIVED (FAIL) hardware" in found.told) is ("WAIVED" in (was, now))


def test_a_check_that_a_waived_failure_blocks_did_not_get_worse() -> None:
    blocked = result("p4.oracle.n1", "BLOCKED", by="p1.bf16.matmul")
    for blocker, kind, worse in ((waived("p1.bf16.matmul"), "changed", False), (None, "newly failing", True)):
        after = run(*filter(None, [blocked, blocker]))
        found = changes(run(result("p4.oracle.n1"), waived("p1.bf16.matmul")), after)["p4.oracle.n1"]
        assert (found.kind, found.worse) == (kind, worse)


def test_a_hard_check_that_is_absent_is_worse_where_the_same_was_asked_for() -> None:
    whole, part = run(*passing()), passing()[1:]
    (found,) = changes(whole, run(*part)).values()
    assert (found.kind, found.worse) == ("did not run", True)
    (found,) = changes(whole, run(*part, selection="--phases 4")).values()
    assert (found.kind, found.worse) == ("did not run", False)
    (found,) = changes(run(*part), whole).values()
    assert (found.kind, found.worse) == ("added", False)


def test_what_fails_in_both_runs_is_still_failing_and_what_the_suite_dropped_is_gone() -> None:
    failing = run(result("p4.oracle.n1", "FAIL"))
    (found,) = changes(failing, failing).values()
    assert (found.kind, found.worse) == ("still failing", False)
    (found,) = compare(failing, run(), lambda name, target: [], {"p4.oracle.n33"})
    assert (found.kind, found.worse) == ("gone", False)


def of_share(share: float, duration_s: float = 1.0) -> Record:
    return run(result("p4.oracle.n1", measurements=measured(share, 1.0), duration_s=duration_s))


def past(*shares: float) -> list[Point]:
    rest = ("hardware", "error")
    return [
        Point(str(n), "", "sm120", "p4.oracle.n1", "hard", "PASS", None, *rest, one, 1.0, 1.0)
        for n, one in enumerate(shares)
    ]


def test_without_a_history_a_factor_tells_what_is_tighter_or_slower() -> None:
    assert changes(of_share(0.2), of_share(0.29, 1.9)) == {}
    (found,) = changes(of_share(0.2), of_share(0.31)).values()
    assert (found.kind, found.worse) == ("tighter", False)
    assert (
        "0.31 of what is allowed, 0.2 before (over 1.5 times; 0 earlier runs, too few to know the noise)" in found.told
    )
    (found,) = changes(of_share(0.2, 1.0), of_share(0.2, 2.1)).values()
    assert found.kind == "slower"


def test_a_value_below_zero_uses_nothing_of_its_allowance() -> None:
    for was, now in ((-2.0, -1.0), (-1.0, -2.0), (0.3, -1.0)):
        assert changes(of_share(was), of_share(now)) == {}
        assert changes(of_share(was), of_share(now), past(*[was] * 5)) == {}
    (found,) = changes(of_share(-2.0), of_share(0.5)).values()
    assert (found.kind, found.told[:43]) == ("tighter", "error: 0.5 of what is allowed, 0 before (ov")


def test_the_noise_of_enough_runs_is_allowed_for() -> None:
    noisy, steady = past(0.1, 0.3, 0.2, 0.25, 0.15), past(0.2, 0.2, 0.2, 0.2, 0.2)
    assert changes(of_share(0.2), of_share(0.4), noisy) == {}
    (found,) = changes(of_share(0.2), of_share(0.22), steady).values()
    assert "above the noise of 5 earlier runs" in found.told


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    folder = tmp_path / "records"
    for day in range(1, 4):
        write(record("sm120", passing(), day=day), folder)
    write(record("sm120", [*passing()[:-1], result("p4.triton_pytorch.max", "FAIL")], day=4), folder)
    write(record("sm90", passing()[:2], day=5), folder)
    return folder


@pytest.fixture
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from verify.tests import samples

    for module in ("report.difference", "record.verdict", "record.checker"):
        monkeypatch.setattr(f"verify.{module}.catalogue", samples.checks)


def verb(tree: Path, *words: str) -> int:
    return cli.main([*words, "--records", str(tree)])


def test_diff_names_the_runs_and_what_got_worse(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert verb(tree, "diff", "run-sm120-1", "run-sm120-2") == 0
    assert "No HARD check got worse." in capsys.readouterr().out
    assert verb(tree, "diff", str(tree / "runs" / "run-sm120-1"), "run-sm120-4") == 1
    out = capsys.readouterr().out
    assert "newly failing (1)\n  HARD p4.triton_pytorch.max  PASS hardware, now FAIL hardware" in out
    assert "1 HARD check got worse." in out
    assert verb(tree, "diff", "run-sm120-1", "run-sm120-4", "--json") == 1
    assert json.loads(capsys.readouterr().out)["changes"][0]["worse"] is True


@pytest.mark.usefixtures("small_catalogue")
def test_since_last_green_finds_the_last_run_that_verified_its_target(
    tree: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verb(tree, "diff", "--since", "last-green", "--gpu", "sm120") == 1
    assert "from run-sm120-3" in capsys.readouterr().out
    assert verb(tree, "diff", "--since", "last-green", "--gpu", "sm90") == 3
    assert "there is no green run on sm90 before run-sm90-5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["diff", "run-sm120-1"], "diff compares two runs"),
        (["diff", "run-sm120-1", "absent"], "there is no record 'absent'"),
        (["diff", "a", "b", "--since", "last-green"], "takes at most one run"),
        (["history", "--check", "p4.orcle"], "no record has a result of 'p4.orcle'; the nearest are p4.oracle"),
        (["history", "--gpu", "sm80"], "no record has a result of a check on sm80"),
        (["history", "--gpu", "sm1"], "is not a GPU architecture"),
    ],
)
def test_a_name_that_is_not_there_is_exit_3(tree: Path, words: list[str], told: str, capsys) -> None:
    assert verb(tree, *words) == 3
    assert told in capsys.readouterr().err


def test_history_shows_targets_families_and_the_course_of_a_check(tree: Path, capsys) -> None:
    assert verb(tree, "history") == 0
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["sm120"][1:3] == ["4", "PPPF"]
    assert verb(tree, "history", "--gpu", "sm120") == 0
    assert "p4.triton_pytorch     4  PPPF" in capsys.readouterr().out
    assert verb(tree, "history", "--check", "p4.oracle") == 0
    out = capsys.readouterr().out
    assert "newest first (8 of 8 results)" in out
    assert "measured / allowed" in out
    assert verb(tree, "history", "--check", "p4.oracle.n1", "--json") == 0
    assert len(json.loads(capsys.readouterr().out)) == 4


@pytest.mark.parametrize(
    ("verdicts", "letter", "counts"),
    [
        (["PASS", "PASS", "SKIP", "ABSENT", "REFUSED"], "P", "2P 1S 1A 1R"),
        (["SKIP", "SKIP", "ABSENT"], "A", "2S 1A"),
        (["PASS", "PASS", "FAIL", "SKIP"], "F", "2P 1F 1S"),
        (["PASS", "BLOCKED"], "B", "1P 1B"),
        (["PASS", "WAIVED", "PASS"], "W", "2P 1W"),
    ],
)
def test_a_skip_does_not_hide_what_passed_in_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys, verdicts: list[str], letter: str, counts: str
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    listed = {"waiver": waived("p4.oracle.n1").waiver}
    told = [
        result(f"p4.oracle.n{n}", verdict, gate="hard", **listed if verdict == "WAIVED" else {})
        for n, verdict in enumerate(verdicts)
    ]
    write(record("sm120", told, day=2), tmp_path, "evidence")
    write(record("sm120", [result("p8.kernel.ms")], day=1), tmp_path, "evidence")
    write(compiled("sm120", [result("p3.scoring.n1", evidence="compiled", gate="hard")]), tmp_path, "evidence")
    write(compiled("sm88", gap="no toolchain"), tmp_path, "evidence")
    assert verb(tmp_path, "history") == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    # the run of day 1 has no HARD check
    assert ["sm120", "2", f"·{letter}", "-", *counts.split()] in lines
    assert ["sm120", "compiled", "1", "P", "-", "1P"] in lines
    assert ["sm88", "compiled", "1", "·", "-", "·"] in lines
