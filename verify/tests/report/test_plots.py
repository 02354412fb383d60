"""Plots: in characters, as a chart, and where the reports and ``explain`` show them."""

from __future__ import annotations

import io
import json
import math
import re

import pytest
from rich.console import Console

from verify import explain
from verify.architectures import find
from verify.record.curves import Curve, Point
from verify.record.verdict import Assessment, assess
from verify.report import documents, terminal
from verify.report.plots import mermaid, text_plot, value_rows
from verify.tests.samples import checks, curve, passing, record, result

AXES = {"x": "generated tokens", "y": "KV blocks"}

FULL = Curve.of("without the plugin", [(t, math.ceil(t / 16)) for t in range(2049)], **AXES)
CAPPED = Curve.of("with the plugin", [(t, math.ceil(min(t, 512 + t % 128) / 16)) for t in range(2049)], **AXES)


def drawn(*curves: Curve) -> Assessment:
    results = [*passing(), result("p8.kernel.ms", curves=list(curves))]
    return assess(find(120), [record("sm120", results)], checks())


def test_the_terminal_shows_both_curves_in_one_plot_after_the_matrix() -> None:
    for width in (60, 80, 140):
        console = Console(file=io.StringIO(), width=width, highlight=False)
        terminal.print_report(drawn(FULL, CAPPED), console)
        lines = console.file.getvalue().splitlines()
        start = lines.index("p8.kernel.ms  hardware")
        plot = lines[start + 1 : lines.index("", start)]
        assert plot == text_plot([FULL, CAPPED], width)
        assert max(map(len, plot)) <= min(width, 72)
        assert any(line.startswith("6.1") for line in lines[:start])


def test_a_plot_in_characters_is_what_it_should_be() -> None:
    rising, flat = curve("rising", [(0, 0), (8, 100)]), curve("flat", [(4, 50), (8, 50)])
    assert text_plot([rising, flat], 28) == [
        "KV blocks",
        "100 +                    o",
        "    |                  oo",
        "    |                oo",
        " 75 +               o",
        "    |             oo",
        "    |           oo",
        " 50 +          *xxxxxxxxxx",
        "    |        oo",
        "    |      oo",
        " 25 +     o",
        "    |   oo",
        "    | oo",
        "  0 +o",
        "    ++----+----+----+----+",
        "     0    2    4    6    8",
        "          generated tokens",
        "o rising",
        "x flat",
        "* several curves",
    ]


@pytest.mark.parametrize(
    "points", [[(5, 3), (5, 3)], [(0, 0), (1, 0)], [(-3, -1e-7), (0, 5e-6)], [(1e6, 1e9), (2e6 + 1, 3e9)]]
)
def test_any_range_can_be_plotted(points: list[Point]) -> None:
    plot = text_plot([curve("a", points)], 80)
    assert any("o" in line for line in plot[1:14])
    assert max(map(len, text_plot([curve("a", points)], 60))) <= 60
    assert not re.search(r"\de[+-]", mermaid([curve("a", points)]))  # Mermaid reads no exponents


def test_markdown_has_a_chart_of_the_common_range_and_a_table_of_all() -> None:
    short = curve('the "short" one', [(0, 1), (1024, 65)])
    text = documents.report_markdown(drawn(FULL, short), [])
    section = text.partition("## Curves\n\n### `p8.kernel.ms`, hardware\n\n")[2]
    chart, _, rest = section.partition("```\n\n")
    assert chart.startswith("```mermaid\n---\nconfig:\n")
    assert '\n  x-axis "generated tokens" 0 --> 1024\n  y-axis "KV blocks" 0 --> 160\n' in chart
    series = re.findall(r"  line \"(.*)\" \[(.*)\]", chart)
    assert [name for name, _ in series] == ["without the plugin", "the 'short' one"]
    assert {len(values.split(", ")) for _, values in series} == {129}
    assert [values.split(", ")[-1] for _, values in series] == ["64", "65"]
    table = rest.splitlines()
    assert table[0] == (
        '| generated tokens | KV blocks, without the plugin (blue) | KV blocks, the "short" one (orange) |'
    )
    assert table[6:8] == ["| 1024 | 64 | 65 |", "| 1280 | 80 | - |"]
    assert "| highest | 128 | 65 |" in table


def test_curves_without_a_common_range_have_a_table_only() -> None:
    apart = [curve("a", [(10, 1), (20, 2)]), curve("b", [(30, 3), (40, 4)])]
    assert mermaid(apart) == ""
    assert value_rows(apart)[1][1:] == ["1", "-"]
    assert "## Curves\n\n### `p8.kernel.ms`, hardware\n\n| generated tokens |" in documents.report_markdown(
        drawn(*apart), []
    )


def test_json_has_the_points_and_reports_without_curves_are_as_before() -> None:
    told = json.loads(documents.report_json(drawn(FULL, CAPPED), []))
    found = {check["id"]: check["curves"] for row in told["rows"] for check in row["checks"]}
    assert [Curve.model_validate(one) for one in found.pop("p8.kernel.ms")] == [FULL, CAPPED]
    assert set(map(tuple, found.values())) == {()}
    assert "Curves" not in documents.report_markdown(drawn(), [])


def test_explain_shows_the_curves_of_the_last_result_that_has_some() -> None:
    days = [[curve("a", [(0, 1), (1, 2)])], [FULL, CAPPED], []]
    records = [record("sm120", [result("p8.kernel.ms", curves=drawn)], day=day) for day, drawn in enumerate(days, 1)]
    console = Console(file=io.StringIO(), width=80, highlight=False)
    explain._print_results(["p8.kernel.ms"], records, console)
    assert console.file.getvalue().endswith("\n".join(["", "p8.kernel.ms  hardware", *text_plot(days[1], 80), "", ""]))
