"""The gate matrix of a target: one row per family of checks, grouped by phase, the items of the plan's table first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from verify.checks import CheckSpec
from verify.record.cells import Cell
from verify.record.headroom import room, tightest
from verify.record.schema import EVIDENCE, CheckResult, Evidence, Measurement, Verdict
from verify.record.verdict import Assessment
from verify.report.looks import BY_WORD, LOOKS, SHAPES

#: The plan's pass/fail table: these items come first in their phase.
PLAN_TABLE = ("1.3", "1.4", "3.1", "3.2", "4.1", "2.2", "4.2", "5.2", "6.1")

NOT_RUN = "NOT RUN"

#: What is added to the verdict of a failure that its author has listed.
KNOWN = "known"

#: The word of a row is the first of these that any of its cells has.
WORST_FIRST: tuple[str, ...] = (
    Verdict.CRASH, Verdict.TIMEOUT, Verdict.ERROR, Verdict.FAIL, Verdict.INFRA, Verdict.WAIVED, Verdict.BLOCKED,
    NOT_RUN, Verdict.REFUSED, Verdict.ABSENT, Verdict.SKIP, *reversed([*BY_WORD]), Verdict.PASS,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """A family of checks on a target: its worst verdict and how many of its checks share it."""

    spec: CheckSpec
    cells: tuple[Cell, ...]

    @property
    def phase(self) -> int:
        return self.spec.phase

    @property
    def worst(self) -> str:
        """The word of the row. Where no check ran on the target, those of which nothing is known do not hide what was
        simulated: checks that launch no kernel are never simulated.
        """
        words = {_word(cell) for cell in self.cells}
        if not any(cell.proves for cell in self.cells) and any(cell.simulation for cell in self.cells):
            words -= {NOT_RUN}
        return min(words, key=WORST_FIRST.index)

    @property
    def verdict(self) -> str:
        """The worst verdict with its code or blocker, ``known``, and ``2/37`` if only some of the checks have it."""
        alike = [cell for cell in self.cells if _word(cell) == self.worst]
        parts = [str(self.worst)]
        result = alike[0].result
        if result is not None and (result.code or result.by):
            parts.append(result.code or f"by {result.by}")
        parts += [KNOWN] if self.known else []
        if len(self.cells) > 1:
            parts.append(str(len(alike)) if len(alike) == len(self.cells) else f"{len(alike)}/{len(self.cells)}")
        return " ".join(parts)

    @property
    def known(self) -> bool:
        """Whether every check with the worst verdict is a known deviation."""
        known = (one.result and one.result.deviation for one in self.cells if _word(one) == Verdict.FAIL)
        return self.worst == Verdict.FAIL and all(known)

    @property
    def evidence(self) -> str:
        """The kinds of evidence behind the row, ``-`` if there is none."""
        return "+".join(_kinds(self.cells)) or "-"

    @property
    def shape(self) -> Evidence | None:
        """The best evidence of the checks that have the worst verdict; else of any."""
        worst = [cell for cell in self.cells if _word(cell) == self.worst]
        return next(iter(_kinds(worst) or _kinds(self.cells)), None)

    @property
    def tightest(self) -> Measurement | None:
        """The measurement with the least headroom among the row's checks."""
        return tightest(one for cell in self.cells if cell.result for one in cell.result.measurements)


def rows(cells: Iterable[Cell]) -> list[Row]:
    """Group cells into rows: by phase, the items of the plan's table first, then in order of declaration."""
    families: dict[str, list[Cell]] = {}
    for cell in cells:
        families.setdefault(cell.check.spec.family, []).append(cell)
    folded = [Row(members[0].check.spec, tuple(members)) for members in families.values()]
    return sorted(folded, key=lambda row: (row.phase, *_plan_order(row.spec.plan)))


@dataclass(frozen=True, slots=True)
class Mark:
    """A family of checks on a target in one to three characters: ``●P``, ``◆P``, ``○F``, ``●P~``, ``○F*``, ``·``.

    ``word`` is the verdict, ``evidence`` its kind of evidence; ``stale`` says that the result no longer counts,
    ``known`` that the failure is a known deviation.
    """

    word: str
    evidence: Evidence | None
    stale: bool = False
    known: bool = False

    def __str__(self) -> str:
        if self.evidence is None:
            return "·"
        return SHAPES[self.evidence] + LETTERS[self.word] + "~" * self.stale + "*" * self.known


#: The shape shows the evidence and the letter the verdict, so that neither needs a colour.
LETTERS = MappingProxyType(
    {"PASS": "P", "FAIL": "F", "ERROR": "E", "CRASH": "C", "TIMEOUT": "T", "INFRA": "I", "SKIP": "S", "BLOCKED": "B"}
    | {"ABSENT": "A", "REFUSED": "R", "WAIVED": "W"}
)
LEGEND = (
    f"{'  '.join(f'{shape} {kind}' for kind, shape in SHAPES.items())}  · no result; "
    "P pass  F fail  E error  C crash  T timeout  I infra  "
    "S skip  B blocked  A absent  R refused  W waived; ~ stale, does not count; * known deviation, still a failure; "
    "a simulated mark is of those checks that launch a kernel"
)


def stale_of(row: Row) -> CheckResult | None:
    """The worst stale result of a row that has no valid result; skips and blocked checks do not count as results."""
    if row.worst != NOT_RUN or row.evidence != "-":
        return None
    before = (cell.stale for cell in row.cells if cell.stale)
    said = [result for result in before if result.verdict not in (Verdict.SKIP, Verdict.BLOCKED)]
    return min(said, key=lambda result: WORST_FIRST.index(result.verdict), default=None)


def mark(row: Row) -> Mark:
    """The worst result of a row, with the best evidence that any check has it by; else a stale one."""
    worst = [cell.result for cell in row.cells if _word(cell) == row.worst and cell.result is not None]
    if worst:
        best = min(worst, key=lambda result: EVIDENCE.index(result.evidence))
        return Mark(best.verdict, best.evidence, known=row.known)
    if (before := stale_of(row)) is not None:
        return Mark(before.verdict, before.evidence, stale=True)
    return Mark(NOT_RUN, None)


def grid(assessments: Sequence[Assessment]) -> list[tuple[CheckSpec, dict[str, Mark]]]:
    """Every family of checks, HARD ones first, with its marks by target, for the targets that it applies to."""
    specs: dict[str, CheckSpec] = {}
    marks: dict[str, dict[str, Mark]] = {}
    for assessment in assessments:
        for row in rows(assessment.cells):
            specs.setdefault(row.spec.family, row.spec)
            marks.setdefault(row.spec.family, {})[assessment.target.target] = mark(row)
    order = sorted(specs.values(), key=lambda spec: (spec.gate != "hard", spec.phase, *_plan_order(spec.plan)))
    return [(spec, marks[spec.family]) for spec in order]


VERSIONS = ("target", "GPU", "driver", "CUDA", "torch", "triton", "vLLM", "subject", "newest")


def versions(assessments: Sequence[Assessment]) -> list[list[str]]:
    """The versions in each target's newest record, in the order of ``VERSIONS``; targets without one are absent."""
    lines = []
    for assessment in assessments:
        if not assessment.used:
            continue
        newest = next((one for one in assessment.used if one.on_target), assessment.used[0])
        at = newest.environment
        card = [at.gpu.name, at.gpu.driver] if at.gpu else ["none", "none"]
        software = [at.cuda_runtime.partition(" (")[0], at.torch, at.triton, at.vllm.partition(" (")[0]]
        subject = f"{newest.subject.version} {newest.subject.git_sha[:7]}{'+' * newest.subject.dirty}"
        lines.append([assessment.target.target, *card, *software, subject, newest.time_utc[:10]])
    return lines


def by_phase(folded: Sequence[Row]) -> dict[int, list[Row]]:
    phases: dict[int, list[Row]] = {}
    for row in folded:
        phases.setdefault(row.phase, []).append(row)
    return phases


def told(measurement: Measurement) -> str:
    """A measurement in a sentence, as in a failure message; without a limit that is none."""
    if measurement.allowed != math.inf:
        return measurement.told
    words = f"{measurement.name}: measured {_short(measurement.measured)} {measurement.unit}".strip()
    return f"{words}, no limit{measurement.where and f' at {measurement.where}'}"


def bound(measurement: Measurement | None) -> str:
    """``measured / allowed`` in about 17 characters, with the unit if it fits."""
    if measurement is None:
        return "-"
    allowed = "any" if measurement.allowed == math.inf else _short(measurement.allowed)
    pair = f"{_short(measurement.measured)} / {allowed}"
    with_unit = f"{pair} {measurement.unit}".strip()
    return with_unit if len(with_unit) <= 17 else pair


def headroom(measurement: Measurement | None) -> str:
    """How many times the measured value fits into what is allowed; ``-`` if that would be no figure."""
    value = None if measurement is None else room(measurement)
    if value is None:
        return "-"
    if math.isnan(value):
        return "nan"
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x" if value < 1e5 else f"{value:.0e}x"


def count(number: int, noun: str) -> str:
    """``1 check``, ``2 checks``; of a noun that ends in a hiss, ``2 launches``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{'es' if noun.endswith('ch') else 's'}"


def listed(names: Sequence[str]) -> str:
    """Names joined for a sentence: ``sm80, sm86 and sm90``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _word(cell: Cell) -> str:
    if cell.result is None:
        return NOT_RUN
    if cell.proves or cell.warns or cell.result.verdict is Verdict.WAIVED:
        return cell.result.verdict
    if cell.result.verdict is Verdict.PASS:
        return LOOKS[cell.result.evidence].passed
    # a kernel that was not built says nothing, but one that was not simulated says why
    return cell.result.verdict if cell.result.evidence == "simulated" else NOT_RUN


def _kinds(cells: Iterable[Cell]) -> list[Evidence]:
    """The kinds of evidence of those cells that say something, best first."""
    found = {cell.result.evidence for cell in cells if cell.result is not None and _informs(cell)}
    return [kind for kind in EVIDENCE if kind in found]


def _informs(cell: Cell) -> bool:
    return cell.result is not None and cell.result.verdict not in (Verdict.SKIP, Verdict.BLOCKED)


def _plan_order(plan: str | None) -> tuple[bool, int]:
    return plan not in PLAN_TABLE, PLAN_TABLE.index(plan) if plan in PLAN_TABLE else 0


def _short(value: float) -> str:
    if math.isinf(value):
        return "infinity" if value > 0 else "-infinity"
    if math.isnan(value):
        return "nan"
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if 0.01 <= abs(value) < 1e5 else f"{value:.1e}"
