"""A curve that a check recorded: one quantity over another, thinned to few points."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Sequence

from pydantic import Field, model_validator

from verify.record.strict import Strict

Point = tuple[float, float]

#: The number of points that a long series is thinned to, and the most that a record accepts.
_THINNED, _MOST = 256, 512

#: The most curves in a plot, which has one marker style for each.
MOST_CURVES = 4


class Curve(Strict):
    """One line of a plot: ``name`` for the legend, ``x`` and ``y`` the axes with their units, points with x ascending.

    Two points may share an x, as before and after an eviction. Raises ValidationError for points that are not a curve.
    """

    name: str = Field(min_length=1)
    x: str = Field(min_length=1)
    y: str = Field(min_length=1)
    points: list[Point] = Field(min_length=2, max_length=_MOST)

    @model_validator(mode="after")
    def _ascending_and_finite(self) -> Curve:
        if wrong := _wrong(self.points):
            raise ValueError(f"curve {self.name!r} {wrong}")
        return self

    @classmethod
    def of(cls, name: str, points: Iterable[tuple[float, float]], *, x: str, y: str) -> Curve:
        """The curve through any number of points, thinned. Raises ValueError for points that are not a curve."""
        series = [(float(at), float(value)) for at, value in points]
        if wrong := _wrong(series):  # before thinning, which could drop the wrong point
            raise ValueError(f"curve {name!r} {wrong}")
        return cls(name=name, x=x, y=y, points=thin(series))

    @property
    def highest(self) -> float:
        return max(value for _, value in self.points)

    def at(self, x: float) -> float | None:
        """The last value recorded at or before ``x``; None before the first point and after the last."""
        before = bisect_right(self.points, x, key=lambda point: point[0])
        return self.points[before - 1][1] if before and x <= self.points[-1][0] else None


def thin(points: Sequence[Point], most: int = _THINNED) -> list[Point]:
    """At most ``most`` (4 or more) of ``points``: the first, the last, and the lowest and highest of each of the equal
    buckets between them, so that no peak is lost.
    """
    if len(points) <= most:
        return list(points)
    inner, buckets = range(1, len(points) - 1), (most - 2) // 2
    kept = {0, len(points) - 1}
    for bucket in range(buckets):
        members = inner[bucket * len(inner) // buckets : (bucket + 1) * len(inner) // buckets]
        kept |= {pick(members, key=lambda index: points[index][1]) for pick in (min, max)}
    return [points[index] for index in sorted(kept)]


def clash(curves: Sequence[Curve]) -> str:
    """Why ``curves`` cannot share one plot, in a sentence; empty if they can."""
    if len(curves) > MOST_CURVES:
        return f"a result has {len(curves)} curves, but a plot shows at most {MOST_CURVES}; record fewer"
    names: set[str] = set()
    for curve in curves:
        if (curve.x, curve.y) != (curves[0].x, curves[0].y):
            ours, theirs = (f"{one.y} over {one.x}" for one in (curve, curves[0]))
            return f"curve {curve.name!r} is {ours}, but {curves[0].name!r} is {theirs}; a result has one pair of axes"
        if curve.name in names:
            return f"two curves are named {curve.name!r}; rename one"
        names.add(curve.name)
    return ""


def _wrong(points: Sequence[Point]) -> str:
    if len(points) < 2:
        return f"needs at least 2 points, but has {len(points)}"
    for index, point in enumerate(points):
        if not all(map(math.isfinite, point)):
            return f"is not finite at point {index}: {point}"
        if index and point[0] < points[index - 1][0]:
            return f"goes back from x {points[index - 1][0]:g} to {point[0]:g} at point {index}; sort its points"
    return ""
