"""The charts of the pages: Vega-Lite specifications, drawn as SVG with the colours of the style sheet."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from verify.record.builds import Build, Compilation
from verify.record.curves import Curve

#: One per curve of a plot, in the order of ``verify.report.plots``.
_SERIES = [f"var(--series-{number})" for number in range(1, 5)]

_CONFIG: Mapping[str, Any] = {
    "font": "system-ui, sans-serif",
    "point": {"color": "var(--series-1)"},
    "background": None,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--muted)",
        "titleColor": "var(--muted)",
        "titleFontWeight": "normal",
        "gridColor": "var(--line)",
        "domainColor": "var(--line)",
        "tickColor": "var(--line)",
        "labelFontSize": 11,
        "titleFontSize": 11,
    },
    "legend": {"labelColor": "var(--ink)", "title": None, "orient": "top", "labelLimit": 0, "symbolType": "stroke"},
    "header": {"labelColor": "var(--muted)", "labelFontSize": 10, "title": None, "labelLimit": 0},
}

#: The metrics of a chart of builds, with the titles of its axis.
METRICS = {
    "registers": "registers per thread",
    "instructions": "warp instructions per key",
    "occupancy": "theoretical occupancy, %",
}


def draw(specification: Mapping[str, Any]) -> Markup:
    """The SVG of a Vega-Lite specification, to be inserted into a page unescaped: Vega escapes the texts in it."""
    import vl_convert

    schema = {"$schema": "https://vega.github.io/schema/vega-lite/v5.json"}
    svg = vl_convert.vegalite_to_svg({**schema, "config": _CONFIG, **specification})
    # the page labels a chart as one image; Vega's roles would add images without a name
    return Markup(re.sub(r' (?:role|aria-[a-z]+)="[^"]*"', "", svg))


def plot(curves: Sequence[Curve], width: int = 560, height: int = 220) -> Markup:
    """The curves of one result in one chart."""
    values = [
        {"x": x, "y": y, "name": curve.name, "order": index}
        for curve in curves
        for index, (x, y) in enumerate(curve.points)
    ]
    names = [curve.name for curve in curves]
    return draw(
        {
            "width": width,
            "height": height,
            "data": {"values": values},
            "mark": {"type": "line", "strokeWidth": 1.75},
            "encoding": {
                "x": {"field": "x", "type": "quantitative", "title": curves[0].x, "scale": {"nice": False}},
                "y": {"field": "y", "type": "quantitative", "title": curves[0].y},
                "order": {"field": "order"},
                "color": {"field": "name", "scale": {"domain": names, "range": _SERIES[: len(names)]}},
            },
        }
    )


def spread(compilations: Iterable[Compilation], metric: str) -> Markup:
    """A metric of every build by architecture: a dot for each build, and a line over their range."""
    values = [
        {"gpu": str(one.sm), "value": value}
        for one in compilations
        for build in one.builds
        if (value := number(build, metric)) is not None
    ]
    across = {"field": "gpu", "type": "nominal", "sort": None, "title": "SM", "axis": {"labelAngle": 0}}
    scale = {"type": "log"} if metric == "instructions" else {"zero": True}
    up = {"field": "value", "type": "quantitative", "title": None, "scale": scale}
    return draw(
        {
            "width": {"step": 29},
            "height": 180,
            "data": {"values": values},
            "layer": [
                {
                    "mark": {"type": "rule", "color": "var(--line-strong)", "strokeWidth": 2},
                    "encoding": {
                        "x": across,
                        "y": {**up, "aggregate": "min"},
                        "y2": {"field": "value", "aggregate": "max"},
                    },
                },
                {
                    "mark": {"type": "circle", "size": 34, "opacity": 0.55, "color": "var(--series-1)"},
                    "encoding": {"x": across, "y": up},
                },
            ],
        }
    )


def multiples(compilations: Sequence[Compilation], metric: str) -> Markup:
    """A metric of each variant over the architectures: a small chart per variant, all on one scale."""
    values = [
        {"gpu": str(one.sm), "value": value, "build": build_name(build)}
        for one in compilations
        for build in one.builds
        if (value := number(build, metric)) is not None
    ]
    names = list(dict.fromkeys(value["build"] for value in values))
    axis = {"labelAngle": -90, "labelFontSize": 9, "ticks": False, "labelPadding": 2}
    scale = {"type": "log", "nice": False} if metric == "instructions" else {"zero": True}
    return draw(
        {
            "data": {"values": values},
            "facet": {"field": "build", "type": "nominal", "sort": names},
            "columns": 6,
            "spacing": {"row": 18, "column": 14},
            "spec": {
                "width": 132,
                "height": 56,
                "mark": {"type": "line", "point": {"size": 16, "color": "var(--series-1)"}, "color": "var(--series-1)"},
                "encoding": {
                    "x": {"field": "gpu", "type": "nominal", "sort": None, "title": None, "axis": axis},
                    "y": {
                        "field": "value",
                        "type": "quantitative",
                        "title": None,
                        "scale": scale,
                        "axis": {"tickCount": 3, "labelFontSize": 9},
                    },
                },
            },
        }
    )


def ratios(costs: Iterable[Any], cards: Iterable[Any]) -> Markup:
    """Warp instructions per byte, a row for each target with a diamond for each build, and a bar at the ridge of each
    of the ``cards``. ``costs`` and ``cards`` are those of ``verify.report.site.roofline``.
    """
    values = [{"target": one.target, "ratio": one.ratio, "name": one.aggregation} for one in costs]
    targets = list(dict.fromkeys(value["target"] for value in values))
    ridges = [{"target": card.target, "ratio": card.ridge} for card in cards if card.target in targets]
    scale = {"type": "log", "nice": False, "padding": 12}
    across = {"field": "ratio", "type": "quantitative", "title": "warp instructions per byte", "scale": scale}
    up = {"field": "target", "type": "nominal", "sort": targets, "title": None}
    colour = {"field": "name", "scale": {"domain": ["mean", "max"], "range": _SERIES[:2]}}
    point = {"type": "point", "shape": "diamond", "filled": True, "size": 70, "opacity": 0.6}
    bar = {"type": "tick", "color": "var(--ink)", "thickness": 3, "size": 20}
    return draw(
        {
            "width": 430,
            "height": {"step": 23},
            "layer": [
                {
                    "data": {"values": values},
                    "mark": point,
                    "encoding": {"x": across, "y": up, "color": colour},
                },
                {"data": {"values": ridges}, "mark": bar, "encoding": {"x": across, "y": up}},
            ],
            "config": {**_CONFIG, "legend": {**_CONFIG["legend"], "symbolType": "diamond"}},
        }
    )


def over_time(values: Sequence[Mapping[str, Any]], unit: str, *, log: bool = False) -> Markup:
    """Measurements over time, a small chart per target, with the allowed value as a dashed line.

    ``values`` have ``time`` (RFC 3339), ``target``, ``value`` and ``allowed``, which may be None.
    """
    when = {
        "field": "time",
        "type": "temporal",
        "title": None,
        "axis": {"format": "%d %b", "tickCount": 3, "labelFontSize": 9, "grid": False},
    }
    scale = {"type": "log", "nice": False} if log else {"zero": True}
    up = {"type": "quantitative", "title": unit, "scale": scale, "axis": {"tickCount": 3, "labelFontSize": 9}}
    line = {"type": "line", "color": "var(--series-1)", "strokeWidth": 1.5, "point": {"size": 16}}
    limit = {"type": "line", "interpolate": "step-after", "strokeDash": [4, 3], "color": "var(--bad)"}
    layers: list[dict[str, object]] = [{"mark": line, "encoding": {"x": when, "y": {"field": "value", **up}}}]
    if any(value["allowed"] is not None for value in values):
        layers.append({"mark": limit, "encoding": {"x": when, "y": {"field": "allowed", **up}}})
    return draw(
        {
            "data": {"values": list(values)},
            "facet": {"field": "target", "type": "nominal", "sort": None},
            "columns": 5,
            "spacing": {"row": 18, "column": 14},
            "spec": {"width": 150, "height": 70, "layer": layers},
        }
    )


def number(build: Build, metric: str) -> float | None:
    """One of the ``METRICS`` of a build; None if the build does not have it."""
    used = build.resources
    if used is None:
        return None
    if metric == "registers":
        return used.registers
    if metric == "occupancy":
        return None if used.occupancy is None else round(100 * used.occupancy, 1)
    return used.code.warp_instructions_per_key if used.code else None


def build_name(build: Build) -> str:
    return build.variants[0] + build.configuration
