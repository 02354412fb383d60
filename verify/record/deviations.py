"""Known deviations: failures of a subject that its author has listed, each with a reason, an issue and a last day.

A failure that is listed remains a FAIL, in its finding and in the verdict. It is marked as known in the record and in
every report, and does not decide the exit code of a run.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from typing import Annotated

from pydantic import Field

from verify.checks import Check
from verify.record.schema import FAILING, NOT_OFFERED, CheckResult, Deviation, Verdict

#: What an entry is read from, next to where ``subject.toml`` is.
FILE = "deviations.toml"

#: How many checks are named in one sentence; the rest is only counted.
_NAMED = 6


class Entry(Deviation):
    """A deviation and its ``checks``: ids of checks or of families."""

    checks: list[Annotated[str, Field(min_length=1)]] = Field(min_length=1)

    def covers(self, check_id: str) -> bool:
        return check_id in self.checks or check_id.rpartition(".")[0] in self.checks

    def expired(self, today: date) -> bool:
        return self.expires < today

    @property
    def told(self) -> str:
        return f"the known deviation {', '.join(self.checks)}"


def known(entries: Iterable[Entry], check_id: str, today: date) -> Deviation | None:
    """The first entry for the check that has not expired on ``today``, without its checks; None without any."""
    found = (one for one in entries if one.covers(check_id) and not one.expired(today))
    return next((Deviation(reason=one.reason, issue=one.issue, expires=one.expires) for one in found), None)


def told_before(entries: Sequence[Entry], today: date) -> Iterator[str]:
    """A sentence for each entry that has expired, to be printed before the run."""
    for one in entries:
        if one.expired(today):
            yield f"{one.told} expired on {one.expires}, so its failures count; fix them, or give a later date"


def without_failure(entries: Iterable[Entry], results: Sequence[CheckResult], checks: Sequence[Check]) -> list[str]:
    """A sentence for each entry of which every check has a result and none failed.

    An entry with a check that did not run, was skipped or was blocked is left alone.
    """
    fine = {one.id for one in results if one.verdict in NOT_OFFERED | {Verdict.PASS}}
    told = []
    for entry in entries:
        own = {one.id for one in checks if entry.covers(one.id)}
        if own and own <= fine:
            none = "its check did not fail" if len(own) == 1 else f"none of its {len(own)} checks failed"
            told.append(f"{entry.told} matches nothing, because {none}; remove it from {FILE}")
    return told


def told_after(results: Sequence[CheckResult], *, alone: bool) -> str:
    """A sentence on the failures that are known; empty without any. ``alone`` says that nothing else makes the run
    fail.
    """
    names = [one.id for one in results if one.deviation is not None]
    if not names:
        return ""
    failed = sum(one.verdict in FAILING for one in results)
    failures = "1 failure" if failed == 1 else f"{failed} failures"
    if others := failed - len(names):
        share = f"{len(names)} of them known deviations" if len(names) > 1 else "1 of them a known deviation"
        end = "the others are warnings" if alone else f"{'the other one counts' if others == 1 else 'the others count'}"
    else:
        share = "a known deviation" if failed == 1 else "all of them known deviations"
        end = "nothing else failed" if alone else "the run fails for another reason"
    return f"{failures}, {share} ({some(names)}){untested(names, results)}; {end}"


def some(names: Sequence[str]) -> str:
    """The first few of ``names``, and how many more there are."""
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"{', '.join(names[:_NAMED])}{more}"


def untested(names: Sequence[str], results: Iterable[CheckResult]) -> str:
    """How many checks are blocked by those of ``names``, as the continuation of a sentence; empty without any."""
    blocked = sum(one.by in names for one in results)
    return f"; {blocked} more did not run because of them" if blocked else ""
