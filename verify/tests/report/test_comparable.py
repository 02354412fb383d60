"""What ``diff --since last-green`` says about every target: which runs it compares, and what it calls each change."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from verify import cli
from verify.checks import Check, CheckSpec
from verify.record.schema import CheckResult, Record
from verify.tests.samples import compiled, record, result, simulated, waived, write

#: Fourteen HARD checks and a SOFT one.
CASES = [f"n{number}" for number in range(14)]
IDS = [f"p4.oracle.{case}" for case in CASES]
SOFT = "p8.kernel.ms"
GREEN_DAYS = (1, 2, 3)


def catalogue() -> list[Check]:
    return [
        Check(spec.id_of(case), case, spec, f"phases/x.py::test[{case}]")
        for spec in (
            CheckSpec("p4.oracle", "hard", "claim", "reason", "remedy", dict.fromkeys(CASES)),
            CheckSpec("p8.kernel", "soft", "claim", "reason", "remedy", {"ms": None}),
        )
        for case in spec.cases
    ]


def results(evidence: str = "hardware", left_out: Iterable[str] = (), **verdicts: str) -> list[CheckResult]:
    """Every check passed, except for these cases."""
    return [
        result(name, verdicts.get(name.rpartition(".")[2], "PASS"), evidence, gate="soft" if name == SOFT else "hard")
        for name in (*IDS, SOFT)
        if name not in left_out
    ]


Diff = Callable[..., tuple[int, str, dict[str, dict]]]


@pytest.fixture
def diff(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Diff:
    """Compares the given records: the exit code, what is printed, and the runs of the JSON by target and evidence."""
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    for module in ("report.difference", "record.verdict"):
        monkeypatch.setattr(f"verify.{module}.catalogue", catalogue)

    def call(*records: Record, words: Iterable[str] = ()) -> tuple[int, str, dict[str, dict]]:
        for one in records:
            write(one, tmp_path, "evidence")
        command = ["diff", "--since", "last-green", "--records", str(tmp_path / "evidence"), *words]
        code = cli.main(command)
        text = capsys.readouterr()
        assert cli.main([*command, "--json"]) == code
        told = capsys.readouterr().out
        found = json.loads(told) if told and not words else []
        return code, text.out + text.err, {f"{one['target']} {one['evidence']}": one for one in found}

    return call


def nights(target: str, days: Iterable[int] = GREEN_DAYS, **fields: object) -> list[Record]:
    """Green runs."""
    return [
        record(target, results("emulated" if target == "emulated" else "hardware"), day=day, **fields) for day in days
    ]


def kinds(target: dict, run: int = 0) -> dict[str, tuple[str, bool]]:
    return {one["id"]: (one["kind"], one["worse"]) for one in target["runs"][run]["changes"]}


def test_a_night_names_the_gpu_that_fails_the_one_that_crashes_and_the_one_that_did_not_run(diff: Diff) -> None:
    crashed = dict.fromkeys(CASES[:12], "CRASH")
    code, text, found = diff(
        *nights("emulated", (1, 2, 3, 4)),
        *nights("sm80"), record("sm80", results(n5="FAIL"), day=4),
        *nights("sm90"), record("sm90", results(**crashed), day=4),
        *nights("sm100", (1, 2, 3, 4)),
        *nights("sm120"),
    )  # fmt: skip
    assert code == 1
    assert kinds(found["sm80 hardware"]) == {"p4.oracle.n5": ("newly failing", True)}
    assert kinds(found["sm90 hardware"]) == dict.fromkeys(IDS[:12], ("newly failing", True))
    assert kinds(found["sm120 hardware"]) == {"sm120": ("did not run", True)}
    assert {name: one["worse"] for name, one in found.items()} == {
        "sm80 hardware": True, "sm90 hardware": True, "sm100 hardware": False, "sm120 hardware": True,
        "emulated emulated": False,
    }  # fmt: skip
    assert text.splitlines()[-4:] == [
        "sm80: 1 newly failing",
        "sm90: 12 newly failing",
        "sm120: did not run",
        "5 targets: 3 with HARD checks that got worse or did not run, 2 without a HARD check that got worse.",
    ]
    assert "HARD sm120  its newest run is of 2026-11-03, and sm" in text
    assert "newly failing (12)\n  HARD p4.oracle.n0  PASS hardware, now CRASH hardware: measured 2" in text
    assert (
        "sm100  run-sm100-4 of 2026-11-04, compared with the last green run, run-sm100-3 of 2026-11-03: no change"
        in text
    )


@pytest.mark.parametrize("field", ["selection", "model"])
def test_a_run_of_a_few_checks_is_not_set_against_a_whole_one(diff: Diff, field: str) -> None:
    few = record("sm90", results()[:2], day=4, **{field: "another"})
    code, text, found = diff(*nights("sm90", (1,)), few)
    assert code == 0
    newest, whole = found["sm90 hardware"]["runs"]
    assert (newest["before"], newest["changes"], whole["after"]) == (None, [], "run-sm90-1")
    assert f"nothing comparable: no earlier run {'of its selection ' * (field == 'model')}has its {field}" in text
    assert "no change" not in text
    assert "1 target: 1 with nothing comparable." in text
    code, text, _ = diff(words=["--gpu", "sm90"])
    assert code == 3
    assert "there is no green run on sm90 before run-sm90-4 that it can be compared with (no earlier run" in text


def test_a_run_of_a_few_checks_does_not_hide_that_a_whole_one_got_worse(diff: Diff) -> None:
    bad = record("sm90", results(n1="FAIL", n2="FAIL"), day=2)
    few = record("sm90", [result("p4.oracle.n1", gate="hard")], day=3, selection="-k n1")
    code, text, found = diff(*nights("sm90", (1,)), bad, few)
    assert code == 1
    assert [one["after"] for one in found["sm90 hardware"]["runs"]] == ["run-sm90-3", "run-sm90-2"]
    # n1 passed in a newer run
    assert kinds(found["sm90 hardware"], 1) == {"p4.oracle.n2": ("newly failing", True)}
    assert "sm90: 1 newly failing\n" in text


def test_a_run_whose_checks_all_passed_in_a_newer_one_is_left_out(diff: Diff) -> None:
    few = record("sm90", results()[:2], day=1, selection="-k n1")
    code, _, found = diff(few, *nights("sm90", (2, 3)))
    assert code == 0
    assert [one["after"] for one in found["sm90 hardware"]["runs"]] == ["run-sm90-3"]


def test_each_kind_of_evidence_is_compared_with_its_own(diff: Diff) -> None:
    built = [compiled("sm90", results("compiled"), day=day, run_id=f"built-{day}") for day in (1, 4)]
    ran = [
        simulated("sm90", results("simulated", n3=verdict), day=day, run_id=f"ran-{day}")
        for day, verdict in ((2, "PASS"), (5, "FAIL"))
    ]
    code, text, found = diff(*built, *ran, *nights("sm90", (3,)))
    assert code == 1
    pairs = {name: (one["runs"][0]["before"], one["runs"][0]["after"]) for name, one in found.items()}
    assert pairs == {
        "sm90 hardware": (None, "run-sm90-3"),
        "sm90 simulated": ("ran-2", "ran-5"),
        "sm90 compiled": ("built-1", "built-4"),
    }
    assert "sm90 simulated: 1 newly failing\n" in text


def test_a_check_that_failed_in_the_run_before_too_is_still_failing(diff: Diff) -> None:
    bad = [record("sm90", results(n1="FAIL", ms="FAIL"), day=day) for day in (2, 3)]
    code, text, found = diff(*nights("sm90", (1,)), *bad)
    assert code == 1
    assert kinds(found["sm90 hardware"]) == {
        "p4.oracle.n1": ("still failing", True),
        SOFT: ("still failing", False),
    }
    assert "now FAIL hardware: measured 2, allowed 1; it did not pass in run-sm90-2 either" in text


def test_without_a_green_run_the_one_before_is_compared(diff: Diff) -> None:
    bad = [record("sm90", results(n1="FAIL", n2=verdict), day=day) for day, verdict in ((1, "PASS"), (2, "CRASH"))]
    code, text, found = diff(*bad)
    assert (code, found["sm90 hardware"]["runs"][0]["before_is_green"]) == (1, False)
    assert kinds(found["sm90 hardware"]) == {
        "p4.oracle.n1": ("still failing", False),
        "p4.oracle.n2": ("newly failing", True),
    }
    assert "compared with run-sm90-1 of 2026-11-01, as no earlier run is green" in text


@pytest.mark.parametrize(
    ("verdicts", "kind", "worse"),
    [
        ("PASS FAIL PASS", "flaky", False),
        ("PASS FAIL PASS CRASH", "flaky", True),
        ("PASS FAIL FAIL", "still failing", True),
        ("FAIL PASS", "newly passing", False),
        # neither the machine nor a skip says anything about the check
        ("PASS INFRA PASS", None, False),
        ("PASS SKIP FAIL", "newly failing", True),
        ("PASS FAIL SKIP FAIL", "still failing", True),
    ],
)
def test_a_check_is_flaky_if_its_verdict_changed_back_and_forth(
    diff: Diff, verdicts: str, kind: str | None, worse: bool
) -> None:
    runs = [record("sm90", results(n1=verdict), day=day) for day, verdict in enumerate(verdicts.split(), 1)]
    code, _, found = diff(*runs)
    assert code == worse
    assert kinds(found["sm90 hardware"]).get("p4.oracle.n1") == ((kind, worse) if kind else None)


def test_another_version_of_the_subject_is_no_sign_of_a_flaky_check(diff: Diff) -> None:
    runs = [record("sm90", results(n1=verdict), day=day) for day, verdict in ((1, "PASS"), (2, "FAIL"), (3, "PASS"))]
    other = runs[1].subject.model_copy(update={"content_sha256": "a" * 64})
    code, _, found = diff(runs[0], runs[1].model_copy(update={"subject": other}), runs[2])
    assert (code, kinds(found["sm90 hardware"])) == (0, {})


def test_only_recent_runs_show_whether_a_check_is_flaky(diff: Diff) -> None:
    runs = [record("sm90", results(n1="FAIL" if day == 2 else "PASS"), day=day) for day in range(1, 13)]
    code, _, found = diff(*runs)
    assert (code, kinds(found["sm90 hardware"])) == (0, {})


def test_a_check_without_a_result_did_not_run_or_is_gone(diff: Diff) -> None:
    before = [*results(), result("p4.removed.n1", gate="hard")]
    cut = record("sm90", results(left_out=[IDS[3], SOFT]), day=2, state="interrupted")
    code, text, found = diff(record("sm90", before, day=1), cut)
    assert code == 1
    assert kinds(found["sm90 hardware"]) == {
        IDS[3]: ("did not run", True),
        SOFT: ("did not run", False),
        "p4.removed.n1": ("gone", False),
    }
    assert text.index("did not run (2)") < text.index("gone (1)")
    assert "sm90: 1 did not run" in text


def test_a_run_that_has_just_begun_is_not_green(diff: Diff) -> None:
    code, _, found = diff(*nights("sm90", (1,)), *nights("sm90", (2,), state="interrupted"), *nights("sm90", (3,)))
    assert (code, found["sm90 hardware"]["runs"][0]["before"]) == (0, "run-sm90-1")


def test_a_run_with_a_waived_failure_is_not_green_and_is_no_worse(diff: Diff) -> None:
    other = [one for one in results() if one.id != IDS[1]]
    listed = record("sm90", [*other, waived(IDS[1], gate="hard")], day=4)
    code, _, found = diff(*nights("sm90"), listed)
    assert (code, kinds(found["sm90 hardware"])) == (0, {IDS[1]: ("changed", False)})
    code, _, found = diff(record("sm90", results(n1="FAIL"), day=5))
    assert (code, found["sm90 hardware"]["runs"][0]["before"]) == (1, "run-sm90-3")
    assert kinds(found["sm90 hardware"]) == {IDS[1]: ("newly failing", True)}
    only = [result(IDS[0], evidence="simulated", gate="hard")]
    listed = simulated("sm120", [*only, waived(IDS[1], evidence="simulated", gate="hard")])
    code, text, _ = diff(listed, simulated("sm120", only, day=2, run_id="again"))
    assert "run-sm120-simulated of 2026-11-01, as no earlier run is green" in text


def test_a_night_is_one_of_the_same_selection_and_evidence(diff: Diff) -> None:
    later = [record("sm80", results()[:2], day=5, selection="-k n1"), *nights("emulated", (5,))]
    code, text, found = diff(*nights("sm80"), *nights("sm90"), *later)
    assert code == 0
    assert "did not run" not in text
    assert set(found) == {"sm80 hardware", "sm90 hardware", "emulated emulated"}
    # a target that never had a green run may not vanish either
    code, text, _ = diff(record("sm120", results(n1="FAIL"), day=2))
    assert code == 1
    assert "sm120: did not run\n" in text


def test_without_a_record_it_says_so(diff: Diff, tmp_path: Path) -> None:
    (tmp_path / "evidence").mkdir()
    code, text, _ = diff()
    assert code == 3
    assert "there is no run to compare; make one first" in text


def test_two_runs_that_ended_at_once_are_not_hidden_by_a_run_of_a_few_checks(diff: Diff) -> None:
    cut = [record("sm90", [], day=day, state="interrupted") for day in (2, 3)]
    few = record("sm90", results()[:2], day=4, selection="-k n1")
    code, _, found = diff(*nights("sm90", (1,)), *cut, few)
    assert code == 1
    lost = dict.fromkeys(IDS[2:], ("did not run", True)) | {SOFT: ("did not run", False)}
    assert kinds(found["sm90 hardware"], 1) == lost
