"""The headroom of measurements: how many times the measured value fits into the allowed one, and where it is least."""

from __future__ import annotations

import math
from collections.abc import Iterable

from verify.record.schema import Measurement

#: The families whose bound is the rounding of the result itself, of which a correct result may need all: half a unit of
#: bfloat16.
BY_DESIGN = frozenset({"p1.bf16_matmul"})


def by_design(measurement: Measurement) -> bool:
    """Whether a measurement is within a bound of which a correct result may need all."""
    return measurement.by_design and measurement.within


def room(measurement: Measurement) -> float | None:
    """The headroom; None where it would be no figure: nothing was measured, nothing is allowed, or everything is; or
    the bound is met by design.
    """
    if by_design(measurement):
        return None
    if measurement.measured <= 0 or measurement.allowed <= 0 or measurement.allowed == math.inf:
        return None
    return measurement.headroom


def used_share(measured: float, allowed: float) -> float | None:
    """The share of what is allowed that was used; a value below 0 uses none. None where nothing is allowed, or
    everything is, or the value is NaN.
    """
    if allowed <= 0 or math.isinf(allowed) or math.isnan(measured):
        return None
    return max(measured, 0) / allowed


def tightest(measurements: Iterable[Measurement]) -> Measurement | None:
    """The measurement with the least headroom, NaN first; one that has no headroom only if there is no other, or if it
    is outside its bound.
    """
    return min(measurements, key=_rank, default=None)


def _rank(one: Measurement) -> tuple[int, float]:
    found = room(one)
    if found is None:
        return (3 if one.within else 1), 0
    return (0, 0) if math.isnan(found) else (2 if one.within else 1, found)
