"""Calling the command line in tests, and reading what it wrote."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from triattention.cli import main

#: Words that the tiny tokenizer knows, in an order that does not repeat.
TEXT = " ".join(random.Random(0).choices(["what", "is", "word11", "word12", "user", *"1234+?:"], k=700))

#: A setting small enough that forty new tokens need several rounds.
SMALL = ("--budget", "16", "--divide-length", "8", "--window-size", "4", "--max-new-tokens", "40")

#: Fields of a line that measure the moment, and differ between two runs of the same tokens.
MEASURED_TIMES = ("seconds", "batch_seconds", "tokens_per_s", "peak_memory_bytes")


def run_one(model: str, dataset: str, *more: str) -> int:
    return main(["run-one", "--model", model, "--dataset", dataset, "--device", "cpu", *more])


def write_questions(path: Path, count: int) -> str:
    """Questions of different lengths that the tiny model's tokenizer knows; no two are the same."""
    lines = []
    for n in range(count):
        tail = " ".join(f"word{20 + n + k}" for k in range(2 * n))
        lines.append({"question": f"what is {1 + n} + 2 ? {tail}".strip(), "answer": 3 + n})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def write_statistics(model: str, directory: Path) -> str:
    (directory / "text").write_text(TEXT)
    output = directory / "tiny.pt"
    assert main(["build-stats", "--model", model, "--input", str(directory / "text"), "--output", str(output)]) == 0
    return str(output)


def lines_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def without_times(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in line.items() if name not in MEASURED_TIMES} for line in lines]


def results_in(out: Path) -> Path:
    """The only results file in a directory."""
    (path,) = out.glob("*.jsonl")
    return path
