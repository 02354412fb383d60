"""Question sets: the bundled ``smoke`` set and local JSON lines files."""

from __future__ import annotations

import json
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from triattention.errors import TriAttentionError

BUNDLED = ("smoke",)


@dataclass(frozen=True, slots=True)
class Question:
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        return self.question

    @property
    def grader(self) -> str:
        return "auto"


@dataclass(frozen=True, slots=True)
class Dataset:
    """Questions in file order; ``name`` is fit for file names."""

    name: str
    questions: tuple[Question, ...]


def load_dataset(name: str, seed: int = 0) -> Dataset:
    """The bundled set called ``name``, or the ``.jsonl`` file at that path.

    Every line of a file is one object with ``question`` (text) and ``answer`` (text or number); other fields and empty
    lines are ignored. Raises TriAttentionError for an unknown name, an unreadable or empty file, or a broken line (with
    its number).
    """
    if name in BUNDLED:
        return Dataset(name, _parse((files("triattention") / "data" / f"{name}.jsonl").read_text("utf-8"), name))
    path = Path(name).expanduser()
    if path.suffix != ".jsonl":
        raise TriAttentionError(
            f"dataset {name!r} is not known; known: {', '.join(BUNDLED)}, or the path of a .jsonl file with question "
            "and answer on each line (benchmark sets such as aime24 come in a later release)"
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
    # not splitlines: a JSON string may hold U+2028 and its kin as they are
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
            f"{where}: not JSON ({error.msg} at column {error.colno}); mend or remove the line"
        ) from error
    if not isinstance(entry, dict):
        raise TriAttentionError(
            f"{where}: a {type(entry).__name__}, not an object with question and answer; mend the line"
        )
    question, answer = entry.get("question"), entry.get("answer")
    if not isinstance(question, str) or not question.strip():
        raise TriAttentionError(f'{where}: "question" is {question!r}; it must be text')
    if isinstance(answer, bool) or not isinstance(answer, str | int | float) or not str(answer).strip():
        raise TriAttentionError(f'{where}: "answer" is {answer!r}; it must be text or a number')
    return Question(question, str(answer))
