"""The records on disk: published evidence and local runs, with the files among them that cannot be read."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from verify.outcome import ConfigurationError
from verify.record import Record, UnreadableRecord, read_record
from verify.request import repository_root

RECORD = "record.json"

#: Beside its own record a run on a GPU keeps what was built for it.
_BUILT = "sm*.json"


@dataclass(frozen=True, slots=True)
class Archive:
    """What was read: the records, and one sentence for each file that is no record."""

    records: tuple[Record, ...]
    unreadable: tuple[str, ...]


def load(folders: Sequence[Path] = ()) -> Archive:
    """Read every record under ``folders``; without any, ``reports/evidence`` and ``reports/runs`` of the repository.

    A file that cannot be read is listed, never raised. Raises ConfigurationError for a folder that is not there.
    """
    records: list[Record] = []
    unreadable: list[str] = []
    for path in _given(folders) if folders else _default(repository_root() / "reports"):
        try:
            record = read_record(path)
        except UnreadableRecord as error:
            unreadable.append(str(error))
        else:
            # evidence is published by copying a run's record, so both may be there
            if record not in records:
                records.append(record)
    return Archive(tuple(records), tuple(unreadable))


def locate(name: str) -> list[Path]:
    """The files of the record that ``name`` is: a file, the directory of a run, or the id of a run or published record.

    Raises ConfigurationError for a name that is none of them.
    """
    path, reports = Path(name), repository_root() / "reports"
    if path.is_file():
        return [path]
    for folder in (path, reports / "runs" / name):
        if folder.is_dir() and (found := [*folder.glob(RECORD), *sorted(folder.glob(_BUILT))]):
            return found
    if found := sorted((reports / "evidence").rglob(f"{glob.escape(path.name)}.json")):
        return found[:1]
    raise ConfigurationError(f"there is no record {name!r}; give a file, the directory of a run, or the id of a run")


def _default(reports: Path) -> Iterator[Path]:
    yield from sorted((reports / "evidence").rglob("*.json"))
    yield from sorted((reports / "runs").glob(f"*/{RECORD}"))
    yield from sorted((reports / "runs").glob(f"*/{_BUILT}"))


def _given(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in folders:
        if not folder.is_dir():
            raise ConfigurationError(f"--records {folder} is not a directory; name one that holds records")
        # beside its records a run's directory has other JSON files, which are none
        runs = {path.parent for path in folder.rglob(RECORD)}
        for path in sorted(folder.rglob("*.json")):
            built = path.parent in runs and path.match(_BUILT)
            if path.name == RECORD or built or not runs.intersection(path.parents):
                yield path
