"""An index of the records on disk, so that a report need not read a thousand files to show the newest of each GPU.

It is an SQLite file in the cache, made from the records alone: it is rebuilt if it is deleted, and a changed file is
read again. Verdicts never come from it: it says which records hold the newest results, and these are read in full.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from verify.architectures import Target
from verify.errors import ConfigurationError
from verify.files import IMPORT_ROOT, cache_folder, repository_root
from verify.record import absences, archive
from verify.record.absences import Absence
from verify.record.archive import Entry, digest_of_file, moment, newest_first, paths, read_again, read_finished, settle
from verify.record.digest import digest_of
from verify.record.grounds import BUNDLED, PACKAGE, Checkout
from verify.record.headroom import by_design, tightest, used_share
from verify.record.reading import UnreadableRecord, rehearsing
from verify.record.schema import CheckResult, Evidence, Record, SubjectInfo
from verify.record.staleness import merged

_TABLES = (
    """CREATE TABLE record (
        number INTEGER PRIMARY KEY, path TEXT UNIQUE, size INTEGER, changed INTEGER,
        problem TEXT, digest TEXT, run_id TEXT, covers TEXT, head TEXT, grounds TEXT
    )""",
    # most records of one version of the suite share their grounds
    "CREATE TABLE grounds (digest TEXT PRIMARY KEY, content TEXT)",
    """CREATE TABLE result (
        record INTEGER, id TEXT, gate TEXT, evidence TEXT, verdict TEXT, code TEXT,
        measure TEXT, measured REAL, allowed REAL, duration_s REAL, rests_on INTEGER,
        PRIMARY KEY (record, id)
    ) WITHOUT ROWID""",
)

_POINTS = """
SELECT id, gate, verdict, code, evidence, measure, measured, allowed, duration_s FROM result
WHERE record = :record AND (:name IS NULL OR id = :name OR id BETWEEN :name || '.' AND :name || '/')
AND NOT (:kind = 'simulated' AND evidence = 'emulated')
"""

#: How long a command waits for another one that is reading a thousand records.
_PATIENCE_S = 30


@dataclass(frozen=True, slots=True)
class Point:
    """One result of a time series: ``measure`` names its tightest measurement, None where it has none.

    NaN is stored as None.
    """

    run_id: str
    time_utc: str
    target: str
    id: str
    gate: str
    verdict: str
    code: str | None
    evidence: Evidence
    measure: str | None
    measured: float | None
    allowed: float | None
    duration_s: float

    @property
    def share(self) -> float | None:
        """The share of the allowance that was used: 1 is the bound, and a value below 0 uses none."""
        if self.measured is None or self.allowed is None:
            return None
        return used_share(self.measured, self.allowed)


@dataclass(slots=True)
class Index:
    """The current records of some folders. ``heads`` are the records of one subject without results, by their number,
    ``everyones`` those of every subject, both without the runs that count for no verdict. ``checkout`` is
    what reports compare results with.
    """

    unreadable: tuple[str, ...]
    heads: dict[int, Record]
    everyones: dict[int, Record]
    checkout: Checkout
    _absences: Sequence[Absence]
    _apart: dict[int, Record]
    _database: sqlite3.Connection
    _paths: dict[int, Path]
    _covers: dict[int, str]
    _read: dict[int, Record] = field(default_factory=dict)

    @property
    def subjects(self) -> list[SubjectInfo]:
        """The subjects of all records, one of each source, those with the newest records first."""
        found: dict[str, SubjectInfo] = {}
        for head in newest_first(self.everyones.values()):
            found.setdefault(head.subject.source, head.subject)
        return [*found.values()]

    def about(self, subject: SubjectInfo) -> Index:
        """The same index with the records of one subject."""
        return replace(self, heads=_of(self.everyones, subject.source))

    @property
    def absences(self) -> Sequence[Absence]:
        """Why nights left no record, newest first. They are of the bundled subject."""
        bundled = all(head.subject.source == BUNDLED for head in self.heads.values())
        return self._absences if bundled else ()

    def confirmations(self, run_id: str) -> list[Record]:
        """The runs that tried the failures of that run again, in full."""
        return [self._in_full(number) for number, head in self._apart.items() if head.confirms == run_id]

    def beside(self) -> list[Record]:
        """The newest run of each word by which runs are shown next to the others, in full, newest first."""
        shown = {number: head for number, head in self._apart.items() if head.beside and head.confirms is None}
        newest: dict[tuple[str, str, str], int] = {}
        for number, head in sorted(shown.items(), key=lambda pair: moment(pair[1]), reverse=True):
            newest.setdefault((head.beside, head.target, head.kind), number)
        return [self._in_full(number) for number in newest.values()]

    def records(self, target: Target) -> list[Record]:
        """The records of ``target``: in full if one of their results is the newest of its kind, else without results.

        ``assess`` returns the same for them as for all records in full.
        """
        own = {number: head for number, head in self.heads.items() if head.target == target.target}
        numbers = {head.run_id: number for number, head in own.items()}
        used, _, comparison = merged(target, own.values(), self.checkout)
        needed = {numbers[head.run_id] for head in used if head.compilation and not head.compilation.gap}
        known: set[tuple[object, ...]] = set()
        looked: set[tuple[object, ...]] = set()
        kept = {head.run_id for head in used}
        for head in newest_first(own.values()):
            number, counting = numbers[head.run_id], head.run_id in kept
            changed = tuple(bool(why) for why in comparison.lists(head))
            # most runs have the same checks as the next newer one
            if (look := (head.model, self._covers[number], counting and changed)) in looked:
                continue
            looked.add(look)
            query = "SELECT id, gate, evidence, rests_on FROM result WHERE record = ?"
            results = {
                (head.model, *kind, counting and rests_on is not None and not changed[rests_on])
                for *kind, rests_on in self._database.execute(query, (number,))
            }
            if not results <= known:
                needed.add(number)
                known |= results
        return [self._in_full(number) if number in needed else head for number, head in own.items()]

    def find(self, run_id: str) -> Record | None:
        """The full record of that run."""
        number = next((number for number, head in self.everyones.items() if head.run_id == run_id), None)
        return None if number is None else self._in_full(number)

    def passed(self, run_id: str) -> set[str]:
        """The checks that passed in that run."""
        query = "SELECT id FROM record JOIN result ON record = number WHERE run_id = ? AND verdict = 'PASS'"
        return {check_id for (check_id,) in self._database.execute(query, (run_id,))}

    def points(self, name: str | None = None, target: str | None = None, last: int | None = None) -> list[Point]:
        """Every result that says something about its target, oldest first, limited to the check or family ``name`` and
        to ``target`` where given.

        With ``last``, only those of the newest ``last`` records of each target and kind.
        """
        seen: Counter[tuple[str, Evidence]] = Counter()
        chosen: list[tuple[int, Record]] = []
        for number, head in self._newest_first():
            seen[head.target, head.kind] += 1
            if target in (None, head.target) and (last is None or seen[head.target, head.kind] <= last):
                chosen.append((number, head))
        return [
            Point(head.run_id, head.time_utc, head.target, *row)
            for number, head in reversed(chosen)
            for row in self._database.execute(_POINTS, {"record": number, "name": name, "kind": head.kind})
        ]

    def files(self) -> list[Path]:
        """The files of the records, newest first."""
        return [self._paths[number] for number, _ in self._newest_first()]

    def _newest_first(self) -> list[tuple[int, Record]]:
        return sorted(self.heads.items(), key=lambda pair: moment(pair[1]), reverse=True)

    def _in_full(self, number: int) -> Record:
        if number not in self._read:
            self._read[number] = read_again(self._paths[number])
        return self._read[number]


@contextmanager
def open_index(folders: Sequence[Path] = (), subject: str | None = None) -> Iterator[Index]:
    """The updated index of the records about one subject under ``folders``, or under the default folders.

    ``subject`` is its name or its source in a record; by default the bundled one, or the newest if no record is about
    that one.

    If the cache cannot be written, the index is built in memory, which takes as long as reading every record, and a
    message says so. Raises ConfigurationError if a folder does not exist, no record is about the subject, or the index
    is busy or damaged.
    """
    found = {os.path.abspath(path): path for path in paths(folders)}
    database = _connect()
    try:
        _refresh(database, found)
        yield _opened(database, found, subject, absences.read(archive.absences(folders)))
    except sqlite3.OperationalError as error:
        raise ConfigurationError(f"the index {_file()} cannot be used ({error}); run the command again") from error
    except sqlite3.DatabaseError as error:
        _file().unlink(missing_ok=True)
        raise ConfigurationError(f"removed the damaged index {_file()} ({error}); run the command again") from error
    finally:
        database.close()


def _connect() -> sqlite3.Connection:
    try:
        _file().parent.mkdir(parents=True, exist_ok=True)
        return _with_tables(str(_file()))
    except (OSError, sqlite3.OperationalError) as error:
        print(f"verify: the index {_file()} cannot be stored ({error}), so every record is read", file=sys.stderr)
    except sqlite3.DatabaseError:
        _file().unlink(missing_ok=True)
        return _with_tables(str(_file()))
    return _with_tables(":memory:")


def _with_tables(place: str) -> sqlite3.Connection:
    database = sqlite3.connect(place, timeout=_PATIENCE_S, isolation_level=None)
    version = _version()
    database.execute("BEGIN IMMEDIATE")
    if database.execute("PRAGMA user_version").fetchone() != (version,):
        for table in ("record", "result", "grounds"):
            database.execute(f"DROP TABLE IF EXISTS {table}")
        for statement in _TABLES:
            database.execute(statement)
        database.execute(f"PRAGMA user_version = {version}")
    database.execute("COMMIT")
    # an index lost in a power failure is rebuilt
    database.execute("PRAGMA synchronous = OFF")
    return database


def _refresh(database: sqlite3.Connection, found: Mapping[str, Path]) -> None:
    """Read new and changed files, one at a time, and forget deleted ones."""
    known = {path: state for path, *state in database.execute("SELECT path, size, changed FROM record")}
    states = {path: _state(path) for path in found}
    changed = [path for path, state in states.items() if known.get(path) != state]
    if not changed:
        return
    database.execute("BEGIN IMMEDIATE")
    gone = [path for path in known if path not in states and not os.path.exists(path)]
    for path in (*gone, *changed):
        database.execute("DELETE FROM result WHERE record IN (SELECT number FROM record WHERE path = ?)", (path,))
        database.execute("DELETE FROM record WHERE path = ?", (path,))
    database.execute("DELETE FROM grounds WHERE digest NOT IN (SELECT grounds FROM record WHERE grounds NOTNULL)")
    for path in changed:
        _add(database, path, found[path], states[path])
    database.execute("COMMIT")


def _state(path: str) -> list[int]:
    # ctime too: mtime can be set back
    with suppress(OSError):
        stat = os.stat(path)
        return [stat.st_size, max(stat.st_mtime_ns, stat.st_ctime_ns)]
    return [-1, -1]


def _add(database: sqlite3.Connection, key: str, path: Path, state: Sequence[int]) -> None:
    columns = "(path, size, changed, problem, digest, run_id, covers, head, grounds)"
    insert = f"INSERT INTO record {columns} VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)"
    try:
        record = read_finished(path)
    except UnreadableRecord as error:
        # without the path, which may be spelled differently the next time
        problem = str(error).removeprefix(f"{path}: ")
        database.execute(insert, (key, *state, problem, *[None] * 5))
        return
    built = record.compilation
    about = built and built.model_copy(update={"builds": [], "unlaunched": {}})
    bare: dict[str, object] = {"results": [], "sources": {}, "rests_on": [], "compilation": about}
    head = record.model_copy(update=bare).model_dump_json()
    covers = repr(sorted((one.id, one.gate, one.evidence, one.rests_on) for one in record.results))
    content = json.dumps([record.sources, record.rests_on])
    grounds = _digest(content)
    database.execute("INSERT OR IGNORE INTO grounds VALUES (?, ?)", (grounds, content))
    facts = (digest_of_file(path), record.run_id, _digest(covers), head, grounds)
    number = database.execute(insert, (key, *state, None, *facts)).lastrowid
    assert number is not None  # the INSERT made a row
    database.executemany(
        "INSERT INTO result VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", (_row(number, one) for one in record.results)
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _row(number: int, result: CheckResult) -> tuple[int | str | float | None, ...]:
    tight = tightest(result.measurements)
    if tight and by_design(tight):
        tight = tight.model_copy(update={"allowed": math.inf})  # no share of it says anything
    numbers = (tight.name, tight.measured, tight.allowed) if tight else (None, None, None)
    told = (result.gate, result.evidence, result.verdict, result.code)
    return (number, result.id, *told, *numbers, result.duration_s, result.rests_on)


def _opened(
    database: sqlite3.Connection,
    found: Mapping[str, Path],
    subject: str | None,
    absent: tuple[Sequence[Absence], Sequence[str]],
) -> Index:
    query = "SELECT path, number, problem, digest, run_id, covers, head, grounds FROM record"
    rows = {path: row for path, *row in database.execute(query) if path in found}
    problems = [f"{found[path]}: {rows[path][1]}" for path in found if rows[path][1] is not None]
    good = {found[path]: rows[path] for path in found if rows[path][1] is None}
    kept, refused = settle([Entry(path, run_id, digest) for path, (_, _, digest, run_id, _, _, _) in good.items()])
    counted = {good[entry.path][0]: (entry.path, *good[entry.path][-3:]) for entry in kept}
    contents = dict(database.execute("SELECT digest, content FROM grounds"))
    known = {digest: json.loads(contents[digest]) for digest in {row[3] for row in counted.values()}}
    root = repository_root()
    heads = {number: _head(head, *known[grounds]) for number, (_, _, head, grounds) in counted.items()}
    everyones = {number: head for number, head in heads.items() if not head.apart}
    return Index(
        unreadable=(*problems, *refused, *absent[1]),
        heads=_of(everyones, _source(everyones, subject)),
        everyones=everyones,
        checkout=Checkout(root, root, root / PACKAGE),
        _absences=absent[0],
        _apart={number: head for number, head in heads.items() if number not in everyones},
        _database=database,
        _paths={number: path for number, (path, *_) in counted.items()},
        _covers={number: covers for number, (_, covers, _, _) in counted.items()},
    )


def _of(heads: Mapping[int, Record], source: str) -> dict[int, Record]:
    return {number: head for number, head in heads.items() if head.subject.source == source}


def _source(heads: Mapping[int, Record], subject: str | None) -> str:
    """The source of the subject whose records are shown. Raises ConfigurationError if no record is about it."""
    sources = {head.subject.source: head.subject.name for head in newest_first(heads.values())}
    if subject is None:
        return BUNDLED if BUNDLED in sources or not sources else next(iter(sources))
    for source, name in sources.items():
        if subject in (source, source.partition(":")[2], name):
            return source
    raise ConfigurationError(
        f"no record is about the subject {subject!r}; there are records of {', '.join(sources) or 'none'}"
    )


def _head(text: str, sources: dict[str, str], rests_on: list[list[str]]) -> Record:
    return Record.model_validate_json(text).model_copy(update={"sources": sources, "rests_on": rests_on})


def _file() -> Path:
    return cache_folder() / ("rehearsal.sqlite" if rehearsing() else "records.sqlite")


def _version() -> int:
    """A number that changes with the rules for what is a record, and with the tables."""
    files = (
        Path(__file__).with_name(f"{name}.py")
        for name in (
            *("archive", "builds", "curves", "headroom", "index", "pictures", "reading", "schema", "simulation"),
            "strict",
        )
    )
    return int(digest_of([*files, IMPORT_ROOT / "verify" / "checks.py"], IMPORT_ROOT)[:7], 16)
