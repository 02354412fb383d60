"""The results file of a run: JSON lines, written one whole batch at a time, so that a run can be resumed.

A line is one reply: the fields of ``Result``, then the settings of the run, which every line repeats. So a line is
complete by itself, and a run can check every setting of the file it would resume. ``<name>.summary.json`` is computed
from the lines once every batch is there.
"""

from __future__ import annotations

import codecs
import json
import os
import reprlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from filelock import FileLock, Timeout

from triattention.errors import TriAttentionError
from triattention.files import write_text
from triattention.reading import decoded, parse_json

if TYPE_CHECKING:
    from triattention.cli.plan import Plan

_APPEND_LIMIT_S = 60

Line = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Result:
    """One reply, as measured.

    ``index`` is the question's index in the dataset, from 0; ``batch`` the number of the batch in the run, seeded with
    ``batch_seed``. ``tokens_per_s`` is new_tokens / seconds. The other fields are from ``Grade`` and
    ``generation.Answer``.
    """

    question: str
    expected: str
    answer: str
    extracted: str
    correct: bool
    index: int
    sample: int
    batch: int
    batch_seed: int
    prompt_tokens: int
    new_tokens: int
    truncated: bool
    seconds: float
    batch_seconds: float
    tokens_per_s: float
    peak_kv_tokens: int
    peak_kv_bytes: int
    peak_memory_bytes: int
    rounds: int


#: The fields of a result with their types; ``float`` fields may hold whole numbers.
MEASURED = {name: (int, float) if kind is float else kind for name, kind in get_type_hints(Result).items()}


def read_lines(path: Path) -> tuple[list[Line], int]:
    """The complete lines of a results file, and the number of bytes of a truncated last line.

    A last line that only lacks its line end, as some editors leave it, is complete. Raises TriAttentionError for a file
    that cannot be read, or a complete line that is not a result.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TriAttentionError(f"cannot read {path}: {error.strerror}; give a results file of run-one") from error
    if data.startswith((codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        data = decoded(data, str(path)).encode()
    whole, _, last = data.rpartition(b"\n")
    torn = last if _is_torn(last) else b""
    lines = []
    text = decoded(whole if torn or not last else data, str(path))
    for number, line in enumerate(text.split("\n") if text else [], start=1):
        where = f"{path}, line {number}"
        try:
            entry = parse_json(line)
        except ValueError as error:
            raise TriAttentionError(f"{where}: {error}; correct or remove the line") from error
        lines.append(_checked(entry, where))
    return lines, len(torn)


def _is_torn(last: bytes) -> bool:
    """Whether what follows the last line end is the beginning of an object, as an interrupted run leaves it."""
    try:
        json.JSONDecoder().raw_decode(last.decode("utf-8", "replace").strip() or "0")
    except RecursionError:
        return False
    except ValueError:
        return last.startswith(b"{")
    return False


def _checked(entry: Any, where: str) -> Line:
    for name, kind in MEASURED.items():
        if not isinstance(entry, dict) or name not in entry:
            raise TriAttentionError(f"{where} has no {name!r}, so it is not a result of run-one")
        value = entry[name]
        wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
        if wrong or (kind is int and abs(value) >= 2**63):
            raise TriAttentionError(
                f"{where}: {name!r} is {reprlib.repr(value)}, which run-one never writes; remove the line"
            )
    return entry


def _appendable(data: bytes) -> bool:
    """Whether lines can be added to a results file as it is: UTF-8 without a byte order mark, the last line ended."""
    return not data or (data.endswith(b"}\n") and data.startswith(b"{"))


class Results:
    """The lines of one plan's results file at ``path``: existing ones, and new ones to append."""

    def __init__(self, plan: Plan, path: Path) -> None:
        self.path = path
        self._plan = plan
        self._size = 0
        self._lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=_APPEND_LIMIT_S)

    @contextmanager
    def open(self) -> Iterator[None]:
        """Lock the file for one run: create its directory, drop unfinished batches of an interrupted run, and at the
        end remove lock files and directories that stayed empty.

        Raises TriAttentionError if another run is writing it, or if it is from a run with other settings.
        """
        self.done()
        made = []
        try:
            with _cannot_write(self.path):
                made = _make_directories(self.path.parent)
            owner = FileLock(self.path.with_name(f".{self.path.name}.run.lock"))
            try:
                owner.acquire(timeout=0)
            except Timeout:
                raise TriAttentionError(
                    f"another run is writing {self.path}; wait for it, or give a --run-tag"
                ) from None
            try:
                with _cannot_write(self.path):
                    self._repair()
                yield
            finally:
                for lock in (self._lock, owner):
                    Path(lock.lock_file).unlink(missing_ok=True)
                owner.release()
        finally:
            for directory in made:
                with suppress(OSError):  # it contains results
                    directory.rmdir()

    def done(self, settings: Mapping[str, Any] | None = None) -> set[int]:
        """The numbers of the finished batches.

        Raises TriAttentionError, naming the first setting or question that differs, for a file of another run.
        ``settings`` are those of a loaded model, if there is one.
        """
        whole, _, _ = self._by_batch(self._plan.settings if settings is None else settings)
        return set(whole)

    def _by_batch(self, settings: Mapping[str, Any]) -> tuple[dict[int, list[Line]], int, int]:
        """The lines of finished batches, the number of other lines, and the bytes of a truncated last line."""
        if not self.path.exists():
            return {}, 0, 0
        lines, torn = read_lines(self.path)
        batches = self._plan.batches
        found: dict[int, list[Line]] = {}
        for number, line in enumerate(lines, start=1):
            self._require_same(line, number, settings)
            found.setdefault(line["batch"], []).append(line)
        whole = {}
        for batch, members in found.items():
            units = [(line["index"], line["sample"]) for line in members]
            if len(set(units)) < len(units):
                raise TriAttentionError(f"{self.path} has batch {batch} twice; remove the file, or give a --run-tag")
            if units == [(unit.index, unit.sample) for unit in batches[batch]]:
                whole[batch] = members
        return whole, len(lines) - sum(map(len, whole.values())), torn

    def _require_same(self, line: Line, number: int, settings: Mapping[str, Any]) -> None:
        way_out = "give another --out or --run-tag, or remove the file"
        for name, value in settings.items():
            if line.get(name) != value:
                raise TriAttentionError(
                    f"{self.path} is from a run with {name} = {line.get(name)!r}, but this one has {value!r}; {way_out}"
                )
        if line["index"] not in range(len(self._plan.questions)) or line["batch"] not in range(len(self._plan.batches)):
            raise TriAttentionError(f"{self.path}, line {number} does not belong to a batch of this run; {way_out}")
        question = self._plan.questions[line["index"]]
        if line["question"] == question.question and line["expected"] != question.answer:
            raise TriAttentionError(
                f"{self.path}, line {number} was graded with the answer {line['expected'][:60]!r}, but question "
                f"{line['index'] + 1} of {self._plan.settings['dataset']} has {question.answer[:60]!r}; {way_out}"
            )
        if line["question"] != question.question:
            raise TriAttentionError(
                f"{self.path}, line {number} answers {line['question'][:60]!r}, but question {line['index'] + 1} of "
                f"{self._plan.settings['dataset']} is {question.question[:60]!r}; {way_out}"
            )

    def _repair(self) -> None:
        """Drop a truncated last line and unfinished batches, with a note; they are generated again."""
        whole, unfinished, torn = self._by_batch(self._plan.settings)
        if unfinished or torn:
            dropped = [f"{unfinished} lines of unfinished batches"] * bool(unfinished) + ["a cut-off line"] * bool(torn)
            print(f"note: {self.path} ended with {' and '.join(dropped)}: dropped, and generated again")
        if self.path.exists() and (unfinished or torn or not _appendable(self.path.read_bytes())):
            self._rewrite(whole)
        self._size = self.path.stat().st_size if self.path.exists() else 0

    def append(self, lines: Sequence[Line]) -> None:
        """Append the lines of one batch in one write that is flushed to disk: all of them or none."""
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with _cannot_write(self.path), self._lock:
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                before = os.fstat(handle).st_size
                try:
                    written = os.write(handle, data)
                    if written < len(data):
                        raise OSError(None, f"{written} of {len(data)} bytes were written")
                    os.fsync(handle)
                except OSError:
                    os.ftruncate(handle, before)
                    raise
            finally:
                os.close(handle)

    def new_lines(self) -> list[Line]:
        """The complete lines that other processes have appended since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as stream:
            stream.seek(self._size)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._size += len(whole)
        return [json.loads(line) for line in whole.split(b"\n")[:-1]]

    def finish(self) -> list[Line]:
        """The lines of the complete run in dataset order; the file is sorted, too."""
        whole, _, _ = self._by_batch(self._plan.settings)
        absent = len(self._plan.batches) - len(whole)
        if absent:
            raise TriAttentionError(f"{absent} of {len(self._plan.batches)} batches are missing in {self.path}")
        if list(whole) != sorted(whole):
            with _cannot_write(self.path):
                self._rewrite(whole)
        return [line for batch in sorted(whole) for line in whole[batch]]

    def _rewrite(self, batches: Mapping[int, Sequence[Line]]) -> None:
        lines = [line for batch in sorted(batches) for line in batches[batch]]
        write_text(self.path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))


def write_summary(path: Path, summary: Mapping[str, Any]) -> None:
    """Write ``<name>.summary.json`` next to the lines at ``path``."""
    with _cannot_write(path):
        write_text(summary_path(path), json.dumps(summary, indent=1, ensure_ascii=False) + "\n")


def summary_path(path: Path) -> Path:
    return path.with_suffix(".summary.json")


@contextmanager
def _cannot_write(path: Path) -> Iterator[None]:
    try:
        yield
    except Timeout as error:
        raise TriAttentionError(f"{path} stayed locked for {_APPEND_LIMIT_S} s; is another run stopped?") from error
    except OSError as error:
        raise TriAttentionError(f"cannot write {path}: {error.strerror}; make room, or give another --out") from error


def _make_directories(directory: Path) -> list[Path]:
    """Create a directory and its parents; returns the created ones, innermost first."""
    absent = [path for path in (directory, *directory.parents) if not path.exists()]
    directory.mkdir(parents=True, exist_ok=True)
    return absent
