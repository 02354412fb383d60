"""The page of the tolerances: what each cell shows, and by which evidence."""

from __future__ import annotations

import math
import re

import pytest

from verify.architectures import find, known_targets
from verify.record.schema import CheckResult, Record
from verify.record.verdict import assess
from verify.report.matrix import rows
from verify.report.site.page import Frame
from verify.report.site.tolerances import Need, needed, percent, tolerances
from verify.report.site.view import Column
from verify.tests.samples import checks, measured, record, result, simulated


@pytest.mark.parametrize(
    ("value", "tone", "text"),
    [
        (1e-9, "need-0", "<0.001%"),
        (0.001, "need-0", "0.1%"),
        (0.00451, "need-2", "0.45%"),
        (0.0462, "need-4", "4.6%"),
        (0.306, "need-6", "31%"),
        (0.998, "need-6", "99.8%"),
        (1.0, "need-6", "100%"),
        (1.001, "over", "100.1%"),
        (2.5, "over", "250%"),
        (math.inf, "over", ">1000%"),
        (math.nan, "over", "nan"),
    ],
)
def test_a_colour_is_a_share_of_the_tolerance_on_a_log_scale(value: float, tone: str, text: str) -> None:
    one = Need(result("p4.oracle.n1", "FAIL"), measured(value, 1.0)[0])
    assert (one.tone, one.text) == (tone, text)


def test_the_ends_of_the_colours_are_short() -> None:
    ends = [percent(step) for step in (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)]
    assert ends == ["0.1%", "0.3%", "1%", "3%", "10%", "30%", "100%"]


def need_of(*found: Record) -> Need | None:
    """The cell of p4.oracle on sm120."""
    return next(needed(row) for row in rows(assess(find(120), found, checks()).cells) if row.spec.family == "p4.oracle")


def of(check_id: str, value: float, evidence: str = "hardware") -> CheckResult:
    numbers = [*measured(0, 0, "differences"), *measured(value, 1)]
    return result(check_id, "PASS" if value <= 1 else "FAIL", evidence, measurements=numbers)


def test_a_cell_is_the_tightest_number_of_the_best_evidence_that_has_one() -> None:
    ran = record("sm120", [of("p4.oracle.n1", 0.1), of("p4.oracle.n33", 0.2)])
    tight = simulated("sm120", [of("p4.oracle.n1", 0.9, "simulated")], day=2)
    assert (
        need_of(ran, tight).told
        == "20% of the tolerance, hardware evidence; p4.oracle.n33, error: measured 0.2, allowed 1"
    )
    exact = record("sm120", [result("p4.oracle.n33", measurements=measured(0, 0))])
    assert need_of(exact, tight).told.startswith("90% of the tolerance, simulated evidence; p4.oracle.n1")
    assert need_of(exact) is None
    assert need_of() is None


def test_only_families_with_a_number_have_a_row_in_the_order_of_the_matrix() -> None:
    found = [
        record("sm120", [of("p4.oracle.n1", 0.1), of("p4.triton_pytorch.mean", 3), result("p1.bf16.matmul")]),
        record("emulated", [of("p4.oracle.n1", 0.5, "emulated")]),
    ]
    columns = [Column(assess(target, found, checks())) for target in known_targets()]
    specs = {one.spec.family: one.spec for one in checks()}
    hard = {1: [specs["p1.bf16"]], 4: [specs["p4.triton_pytorch"], specs["p4.oracle"]]}
    told = tolerances(columns, {"hard": hard, "soft": {8: [specs["p8.kernel"]]}})
    assert {gate: [*phases] for gate, phases in told["blocks"].items()} == {"hard": [4]}
    page = Frame(2, found[0], ()).renderer(in_short="", columns=columns)("tolerances.html", **told)
    assert re.findall(r'href="check/(.*?)\.html"', page) == ["p4.triton_pytorch", "p4.oracle"]
    assert re.findall(r'<td class="(\S+)" data-e="(\w+)">', page) == [
        ("over", "hardware"), ("need-4", "hardware"), ("need-6", "emulated"),
    ]  # fmt: skip
    assert page.count("no number") == 11 + 12
    empty = Frame(0, None, ()).renderer(in_short="", columns=columns)("tolerances.html", **tolerances(columns, {}))
    assert "No valid result has a measurement with a tolerance." in empty
