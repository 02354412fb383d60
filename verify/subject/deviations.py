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
from collections.abc import Iterable
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
    found = validated(file, _File, _told)
    words = {word for one in checks for word in (one.id, one.spec.family)}
    for number, entry in enumerate(found.deviation, start=1):
        for name in entry.checks:
            if name not in words:
                near = difflib.get_close_matches(name, words, 1, 0.0)[0]
                raise ConfigurationError(
                    f"{file}: {name!r} in entry {number} is not a check or a family; the nearest is {near!r}"
                )
    return tuple(found.deviation)


def _told(error: ValidationError) -> str:
    first = error.errors()[0]
    table, number, field = (*first["loc"], None, None)[:3]
    if table != "deviation":
        return f"{table} is not known; an entry begins with [[deviation]]"
    if not isinstance(number, int) or field is None:
        return f"deviation is {reprlib.repr(first['input'])}; begin each entry with [[deviation]]"
    if first["type"] == "extra_forbidden":
        return f"{field} of entry {number + 1} is not known; an entry has {', '.join(_EXPECTED)}"
    expected = _EXPECTED[str(field)]
    if first["type"] == "missing":
        return f"entry {number + 1} has no {field}; give {expected}"
    return f"{field} of entry {number + 1} is {reprlib.repr(first['input'])}; give {expected}"
