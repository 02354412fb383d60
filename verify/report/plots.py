"""Plots of the curves of one result: in plain characters for a terminal, as a Mermaid chart for Markdown.

A character plot joins the points. A chart and a table show only recorded values: at each x the last one up to there.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from decimal import Decimal
from itertools import pairwise

from verify.record.curves import Curve, Point

#: The marker of each curve in a terminal, and that of a place that several curves share.
_MARKS, _SEVERAL = "ox+^", "*"

#: The line colours of a chart: distinguishable on light and dark pages, and with any kind of colour vision.
_COLOURS = {"blue": "#0072b2", "orange": "#e69f00", "green": "#009e73", "pink": "#cc79a7"}

# intervals; a quarter of them has a number at the axis
_ROWS, _COLUMNS, _NARROWEST, _TICKS = 12, 60, 20, 4

# a power of two: Mermaid sums up the steps, and with a rounded step the last value would be lost
_STEPS = 128

#: The ends of an axis, times a power of ten: numbers whose quarters are short.
_ROUND = (1, 1.2, 1.6, 2, 2.4, 3.2, 4, 6, 8, 10, 12)


def text_plot(curves: Sequence[Curve], width: int) -> list[str]:
    """One plot of all curves in lines of at most ``width`` (60 or more) characters, except for long names.

    The y axis includes zero; the x axis starts at zero if the points are near enough.
    """
    (left, right), (bottom, top) = _x_range(curves), _y_range(curves)
    beside, below = ([_short(at) for at in _grid(*ends, _TICKS)] for ends in ((bottom, top), (left, right)))
    gutter = max(map(len, beside))
    columns = max(min(_COLUMNS, width - gutter - 2 - len(below[-1])), _NARROWEST) // _TICKS * _TICKS
    across, up = columns / (right - left), _ROWS / (top - bottom)
    canvas = [[" "] * (columns + 1) for _ in range(_ROWS + 1)]
    for curve, mark in zip(curves, _MARKS, strict=False):
        places = [((x - left) * across, (y - bottom) * up) for x, y in curve.points]
        for column, row in set(_line(places)):
            canvas[row][column] = mark if canvas[row][column] == " " else _SEVERAL
    lines = [curves[0].y]
    for row in range(_ROWS, -1, -1):
        tick, off = divmod(row, _ROWS // _TICKS)
        lines.append(f"{'' if off else beside[tick]:>{gutter}} {'|' if off else '+'}{''.join(canvas[row])}".rstrip())
    lines.append(" " * (gutter + 1) + "+" + ("+" + "-" * (columns // _TICKS - 1)) * _TICKS + "+")
    under = "".join(f"{number:<{columns // _TICKS - 1}} " for number in below)
    lines += [" " * (gutter + 2) + under.rstrip(), f"{curves[0].x:>{gutter + columns + 3}}"]
    lines += [f"{mark} {curve.name}" for curve, mark in zip(curves, _MARKS, strict=False)]
    return lines + [f"{_SEVERAL} several curves"] * any(_SEVERAL in row for row in canvas)


def mermaid(curves: Sequence[Curve]) -> str:
    """A fenced chart of the x range in which every curve has values; empty if there is none."""
    start, end = max(curve.points[0][0] for curve in curves), min(curve.points[-1][0] for curve in curves)
    if start >= end:
        return ""
    lines = ["```mermaid", "---", "config:", "  themeVariables:", "    xyChart:"]
    lines += [f'      plotColorPalette: "{", ".join(_COLOURS.values())}"', "---", "xychart-beta"]
    for axis, title, low, high in (("x", curves[0].x, start, end), ("y", curves[0].y, *_y_range(curves))):
        lines.append(f"  {axis}-axis {_quoted(title)} {_plain(low)} --> {_plain(high)}")
    for curve in curves:
        found = (curve.at(x) for x in _grid(start, end, _STEPS))  # never None from start to end
        values = ", ".join(_plain(value) for value in found if value is not None)
        lines.append(f"  line {_quoted(curve.name)} [{values}]")
    return "\n".join([*lines, "```", ""])


def value_rows(curves: Sequence[Curve]) -> list[list[str]]:
    """The cells of a table: a header, a few values of each curve, and its highest one."""
    rows = [[curves[0].x, *(f"{c.y}, {c.name} ({colour})" for c, colour in zip(curves, _COLOURS, strict=False))]]
    for x in _grid(*_x_range(curves), 2 * _TICKS):
        values = [curve.at(x) for curve in curves]
        if any(value is not None for value in values):
            rows.append([_short(x), *("-" if value is None else _short(value) for value in values)])
    return [*rows, ["highest", *(_short(curve.highest) for curve in curves)]]


def _x_range(curves: Sequence[Curve]) -> tuple[float, float]:
    left, right = min(curve.points[0][0] for curve in curves), max(curve.points[-1][0] for curve in curves)
    near = 0 <= left <= right / 2
    return (0.0 if near else left), (right if right > left else left + 1)


def _y_range(curves: Sequence[Curve]) -> tuple[float, float]:
    values = [value for curve in curves for _, value in curve.points]
    low = min(0.0, *values)
    extent = max(0.0, *values) - low or 1.0
    power = 10.0 ** math.floor(math.log10(extent))
    return low, low + next(factor * power for factor in _ROUND if factor * power >= extent)


def _grid(start: float, end: float, steps: int) -> list[float]:
    # both ends come out exactly
    return [start * (steps - step) / steps + end * step / steps for step in range(steps + 1)]


def _line(places: Sequence[Point]) -> Iterator[tuple[int, int]]:
    """The cells that the lines between ``places`` cross, as (column, row)."""
    for (x, y), (next_x, next_y) in pairwise(places):
        steps = math.ceil(max(abs(next_x - x), abs(next_y - y))) or 1
        for to_x, to_y in zip(_grid(x, next_x, steps), _grid(y, next_y, steps), strict=True):
            yield round(to_x), round(to_y)


def _short(value: float) -> str:
    return f"{value:.6g}"


def _plain(value: float) -> str:
    # Mermaid does not read exponents
    return format(Decimal(_short(value)), "f")


def _quoted(text: str) -> str:
    return '"' + text.replace('"', "'") + '"'
