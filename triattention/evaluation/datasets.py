"""Datasets by name: bundled, benchmarks of the hub, generated tasks, and local JSON lines files."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files

from triattention.errors import TriAttentionError
from triattention.evaluation import needle, state_query
from triattention.evaluation.benchmarks import BENCHMARKS, load_benchmark
from triattention.evaluation.questions import Dataset, Question
from triattention.files import expanded

__all__ = ["BUNDLED", "KNOWN", "Dataset", "Question", "load_dataset"]

BUNDLED = ("smoke",)


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


def load_dataset(name: str, seed: int = 0) -> Dataset:
    """The dataset ``name``: one of KNOWN, or the ``.jsonl`` file at that path.

    Every line of a file is an object with ``question`` (text), ``answer`` (text or number) and optionally ``grader``;
    other fields and empty lines are ignored. Generated tasks are the same for the same ``seed``; other datasets ignore
    it. Raises TriAttentionError for an unknown name, a task argument out of range, an unavailable benchmark, an
    unreadable or empty file, or an invalid line (with its number).
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
    if path.suffix != ".jsonl":
        raise TriAttentionError(
            f"dataset {name!r} is not known; known: {', '.join(KNOWN)}, or the path of a .jsonl file with question and "
            "answer on each line"
        )
    try:
        text = path.read_text("utf-8")
    except OSError as error:
        raise TriAttentionError(
            f"cannot read the dataset {path}: {error.strerror}; give the path of a .jsonl file"
        ) from error
    except UnicodeDecodeError as error:
        raise TriAttentionError(f"the dataset {path} is not UTF-8 (byte {error.start}); convert it first") from error
    return Dataset("".join(c if c.isalnum() or c in "._-" else "-" for c in path.stem), _parse(text, str(path)))


def _parse(text: str, source: str) -> tuple[Question, ...]:
    # not splitlines: a JSON string may contain U+2028 and other line separators unescaped
    lines = enumerate(text.split("\n"), start=1)
    questions = tuple(_parse_line(line, f"{source}, line {number}") for number, line in lines if line.strip())
    if not questions:
        raise TriAttentionError(f"the dataset {source} has no questions; put one JSON object on each line")
    return questions


def _parse_line(line: str, where: str) -> Question:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise TriAttentionError(
            f"{where}: not JSON ({error.msg} at column {error.colno}); correct or remove the line"
        ) from error
    if not isinstance(entry, dict):
        raise TriAttentionError(
            f"{where}: a {type(entry).__name__}, not an object with question and answer; correct the line"
        )
    question, answer = entry.get("question"), entry.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise TriAttentionError(f'{where}: "question" is {question!r}; it must be text')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise TriAttentionError(f'{where}: "answer" is {answer!r}; it must be text or a number')
    try:
        return Question(question, str(answer), grader=entry.get("grader", "auto"))
    except TriAttentionError as error:
        raise TriAttentionError(f"{where}: {error}") from error
