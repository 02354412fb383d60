"""What GitHub shows of a report: an annotation for each finding, at its line if it is known, and a summary."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from verify import cli
from verify.record.schema import CheckResult, Record
from verify.report import workflow
from verify.tests import samples
from verify.tests.samples import REPOSITORY, known, passing, record, result, simulated, waived, write

#: How GitHub's runner reads a workflow command: properties without the signs that end them, then the message.
_COMMAND = re.compile(r"^::(error|warning|notice) ((?:\w+=[^,:]*)(?:,\w+=[^,:]*)*)::(.*)$")

Annotation = tuple[str, dict[str, str], str]


@pytest.fixture(autouse=True)
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("record.verdict", "report.verb"):
        monkeypatch.setattr(f"verify.{module}.catalogue", samples.checks)
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)


def read(text: str) -> list[Annotation]:
    """The annotations that a runner would see in an output; every line must be one."""
    found = []
    for line in text.splitlines():
        command = _COMMAND.match(line)
        assert command is not None, line
        level, properties, message = command.groups()
        named = dict(one.split("=", 1) for one in properties.split(","))
        found.append((level, {name: _plain(value) for name, value in named.items()}, _plain(message)))
    return found


def _plain(words: str) -> str:
    for sign in ":,\r\n%":
        words = words.replace(f"%{ord(sign):02X}", sign)
    return words


def annotated(
    folder: Path, capsys: pytest.CaptureFixture[str], made: Record, gpu: str | None = "sm120"
) -> list[Annotation]:
    path = write(made, folder, "evidence")
    more = ["--gpu", gpu] if gpu else []
    assert cli.main(["report", "--format", "github", "--records", str(path.parent), *more]) == 0
    return read(capsys.readouterr().out)


def test_an_annotation_is_one_line_whatever_it_says() -> None:
    assert (
        workflow.annotation("error", "sm90: a, b", "100%\r\nwrong::x", file="a,b.py", line="7")
        == "::error file=a%2Cb.py,line=7,title=sm90%3A a%2C b::100%25%0D%0Awrong::x"
    )
    (found,) = read(workflow.annotation("error", "sm90: a, b", "100%\nwrong::x"))
    assert found == ("error", {"title": "sm90: a, b"}, "100%\nwrong::x")


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([result("p1.bf16.matmul", "FAIL"), *passing()[1:]], [("error", "sm120: p1.bf16 FAIL")]),
        ([result("p1.bf16.matmul", "CRASH"), *passing()[1:]], [("error", "sm120: p1.bf16 CRASH")]),
        ([*passing(), result("p8.kernel.ms", "FAIL")], [("warning", "sm120: p8.kernel FAIL")]),
        ([known("p1.bf16.matmul"), *passing()[1:]], [("notice", "sm120: p1.bf16 FAIL")]),
        ([waived("p1.bf16.matmul"), *passing()[1:]], [("notice", "sm120: p1.bf16 WAIVED")]),
        (passing()[1:], [("warning", "sm120: INCOMPLETE")]),
        ([result("p1.bf16.matmul", "ABSENT"), *passing()[1:]], [("error", "sm120: INCOMPLETE")]),
        (passing(), []),
    ],
    ids=["hard", "crash", "soft", "known", "waived", "missing", "absent", "verified"],
)
def test_a_failure_has_the_level_of_its_gate(
    results: Sequence[CheckResult],
    expected: list[tuple[str, str]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    *found, last = annotated(tmp_path, capsys, record("sm120", results))
    assert [(level, named["title"]) for level, named, _ in found] == expected
    assert last[:2] == ("notice", {"title": "TriAttention"})


def test_a_finding_is_one_annotation_with_its_checks_and_how_to_repeat_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = [result(name, "FAIL", cause="the sign is wrong") for name in samples.HARD if name.startswith("p4.")]
    (first, _) = annotated(tmp_path, capsys, record("sm120", [*passing()[:2], *failed]))
    assert first[0] == "error"
    lines = first[2].splitlines()
    assert lines[0] == "the sign is wrong"
    assert lines[-2] == f"checks: {', '.join(one.id for one in failed)}"
    assert lines[-1] == f"repeat: {failed[0].repeat}"


def test_what_was_simulated_is_named_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = simulated("sm120", [result("p4.oracle.n1", "FAIL", evidence="simulated")])
    # nothing ran on it, so what did not run there is no error
    (first, last) = annotated(tmp_path, capsys, made)
    assert (first[0], first[1]["title"]) == ("error", "sm120 simulated: p4.oracle FAIL")
    assert last[0] == "notice"


@pytest.mark.parametrize(
    ("source", "cause", "place"),
    [
        ("bundled", "", {"file": "phases/p4_x.py", "line": "12"}),
        ("bundled", "TypeError at triattention/scoring.py:7", {"file": "triattention/scoring.py", "line": "7"}),
        ("checkout:theirs", "TypeError at theirs/scoring.py:7", {"file": "theirs/scoring.py", "line": "7"}),
        ("checkout:theirs", "", {}),
    ],
)
def test_the_line_is_one_of_the_subjects_repository(
    source: str, cause: str, place: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = result("p4.oracle.n1", "FAIL", cause=cause, message="phases/p4_x.py:12: measured 2, allowed 1")
    made = record("sm120", [failed, *passing()[:2]])
    made = made.model_copy(update={"subject": made.subject.model_copy(update={"source": source, "profile": "full"})})
    first = annotated(tmp_path, capsys, made)[0]
    assert {name: value for name, value in first[1].items() if name != "title"} == place


def test_all_targets_are_told_and_those_without_records_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(record("sm90", [result("p1.bf16.matmul", "FAIL"), *passing()[1:]]), tmp_path, "evidence")
    *found, last = annotated(tmp_path, capsys, record("sm120", [*passing(), result("p8.kernel.ms", "FAIL")]), gpu=None)
    assert [(level, named["title"]) for level, named, _ in found] == [
        ("error", "sm90: p1.bf16 FAIL"),
        ("warning", "sm120: p8.kernel FAIL"),
    ]
    assert last[2].startswith("1 of 12 GPUs verified on hardware (sm120)")


def test_the_summary_of_a_step_is_appended_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tmp_path / "summary.md"
    place.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(place))
    annotated(tmp_path, capsys, record("sm120", passing()))
    assert place.read_text().startswith("before\n# sm120: VERIFIED\n")
    annotated(tmp_path, capsys, record("sm120", passing()), gpu=None)
    assert "| target | products | verdict |" in place.read_text()


def test_a_summary_that_github_would_refuse_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "summary.md"))
    assert workflow.summarise("é" * 2**20)
    content = (tmp_path / "summary.md").read_bytes()
    assert len(content) <= 2**20
    assert content.decode().endswith("more than 1 MiB.\n")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--out", "file"], "--out file needs another format than github"),
        (["--rehearsal"], "--format github is read as evidence, and a rehearsal is none"),
    ],
)
def test_what_it_cannot_do_is_said(more: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["report", "--format", "github", *more]) == 3
    assert told in capsys.readouterr().err


def test_the_jobs_before_the_set_up_need_the_standard_library_only() -> None:
    program = "import ci.nightly.alert, ci.nightly.plan, ci.nightly.watch, ci.nightly.waivers"
    command = [sys.executable, "-S", "-c", program]
    child = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert child.returncode == 0, child.stderr
