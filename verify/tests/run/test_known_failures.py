"""Known failures: what ``ci/known_failures.toml`` may say, and what changes in a run that has one."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from verify.architectures import find
from verify.checks import catalogue
from verify.errors import ConfigurationError
from verify.record.known_failures import FILE, Condition, KnownFailure, applying, outdated, told_waived, waiver
from verify.record.schema import Verdict
from verify.run import simulate
from verify.run.conclusion import concluded
from verify.run.runner import exit_code
from verify.subject.known_failures import read_known_failures
from verify.tests.samples import REPOSITORY, checks, known_failure, record, result, simulated, waived
from verify.tests.tree import Tree, make_tree

DAY = timedelta(days=1)
TODAY = datetime.now(UTC).date()
LATER = TODAY + 30 * DAY
ISSUE = "https://example.org/12"

_ENTRY = f"""
[[known_failure]]
checks = ["p4.oracle"]
when = {{ sm = [120], triton = ">=3.8,<3.9" }}
reason = "Zeros are NaN."
issue = "{ISSUE}"
owner = "@me"
added = {TODAY}
expires = {LATER}
probe = "python -m verify run --phases 4"
"""


def read(root: Path, text: str, source: str = "bundled") -> tuple[KnownFailure, ...]:
    (root / FILE).parent.mkdir(exist_ok=True)
    (root / FILE).write_text(text)
    return read_known_failures(source, root, checks())


def test_the_list_of_this_repository_can_be_used_and_its_example_too(tmp_path: Path) -> None:
    read_known_failures("bundled", REPOSITORY, catalogue())
    lines = (REPOSITORY / FILE).read_text().splitlines()
    example = [line.removeprefix("# ") for line in lines[lines.index("# [[known_failure]]") :]]
    (found,) = read(tmp_path, "\n".join(example[: example.index("#")]).replace("p4.repeat.*", "p4.oracle.*"))
    assert found.expires - found.added == 62 * DAY


def test_an_entry_names_ids_families_or_patterns_and_another_subject_has_none(tmp_path: Path) -> None:
    assert read_known_failures("bundled", tmp_path, checks()) == ()
    (found,) = read(tmp_path, _ENTRY)
    assert [found.covers(name) for name in ("p4.oracle.n1", "p4.oracles.n1")] == [True, False]
    (found,) = read(tmp_path, _ENTRY.replace("p4.oracle", "p4.oracle.n3*"))
    assert [found.covers(name) for name in ("p4.oracle.n33", "p4.oracle.n1")] == [True, False]
    assert (found.when.sm, found.when.triton, found.expires) == ([120], ">=3.8,<3.9", LATER)
    assert len(read(tmp_path, _ENTRY + _ENTRY.replace("[120]", "[121]"))) == 2
    assert read(tmp_path, _ENTRY, "checkout:theirs") == ()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t + "checks", "cannot be read as TOML"),
        (lambda t: t.replace("[[known_failure]]", "[[deviation]]"), r"an entry begins with \[\[known_failure\]\]"),
        (
            lambda t: t.replace("owner", "who"),
            "entry 1 has no owner; give who fixes it|who of entry 1 is not known; an",
        ),
        (lambda t: t.replace("@me", "me"), "owner of entry 1 is 'me'; give who fixes it, such as '@name'"),
        (lambda t: t.replace("python -m verify run --phases 4", " "), "probe of entry 1 is ' '; give the command"),
        (lambda t: t.replace("sm = [", "gpu = ["), "when.gpu of entry 1 is not known; when has sm, driver, cuda, trit"),
        (lambda t: t.replace("[120]", "120"), r"when.sm of entry 1 is 120; give a list of SM numbers"),
        (lambda t: t.replace("[120]", "[true]"), r"when.sm of entry 1 is True; give a list of SM numbers"),
        (lambda t: t.replace("[120]", "[]"), r"when.sm of entry 1 is \[\]; give a list of SM numbers"),
        (lambda t: t.replace("[120]", "[121, 122]"), "when.sm of entry 1 has 122; use 80, 86, "),
        (lambda t: t.replace(">=3.8,<3.9", "new"), "when.triton of entry 1 is 'new'; give a version specifier such as"),
        (lambda t: t.replace(">=3.8,<3.9", ""), "when.triton of entry 1 is ''; give a version specifier such as"),
        (lambda t: t.replace('{ sm = [120], triton = ">=3.8,<3.9" }', "120"), "when of entry 1 is 120; give a table"),
        (
            lambda t: t.replace("p4.oracle", "p4.oracle.m*"),
            r"'p4.oracle.m\*' in entry 1 matches no .* is 'p4.oracle'",
        ),
        (
            lambda t: t.replace(f"{LATER}", f"{TODAY - DAY}"),
            f"expires of entry 1 is {TODAY - DAY}; give a day from {TODAY} to {TODAY + 90 * DAY}",
        ),
        (lambda t: t.replace(f"{LATER}", f"{TODAY + 91 * DAY}"), "which is 90 days after it was added"),
        (
            lambda t: t.replace(f"added = {TODAY}", f"added = {LATER}"),
            f"added of entry 1 is {LATER}, which is in the future; give the day on which it was added",
        ),
        (
            lambda t: t + t.replace("[120]", "[90, 120]").replace("p4.oracle", "p4.*.n1"),
            "entries 1 and 2 both match p4.oracle.n1 on the same target; narrow one of them",
        ),
        (
            lambda t: t + t.replace("sm = [120], ", "").replace("3.8", "3.0"),
            "entries 1 and 2 both match p4.oracle.n1 on the same target",
        ),
    ],
)
def test_each_mistake_is_one_sentence(tmp_path: Path, change: Callable[[str], str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as raised:
        read(tmp_path, change(_ENTRY))
    assert str(raised.value).startswith(f"{tmp_path / FILE}")


def test_a_condition_is_about_the_target_the_versions_and_the_model() -> None:
    card, none = record("sm120", []).environment, record("emulated", []).environment
    assert Condition().holds("emulated", none, "embedded")
    for when, holds in (
        ({"sm": [120, 121]}, True), ({"sm": [90]}, False),
        ({"triton": ">=3.7,<3.8"}, True), ({"triton": "<3.7"}, False),
        ({"torch": "==2.13.*", "cuda": ">=13"}, True), ({"torch": "==2.13.*", "cuda": ">=13.1"}, False),
        ({"driver": ">=580"}, True), ({"model": "embedded"}, True), ({"model": "other"}, False),
    ):  # fmt: skip
        assert Condition(**when).holds("sm120", card, "embedded") is holds, when
    assert not Condition(sm=[120]).holds("emulated", none, "embedded")
    assert not Condition(driver=">=1").holds("emulated", none, "embedded")
    local = card.model_copy(update={"torch": "2.13.0+cu130", "triton": "3.8.0.dev1", "cuda_runtime": "not installed"})
    assert Condition(torch="==2.13.0", triton=">=3.8").holds("sm120", local, "embedded")
    assert not Condition(triton="<3.8").holds("sm120", local, "embedded")
    assert not Condition(cuda=">=1").holds("sm120", local, "embedded")


@pytest.mark.parametrize("verdict", [one for one in Verdict if one is not Verdict.WAIVED])
def test_only_a_failure_of_the_subject_is_waived_and_only_until_its_last_day(verdict: Verdict) -> None:
    found = waiver([known_failure("p4.oracle")], "p4.oracle.n1", verdict, LATER)
    if verdict not in (Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT):
        assert found is None
        return
    assert str(found) == f"{verdict}, waived by @owner until {LATER}: Zeros are NaN. ({ISSUE})"
    assert waiver([known_failure("p4.oracle")], "p4.oracle.n1", verdict, LATER + DAY) is None
    assert waiver([known_failure("p4.triton_pytorch")], "p4.oracle.n1", verdict, LATER) is None


def test_a_waived_failure_decides_no_exit_code_and_hides_no_other() -> None:
    own, soft = waived("p4.oracle.n1", gate="hard"), waived("p8.kernel.ms")
    assert exit_code([own, soft], strict_soft=True) == 0
    assert exit_code([own, result("p4.oracle.n33", "BLOCKED", by=own.id)]) == 0
    assert exit_code([own, result("p4.oracle.n33", "FAIL")]) == 1
    assert exit_code([own, result("p8.kernel.ms", "FAIL")], strict_soft=True) == 4
    assert exit_code([own, result("p8.kernel.ms", "INFRA")]) == 3


def test_the_last_sentence_names_every_waived_check_with_its_issue_and_its_day() -> None:
    own = [waived(f"p4.oracle.n{number}") for number in range(8)]
    blocked, soft = result("p4.oracle.n33", "BLOCKED", by=own[0].id), result("p8.kernel.ms", "FAIL")
    why = f"FAIL, {ISSUE}, @owner, until 2027-01-31"
    assert told_waived([soft], alone=True) == ""
    assert told_waived([own[0]], alone=True) == f"1 failure is waived: p4.oracle.n0 ({why}); nothing else failed"
    told = told_waived([*own, blocked, soft], alone=True)
    assert told.startswith("8 failures are waived: p4.oracle.n0, p4.oracle.n1, ")
    assert told.endswith(f"n7 ({why}); 1 more did not run because of them; the other failures are warnings")
    assert told_waived([own[0], soft], alone=False).endswith("the run fails for another reason")


def test_an_entry_that_has_expired_or_whose_check_passes_must_be_changed() -> None:
    fine, bad = result("p4.oracle.n1"), waived("p4.oracle.n33")
    listed = [known_failure("p4.oracle")]
    (told,) = outdated(listed, [fine, bad], TODAY, on_target=True)
    assert told == (
        f"p4.oracle.n1 passed, but the known failure p4.oracle ({ISSUE}) has it; narrow it in {FILE}. "
        "Its probe: make probe"
    )
    (told,) = outdated(listed, [fine], TODAY, on_target=True)
    assert f"has it; remove it from {FILE}" in told
    (told,) = outdated(listed, [fine, bad], LATER + DAY, on_target=True)
    assert (
        told == f"the known failure p4.oracle ({ISSUE}) expired on {LATER}; remove it from {FILE}, or give a later date"
    )
    assert [*outdated(listed, [fine], TODAY, on_target=False)] == []  # a simulated pass proves nothing
    assert [*outdated(listed, [bad, result("p4.oracle.n1", "SKIP")], TODAY, on_target=True)] == []


_PHASE = """
@check("p1.zeros", gate="hard", cases={"score": 2.0, "rank": 0.5}, **WORDS)
def test_zeros(case, measure, subject): measure("error", case, 1.5)

@check("p1.after", gate="hard", cases="one", needs=("p1.zeros",), **WORDS)
def test_after(case): pass

@check("p1.slow", gate="soft", cases="one", timeout_s=0.3, **WORDS)
def test_slow(case): time.sleep(30)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    tree.write_phase(1, _PHASE)
    tree.write_phase(2, '@check("p2.dies", gate="soft", cases="one", **WORDS)\ndef test_dies(case): os.abort()\n')
    return tree


def _listed(*names: str, expires: date = LATER) -> str:
    text = _ENTRY.replace('when = { sm = [120], triton = ">=3.8,<3.9" }\n', "").replace(
        '"p4.oracle"', f"{[*names]}"[1:-1]
    )
    return text.replace(f"added = {TODAY}", f"added = {min(TODAY, expires)}").replace(f"= {LATER}", f"= {expires}")


def _run(tree: Tree, text: str, *words: str) -> tuple[int, str]:
    (tree.root / FILE).parent.mkdir(exist_ok=True)
    (tree.root / FILE).write_text(text)
    run = tree.verify if words[0] == "run" else tree.pytest
    done = run(*words)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


def test_a_run_with_nothing_but_known_failures_ends_with_0_and_a_record_that_says_so(tree: Tree) -> None:
    text = _listed("p1.zeros.s*", "p2.dies") + _listed("p1.slow").replace("/12", "/13")
    code, told = _run(tree, text, "run", "--device=cpu")
    assert code == 0, told
    assert f"3 failures are waived: p1.zeros.score (FAIL, {ISSUE}, @me, until {LATER}); p1.slow.one (TIMEOUT, " in told
    assert f"p2.dies.one (CRASH, {ISSUE}, @me, until {LATER}); 1 more did not run because of them; nothing else" in told
    assert "WAIVED p1.zeros.score: phases/p1_tiny.py" in told
    assert "(waived: p1.zeros.score)" in told
    made = tree.records()[-1]
    assert {one.id: (str(one.verdict), one.waiver and str(one.waiver.verdict)) for one in made.results} == {
        "p1.zeros.score": ("WAIVED", "FAIL"), "p1.zeros.rank": ("PASS", None), "p1.after.one": ("BLOCKED", None),
        "p1.slow.one": ("WAIVED", "TIMEOUT"), "p2.dies.one": ("WAIVED", "CRASH"),
    }  # fmt: skip
    own = made.results[0]
    assert (own.message[:30], own.measurements[0].measured) == ("phases/p1_tiny.py:11: error: m"[:30], 2.0)
    assert made.findings == []
    assert "waive" not in tree.verify("check", made.run_id).stdout.lower()
    # what was known when the run began is known when it is resumed
    code, told = _run(tree, "", "run", f"--resume={made.run_id}")
    assert (code, "3 failures are waived" in told) == (0, True), told


def test_pytest_shows_a_waived_failure_as_an_expected_one(tree: Tree) -> None:
    code, told = _run(tree, _listed("p1.zeros.score", "p1.slow"), "phases", "--device=cpu", "--phase=1", "-rx")
    assert (code, "1 passed, 1 skipped, 1 deselected, 2 xfailed" in told) == (0, True), told
    assert f"- FAIL, waived by @me until {LATER}: Zeros are NaN. ({ISSUE})" in told
    assert {str(one.verdict) for one in tree.results().values()} == {"WAIVED", "PASS", "BLOCKED"}


def test_pytest_ends_red_if_only_an_entry_must_be_changed(tree: Tree) -> None:
    old = _listed("p1.after", expires=date(2026, 5, 1)).replace("2027", "2026")
    words = ("phases", "--device=cpu", "-k", "zeros and rank or after")
    code, told = _run(tree, _listed("p1.zeros") + old, *words)
    assert code == 4, told
    assert f"p1.zeros.rank passed, but the known failure p1.zeros ({ISSUE}) has it; remove it from {FILE}." in told
    assert told.count("expired on 2026-05-01, so its failures count; fix them, or give a later date") == 1
    assert f"nothing failed, but the run cannot end with 0 until {FILE} is changed" in told


def test_a_mistake_is_refused_before_anything_runs(tree: Tree) -> None:
    before = len(tree.records())
    for words, code in ((("run", "--device=cpu"), 3), (("phases", "--device=cpu"), 4)):
        found, told = _run(tree, _listed("p1.zero.*"), *words)
        assert (found, "'p1.zero.*' in entry 1 matches no check; the nearest is 'p1.zeros" in told) == (code, True), (
            told
        )
    assert len(tree.records()) == before


@pytest.mark.parametrize(
    ("results", "expires", "code", "ends"),
    [
        ([result("p4.oracle.n1"), waived("p4.oracle.n33")], LATER, 0, 3),
        ([result("p4.oracle.n1"), waived("p4.oracle.n33")], LATER, 1, 1),
        ([result("p4.oracle.n1"), waived("p4.oracle.n33")], LATER, 4, 4),
        ([result("p4.oracle.n1", "SKIP"), waived("p4.oracle.n33")], LATER, 0, 0),
        ([result("p4.oracle.n1", "SKIP")], TODAY - DAY, 0, 3),
        ([result("p4.oracle.n1", "FAIL")], TODAY - DAY, 1, 1),
    ],
)
def test_an_entry_that_must_be_changed_decides_the_exit_code_only_where_nothing_failed(
    results: list, expires: date, code: int, ends: int
) -> None:
    manifest = SimpleNamespace(deviations=(), known_failures=(known_failure("p4.oracle", expires=expires),), day=TODAY)
    assert concluded(record("sm120", results), manifest, code)[0] == ends


def test_what_has_no_check_in_a_run_or_another_target_does_not_concern_it(tmp_path: Path) -> None:
    surroundings = record("sm120", []).environment
    listed = [
        known_failure("p4.oracle"),
        known_failure("p4.*.mean"),
        known_failure("p1.bf16", when={"sm": [90]}),
        known_failure("p1.nvcc", when={"sm": [120]}),
    ]
    found = applying(listed, ["p4.oracle.n1", "p1.bf16.matmul", "p1.nvcc.version"], "sm120", surroundings, "embedded")
    assert [one.checks for one in found] == [["p4.oracle"], ["p1.nvcc"]]


def test_a_simulation_names_what_is_waived_and_ends_with_0(capsys: pytest.CaptureFixture[str]) -> None:
    made = simulated(
        "sm120", [waived("p4.oracle.n1", evidence="simulated"), result("p4.oracle.n33", "ABSENT", "simulated")]
    )
    assert simulate._conclude([simulate.Ended(find(120), 0, made)], Console(width=200, highlight=False)) == 0
    told = capsys.readouterr().out
    assert "sm120 WAIVED p4.oracle.n1: measured 2, allowed 1\nsm120: 1 ABSENT, 1 WAIVED with 400 launches" in told
