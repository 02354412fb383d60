"""The records on disk: published evidence and local runs, with the files among them that cannot be read."""

from __future__ import annotations

import glob
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from verify.errors import ConfigurationError
from verify.files import EVIDENCE, RUNS, repository_root
from verify.record.absences import FILE as ABSENCE
from verify.record.reading import UnreadableRecord, read_record
from verify.record.schema import Record

RECORD = "record.json"

#: The record of the kernels built for the GPU, which a run on a GPU keeps next to its own record.
_BUILT = "sm*.json"


@dataclass(frozen=True, slots=True)
class Archive:
    """The records that were read, and one sentence for each file that does not count, with the reason."""

    records: tuple[Record, ...]
    unreadable: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Entry:
    """A record file: the id of its run and the digest of its content."""

    path: Path
    run_id: str
    digest: str

    @property
    def published(self) -> bool:
        return self.path.name != RECORD and not self.path.match(_BUILT)


def load(folders: Sequence[Path] = ()) -> Archive:
    """Read every record under ``folders``; without any, ``reports/evidence`` and ``reports/runs`` of the repository.

    A file that does not count is listed; it never raises. Raises ConfigurationError if a folder does not exist.
    """
    read: dict[Path, Record] = {}
    unreadable: list[str] = []
    for path in paths(folders):
        try:
            read[path] = read_finished(path)
        except UnreadableRecord as error:
            unreadable.append(str(error))
    kept, refused = settle([Entry(path, record.run_id, digest_of_file(path)) for path, record in read.items()])
    return Archive(tuple(read[entry.path] for entry in kept), (*unreadable, *refused))


def read_finished(path: Path) -> Record:
    """``read_record`` for a run that has ended, well or not. A run that has not ended raises UnreadableRecord too."""
    record = read_record(path)
    if record.state == "running":
        raise UnreadableRecord(
            f"{path}: is half-written (state running); let the run end, or continue it: "
            f"python -m verify run --resume {record.run_id}"
        )
    return record


def read_again(path: Path) -> Record:
    """``read_finished`` for a record read before. Raises ConfigurationError if it can no longer be read."""
    try:
        return read_finished(path)
    except UnreadableRecord as error:
        raise ConfigurationError(f"{error}; the file changed during this command, so run it again") from error


def newest_runs(folder: Path) -> Iterator[Record]:
    """The readable records of the runs in ``folder``, ended or not, newest first."""
    for path in sorted(folder.glob(f"*/{RECORD}"), reverse=True):
        with suppress(UnreadableRecord):
            yield read_record(path)


def settle(entries: Sequence[Entry]) -> tuple[list[Entry], list[str]]:
    """The files that count, and a sentence for each that does not: extra copies of a run, and contradictory copies.

    Evidence is published by copying a run's record, so one published and one local copy are normal.
    """
    kept: list[Entry] = []
    refused: list[str] = []
    runs: dict[str, list[Entry]] = {}
    for entry in entries:
        runs.setdefault(entry.run_id, []).append(entry)
    for run_id, (first, *others) in runs.items():
        if any(other.digest != first.digest for other in others):
            files = " and ".join(str(entry.path) for entry in (first, *others))
            refused.append(f"{files}: contradict each other about run {run_id}; none counts until only one is left")
            continue
        kept.append(first)
        seen = {first.published}
        for other in others:
            if other.published in seen:
                refused.append(f"{other.path}: is a duplicate of {first.path} (run {run_id}); remove one of them")
            seen.add(other.published)
    return kept, refused


def digest_of_file(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def paths(folders: Sequence[Path] = ()) -> list[Path]:
    """Every file that should be a record. Raises ConfigurationError if a folder does not exist."""
    return list(_given(folders) if folders else _default(repository_root()))


def absences(folders: Sequence[Path] = ()) -> list[Path]:
    """Every file that says why there is no record. Raises ConfigurationError if a folder does not exist."""
    if folders:
        return [path for folder in folders for path in sorted(_directory(folder).rglob(ABSENCE))]
    return sorted((repository_root() / RUNS).glob(f"*/{ABSENCE}"))


def locate(name: str) -> list[Path]:
    """The files of the record ``name``: a file, the directory of a run, or the id of a run or a published record.

    Raises ConfigurationError for any other name.
    """
    path, root = Path(name), repository_root()
    if path.is_file():
        return [path]
    for folder in (path, root / RUNS / name):
        if folder.is_dir() and (found := [*folder.glob(RECORD), *sorted(folder.glob(_BUILT))]):
            return found
    if found := sorted((root / EVIDENCE).rglob(f"{glob.escape(path.name)}.json")):
        return found[:1]
    raise ConfigurationError(f"there is no record {name!r}; give a file, the directory of a run, or the id of a run")


def _default(root: Path) -> Iterator[Path]:
    yield from sorted((root / EVIDENCE).rglob("*.json"))
    yield from sorted((root / RUNS).glob(f"*/{RECORD}"))
    yield from sorted((root / RUNS).glob(f"*/{_BUILT}"))


def _given(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in map(_directory, folders):
        # a run's directory also has JSON files that are not records
        runs = {path.parent for path in folder.rglob(RECORD)}
        for path in sorted(folder.rglob("*.json")):
            built = path.parent in runs and path.match(_BUILT)
            if path.name == RECORD or built or not (path.name == ABSENCE or runs.intersection(path.parents)):
                yield path


def _directory(folder: Path) -> Path:
    if not folder.is_dir():
        raise ConfigurationError(f"--records {folder} is not a directory; name one that holds records")
    return folder


def moment(record: Record) -> tuple[datetime, str]:
    """The key that records are sorted by."""
    # as times, not strings: "…00.5Z" would sort before "…00Z"
    return datetime.fromisoformat(record.time_utc), record.run_id


def newest_first(records: Iterable[Record]) -> list[Record]:
    return sorted(records, key=moment, reverse=True)
