"""The page of the tolerances: the share of each that was needed, by family of checks and target."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from verify.checks import CheckSpec
from verify.record.headroom import room, tightest
from verify.record.schema import EVIDENCE, CheckResult, Measurement
from verify.report.matrix import Row, told
from verify.report.site.view import Column

#: The upper ends of the colours, from pale to deep: two for each decade. What is above the last is outside its bound.
STEPS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)

#: The share below which only the limit is shown.
_LEAST = 1e-5


@dataclass(frozen=True, slots=True)
class Need:
    """The tightest measurement of a family on a target that has a figure, and the result that it is of."""

    result: CheckResult
    measurement: Measurement

    @property
    def share(self) -> float:
        """The share of the tolerance that was needed: 1 is the bound. NaN where NaN was measured."""
        return self.measurement.measured / self.measurement.allowed

    @property
    def tone(self) -> str:
        """The class of its colour: ``need-0`` to ``need-6`` by ``STEPS``, or ``over`` outside its bound."""
        return f"need-{bisect_left(STEPS, self.share)}" if self.measurement.within else "over"

    @property
    def text(self) -> str:
        return "nan" if math.isnan(self.share) else percent(self.share)

    @property
    def told(self) -> str:
        """The cell in words: the share, the evidence, the check, and the measurement with its bound."""
        evidence = f"{self.result.evidence} evidence"
        return f"{self.text} of the tolerance, {evidence}; {self.result.id}, {told(self.measurement)}"


def percent(share: float) -> str:
    """A share in a few characters: ``98%``, ``99.7%``, ``4.6%``, ``<0.001%``, ``>1000%``."""
    if share < _LEAST:
        return f"<{100 * _LEAST:g}%"
    if share > 10:
        return ">1000%"
    if share < 0.0995:
        return f"{100 * share:.2g}%"
    at_the_bound = 0.995 <= share < 1.005 and share != 1  # which a whole number would hide
    return f"{100 * share:.{1 if at_the_bound else 0}f}%"


def needed(row: Row) -> Need | None:
    """What a family needed of its tolerance on a target, by the best evidence that has a figure; None without one."""
    results = [cell.result for cell in row.cells if cell.result is not None]
    figures = [(one, number) for one in results for number in one.measurements if room(number) is not None]
    for kind in EVIDENCE:
        if least := tightest(number for one, number in figures if one.evidence == kind):
            return next(Need(one, number) for one, number in figures if number is least)
    return None


def tolerances(columns: Sequence[Column], blocks: Mapping[str, Mapping[int, Sequence[CheckSpec]]]) -> dict[str, Any]:
    """The content of the page: those families of ``blocks``, by gate and phase, that have a figure on any target."""
    needs = {
        spec.family: [needed(column.rows[spec.family]) if spec.family in column.rows else None for column in columns]
        for phases in blocks.values()
        for specs in phases.values()
        for spec in specs
    }
    needs = {family: found for family, found in needs.items() if any(found)}
    shown: dict[str, dict[int, list[CheckSpec]]] = {}
    for gate, phases in blocks.items():
        for phase, specs in phases.items():
            if kept := [one for one in specs if one.family in needs]:
                shown.setdefault(gate, {})[phase] = kept
    return {
        "blocks": shown,
        "needs": needs,
        "steps": [percent(step) for step in STEPS],
    }
