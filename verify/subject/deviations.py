"""``deviations.toml``: the failures that the author of a subject knows about and has not fixed yet.

[[deviation]]
checks = ["p4.zero", "p4.triton_oracle.n33"]   # families, or ids of checks
reason = "The score of a key of zeros is NaN."
issue = "https://github.com/them/theirs/issues/12"
expires = 2027-03-01                                # the last day on which it counts as known
"""

from __future__ import annotations

import difflib
import os
import reprlib
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from verify.checks import Check
from verify.errors import ConfigurationError
from verify.record.deviations import FILE, Entry
from verify.subject.subject import Subject
from verify.subject.toml import validated

_EXPECTED = {
    "checks": "a list of ids of checks or families",
    "reason": "one sentence",
    "issue": "the URL of the issue, https://...",
    "expires": "a date without quotes, such as 2027-03-01",
}


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    deviation: list[Entry] = Field(default_factory=list)


def read_deviations(subject: Subject, repository: Path, checks: Iterable[Check]) -> tuple[Entry, ...]:
    """The known deviations of a subject; none without a file, which is in the root of a checkout, or in the package.

    Raises ConfigurationError, in one sentence with the entry, its value and what is expected, for the first mistake,
    and for a file of the bundled subject.
    """
    bundled = subject.root.resolve() == repository.resolve()
    file = (subject.root if bundled or subject.source.startswith("checkout:") else subject.folder) / FILE
    if not os.path.lexists(file):
        return ()
    if bundled:
        raise ConfigurationError(f"{file}: the bundled subject may have no known deviation; delete the file")
    found = validated(file, _File, partial(mistake, table="deviation", expected=_EXPECTED))
    words = {word for one in checks for word in (one.id, one.spec.family)}
    for number, entry in enumerate(found.deviation, start=1):
        for name in entry.checks:
            if name not in words:
                raise ConfigurationError(
                    f"{file}: {name!r} in entry {number} is not a check or a family; {nearest(name, words)}"
                )
    return tuple(found.deviation)


def nearest(name: str, words: Iterable[str]) -> str:
    """Which of ``words`` is most like ``name``, as the end of an error message."""
    return f"the nearest is {difflib.get_close_matches(name, [*words], 1, 0.0)[0]!r}"


def mistake(error: ValidationError, table: str, expected: Mapping[str, str]) -> str:
    """The first mistake in a file of entries that each begin with ``[[table]]``, as the end of an error message.

    ``expected`` has what to give for each field; a field of a table in the entry has a name such as ``when.sm``.
    """
    first = error.errors()[0]
    top, number, *rest = (*first["loc"], None)[:4]
    field = ".".join(part for part in rest if isinstance(part, str))
    if top != table:
        return f"{top} is not known; an entry begins with [[{table}]]"
    if not isinstance(number, int) or not field:
        return f"{table} is {reprlib.repr(first['input'])}; begin each entry with [[{table}]]"
    if first["type"] == "extra_forbidden":
        within, _, _ = field.rpartition(".")
        known = [one.removeprefix(f"{within}.") for one in expected if one.rpartition(".")[0] == within]
        return f"{field} of entry {number + 1} is not known; {within or 'an entry'} has {', '.join(known)}"
    if first["type"] == "missing":
        return f"entry {number + 1} has no {field}; give {expected[field]}"
    return f"{field} of entry {number + 1} is {reprlib.repr(first['input'])}; give {expected[field]}"
