"""The content of the pages: assessments as marks, results as lines, and the sentences above them."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from verify.architectures import Architecture, Target
from verify.record.cells import Cell
from verify.record.findings import next_step, title
from verify.record.headroom import room, tightest
from verify.record.schema import FAILING, CheckResult, Finding, Measurement, Record, Verdict, Waiver
from verify.record.simulation import UNSUPPORTED
from verify.record.verdict import Assessment
from verify.report.looks import BY_WORD
from verify.report.matrix import KNOWN, Row, bound, headroom, listed, rows, stale_of, told
from verify.report.site.news import News

STALE = "STALE"

#: Verdicts without a sign of their own: their cells have the word.
_WITHOUT_SIGN = (Verdict.ABSENT, Verdict.REFUSED, Verdict.BLOCKED)

#: What a cell of the matrix says of a skip whose code does not fit.
_SHORT = {UNSUPPORTED: "skipped"}

#: The share of a bar's width at which the allowed value is, and the number of decades below it.
_LIMIT, _DECADES = 0.8, 4


@dataclass(frozen=True, slots=True)
class Mark:
    """One cell: the ``shape`` of its evidence (its name, or ``none`` for a dash), the ``tone`` and ``word`` of its
    verdict, the short ``note`` in it, and ``detail`` that only its description has.
    """

    shape: str
    tone: str
    word: str
    note: str = ""
    anchor: str = ""  #: its place on the target's page
    detail: str = ""

    @property
    def told(self) -> str:
        """The cell in words, for readers who cannot see the shape."""
        evidence = "no evidence" if self.shape == "none" else f"{self.shape} evidence"
        note = "" if self.note == self.word.lower() else self.note
        return ", ".join(filter(None, (self.word, evidence, note, self.detail)))


def tone_of(word: str, shape: str) -> str:
    """The tone, which decides the colour, of a verdict; only a pass on hardware is green."""
    if word in FAILING:
        return "fail"
    if word == Verdict.WAIVED:
        return "waived"
    if word == STALE:
        return "stale"
    if word in BY_WORD:
        return BY_WORD[word]
    if word == Verdict.PASS:
        return "pass" if shape == "hardware" else shape
    return "absent"


@dataclass(frozen=True)
class Column:
    """One target of the matrix."""

    assessment: Assessment
    news: News | None = None

    @property
    def target(self) -> Target:
        return self.assessment.target

    @property
    def name(self) -> str:
        return self.target.target

    @property
    def products(self) -> str:
        if isinstance(self.target, Architecture):
            return ", ".join(self.target.products) or "no product known"
        return "Triton's interpreter and CPU torch"

    @property
    def passed(self) -> int:
        return sum(cell.passed for cell in self.assessment.must_pass)

    @property
    def newest(self) -> Record | None:
        """The newest run, or the newest other record if nothing ran."""
        used = self.assessment.used
        return next((record for record in used if record.on_target), used[0] if used else None)

    @cached_property
    def rows(self) -> dict[str, Row]:
        return {row.spec.family: row for row in rows(self.assessment.cells)}

    @cached_property
    def _cells(self) -> dict[str, Row]:
        return {cell.check.id: Row(cell.check.spec, (cell,)) for cell in self.assessment.cells}

    def of_family(self, family: str) -> Mark | None:
        """The mark of a family of checks; None if it does not apply to the target."""
        return self._mark(self.rows[family]) if family in self.rows else None

    def of_check(self, check_id: str) -> Mark | None:
        return self._mark(self._cells[check_id]) if check_id in self._cells else None

    def _mark(self, row: Row) -> Mark:
        shape = row.shape or "none"
        anchor = next((cell.check.id for cell in row.cells if cell.result), row.spec.family)
        if (before := stale_of(row)) is not None:
            return Mark(before.evidence, "stale", STALE, f"was {before.verdict}", anchor)
        if len(row.cells) > 1 and "/" in row.verdict:
            note = row.verdict.split()[-1]
        else:
            note = headroom(row.tightest) if row.tightest and room(row.tightest) is not None else ""
        code = next((cell.result.code for cell in row.cells if cell.result and cell.result.code), "")
        detail = ""
        if row.worst == Verdict.SKIP:
            note, detail = _SHORT.get(code, code or note), code if code in _SHORT else ""
        if row.known:
            note, detail = KNOWN, note
        elif row.worst in _WITHOUT_SIGN:
            note, detail = row.worst.lower(), note
        return Mark(shape, tone_of(row.worst, shape), row.worst, note, anchor, detail)


@dataclass(frozen=True, slots=True)
class Bar:
    """A measurement on a log scale, in percent of the width; the allowed value is at ``_LIMIT`` of the width. One that
    is within its bound by design has no ``width``.
    """

    text: str
    headroom: str
    width: int | None
    over: bool

    @classmethod
    def of(cls, one: Measurement) -> Bar:
        left = room(one)
        if left is None:
            width = None if one.within else 100
        elif math.isnan(left):
            width = 100
        else:
            place = 1 - math.log10(left) / _DECADES if left else math.inf
            width = round(100 * min(max(_LIMIT * place, 0.01), 1))
        return cls(bound(one), headroom(one), width, not one.within)


@dataclass(frozen=True, slots=True)
class Line:
    """One result as a row of a table; ``known`` says whether the suite has its check."""

    result: CheckResult
    word: str
    shape: str
    tone: str
    known: bool
    bar: Bar | None
    like: str = ""  #: the check of the same family above it that has the same message

    @property
    def phase(self) -> int:
        return int(self.result.id[1])

    @property
    def told(self) -> list[str]:
        """Each measurement in a sentence."""
        return [told(one) for one in self.result.measurements]

    @property
    def start(self) -> tuple[str | bool, ...]:
        """The content of its row before the numbers."""
        result, family = self.result, self.result.id.rpartition(".")[0]
        note = result.code or result.by or ("known deviation" if result.deviation else "") or _by(result)
        return result.id, family, result.gate, self.word, note, self.shape, self.tone, self.known


def _by(result: CheckResult) -> str:
    """Who waives a failure and until when; empty of any other result."""
    return f"by {result.waiver.owner} until {result.waiver.expires}" if result.waiver else ""


def lines(results: Iterable[CheckResult], families: Container[str], column: Column | None = None) -> list[Line]:
    """The rows of ``results``, with the verdicts for the target of ``column`` if given."""
    found = []
    first: dict[tuple[str, str], str] = {}
    for result in results:
        shape = "none" if result.verdict in (Verdict.SKIP, Verdict.BLOCKED) else result.evidence
        counts = column.of_check(result.id) if column else None
        word = counts.word if counts else str(result.verdict)
        one = tightest(result.measurements)
        family = result.id.rpartition(".")[0]
        like = first.setdefault((family, result.said), result.id) if result.message else ""
        bar = Bar.of(one) if one else None
        found.append(
            Line(result, word, shape, tone_of(word, shape), family in families, bar, "" if like == result.id else like)
        )
    return found


@dataclass(frozen=True, slots=True)
class Failure:
    """Failing checks of a target of which the same is said: the ``name`` that they share, and what to do."""

    name: str
    cells: Sequence[Cell]
    step: str

    @property
    def waiver(self) -> Waiver | None:
        return self.cells[0].outcome.waiver


def failures(assessment: Assessment) -> list[Failure]:
    """The failures on a target, waived or not; those of one family with the same words are one."""
    groups: dict[tuple[object, ...], list[Cell]] = {}
    for cell in assessment.cells:
        if cell.failed or cell.warns or (cell.result and cell.result.waiver):
            result, spec = cell.outcome, cell.check.spec
            known = str(result.deviation or result.waiver or "")
            same = (spec.family, result.verdict, result.evidence, result.said, known, next_step(result, spec.remedy))
            groups.setdefault(same, []).append(cell)
    return [
        Failure(members[0].check.id if len(members) == 1 else members[0].check.spec.family, members, str(same[-1]))
        for same, members in groups.items()
    ]


def across(marks: Mapping[str, Mark | None]) -> str:
    """The results of one check on all targets in a sentence, such as that it fails only on one."""
    told = {name: mark for name, mark in marks.items() if mark is not None}
    failed = [name for name, mark in told.items() if mark.tone == "fail"]
    not_simulated, not_built = (
        [name for name in failed if told[name].shape == shape] for shape in ("simulated", "compiled")
    )
    failing = [name for name in failed if name not in (*not_simulated, *not_built)]
    passing = [name for name, mark in told.items() if mark.tone in ("pass", "emulated")]
    simulated, compiled = (
        [name for name, mark in told.items() if mark.tone == tone] for tone in ("simulated", "compiled")
    )
    waived = [name for name, mark in told.items() if mark.tone == "waived"]
    parts = []
    if failing:
        parts.append(f"fails {'only ' if len(failing) == 1 and passing else ''}on {listed(failing)}")
    if passing:
        parts.append(f"passes on {listed(passing)}")
    elif failing:
        parts.append("passes nowhere")
    parts += [f"its failure is waived on {listed(waived)}"] if waived else []
    parts += [f"fails in the simulator for {listed(not_simulated)}"] if not_simulated else []
    parts += [f"passes in the simulator for {listed(simulated)}"] if simulated else []
    parts += [f"does not compile for {listed(not_built)}"] if not_built else []
    if compiled:
        parts.append(f"compiled for {listed(compiled)}, which {'has' if len(compiled) == 1 else 'have'} not run it")
    sentence = "; ".join(parts) or "no target has a valid result"
    return f"{sentence[0].upper()}{sentence[1:]}."


def known_in(finding: Finding, outcomes: Mapping[str, CheckResult]) -> int:
    """How many failures of a finding are known deviations; ``outcomes`` are the results by id."""
    return sum(outcomes[name].deviation is not None for name in finding.checks if name in outcomes)


def title_of(finding: Finding, outcomes: Mapping[str, CheckResult], claims: Mapping[str, str]) -> str:
    """The title of a finding; ``outcomes`` are the results by id, ``claims`` those of the suite's checks by family."""
    first = finding.checks[0]
    return title(finding, outcomes[first], claims.get(first.rpartition(".")[0]))


def page_name(text: str) -> str:
    """``text`` as a file name; a digest keeps names apart in which characters had to be replaced."""
    safe = re.sub(r"[^A-Za-z0-9._-]", "_", text).lstrip(".")[:80]
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"
