"""Results of ``run-one``: one JSON line per question as it ends, and a summary made from them alone."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Self

from triattention.cli.options import require_writable
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.datasets import Question
    from triattention.generation import Answer
    from triattention.grading import Grade


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the results file. ``tokens_per_s`` is new_tokens / seconds; ``budget`` is None for method full."""

    question: str
    expected: str
    answer: str
    extracted: str
    correct: bool
    prompt_tokens: int
    new_tokens: int
    seconds: float
    tokens_per_s: float
    peak_kv_tokens: int
    rounds: int
    method: str
    budget: int | None
    seed: int
    model: str
    dataset: str
    attn: str
    dtype: str
    device: str

    @classmethod
    def of(cls, question: Question, reply: Answer, graded: Grade, described: Mapping[str, Any]) -> Result:
        return cls(
            question=question.question,
            expected=question.answer,
            answer=reply.text,
            extracted=graded.extracted,
            correct=graded.correct,
            prompt_tokens=reply.prompt_tokens,
            new_tokens=reply.new_tokens,
            seconds=reply.seconds,
            tokens_per_s=reply.tokens_per_s,
            peak_kv_tokens=reply.peak_kv_tokens,
            rounds=reply.rounds,
            **described,
        )


def run_name(method: str, budget: int | None, model: str, dataset: str) -> str:
    """The stem of a run's files, such as ``triattention-b128-embedded-smoke``."""
    return "-".join([method, *([] if budget is None else [f"b{budget}"]), model, dataset])


class Results:
    """Results of a run: ``<out>/<name>.jsonl`` and ``<out>/<name>.summary.json``, in memory where ``out`` is None.

    The first line makes the directory and the file, so a run that fails before it leaves nothing. Every line is written
    whole and flushed; an interrupted run leaves whole lines and no summary.
    """

    def __init__(self, out: Path | None, name: str) -> None:
        self._lines: list[Result] = []
        self._stream: IO[str] | None = None
        self._jsonl = None if out is None else out / f"{name}.jsonl"

    def check(self) -> None:
        """Raise TriAttentionError for a directory that cannot be written to or holds this run already."""
        if self._jsonl is None:
            return
        require_writable(self._jsonl.parent, "--out")
        if self._jsonl.exists():
            raise TriAttentionError(f"{self._jsonl} exists; give another --out, or remove the file")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()

    def append(self, result: Result) -> None:
        self._lines.append(result)
        if self._jsonl is not None:
            try:
                if self._stream is None:
                    self._jsonl.parent.mkdir(parents=True, exist_ok=True)
                    self._stream = self._jsonl.open("x", encoding="utf-8")
                self._stream.write(json.dumps(asdict(result), ensure_ascii=False) + "\n")
                self._stream.flush()
            except OSError as error:
                raise _cannot_write(self._jsonl, error) from error

    def finish(self, described: Mapping[str, Any]) -> str:
        """Write the summary and return its line."""
        summary = summarise(self._lines)
        if self._jsonl is not None:
            path = self._jsonl.with_suffix(".summary.json")
            try:
                _write_atomic(path, {**described, **summary})
            except OSError as error:
                raise _cannot_write(path, error) from error
        return summary_line(summary)


def summarise(lines: list[Result]) -> dict[str, Any]:
    """Accuracy, speed over all questions, the highest peak and the sum of the rounds."""
    correct, tokens, seconds = (sum(getattr(r, name) for r in lines) for name in ("correct", "new_tokens", "seconds"))
    return {
        "questions": len(lines),
        "correct": correct,
        "accuracy": correct / len(lines),
        "new_tokens": tokens,
        "seconds": seconds,
        "tokens_per_s": tokens / seconds,
        "peak_kv_tokens": max(r.peak_kv_tokens for r in lines),
        "rounds": sum(r.rounds for r in lines),
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    return (
        f"accuracy {summary['correct']}/{summary['questions']} = {summary['accuracy']:.3f}  "
        f"tokens/s {summary['tokens_per_s']:.1f}  peak KV {summary['peak_kv_tokens']}  rounds {summary['rounds']}"
    )


def _cannot_write(path: Path | None, error: OSError) -> TriAttentionError:
    return TriAttentionError(f"cannot write {path}: {error.strerror}; make room, or give another --out")


def _write_atomic(path: Path, content: Mapping[str, Any]) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            stream.write(json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
