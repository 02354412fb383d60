"""Reading and writing the files of records.

Reading a record needs only pydantic. Writing is atomic, so a reader never sees half a file. The JSON Schema of
``Record`` is in ``reports/schema/record.schema.json``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from verify.files import decoded, write_atomic
from verify.record.schema import SCHEMA_VERSION, Record

_REHEARSING: ContextVar[bool] = ContextVar("rehearsing", default=False)


class UnreadableRecord(ValueError):
    """A record file that cannot be used; the message names the file and its first problem."""


def unrepeated(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The entries of a JSON object. Raises ValueError for two equal names.

    JSON readers keep the last of them, so a record could show a person one value and a reader another.
    """
    if len(found := dict(pairs)) < len(pairs):
        twice = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
        raise ValueError(f"has {twice!r} twice in one object")
    return found


@contextmanager
def rehearsals_only() -> Iterator[None]:
    """Inside, only the made-up records of a rehearsal are read, and every other record is refused."""
    token = _REHEARSING.set(True)
    try:
        yield
    finally:
        _REHEARSING.reset(token)


def rehearse(on: bool) -> None:
    """As ``rehearsals_only``, for a process that was started to read records, until it ends."""
    _REHEARSING.set(on)


def rehearsing() -> bool:
    """Whether made-up records are read, and no others."""
    return _REHEARSING.get()


def misplaced(rehearsal: bool) -> str:
    """Why a file that is, or is not, a ``rehearsal`` must not be read now; empty if it may."""
    if rehearsal == rehearsing():
        return ""
    return "is made up for a rehearsal, shown with --rehearsal" if rehearsal else "is real; drop --rehearsal"


def read_record(path: Path, *, unique: bool = False) -> Record:
    """Read and validate one record. Raises UnreadableRecord naming the file and its first problem, which may be that it
    is made up for a rehearsal (``rehearsals_only``).

    ``unique`` also refuses repeated names, which takes half as long again.
    """
    try:
        content = decoded(path.read_bytes())
        if unique:
            json.loads(content, object_pairs_hook=unrepeated)
        record = Record.model_validate_json(content)
    except json.JSONDecodeError as error:
        raise UnreadableRecord(f"{path}: is cut off or not JSON ({error})") from error
    except OSError as error:
        raise UnreadableRecord(f"{path}: cannot be read ({error.strerror})") from error
    except ValidationError as error:
        contradiction = f"contradicts itself ({error.errors()[0]['msg']})"
        raise UnreadableRecord(f"{path}: {shape_problem(error) or contradiction}") from error
    except ValueError as error:
        raise UnreadableRecord(f"{path}: {error}") from error
    if why := misplaced(record.rehearsal):
        raise UnreadableRecord(f"{path}: {why}")
    return record


def shape_problem(error: ValidationError) -> str:
    """Why a file does not have the shape of a record; empty if only its parts contradict each other."""
    for one in error.errors():
        place = ".".join(map(str, one["loc"]))
        if one["type"] == "json_invalid":
            return f"is cut off or not JSON ({one['msg'].removeprefix('Invalid JSON: ')})"
        if place == "schema_version":
            return (
                f"has schema version {one['input']}, but this suite reads {SCHEMA_VERSION}; use the suite that wrote it"
            )
        if one["type"] != "value_error":
            return f"is not a record ({place or 'file'}: {one['msg']})"
    return ""


def write_record(record: Record, path: Path) -> None:
    write_atomic(path, record.model_dump_json(indent=1) + "\n")


def json_schema() -> str:
    """The JSON Schema of a record, as stored in ``reports/schema/``."""
    return json.dumps(Record.model_json_schema(), indent=1, sort_keys=True) + "\n"
