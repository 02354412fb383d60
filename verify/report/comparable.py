"""Which runs are compared: of one target, kind of evidence, selection, model and subject, and no others."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from verify.architectures import parse_target
from verify.checks import Check
from verify.record.archive import moment, newest_first
from verify.record.index import Index, Point
from verify.record.schema import EVIDENCE, FAILING, Record, Verdict
from verify.record.staleness import same_subject
from verify.record.verdict import must_pass, profile_of

#: How many comparable runs show whether a check is flaky.
RECENT = 10

#: Verdicts that report a problem, or that another check's problem hides this one.
BAD = FAILING | {Verdict.BLOCKED}

#: Verdicts that say something about the check itself, and not about the machine.
TELLING = (FAILING | {Verdict.PASS}) - {Verdict.INFRA}

#: The verdicts of runs, by run and check.
Verdicts = Mapping[str, Mapping[str, Verdict]]


def comparable(one: Record, other: Record) -> bool:
    """Whether two runs may be compared: only their time, their machine and the version of the subject may differ."""
    return _kin(one) == _kin(other) and one.target == other.target and same_subject(one.subject, other.subject)


def _kin(record: Record) -> tuple[str, str, str]:
    """What runs of one night have in common on every target."""
    return record.kind, record.selection, record.model


@dataclass(frozen=True, slots=True)
class Course:
    """A run and the comparable ones before it, newest first, all without results, and their ``verdicts``.

    ``alone`` says why there is none before it; empty if there is one.
    """

    newest: Record
    earlier: Sequence[Record]
    verdicts: Verdicts
    alone: str

    @classmethod
    def of(cls, newest: Record, heads: Iterable[Record], verdicts: Verdicts) -> Course:
        """The course that ends with ``newest``, out of all ``heads``."""
        own = (one for one in heads if (one.target, one.kind) == (newest.target, newest.kind))
        older = newest_first(one for one in own if moment(one) < moment(newest))
        earlier = [one for one in older if comparable(one, newest)]
        return cls(newest, earlier, verdicts, "" if earlier else _alone(newest, older))

    @property
    def expected(self) -> set[str]:
        """The checks that the newest run has, or should have, a result of: its own, and those of the last earlier run
        that has any.
        """
        before = (self.verdicts.get(one.run_id, {}) for one in self.earlier)
        return {*self.verdicts.get(self.newest.run_id, {}), *next(filter(None, before), {})}

    def last_green(self, checks: Sequence[Check]) -> Record | None:
        """The newest green run before the newest run."""
        return next((one for one in self.earlier if is_green(one, self.verdicts.get(one.run_id, {}), checks)), None)

    def failed_before(self, check_id: str) -> str:
        """The last earlier run in which the check passed, failed or was blocked, if it did not pass; else empty."""
        for one in self.earlier:
            verdict = self.verdicts.get(one.run_id, {}).get(check_id)
            if verdict is Verdict.PASS or verdict in BAD:
                return "" if verdict is Verdict.PASS else one.run_id
        return ""

    def flaky(self) -> dict[str, str]:
        """The checks whose verdict changed between pass and failure at least twice in the ``RECENT`` newest of the runs
        of one content of the subject, with these verdicts in words, oldest first.

        Verdicts that say nothing about the check (SKIP, BLOCKED, INFRA and others) do not count.
        """
        digest = self.newest.subject.content_sha256
        alike = [one for one in (self.newest, *self.earlier) if one.subject.content_sha256 == digest]
        found: dict[str, list[Verdict]] = {}
        for one in reversed(alike[:RECENT]):
            for check_id, verdict in self.verdicts.get(one.run_id, {}).items():
                if verdict in TELLING:
                    found.setdefault(check_id, []).append(verdict)
        return {check_id: " ".join(told) for check_id, told in found.items() if _turns(told) > 1}


def _turns(verdicts: Sequence[Verdict]) -> int:
    return sum((one is Verdict.PASS) != (other is Verdict.PASS) for one, other in pairwise(verdicts))


def _alone(newest: Record, older: Sequence[Record]) -> str:
    if not older:
        return "there is no earlier run"
    if not (alike := [one for one in older if one.selection == newest.selection]):
        return f"no earlier run has its selection ({newest.selection})"
    if all(one.model != newest.model for one in alike):
        return f"no earlier run of its selection has its model ({newest.model})"
    return "every earlier run of its selection is of a subject with another name"


def is_green(run: Record, verdicts: Mapping[str, Verdict], checks: Sequence[Check]) -> bool:
    """Whether a run is complete, passed a must-pass check, and passed every must-pass check of its selection.

    In a simulation and in a compilation, in which some checks are skipped, none of them may have failed or be waived.
    """
    wanted = must_pass(checks, parse_target(run.target), profile_of(run.subject), verdicts)
    found = {verdicts[check.id] for check in wanted if check.id in verdicts}
    wrong = found - {Verdict.PASS} if run.on_target else found & (BAD | {Verdict.WAIVED})
    return run.state == "complete" and Verdict.PASS in found and not wrong


def verdicts_of(points: Iterable[Point]) -> dict[str, dict[str, Verdict]]:
    """The verdicts of results, by run and check."""
    found: dict[str, dict[str, Verdict]] = {}
    for one in points:
        found.setdefault(one.run_id, {})[one.id] = Verdict(one.verdict)
    return found


def courses(index: Index, target: str, verdicts: Verdicts) -> Iterator[tuple[Course, set[str]]]:
    """The newest run on ``target`` of each kind of evidence and each selection, newest first, and the checks that
    passed in newer ones of its kind.

    A run of which every check passed in a newer one is left out.
    """
    heads = [head for head in index.heads.values() if head.target == target]
    for kind in EVIDENCE:
        passed: set[str] = set()
        newest: dict[tuple[str, str, str], Record] = {}
        for head in newest_first(head for head in heads if head.kind == kind):
            newest.setdefault(_kin(head), head)
        for place, head in enumerate(newest.values()):
            course = Course.of(head, heads, verdicts)
            if place == 0 or course.expected - passed:
                yield course, set(passed)
            passed |= {name for name, verdict in verdicts.get(head.run_id, {}).items() if verdict is Verdict.PASS}


def missed(run: Record, heads: Iterable[Record]) -> str:
    """Why the target of ``run``, its newest, missed a night: another target has a run of the same evidence, selection
    and model from a later day (UTC). Empty if none has.
    """
    others = (one for one in heads if one.target != run.target and _kin(one) == _kin(run))
    newest = max(others, key=moment, default=run)
    day, last = (one.time_utc[:10] for one in (newest, run))
    return f"its newest run is of {last}, and {newest.target} has one of {day}" if day > last else ""
