"""Absences: why a nightly run of a target left no record that counts.

The job that collects the records of a night writes an absence as a file of its own, ``absence.json`` in a folder next
to those of the runs. It is evidence of nothing: a target whose newest run is absent is neither green nor failed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Literal

from pydantic import Field, ValidationError, model_validator

from verify.files import decoded, write_atomic
from verify.record.reading import misplaced
from verify.record.strict import Strict

FILE = "absence.json"

Kind = Literal["NO_RUNNER", "NO_RECORD", "INVALID"]

#: What each kind of absence means.
MEANINGS: Final[dict[Kind, str]] = {
    "NO_RUNNER": "no runner took the job",
    "NO_RECORD": "the job began and left no record",
    "INVALID": "the record of the job was refused",
}


class Absence(Strict):
    """A night on which ``target`` has no record that counts, and ``why``, in one sentence."""

    schema_version: Literal[1] = 1
    absence: Kind
    target: str = Field(pattern=r"^(emulated|sm\d{2,3})$")
    time_utc: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ$")
    why: str = Field(pattern=r"\S")
    rehearsal: bool = False

    @model_validator(mode="after")
    def _at_a_moment(self) -> Absence:
        datetime.fromisoformat(self.time_utc)
        return self

    @property
    def told(self) -> str:
        """Day, kind and reason in words."""
        return f"{self.absence} on {self.time_utc[:10]}: {MEANINGS[self.absence]} ({self.why})"

    def write(self, runs: Path) -> Path:
        """Write the file into a new folder of ``runs``, and return its path."""
        stamp = self.time_utc.translate(str.maketrans("", "", "-:"))
        path = runs / f"{stamp}-{self.target}-{self.absence.lower().replace('_', '-')}" / FILE
        write_atomic(path, self.model_dump_json(indent=1) + "\n")
        return path


def read(paths: Iterable[Path]) -> tuple[list[Absence], list[str]]:
    """The absences in these files, newest first, and a sentence for each file that does not count."""
    found, problems = [], []
    for path in paths:
        try:
            one = Absence.model_validate(json.loads(decoded(path.read_bytes())))
        except OSError as error:
            problems.append(f"{path}: cannot be read ({error.strerror})")
        except ValidationError as error:
            first = error.errors()[0]
            problems.append(f"{path}: is not an absence ({'.'.join(map(str, first['loc']))}: {first['msg']})")
        except ValueError as error:
            problems.append(f"{path}: is not JSON ({error})")
        else:
            if why := misplaced(one.rehearsal):
                problems.append(f"{path}: {why}")
            else:
                found.append(one)
    return sorted(found, key=lambda one: one.time_utc, reverse=True), problems


def newest_of(absences: Sequence[Absence], target: str, since: str) -> Absence | None:
    """The newest absence of a target after the moment ``since`` (RFC 3339; empty: ever)."""
    return next((one for one in absences if one.target == target and one.time_utc > since), None)
