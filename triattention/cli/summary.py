"""The summary of a run's result lines, and how it is printed; computed from the lines only."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from triattention.cli.intervals import effective_samples, pass_at_1
from triattention.cli.results import MEASURED, Line

_MIB = 2**20


def settings_of(lines: Sequence[Line]) -> dict[str, Any]:
    """The settings that every line of a run repeats."""
    return {name: value for name, value in lines[0].items() if name not in MEASURED}


def shares_of(lines: Sequence[Line]) -> dict[tuple[int, str], float]:
    """The share of correct samples by question (index and text), in the order of the lines."""
    samples: dict[tuple[int, str], list[bool]] = {}
    for line in lines:
        samples.setdefault((line["index"], line["question"]), []).append(line["correct"])
    return {question: sum(correct) / len(correct) for question, correct in samples.items()}


def summarise(lines: Sequence[Line]) -> dict[str, Any]:
    """Accuracy (pass@1) with its 95 % interval, speed, peaks and sums.

    ``tokens_per_s`` is the sum of the new tokens over the sum of the batches' seconds: the speed of one worker,
    regardless of their number. Rounds are counted once per batch.
    """
    shares = list(shares_of(lines).values())
    batches = {line["batch"]: line for line in lines}.values()
    new_tokens = sum(line["new_tokens"] for line in lines)
    seconds = math.fsum(line["batch_seconds"] for line in batches)
    accuracy = pass_at_1(shares, len(lines))
    return {
        "replies": len(lines),
        "correct": sum(line["correct"] for line in lines),
        "accuracy": accuracy.estimate,
        "accuracy_low": accuracy.low,
        "accuracy_high": accuracy.high,
        "effective_samples": effective_samples(shares, len(lines)),
        "truncated": sum(line["truncated"] for line in lines),
        "prompt_tokens": sum(line["prompt_tokens"] for line in lines),
        "new_tokens": new_tokens,
        "seconds": seconds,
        "tokens_per_s": new_tokens / seconds,
        "peak_kv_tokens": max(line["peak_kv_tokens"] for line in lines),
        "peak_kv_bytes": max(line["peak_kv_bytes"] for line in lines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "rounds": sum(line["rounds"] for line in batches),
    }


def summary_line(summary: Mapping[str, Any]) -> str:
    return (
        f"accuracy {summary['correct']}/{summary['replies']} = {summary['accuracy']:.3f} "
        f"(95 % interval {summary['accuracy_low']:.3f} to {summary['accuracy_high']:.3f})  "
        f"tokens/s {summary['tokens_per_s']:.1f}  peak KV {summary['peak_kv_tokens']} tokens, "
        f"{mib(summary['peak_kv_bytes'])}  memory {mib(summary['peak_memory_bytes'])}  rounds {summary['rounds']}  "
        f"truncated {summary['truncated']}"
    )


#: The columns of a table of runs: heading, and a function from a summary to its cell.
COLUMNS = {
    "accuracy": lambda s: f"{s['accuracy']:.3f}",
    "95 % interval": lambda s: f"{s['accuracy_low']:.3f} to {s['accuracy_high']:.3f}",
    "tokens/s": lambda s: f"{s['tokens_per_s']:.1f}",
    "peak KV tokens": lambda s: str(s["peak_kv_tokens"]),
    "peak KV": lambda s: mib(s["peak_kv_bytes"]),
    "memory": lambda s: mib(s["peak_memory_bytes"]),
    "truncated": lambda s: f"{s['truncated']}/{s['replies']}",
}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length as aligned columns: the first left-aligned, the others right-aligned."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def mib(n_bytes: float) -> str:
    return f"{n_bytes / _MIB:.1f} MiB"
