"""``ci/known_failures.toml``: the failures of the bundled subject that are known, owned and not fixed yet.

The file itself explains its fields; ``verify/record/known_failures.py`` says what they do to a run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import combinations
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from verify.architectures import ARCHITECTURES
from verify.checks import Check
from verify.errors import ConfigurationError
from verify.record.grounds import BUNDLED
from verify.record.known_failures import FILE, KnownFailure
from verify.subject.deviations import mistake, nearest
from verify.subject.toml import validated

#: The most days that an entry counts after it was added: then somebody must look at it again.
LONGEST_D = 90

_VERSION = "a version specifier such as '>=3.8,<3.9'"
_EXPECTED = {
    "checks": "a list of ids, families or patterns of ids",
    "when": "a table such as { sm = [120], triton = '>=3.8' }",
    "reason": "one sentence",
    "issue": "the URL of the issue, https://...",
    "owner": "who fixes it, such as '@name'",
    "added": "a date without quotes, such as 2026-12-01",
    "expires": "a date without quotes, such as 2027-02-01",
    "probe": "the command that shows whether it is fixed",
    "when.sm": "a list of SM numbers, such as [120, 121]",
    "when.driver": _VERSION,
    "when.cuda": _VERSION,
    "when.triton": _VERSION,
    "when.torch": _VERSION,
    "when.model": "the name of a model",
}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    known_failure: list[KnownFailure] = Field(default_factory=list)


def read_known_failures(source: str, repository: Path, checks: Iterable[Check]) -> tuple[KnownFailure, ...]:
    """The known failures of the subject with this ``source``: those of the file for the bundled one, none for another.

    Raises ConfigurationError, in one sentence with the entry, its value and what is expected, for the first mistake.
    """
    file = repository / FILE
    if source != BUNDLED or not os.path.lexists(file):
        return ()
    found = validated(file, _File, partial(mistake, table="known_failure", expected=_EXPECTED)).known_failure
    checks = list(checks)
    for number, entry in enumerate(found, start=1):
        if wrong := _names(entry, number, checks) or _days(entry, number):
            raise ConfigurationError(f"{file}: {wrong}")
    if wrong := _overlap(found, checks):
        raise ConfigurationError(f"{file}: {wrong}")
    return tuple(found)


def _names(entry: KnownFailure, number: int, checks: Sequence[Check]) -> str:
    """What is wrong with the names of checks and GPUs in an entry; empty if nothing is."""
    for name in entry.checks:
        if not any(entry.model_copy(update={"checks": [name]}).covers(one.id) for one in checks):
            near = nearest(name, {word for one in checks for word in (one.id, one.spec.family)})
            return f"{name!r} in entry {number} matches no check; {near}"
    known = {one.sm: str(one.sm) for one in ARCHITECTURES}
    if unknown := [sm for sm in entry.when.sm or () if sm not in known]:
        return f"when.sm of entry {number} has {unknown[0]}; use {', '.join(known.values())}"
    return ""


def _days(entry: KnownFailure, number: int) -> str:
    """What is wrong with the days of an entry; empty if nothing is."""
    last = entry.added + timedelta(days=LONGEST_D)
    tomorrow = datetime.now(UTC).date() + timedelta(days=1)  # where it is later than in UTC, that is today
    if entry.added > tomorrow:
        return f"added of entry {number} is {entry.added}, which is in the future; give the day on which it was added"
    if not entry.added <= entry.expires <= last:
        return (
            f"expires of entry {number} is {entry.expires}; give a day from {entry.added} to {last}, which is "
            f"{LONGEST_D} days after it was added"
        )
    return ""


def _overlap(entries: Sequence[KnownFailure], checks: Sequence[Check]) -> str:
    """Which two entries match one check on one GPU; empty if none do."""
    for (first, one), (second, other) in combinations(enumerate(entries, start=1), 2):
        if one.when.overlaps(other.when):
            for check in checks:
                if one.covers(check.id) and other.covers(check.id):
                    return f"entries {first} and {second} both match {check.id} on the same target; narrow one of them"
    return ""
