"""Known deviations: what ``deviations.toml`` may say, and what changes in a run that has one."""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pytest
from pydantic import ValidationError

from verify.errors import ConfigurationError
from verify.record.deviations import Entry, known, told_after, without_failure
from verify.record.schema import CheckResult, Deviation
from verify.run.runner import exit_code
from verify.subject.deviations import read_deviations
from verify.subject.find import find_subject
from verify.tests.samples import REPOSITORY, checks, result
from verify.tests.tree import Tree, make_tree

LATER = datetime.now(UTC).date() + timedelta(days=30)
WHY = {"reason": "Zeros are NaN.", "issue": "https://example.org/12", "expires": LATER}

_ENTRY = """
[[deviation]]
checks = ["p4.oracle"]
reason = "Zeros are NaN."
issue = "https://example.org/12"
expires = 2027-03-01
"""


def _entry(*names: str, expires: date = LATER) -> Entry:
    return Entry(checks=[*names], **WHY | {"expires": expires})


def _failed(check_id: str, **fields: object) -> CheckResult:
    return result(check_id, "FAIL", **{"deviation": Deviation(**WHY)} | fields)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    (tmp_path / "triattention").mkdir()
    (tmp_path / "triattention" / "__init__.py").touch()
    return tmp_path


def _read(checkout: Path, text: str) -> tuple[Entry, ...]:
    (checkout / "deviations.toml").write_text(text)
    return read_deviations(find_subject(str(checkout), REPOSITORY), REPOSITORY, checks())


def test_entries_name_checks_or_families_and_what_is_known_about_them(checkout: Path) -> None:
    assert read_deviations(find_subject(str(checkout), REPOSITORY), REPOSITORY, checks()) == ()
    first, second = _read(checkout, _ENTRY + _ENTRY.replace("p4.oracle", "p1.bf16.matmul"))
    assert (first.checks, first.reason, first.expires) == (["p4.oracle"], "Zeros are NaN.", date(2027, 3, 1))
    assert [first.covers(name) for name in ("p4.oracle.n1", "p4.oracles.n1", "p1.bf16.matmul")] == [True, False, False]
    assert [second.covers(name) for name in ("p1.bf16.matmul", "p1.bf16.other")] == [True, False]
    assert known([first], "p4.oracle.n1", first.expires) == Deviation(
        reason=first.reason, issue=first.issue, expires=first.expires
    )
    assert known([first], "p4.oracle.n1", first.expires + timedelta(days=1)) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda t: t + "checks", "cannot be read as TOML"),
        (lambda t: t.replace("2027-03-01", "2027-13-01"), "cannot be read as TOML"),
        (lambda t: t.replace("2027-03-01", '"soon"'), r"expires of entry 1 is 'soon'; give a date without quotes"),
        (lambda t: t.replace("2027-03-01", "2027"), "expires of entry 1 is 2027; give a date"),
        (lambda t: t.replace("https://example.org/12", "#12"), "issue of entry 1 is '#12'; give the URL"),
        (lambda t: t.replace("Zeros are NaN.", " "), "reason of entry 1 is ' '; give one sentence"),
        (lambda t: t.replace('["p4.oracle"]', "[]"), r"checks of entry 1 is \[\]; give a list of ids"),
        (lambda t: t.replace('["p4.oracle"]', '"p4.oracle"'), "checks of entry 1 is 'p4.oracle'; give a list"),
        (lambda t: t.replace("reason", "why"), "why of entry 1 is not known|entry 1 has no reason; give one sentence"),
        (lambda t: t + t.replace("issue", "#"), "entry 2 has no issue; give the URL of the issue"),
        (lambda t: t + "by = 'me'", "by of entry 1 is not known; an entry has checks, reason, issue, expires"),
        (lambda t: t.replace("[[deviation]]", "[deviation]"), r"begin each entry with \[\[deviation\]\]"),
        (lambda t: t.replace("[[deviation]]", "[[known]]"), r"known is not known; an entry begins with \[\[deviation"),
        (
            lambda t: t.replace("p4.oracle", "p4.oracle.*"),
            r"'p4.oracle.\*' in entry 1 is not .*; the nearest is 'p4.ora",
        ),
    ],
)
def test_each_mistake_is_one_sentence(checkout: Path, change: Callable[[str], str], told: str) -> None:
    with pytest.raises(ConfigurationError, match=told) as raised:
        _read(checkout, change(_ENTRY))
    assert str(raised.value).startswith(f"{checkout / 'deviations.toml'}")


@pytest.mark.parametrize(
    "form",
    [
        lambda text: codecs.BOM_UTF8 + text.encode(),
        lambda text: text.encode("utf-16"),
        lambda text: text.encode("utf-32"),
        lambda text: text.replace("\n", "\r\n").encode(),
        lambda text: text.replace("\n", "\r").encode(),
        lambda text: text.rstrip().encode(),
    ],
    ids=["UTF-8 with a mark", "UTF-16", "UTF-32", "Windows", "old Mac", "no last line end"],
)
def test_a_file_that_another_editor_saved_says_the_same(checkout: Path, form: Callable[[str], bytes]) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    (checkout / "deviations.toml").write_bytes(form(_ENTRY.replace("Zeros", "Zéros")))
    (entry,) = read_deviations(subject, REPOSITORY, checks())
    assert (entry.reason, entry.expires) == ("Zéros are NaN.", date(2027, 3, 1))


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (_ENTRY.encode() + b"# caf\xe9", r"TOML \(line 7 is not UTF-8; save it as UTF-8\); repair it"),
        (_ENTRY.encode("utf-16-le"), r"TOML \(line 2 has a NUL character; save it as UTF-8\)"),
        (_ENTRY.encode() + b"by = " + b"[" * 9999, r"TOML \(nested too deeply\)"),
        (_ENTRY.encode() + b"by = " + b"9" * 5000, r"TOML \(Exceeds the limit"),
        (_ENTRY.encode() + b"expires = 2028-03-01\n", r"TOML \(Cannot overwrite a value \(at line 7"),
        (_ENTRY.encode().replace(b"2027-03-01", b"9" * 400), r"expires of entry 1 is 9+\.\.\.9+; give a date without"),
        (_ENTRY.encode().replace(b"2027-03-01", b"2027-03-01T12:30:00"), r"entry 1 is datetime.*; give a date"),
    ],
)  # fmt: skip
def test_a_file_with_two_meanings_is_one_short_sentence(checkout: Path, data: bytes, told: str) -> None:
    (checkout / "deviations.toml").write_bytes(data)
    with pytest.raises(ConfigurationError, match=told) as raised:
        read_deviations(find_subject(str(checkout), REPOSITORY), REPOSITORY, checks())
    assert len(str(raised.value)) < 400


def test_the_bundled_subject_may_have_none(checkout: Path) -> None:
    (checkout / "deviations.toml").write_text(_ENTRY)
    for name in ("bundled", str(checkout)):
        with pytest.raises(
            ConfigurationError, match="the bundled subject may have no known deviation; delete the file"
        ):
            read_deviations(find_subject(name, checkout), checkout, checks())


@pytest.mark.parametrize("verdict", ["PASS", "CRASH", "ABSENT", "SKIP"])
def test_only_a_failure_can_be_known(verdict: str) -> None:
    with pytest.raises(ValidationError, match="only a FAIL can be a known deviation"):
        result("p4.oracle.n1", verdict, deviation=Deviation(**WHY))


def test_a_known_failure_decides_no_exit_code_and_hides_no_other() -> None:
    own, soft = _failed("p4.oracle.n1", gate="hard"), _failed("p8.kernel.ms")
    assert exit_code([own, soft], strict_soft=True) == 0
    assert exit_code([own, result("p4.oracle.n33", "BLOCKED", by=own.id)]) == 0
    assert exit_code([own, result("p4.oracle.n33", "FAIL")]) == 1
    assert exit_code([own, result("p4.oracle.n33", "ABSENT")]) == 1
    assert exit_code([own, result("p8.kernel.ms", "FAIL")], strict_soft=True) == 4
    assert exit_code([own, result("p8.kernel.ms", "INFRA")]) == 3


def test_the_last_sentence_never_sounds_like_a_pass() -> None:
    own, other = _failed("p4.oracle.n1"), result("p8.kernel.ms", "FAIL")
    blocked = result("p4.oracle.n33", "BLOCKED", by=own.id)
    assert told_after([other], alone=True) == ""
    assert told_after([own], alone=True) == "1 failure, a known deviation (p4.oracle.n1); nothing else failed"
    assert told_after([own, blocked], alone=False).endswith(
        "(p4.oracle.n1); 1 more did not run because of them; the run fails for another reason"
    )
    assert told_after([own, other], alone=True) == (
        "2 failures, 1 of them a known deviation (p4.oracle.n1); the others are warnings"
    )
    assert told_after([own, other], alone=False).endswith("; the other one counts")


def test_an_entry_of_which_everything_ran_and_nothing_failed_is_told() -> None:
    fine = [result("p4.oracle.n1"), result("p4.oracle.n33", "REFUSED")]
    (told,) = without_failure([_entry("p4.oracle")], fine, checks())
    assert told == (
        "the known deviation p4.oracle matches nothing, because none of its 2 checks failed; "
        "remove it from deviations.toml"
    )
    assert without_failure([_entry("p4.oracle")], fine[:1], checks()) == []
    assert without_failure([_entry("p4.oracle")], [fine[0], _failed("p4.oracle.n33")], checks()) == []
    assert without_failure([_entry("p4.oracle")], [fine[0], result("p4.oracle.n33", "SKIP")], checks()) == []


_PHASE = """
@check("p1.zeros", gate="hard", cases={"score": 2.0, "rank": 0.5}, **WORDS)
def test_zeros(case, measure, subject): measure("error", case, 1.5)

@check("p1.fine", gate="hard", cases="one", **WORDS)
def test_fine(case, subject): pass

@check("p1.after", gate="hard", cases="one", needs=("p1.zeros",), **WORDS)
def test_after(case): pass
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    tree.write_phase(1, _PHASE)
    theirs = tree.root / "theirs" / "triattention"
    theirs.mkdir(parents=True)
    (theirs / "__init__.py").write_text('__version__ = "3"\n')
    return tree


def _run(tree: Tree, *names: str, expires: date = LATER, verb: str = "run") -> tuple[int, str]:
    text = f'[[deviation]]\nchecks = {json.dumps(names)}\nreason = "{WHY["reason"]}"\nissue = "{WHY["issue"]}"\n'
    (tree.root / "theirs" / "deviations.toml").write_text(f"{text}expires = {expires}\n")
    options = ["--device=cpu", "--subject=theirs"]
    done = tree.verify("run", *options) if verb == "run" else tree.pytest("phases", *options)
    return done.returncode, " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("verb", ["run", "pytest"])
def test_a_run_with_a_known_deviation_ends_with_0_and_a_record_of_the_failure(tree: Tree, verb: str) -> None:
    code, told = _run(tree, "p1.zeros.score", verb=verb)
    assert code == 0, told
    assert "1 failure, a known deviation (p1.zeros.score); 1 more did not run because of them; nothing else" in told
    assert "EMULATED FAIL 1 of 4 must-pass checks failed" in told
    assert "known deviation: Zeros are NaN. (https://example.org/12, until" in told
    record = tree.records()[-1]
    assert {one.id: (one.verdict, one.deviation is not None) for one in record.results} == {
        "p1.zeros.score": ("FAIL", True), "p1.zeros.rank": ("PASS", False), "p1.fine.one": ("PASS", False),
        "p1.after.one": ("BLOCKED", False),
    }  # fmt: skip
    assert [one.checks for one in record.findings] == [["p1.zeros.score"]]
    assert "deviation" not in tree.verify("check", record.run_id).stdout


@pytest.mark.parametrize(
    ("names", "expires", "code", "told"),
    [
        (["p1.zeros", "p1.fine"], date(2026, 5, 1), 1, "expired on 2026-05-01, so its failures count; fix them, or"),
        (["p1.fine"], LATER, 1, "the known deviation p1.fine matches nothing, because its check did not fail; remove"),
        (["p1.zero"], LATER, 3, "'p1.zero' in entry 1 is not a check or a family; the nearest is 'p1.zeros'"),
    ],
)
def test_an_entry_that_is_wrong_turns_the_run_red(
    tree: Tree, names: list[str], expires: date, code: int, told: str
) -> None:
    found, said = _run(tree, *names, expires=expires)
    assert (found, told in said) == (code, True), said


@pytest.mark.parametrize(("verb", "code"), [("run", 3), ("pytest", 4)])
def test_an_entry_that_matches_nothing_is_enough_to_end_red(tmp_path: Path, verb: str, code: int) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _PHASE.replace("2.0", "1.0"))
    (tmp_path / "theirs").mkdir()
    (tmp_path / "triattention").rename(tmp_path / "theirs" / "triattention")
    (tmp_path / "triattention").mkdir()
    (tmp_path / "triattention" / "__init__.py").touch()
    found, said = _run(tree, "p1.zeros", verb=verb)
    assert (found, "because none of its 2 checks failed" in said) == (code, True), said
