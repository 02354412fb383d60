"""Datasets by name: bundled, benchmarks of the hub, generated tasks, and local JSON lines files."""

from __future__ import annotations

import re
import reprlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from triattention.errors import TriAttentionError
from triattention.evaluation import needle, state_query
from triattention.evaluation.benchmarks import BENCHMARKS, load_benchmark
from triattention.evaluation.questions import Dataset, Question
from triattention.files import expanded
from triattention.reading import Numeral, parse_json, read_text

__all__ = ["BUNDLED", "KNOWN", "Dataset", "Question", "load_dataset"]

BUNDLED = ("smoke",)

_SUFFIXES = (".jsonl", ".ndjson", ".json")
#: The names of a field in a file: the documented one, then those of the published repository and of public datasets.
_QUESTION_NAMES = ("question", "problem", "prompt", "messages")
_ANSWER_NAMES = ("answer", "final_answer", "expected_answer", "target")


@dataclass(frozen=True, slots=True)
class _Generated:
    """A task generated from a seed; its argument, named ``unit``, is an integer from ``least`` to ``most``."""

    questions: Callable[..., tuple[Question, ...]]
    unit: str
    default: int
    least: int
    most: int


_GENERATED = {
    "dfs": _Generated(state_query.state_queries, "STEPS", state_query.DEFAULT_STEPS, 1, state_query.MAX_STEPS),
    "needle": _Generated(needle.needle_questions, "WORDS", needle.DEFAULT_WORDS, needle.MIN_WORDS, needle.MAX_WORDS),
}
#: Every name that load_dataset accepts, as shown to users.
KNOWN = (*BUNDLED, *BENCHMARKS, *(f"{name}[:{task.unit}]" for name, task in _GENERATED.items()))
#: The last line of an answer that is a worked solution, as GSM8K publishes them.
_WORKED = re.compile(r"\n####(?!#)[ \t]*(\S[^\n]*?)\s*\Z")


def load_dataset(name: str, seed: int = 0) -> Dataset:
    """The dataset ``name``: one of KNOWN, or the ``.jsonl`` file at that path.

    Every line of a file is an object with ``question`` (text), ``answer`` (text or number, kept as it is written) and
    optionally ``grader``; other fields and empty lines are ignored. Where there is no ``question`` or ``answer``, one
    of the names of other datasets may stand instead (``_QUESTION_NAMES``, ``_ANSWER_NAMES``). Of an answer that ends
    with a line ``#### ...``, that line counts. A file may also be one JSON list of such objects.

    Generated tasks are the same for the same ``seed``; other datasets ignore it. Raises TriAttentionError for an
    unknown name, a task argument out of range, an unavailable benchmark, an unreadable or empty file, or an invalid
    line (with its number).
    """
    if name in BUNDLED:
        return Dataset(name, _parse((files("triattention") / "data" / f"{name}.jsonl").read_text("utf-8"), name))
    if name in BENCHMARKS:
        return Dataset(name, load_benchmark(name))
    task, colon, argument = name.partition(":")
    if task in _GENERATED:
        return _generate(task, argument if colon else None, seed)
    return _read(name)


def _generate(task: str, argument: str | None, seed: int) -> Dataset:
    made = _GENERATED[task]
    if argument is None:
        size = made.default
    elif re.fullmatch("[0-9]{1,9}", argument) and made.least <= int(argument) <= made.most:
        size = int(argument)
    else:
        raise TriAttentionError(
            f"dataset {task}:{argument}: {made.unit} must be a whole number from {made.least} to {made.most}; "
            f"for example {task}:{made.default}"
        )
    return Dataset(f"{task}-{size}", made.questions(size, seed=seed))


def _read(name: str) -> Dataset:
    path = expanded(name)
    if path.suffix.lower() not in _SUFFIXES:
        if path.is_file():
            raise TriAttentionError(
                f"the dataset {path} does not end with .jsonl; convert it to JSON lines, one object each"
            )
        raise TriAttentionError(
            f"dataset {name!r} is not known; known: {', '.join(KNOWN)}, or the path of a .jsonl file with question and "
            "answer on each line"
        )
    text = read_text(path, "the dataset", "give the path of a .jsonl file")
    return Dataset("".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem), _parse(text, str(path)))


def _parse(text: str, source: str) -> tuple[Question, ...]:
    entries = _items(text, source) if text.lstrip()[:1] == "[" else _lines(text, source)
    questions = tuple(_question(entry, where) for where, entry in entries)
    if not questions:
        raise TriAttentionError(f"the dataset {source} has no questions; put one JSON object on each line")
    return questions


def _lines(text: str, source: str) -> Iterator[tuple[str, Any]]:
    # not splitlines: a JSON string may contain U+2028 and other line separators unescaped
    for number, line in enumerate(text.split("\n"), start=1):
        where = f"{source}, line {number}"
        # files that were put one after the other keep their byte order marks
        if line.strip("\ufeff \t"):
            try:
                yield where, parse_json(line.lstrip("\ufeff"), numerals=True)
            except ValueError as error:
                whole = "; one object must not span several lines" if line.strip() == "{" else ""
                raise TriAttentionError(f"{where}: {error}; correct or remove the line{whole}") from error


def _items(text: str, source: str) -> Iterator[tuple[str, Any]]:
    """The objects of one JSON list, which some tools write instead of lines."""
    try:
        entries = parse_json(text, numerals=True)
    except ValueError as error:
        raise TriAttentionError(
            f"the dataset {source} is neither JSON lines nor one JSON list: {error}; put one JSON object on each line"
        ) from error
    yield from ((f"{source}, item {number}", entry) for number, entry in enumerate(entries, start=1))


def _question(entry: Any, where: str) -> Question:
    if not isinstance(entry, dict):
        raise TriAttentionError(f"{where}: a {_kind(entry)}, not an object with question and answer; correct the line")
    name, question = _field(entry, _QUESTION_NAMES, where)
    if isinstance(question, list):
        question = _only_message(question, name, where)
    if isinstance(question, Numeral) or not isinstance(question, str) or not question.strip():
        raise TriAttentionError(f'{where}: "{name}" is {_short(question)}; it must be text')
    name, answer = _field(entry, _ANSWER_NAMES, where)
    if not isinstance(answer, str) or not answer.strip():
        raise TriAttentionError(f'{where}: "{name}" is {_short(answer)}; it must be text or a number')
    if worked := _WORKED.search(answer):
        answer = worked[1]
    grader = entry.get("grader", "auto")
    try:
        return Question(question, str(answer), grader=str(grader) if isinstance(grader, Numeral) else grader)
    except TriAttentionError as error:
        raise TriAttentionError(f"{where}: {error}") from error


def _field(entry: dict[str, Any], names: Sequence[str], where: str) -> tuple[str, Any]:
    """The field called ``names[0]``, else the only one that is called as one of the other names, in any case."""
    if names[0] in entry:
        return names[0], entry[names[0]]
    found = [name for name in entry if name.lower() in names]
    if len(found) != 1:
        has = f"both {found[0]!r} and {found[1]!r}" if found else f'no "{names[0]}", but {_short(list(entry))}'
        raise TriAttentionError(f'{where}: the object has {has}; call the field that counts "{names[0]}"')
    return found[0], entry[found[0]]


def _only_message(messages: list[Any], name: str, where: str) -> Any:
    """The content of a conversation that is one message of the user."""
    if len(messages) == 1 and isinstance(messages[0], dict) and messages[0].get("role") == "user":
        return messages[0].get("content")
    raise TriAttentionError(
        f'{where}: "{name}" is a list of {len(messages)}, and a question is one text; give it as "question"'
    )


def _kind(value: Any) -> str:
    return "number" if isinstance(value, Numeral) else type(value).__name__


def _short(value: Any) -> str:
    return value if isinstance(value, Numeral) else reprlib.repr(value)
