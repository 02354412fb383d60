"""The cells of a target, one for each check: the newest result with the best evidence."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass

from verify.architectures import EMULATED, Target
from verify.checks import Check, Gate
from verify.record.archive import newest_first
from verify.record.schema import FAILING, NOT_OFFERED, CheckResult, Evidence, Record, Verdict
from verify.record.staleness import Comparison, why_not_merged
from verify.record.without_gpu import must_have

#: The evidence that a cell may show, best first; the verdict on the target rests on the first. A GPU's cell never shows
#: an emulated result.
_EMULATED_ONLY: tuple[Evidence, ...] = ("emulated",)
_ON_A_GPU: tuple[Evidence, ...] = ("hardware", "simulated", "compiled")
_AHEAD_OF_TIME: tuple[Evidence, ...] = ("compiled",)

#: By check and evidence: the newest result, its run id, and why it does not count (empty if it does).
_Results = dict[tuple[str, Evidence], tuple[CheckResult, str, str]]


@dataclass(frozen=True, slots=True)
class Cell:
    """One check on one target: the newest result with the best available evidence, or none."""

    check: Check
    must_pass: bool
    result: CheckResult | None
    proves: bool  #: whether the evidence is of the kind that the target's verdict rests on
    run_id: str | None
    stale: CheckResult | None = None  #: without a result: the newest one that no longer counts
    because: str = ""  #: why it no longer counts
    simulation: CheckResult | None = None  #: the newest simulated result that counts, also where a better one is shown

    @property
    def outcome(self) -> CheckResult:
        """The result of a cell that has one. Raises ValueError for any other cell."""
        if self.result is None:
            raise ValueError(f"{self.check.id} has no result")
        return self.result

    @property
    def passed(self) -> bool:
        return self.proves and self._is_one_of({Verdict.PASS})

    @property
    def failed(self) -> bool:
        return self.proves and self._is_one_of(FAILING)

    @property
    def not_offered(self) -> bool:
        """ABSENT or REFUSED: the subject does not offer what the check asks for."""
        return self.proves and self._is_one_of(NOT_OFFERED)

    @property
    def waived(self) -> bool:
        """A failure that the list of known failures has."""
        return self.proves and self._is_one_of({Verdict.WAIVED})

    @property
    def compiled(self) -> bool:
        """Built for the target, but not run on it."""
        return self._only("compiled") and self._is_one_of({Verdict.PASS})

    @property
    def not_compiled(self) -> bool:
        """A failed build ahead of time."""
        return self._only("compiled") and self.warns

    @property
    def simulated(self) -> bool:
        """Passed in the simulator, but not run on the target."""
        return self._only("simulated") and self._is_one_of({Verdict.PASS})

    @property
    def simulated_failed(self) -> bool:
        """Failed in the simulator, and not run on the target."""
        return self._only("simulated") and self.warns

    @property
    def warns(self) -> bool:
        """A failure with evidence that decides nothing: not a verdict on the target, but a bad sign."""
        return not self.proves and self._is_one_of(FAILING)

    def _only(self, evidence: Evidence) -> bool:
        """Whether there is nothing better than this evidence, which decides nothing."""
        return not self.proves and self.result is not None and self.result.evidence == evidence

    def _is_one_of(self, verdicts: Collection[Verdict]) -> bool:
        return self.result is not None and self.result.verdict in verdicts


@dataclass(frozen=True, slots=True)
class Known:
    """The newest results of a target by check and evidence: those that count, and those that do not."""

    counting: _Results
    before: _Results

    @classmethod
    def of(
        cls,
        used: Sequence[Record],
        stale: Sequence[Record],
        gates: Mapping[str, Gate],
        hard: Set[str],
        comparison: Comparison,
    ) -> Known:
        """From the records that are merged and the ``stale`` ones. ``gates`` are those of the catalogue, ``hard`` the
        ids of the target's must-pass checks.
        """
        counting: _Results = {}
        before: _Results = {}
        why = {id(record): why_not_merged(record, used) or "" for record in stale}
        for record in newest_first((*used, *stale)):
            for result in record.results:
                # must-pass checks of phase 6 are about the embedded model; runs with other models do not count
                other_model = result.id in hard and result.id.startswith("p6.") and record.model != "embedded"
                if gates.get(result.id) == result.gate and not other_model:
                    because = comparison.because(record, result) or why.get(id(record), "")
                    kept = before if because else counting
                    kept.setdefault((result.id, result.evidence), (result, record.run_id, because))
        return cls(counting, before)

    def cell(self, check: Check, target: Target) -> Cell:
        """The cell of a check, not yet said to be must-pass."""
        shown = _AHEAD_OF_TIME if check.spec.ahead_of_time else _EMULATED_ONLY if target is EMULATED else _ON_A_GPU
        simulation = self.counting.get((check.id, "simulated"), (None,))[0] if "simulated" in shown else None
        for evidence in shown:
            if (check.id, evidence) in self.counting:
                result, run_id, _ = self.counting[check.id, evidence]
                return Cell(check, False, result, evidence == shown[0], run_id, simulation=simulation)
        kept = (self.before[check.id, evidence] for evidence in shown if (check.id, evidence) in self.before)
        stale, _, because = next(kept, (None, "", ""))
        return Cell(check, False, None, False, None, stale, because)


def owed(record: Record, must_pass: Iterable[Cell]) -> list[Cell]:
    """The must-pass cells that a record of its kind must have a result of, and has none."""
    have = {result.id for result in record.results}
    phases = {int(name[1]) for name in have}
    gap = record.compilation is not None and bool(record.compilation.gap)
    return [
        cell
        for cell in must_pass
        if cell.check.id not in have and must_have(cell.check.spec, record.kind, phases, gap=gap)
    ]


def without_proof(cells: Iterable[Cell]) -> list[str]:
    """How many of the cells have evidence that decides nothing, in words, the best evidence first."""
    cells = list(cells)
    counted = (
        (sum(cell.simulated for cell in cells), "simulated"),
        (sum(cell.simulated_failed for cell in cells), "FAILED in the simulator"),
        (sum(cell.compiled for cell in cells), "compiled ahead of time"),
        (sum(cell.not_compiled for cell in cells), "NOT compiled (the build failed)"),
    )
    return [f"{number} of them {words}" for number, words in counted if number]
