from __future__ import annotations

import math

import pytest

from verify.architectures import EMULATED, find
from verify.record.headroom import tightest
from verify.record.schema import Measurement, Record
from verify.record.verdict import assess
from verify.report.matrix import bound, grid, headroom, mark, rows, told
from verify.tests.samples import checks, compiled, known, measured, record, result, simulated, waived


def row_of(family: str, *results):
    cells = assess(find(120), [record("sm120", results)], checks()).cells
    return next(row for row in rows(cells) if row.spec.family == family)


def test_phases_ascend_and_the_plan_table_stands_first_in_each() -> None:
    families = [row.spec.family for row in rows(assess(find(120), [], checks()).cells)]
    assert families == ["p1.torch_sees", "p1.bf16", "p1.nvcc", "p4.triton_pytorch", "p4.oracle", "p8.kernel"]


@pytest.mark.parametrize(
    ("results", "words"),
    [
        ([], "NOT RUN 2"),
        ([result("p4.oracle.n1"), result("p4.oracle.n33")], "PASS 2"),
        ([result("p4.oracle.n1")], "NOT RUN 1/2"),
        ([result("p4.oracle.n1"), result("p4.oracle.n33", "FAIL")], "FAIL 1/2"),
        ([result("p4.oracle.n1", "CRASH"), result("p4.oracle.n33", "FAIL")], "CRASH 1/2"),
        ([result("p4.oracle.n1"), result("p4.oracle.n33", "SKIP", code="VRAM")], "SKIP VRAM 1/2"),
        ([result("p4.oracle.n1", "BLOCKED"), result("p4.oracle.n33", "BLOCKED")], "BLOCKED by p1.bf16.matmul 2"),
    ],
)
def test_a_family_shows_its_worst_verdict_and_how_many_have_it(results: list, words: str) -> None:
    assert row_of("p4.oracle", *results).verdict == words


def test_a_family_of_one_is_not_counted() -> None:
    assert row_of("p1.bf16", result("p1.bf16.matmul")).verdict == "PASS"


def test_a_row_shows_its_tightest_number() -> None:
    loose, tight = measured(1e-7, 1e-5), measured(3e-6, 1e-5)
    row = row_of("p4.oracle", result("p4.oracle.n1", measurements=loose), result("p4.oracle.n33", measurements=tight))
    assert (bound(row.tightest), headroom(row.tightest)) == ("3.0e-06 / 1.0e-05", "3.3x")


def test_not_a_number_is_the_tightest_of_all() -> None:
    nan = result("p4.oracle.n1", "FAIL", measurements=measured(math.nan, 1.0))
    row = row_of("p4.oracle", nan, result("p4.oracle.n33", measurements=measured(0.9, 1.0)))
    assert (bound(row.tightest), headroom(row.tightest)) == ("nan / 1", "nan")


def test_what_is_met_by_design_hides_no_headroom_and_no_failure() -> None:
    by_design = [*measured(-21564987, 1e-9), *measured(0, 0), *measured(5, math.inf)]
    tight, wrong, exceeded = measured(0.5, 1), measured(2, 1), measured(3, 0)
    assert [tightest([*by_design, *tight])] == tight
    assert [tightest([*by_design, *tight, *wrong])] == wrong
    assert [tightest([*by_design, *tight, *exceeded])] == exceeded
    assert tightest([]) is None


def test_a_bound_that_a_correct_result_may_need_all_of_has_no_headroom() -> None:
    one = Measurement(name="error", measured=0.98, allowed=1, by_design=True)
    other = Measurement(name="error", measured=0.1, allowed=1)
    assert (headroom(one), headroom(other), tightest([one, other])) == ("-", "10.0x", other)
    # outside the bound it is as red as any other
    outside = Measurement(name="error", measured=2, allowed=1, by_design=True)
    assert (headroom(outside), tightest([outside, other])) == ("0.5x", outside)


def test_a_number_without_a_limit_is_told_without_one() -> None:
    free = Measurement(name="ties", measured=5, allowed=math.inf, unit="tokens", where="head 3")
    assert told(free) == "ties: measured 5 tokens, no limit at head 3"
    assert told(measured(0.5, 1)[0]) == "error: measured 0.5, allowed 1"


@pytest.mark.parametrize(
    ("value", "allowed", "unit", "shown", "room"),
    [
        (0.0, 0.0, "", "0 / 0", "-"),
        (0.0, 1e-6, "", "0 / 1.0e-06", "-"),
        (3, 0, "tokens", "3 / 0 tokens", "-"),
        (0.0, math.inf, "", "0 / any", "-"),
        (12, math.inf, "ties", "12 / any ties", "-"),
        (-0.5, 0.25, "", "-0.5 / 0.25", "-"),
        (math.inf, math.inf, "", "infinity / any", "-"),
        (3, 128, "tokens", "3 / 128 tokens", "42.7x"),
        (1.5, 20.0, "ms", "1.5 / 20 ms", "13.3x"),
        (2.25e-3, 1e-2, "a long unit", "2.2e-03 / 0.01", "4.4x"),
        (math.inf, 1.0, "", "infinity / 1", "0.0x"),
        (1e-9, 1e-2, "", "1.0e-09 / 0.01", "1e+07x"),
    ],
)
def test_numbers_fit_their_columns(value: float, allowed: float, unit: str, shown: str, room: str) -> None:
    measurement = Measurement(name="x", measured=value, allowed=allowed, unit=unit)
    assert (bound(measurement), headroom(measurement)) == (shown, room)
    assert len(shown) <= 17


def other_subject() -> Record:
    """A newer record without results that is about another subject."""
    made = record("sm120", [], day=2)
    return made.model_copy(update={"subject": made.subject.model_copy(update={"name": "another"})})


@pytest.mark.parametrize(
    ("records", "shown"),
    [
        ([], "·"),
        ([record("sm120", [result("p8.kernel.ms")])], "●P"),
        ([record("sm120", [result("p8.kernel.ms", "CRASH")])], "●C"),
        ([record("sm120", [result("p8.kernel.ms", evidence="compiled")])], "◆P"),
        ([record("emulated", [result("p8.kernel.ms", evidence="emulated")])], "·"),
        ([record("sm120", [result("p8.kernel.ms")]), other_subject()], "●P~"),
        ([record("sm120", [result("p8.kernel.ms", "ABSENT")])], "●A"),
        ([record("sm120", [result("p8.kernel.ms", "REFUSED")])], "●R"),
        ([record("sm120", [known("p8.kernel.ms")])], "●F*"),
        # a skip said nothing, then or now
        ([record("sm120", [result("p8.kernel.ms", "SKIP")]), other_subject()], "·"),
    ],
)
def test_a_mark_shows_evidence_by_shape_and_what_is_stale_apart(records: list, shown: str) -> None:
    marks = {spec.family: found for spec, found in grid([assess(find(120), records, checks())])}
    assert str(marks["p8.kernel"]["sm120"]) == shown


def test_of_what_is_stale_the_worst_shows() -> None:
    before = record("sm120", [result("p4.oracle.n1"), result("p4.oracle.n33", "FAIL")])
    marks = {spec.family: found for spec, found in grid([assess(find(120), [before, other_subject()], checks())])}
    assert str(marks["p4.oracle"]["sm120"]) == "●F~"


def test_the_grid_has_hard_checks_first_and_no_mark_where_a_check_does_not_apply() -> None:
    found = grid([assess(target, [], checks()) for target in (find(120), EMULATED)])
    gates = [spec.gate for spec, _ in found]
    assert gates == sorted(gates)
    assert "emulated" not in {spec.family: marks for spec, marks in found}["p1.torch_sees"]


def test_a_row_is_known_if_all_its_failures_are() -> None:
    own, other = known("p4.oracle.n1"), result("p4.oracle.n33", "FAIL")
    for results, words in (
        ([own, known("p4.oracle.n33")], "FAIL known 2"),
        ([own, result("p4.oracle.n33")], "FAIL known 1/2"),
        ([own, other], "FAIL 2"),
    ):
        (found,) = (one for one in rows(assess(find(120), [record("sm120", results)], checks()).cells) if one.phase == 4
                    and one.spec.family == "p4.oracle")  # fmt: skip
        assert found.verdict == words


@pytest.mark.parametrize("evidence", ["hardware", "simulated", "compiled"])
def test_a_waived_failure_is_shown_whatever_its_evidence(evidence: str) -> None:
    made = {"hardware": record, "simulated": simulated, "compiled": compiled}[evidence]
    results = [waived("p4.oracle.n1", evidence=evidence), result("p4.oracle.n33", evidence=evidence)]
    assessment = assess(find(120), [made("sm120", results)], checks())
    found = next(row for row in rows(assessment.cells) if row.spec.family == "p4.oracle")
    assert (found.verdict, found.shape) == ("WAIVED 1/2", evidence)
    assert str(mark(found)).endswith("W")
