"""The verdict on a GPU, or on the emulated target, from its must-pass checks, merged over its records."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from verify.architectures import EMULATED, Target, parse_target
from verify.checks import PROFILES, Check, catalogue
from verify.record.absences import Absence, newest_of
from verify.record.builds import Compilation
from verify.record.capabilities import by_capability
from verify.record.cells import Cell, Known, without_proof
from verify.record.findings import without_cause
from verify.record.grounds import BUNDLED, Checkout
from verify.record.reading import rehearsing
from verify.record.schema import NOT_OFFERED, Finding, Record, SubjectInfo, Verdict
from verify.record.simulation import Simulation
from verify.record.staleness import Comparison, merged


class TargetVerdict(StrEnum):
    """The verdict on a target. VERIFIED vouches for hardware: everything of the profile ``full`` passed on it. CONFORMS
    does for an implementation with another profile, or none. The EMULATED verdicts vouch for no hardware. With
    NO_RUNNER, NO_RECORD and INVALID the newest night left nothing that counts (``verify/record/absences.py``).
    """

    VERIFIED = "VERIFIED"
    CONFORMS = "CONFORMS"
    FAILED = "FAILED"
    INCOMPLETE = "INCOMPLETE"
    INFRA = "INFRA"
    NO_RUNNER = "NO_RUNNER"
    NO_RECORD = "NO_RECORD"
    INVALID = "INVALID"
    EMULATED_PASS = "EMULATED PASS"
    EMULATED_FAIL = "EMULATED FAIL"
    EMULATED_INCOMPLETE = "EMULATED INCOMPLETE"


_EMULATED_WORDS = {
    TargetVerdict.VERIFIED: TargetVerdict.EMULATED_PASS,
    TargetVerdict.CONFORMS: TargetVerdict.EMULATED_PASS,
    TargetVerdict.FAILED: TargetVerdict.EMULATED_FAIL,
    TargetVerdict.INCOMPLETE: TargetVerdict.EMULATED_INCOMPLETE,
    TargetVerdict.INFRA: TargetVerdict.INFRA,
}

#: Begins what is said of made-up records.
REHEARSAL = "REHEARSAL, no evidence: "

#: The SOFT families that an implementation with the profile ``serving`` must pass too.
_SERVING = frozenset({"p7.plugin", "p7.stream", "p7.replay", "p7.together", "p7.blocks"})


@dataclass(frozen=True, slots=True)
class Assessment:
    """A target's verdict with everything it rests on.

    ``used`` and ``stale`` are newest first. ``comparison`` says which results count. ``absence`` is why the newest
    night has no record, if that is so; then the cells are those of earlier runs.
    """

    target: Target
    verdict: TargetVerdict
    sentence: str
    cells: tuple[Cell, ...]
    used: tuple[Record, ...]
    stale: tuple[Record, ...]
    unknown_ids: tuple[str, ...]
    comparison: Comparison
    absence: Absence | None = None

    @property
    def must_pass(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.must_pass)

    @property
    def missing(self) -> tuple[Cell, ...]:
        """Must-pass cells that neither passed nor failed: absent, skipped, blocked, or with other evidence only."""
        return tuple(cell for cell in self.must_pass if not (cell.passed or cell.failed or cell.waived))

    @property
    def waived(self) -> tuple[Cell, ...]:
        """Cells with failures that the list of known failures has, must-pass or not."""
        return tuple(cell for cell in self.cells if cell.waived)

    @property
    def outdated(self) -> dict[str, list[Cell]]:
        """The cells whose newest result no longer counts, by reason."""
        found: dict[str, list[Cell]] = {}
        for cell in self.cells:
            if cell.stale is not None:
                found.setdefault(cell.because, []).append(cell)
        return found

    @property
    def capabilities(self) -> dict[str, str]:
        """What the subject offers, capability by capability, in words; empty where the bundled one passes."""
        passes = not any(cell.failed or cell.not_offered for cell in self.must_pass)
        return {} if self.subject is None or (self.subject.source == BUNDLED and passes) else self.offered

    @property
    def offered(self) -> dict[str, str]:
        """``capabilities`` of any subject."""
        results = ((cell.check.capability, cell.outcome) for cell in self.cells if cell.proves and cell.result)
        return by_capability(results, self.used[0].subject)

    @property
    def findings(self) -> tuple[Finding, ...]:
        """The failing cells by cause, as their runs found them; those of which no run says a cause by verdict."""
        failed = {(cell.run_id, cell.check.id) for cell in self.cells if cell.failed or cell.warns}
        found = []
        for record in self.used:
            for one in record.findings:
                if checks := [name for name in one.checks if (record.run_id, name) in failed]:
                    failed -= {(record.run_id, name) for name in checks}
                    found.append(one.model_copy(update={"checks": checks}))
        left: dict[str, list[str]] = {}
        for cell in self.cells:
            if (cell.run_id, cell.check.id) in failed:
                left.setdefault(without_cause(cell.outcome), []).append(cell.check.id)
        return (*found, *(Finding(cause=cause, checks=checks) for cause, checks in left.items()))

    @property
    def with_curves(self) -> tuple[Cell, ...]:
        """The cells whose results have curves to plot."""
        return tuple(cell for cell in self.cells if cell.result is not None and cell.result.curves)

    @property
    def subject(self) -> SubjectInfo | None:
        return self.used[0].subject if self.used else None

    @property
    def compilation(self) -> Compilation | None:
        """The newest compilation for the target."""
        return next((record.compilation for record in self.used if record.compilation), None)

    @property
    def simulation(self) -> Simulation | None:
        """The newest simulation for the target."""
        return next((record.simulation for record in self.used if record.simulation), None)

    def why_stale(self, record: Record) -> str | None:
        """Why no result of ``record`` counts; None if any does."""
        return self.comparison.why_stale(record, self.used)


def profile_of(subject: SubjectInfo) -> str | None:
    """What a subject must pass: the bundled one everything, unless its record says otherwise."""
    return subject.profile or ("full" if subject.source == BUNDLED else None)


def must_pass(
    checks: Iterable[Check],
    target: Target,
    profile: str | None = "full",
    verdicts: Mapping[str, Verdict] | None = None,
) -> list[Check]:
    """The checks that an implementation with ``profile`` must pass on ``target``, given the ``verdicts`` so far, by id.

    For ``full`` every HARD check that applies to the target. For another profile those of its capabilities; of
    alternatives, those that the implementation offers. Without a profile, every HARD check of what it offers, except
    those that the published API does not promise.
    """
    verdicts = verdicts or {}
    applying = [check for check in checks if check.applies_to(target.target)]
    hard = [check for check in applying if check.spec.gate == "hard"]
    if profile is None:
        return [check for check in hard if check.capability != "plan" and verdicts.get(check.id) not in NOT_OFFERED]
    offered = {check.capability for check in applying if verdicts.get(check.id, Verdict.ABSENT) not in NOT_OFFERED}
    wanted = {name for names in PROFILES[profile] for name in ({*names} & offered or names)}
    if profile != "full":  # of a capability that is offered, one function is enough
        spared = {check.id for check in hard if check.spec.family == "p2.names" and check.capability in offered}
        hard = [check for check in hard if check.id not in spared or verdicts.get(check.id) is not Verdict.ABSENT]
    soft = [check for check in applying if check.spec.family in _SERVING] if profile == "serving" else []
    return [check for check in hard if check.capability in wanted] + soft


def describe_subject(subject: SubjectInfo) -> str:
    """The subject in a few words: ``triattention 0.1.0 (1234abc, with local changes)``; of any but the bundled one also
    its source, because its name may be the same.
    """
    source = "" if subject.source == BUNDLED else f"{subject.source}, "
    return f"{subject.name} {subject.version} ({source}{commit_of(subject)})"


def commit_of(subject: SubjectInfo) -> str:
    """The commit of the subject, and whether it has local changes, in words."""
    state = ", with local changes" if subject.dirty and subject.git_sha != "none" else ""
    return "no git commit" if subject.git_sha == "none" else f"{subject.git_sha[:7]}{state}"


def assess(
    target: Target,
    records: Iterable[Record],
    checks: Sequence[Check],
    checkout: Checkout | None = None,
    absences: Sequence[Absence] = (),
) -> Assessment:
    """The verdict on ``target`` from those of its ``records`` that are comparable with its newest run.

    For each id the newest result counts, a failure as much as a pass, unless a file that it rests on differs in
    ``checkout``. A must-pass check of phase 6 counts with the embedded model only. Records of another subject, software
    or card are listed as stale, as are those of which no result counts. Neither a compilation ahead of time nor a
    simulation makes a run stale; if nothing ran, the newest simulation decides, or else the newest compilation. A
    result whose gate differs from the catalogue's is treated as one of a check that this suite does not have. Without a
    ``checkout``, every result counts. One of ``absences`` that is newer than the newest run on the target decides the
    verdict.
    """
    used, stale, comparison = merged(target, records, checkout)
    gates = {check.id: check.spec.gate for check in checks}
    profile = profile_of(used[0].subject) if used else "full"
    hard = {check.id for check in must_pass(checks, target)}
    known = Known.of(used, stale, gates, hard, comparison)
    found = [known.cell(check, target) for check in checks]
    verdicts = {cell.check.id: cell.result.verdict for cell in found if cell.result is not None}
    wanted = {check.id for check in must_pass(checks, target, profile, verdicts)}
    cells = tuple(
        replace(cell, must_pass=cell.check.id in wanted)
        for cell in found
        if cell.result is not None or cell.check.applies_to(target.target)
    )
    results = (result for record in used for result in record.results)
    unknown = tuple(dict.fromkeys(result.id for result in results if gates.get(result.id) != result.gate))
    verdict = _verdict([cell for cell in cells if cell.must_pass])
    if verdict is TargetVerdict.VERIFIED and profile != "full":
        verdict = TargetVerdict.CONFORMS
    if target is EMULATED:
        verdict = _EMULATED_WORDS[verdict]
    sentence = _sentence(target, verdict, cells, used, stale)
    ran = max((one.time_utc for one in (*used, *stale) if one.on_target), default="")
    if absence := newest_of(absences, target.target, ran):
        verdict, sentence = TargetVerdict(absence.absence), f"{absence.told}. Before that: {sentence}"
    if rehearsing():
        sentence = f"{REHEARSAL}{sentence}"
    return Assessment(target, verdict, sentence, cells, tuple(used), tuple(stale), unknown, comparison, absence)


def _verdict(cells: Sequence[Cell]) -> TargetVerdict:
    failed = {cell.outcome.verdict for cell in cells if cell.failed}
    if failed - {Verdict.INFRA}:
        return TargetVerdict.FAILED
    if failed:
        return TargetVerdict.INFRA
    if cells and all(cell.passed for cell in cells):
        return TargetVerdict.VERIFIED
    return TargetVerdict.INCOMPLETE


def _sentence(
    target: Target, verdict: TargetVerdict, cells: Sequence[Cell], used: Sequence[Record], stale: Sequence[Record]
) -> str:
    """One sentence on what was verified and what was not."""
    hard = [cell for cell in cells if cell.must_pass]
    emulated = target is EMULATED
    if not used:
        who = "a run without a GPU" if emulated else f"an {target.target} GPU"
        none = f"none of its {len(hard)} must-pass checks is verified"
        if stale:
            why = next((f" ({cell.because})" for cell in cells if cell.stale is not None), "")
            records = "record" if len(stale) == 1 else f"{len(stale)} records"
            return f"No result in the {records} of {who} is still valid{why}, so {none}."
        return f"There is no record of {who}, so {none}."
    failed = [cell.check.id for cell in hard if cell.failed]
    waived = [cell.check.id for cell in hard if cell.waived]
    passed = sum(cell.passed for cell in hard)
    left = len(hard) - passed - len(failed) - len(waived)
    ahead = "".join(f", {words}" for words in without_proof(hard))
    subject = used[0].subject
    where = f"{_where(target, used)} for {describe_subject(subject)}"
    if (profile := profile_of(subject)) != "full":
        where += f" (profile {profile})" if profile else " (without a profile: judged by what it offers)"
    end = "; this verifies no GPU." if emulated else "."
    if verdict in (TargetVerdict.VERIFIED, TargetVerdict.CONFORMS, TargetVerdict.EMULATED_PASS):
        return f"All {len(hard)} must-pass checks passed {where}; {_soft(cells)}{end}"
    if unoffered := [cell.check.id for cell in hard if cell.not_offered]:
        ahead = f", {len(unoffered)} of them absent or refused, the first {unoffered[0]}{ahead}"
    if failed:
        ended = "could not be judged" if verdict is TargetVerdict.INFRA else "failed"
        start = f"{len(failed)} of {len(hard)} must-pass checks {ended} {where}, {_first_of(failed, hard)}"
        rest = f"{passed} passed, {f'{len(waived)} waived, ' if waived else ''}{left} without a valid result{ahead}"
        return f"{start}; {rest}{end}"
    listed = f" (waived: {', '.join(waived)})" if waived else ""
    missing = f"; {left} {'has' if left == 1 else 'have'} no valid result{ahead}" if left else ""
    others = "no other" if waived else "none"
    return (
        f"{passed} of {len(hard)} must-pass checks passed {where} and {others} failed{missing}, "
        f"so {target.target} is INCOMPLETE{listed}{end}"
    )


def _first_of(failed: Sequence[str], hard: Sequence[Cell]) -> str:
    """Which checks failed: the first that is no known deviation, and how many are; if all are, the first of them."""
    known = {cell.check.id for cell in hard if cell.failed and cell.outcome.deviation}
    if not known:
        return f"the first of them {failed[0]}"
    what = f"{len(known)} of them known deviations" if len(known) > 1 else "1 of them a known deviation"
    if others := [name for name in failed if name not in known]:
        return f"{what}, the first of the others {others[0]}"
    return f"{'all of them known deviations' if len(known) > 1 else 'a known deviation'}, the first {failed[0]}"


def _where(target: Target, used: Sequence[Record]) -> str:
    if target is EMULATED:
        return "under Triton's interpreter and CPU torch"
    cards = dict.fromkeys(record.environment.gpu.name for record in used if record.environment.gpu)
    return f"on {' and '.join(cards)}" if cards else f"without any {target.target} GPU"


def _soft(cells: Sequence[Cell]) -> str:
    soft = [cell for cell in cells if cell.check.spec.gate == "soft"]
    passed, failed = sum(cell.passed for cell in soft), sum(cell.failed for cell in soft)
    waived = sum(cell.waived for cell in soft)
    absent = len(soft) - passed - failed - waived
    known = f"{waived} waived, " if waived else ""
    return f"of {len(soft)} soft checks {passed} passed, {failed} failed, {known}{absent} without a result"


def missing_by_phase(assessment: Assessment) -> dict[int, list[Cell]]:
    """The missing must-pass cells, by phase, ascending."""
    phases: dict[int, list[Cell]] = {}
    for cell in sorted(assessment.missing, key=lambda cell: cell.check.phase):
        phases.setdefault(cell.check.phase, []).append(cell)
    return phases


def fill_command(assessment: Assessment) -> str:
    """The command that would run what is missing, on a machine with the target's GPU."""
    where = "--device cpu" if assessment.target is EMULATED else f"--expect {assessment.target.target}"
    missing = set(missing_by_phase(assessment))
    some = missing != {cell.check.phase for cell in assessment.must_pass}
    newest = next((record.subject for record in (*assessment.used, *assessment.stale)), None)
    return f"python -m verify run {where}{subject_option(newest)}" + (
        f" --phases {','.join(map(str, sorted(missing)))}" if some else ""
    )


def subject_option(subject: SubjectInfo | None) -> str:
    """The option that chooses the subject again, none for the bundled one. A record has no checkout's path."""
    if subject is None or subject.source == BUNDLED:
        return ""
    return f" --subject={'PATH' if subject.source.startswith('checkout:') else subject.source}"


def assess_record(record: Record) -> Assessment:
    """What ``record`` alone proved about its target when it was made."""
    return assess(parse_target(record.target), [record], list(catalogue()))
