"""The gate matrix of a target: one row per family of checks, grouped by phase, the items of the plan's table first."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from verify.architectures import EMULATED
from verify.checks import CheckSpec
from verify.record.builds import BuildVerdict, Compilation
from verify.record.schema import CheckResult, Evidence, Measurement, Verdict
from verify.record.verdict import Assessment, Cell, TargetVerdict

#: The plan's pass/fail table: these items come first in their phase.
PLAN_TABLE = ("1.3", "1.4", "3.1", "3.2", "4.1", "2.2", "4.2", "5.2", "6.1")

NOT_RUN = "NOT RUN"

#: What is added to the verdict of a failure that its author has listed.
KNOWN = "known"

#: The word of a check whose kernels were built for a GPU that has not run it.
COMPILED = "COMPILED"

#: The word of a row is the first of these that any of its cells has.
WORST_FIRST: tuple[str, ...] = (
    Verdict.CRASH, Verdict.TIMEOUT, Verdict.ERROR, Verdict.FAIL, Verdict.INFRA, Verdict.BLOCKED, NOT_RUN,
    Verdict.REFUSED, Verdict.ABSENT, Verdict.SKIP, COMPILED, Verdict.PASS,
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
        return min((_word(cell) for cell in self.cells), key=WORST_FIRST.index)

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
        kinds = dict.fromkeys(cell.result.evidence for cell in self.cells if cell.result and _informs(cell))
        return "+".join(kinds) or "-"

    @property
    def tightest(self) -> Measurement | None:
        """The measurement with the least headroom among the row's checks."""
        found = [cell.result.tightest for cell in self.cells if cell.result and cell.result.tightest]
        return min(found, key=lambda m: -math.inf if math.isnan(m.headroom) else m.headroom, default=None)


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
SHAPES: Mapping[Evidence, str] = MappingProxyType({"hardware": "●", "compiled": "◆", "emulated": "○"})
LETTERS = MappingProxyType(
    {"PASS": "P", "FAIL": "F", "ERROR": "E", "CRASH": "C", "TIMEOUT": "T", "INFRA": "I", "SKIP": "S", "BLOCKED": "B"}
    | {"ABSENT": "A", "REFUSED": "R"}
)
LEGEND = (
    "● hardware  ◆ compiled  ○ emulated  · no result; P pass  F fail  E error  C crash  T timeout  I infra  "
    "S skip  B blocked  A absent  R refused; ~ stale, does not count; * known deviation, still a failure"
)


def stale_of(row: Row) -> CheckResult | None:
    """The worst stale result of a row that has no valid result; skips and blocked checks do not count as results."""
    if row.worst != NOT_RUN or row.evidence != "-":
        return None
    before = (cell.stale for cell in row.cells if cell.stale)
    said = [result for result in before if result.verdict not in (Verdict.SKIP, Verdict.BLOCKED)]
    return min(said, key=lambda result: WORST_FIRST.index(result.verdict), default=None)


def mark(row: Row) -> Mark:
    """The worst result of a row: a valid one, else one compiled for a GPU that did not run it, else a stale one."""
    worst = next(cell for cell in row.cells if _word(cell) == row.worst)
    if worst.result is not None:
        return Mark(worst.result.verdict, worst.result.evidence, known=row.known)
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
        newest = next((one for one in assessment.used if not one.ahead_of_time), assessment.used[0])
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


def bound(measurement: Measurement | None) -> str:
    """``measured / allowed`` in at most 17 characters, with the unit if it fits."""
    if measurement is None:
        return "-"
    pair = f"{_short(measurement.measured)} / {_short(measurement.allowed)}"
    with_unit = f"{pair} {measurement.unit}".strip()
    return with_unit if len(with_unit) <= 17 else pair


def headroom(measurement: Measurement | None) -> str:
    """How many times the measured value fits into what is allowed."""
    if measurement is None:
        return "-"
    value = measurement.headroom
    if math.isnan(value):
        return "nan"
    if math.isinf(value):
        return "exact" if measurement.measured == 0 else str(value)
    return f"{value:.1f}x" if value < 100 else f"{value:.0f}x" if value < 1e5 else f"{value:.0e}x"


def count(number: int, noun: str) -> str:
    """``1 check``, ``2 checks``."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def built(compilation: Compilation | None) -> str:
    """How many kernels were built for a target: ``21/21``, ``gap`` if the toolchain builds nothing, or ``-``."""
    if compilation is None:
        return "-"
    if compilation.gap:
        return "gap"
    good, wanted = _counted(compilation)
    return f"{good}/{wanted}"


def _counted(compilation: Compilation) -> tuple[int, int]:
    """How many kernels were built, of how many that the variants need."""
    needed = compilation.needed
    return sum(build.verdict is BuildVerdict.OK for build in needed), len(needed) + len(compilation.unlaunched)


def compiled_words(compilation: Compilation) -> str:
    """The kernels built for a target and their resources, in a sentence."""
    tools = f"triton {compilation.triton}, ptxas {compilation.ptxas}"
    if compilation.gap:
        return f"toolchain gap, {compilation.toolchain} with {tools}: {compilation.gap}"
    found = [build.resources for build in compilation.builds if build.resources]
    if not found:
        return f"{built(compilation)} kernels built with {tools}"
    registers, stack = [one.registers for one in found], max(one.stack_bytes for one in found)
    needs = f"{min(registers)} to {max(registers)} registers, {f'{stack} bytes of stack' if stack else 'no stack'}"
    return f"{built(compilation)} kernels built with {tools}; {needs}"


def _word(cell: Cell) -> str:
    if cell.result is None:
        return NOT_RUN
    if cell.proves or cell.not_compiled:
        return cell.result.verdict
    return COMPILED if cell.compiled else NOT_RUN


def _informs(cell: Cell) -> bool:
    return cell.result is not None and cell.result.verdict not in (Verdict.SKIP, Verdict.BLOCKED)


def _plan_order(plan: str | None) -> tuple[bool, int]:
    return plan not in PLAN_TABLE, PLAN_TABLE.index(plan) if plan in PLAN_TABLE else 0


def _short(value: float) -> str:
    if math.isnan(value) or math.isinf(value):
        return str(value)
    if value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.3g}" if 0.01 <= abs(value) < 1e5 else f"{value:.1e}"


_EMULATED = {
    TargetVerdict.EMULATED_PASS: "every must-pass check passes without a GPU",
    TargetVerdict.EMULATED_FAIL: "the run without a GPU failed",
    TargetVerdict.EMULATED_INCOMPLETE: "the run without a GPU is incomplete",
}


def _compiles(one: Compilation) -> bool:
    """Whether every kernel that the variants need was built."""
    good, wanted = _counted(one)
    return 0 < good == wanted


def headline(assessments: Sequence[Assessment]) -> str:
    """In one sentence: how many GPUs are verified, failed or only compile, and how the run without a GPU ended."""
    gpus = [one for one in assessments if one.target is not EMULATED]
    named: dict[TargetVerdict, list[str]] = {}
    for one in gpus:
        named.setdefault(one.verdict, []).append(one.target.target)
    verified = named.get(TargetVerdict.VERIFIED, [])
    told = [f"{len(verified)} of {len(gpus)} GPUs verified on hardware{f' ({listed(verified)})' if verified else ''}"]
    for verdict, words in ((TargetVerdict.FAILED, "failed"), (TargetVerdict.INFRA, "could not be judged")):
        told += [f"{listed(named[verdict])} {words}"] if verdict in named else []
    known = [(one.target.target, one.compilation) for one in gpus if one.compilation is not None]
    if compiled := sum(_compiles(one) for _, one in known):
        told.append(f"the kernels compile for {compiled}")
    gaps = [name for name, compilation in known if compilation.gap]
    told += [f"{listed(gaps)} cannot be compiled for yet"] if gaps else []
    told += [_EMULATED[one.verdict] for one in assessments if one.used and one.verdict in _EMULATED]
    return "; ".join(told) + "."


def listed(names: Sequence[str]) -> str:
    """Names joined for a sentence: ``sm80, sm86 and sm90``."""
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last
