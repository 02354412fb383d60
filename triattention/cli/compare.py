"""``compare``: two runs side by side, computed from their result lines."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from triattention.cli.intervals import paired_difference
from triattention.cli.plan import shown
from triattention.cli.results import Line, read_lines
from triattention.cli.summary import COLUMNS, settings_of, shares_of, summarise, table
from triattention.errors import TriAttentionError
from triattention.files import expanded

#: The rows with a ratio, and the summary entry each is computed from.
_RATIOS = {
    "accuracy": "accuracy", "tokens/s": "tokens_per_s", "peak KV tokens": "peak_kv_tokens",
    "peak KV": "peak_kv_bytes", "memory": "peak_memory_bytes",
}  # fmt: skip


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "compare",
        help="two runs side by side",
        description="Accuracy, speed and memory of two runs, their ratios, and the difference of their accuracies over "
        "the questions that both answered. Every number is computed from the result lines.",
    )
    for name in ("a", "b"):
        parser.add_argument(
            name, metavar=name.upper(), help="a .jsonl file, a run's name in --out, or a directory with one run"
        )
    parser.add_argument("--out", metavar="DIR", default=".", help="where runs given by name are (default: here)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    paths = [_find(name, expanded(args.out)) for name in (args.a, args.b)]
    print(*comparison(paths, [_whole_lines(path) for path in paths]), sep="\n")


def _find(name: str, out: Path) -> Path:
    """The results file that ``name`` refers to."""
    path = expanded(name)
    if path.is_dir():
        found = sorted(path.glob("*.jsonl"))
        if len(found) != 1:
            which = f"{len(found)} runs ({', '.join(file.stem for file in found)})" if found else "no .jsonl file"
            raise TriAttentionError(f"{path} holds {which}; give one .jsonl file")
        return found[0]
    candidates = [path, path.with_name(f"{path.name}.jsonl"), out / f"{name}.jsonl"]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    raise TriAttentionError(
        f"there is no run {name} (looked for {', '.join(map(str, candidates))}); give a .jsonl file"
    )


def _whole_lines(path: Path) -> list[Line]:
    lines, torn = read_lines(path)
    if not lines:
        raise TriAttentionError(f"{path} has no replies; finish the run first")
    settings = settings_of(lines)
    for number, line in enumerate(lines, start=1):
        other = next((name for name, value in settings.items() if line.get(name) != value), None)
        if other is not None:
            raise TriAttentionError(
                f"{path}, line {number} is from another run than line 1 ({other}); give each run its own file"
            )
    for name, kind in (("dataset", str), ("questions", int), ("num_samples", int)):
        if type(settings.get(name)) is not kind:
            raise TriAttentionError(f"{path}: {name!r} is {settings.get(name)!r}, so it is not a run of run-one")
    seen: set[tuple[int, int]] = set()
    for number, line in enumerate(lines, start=1):
        if (reply := (line["index"], line["sample"])) in seen:
            raise TriAttentionError(f"{path}, line {number} is the same reply as an earlier line; remove one of them")
        seen.add(reply)
    if not math.fsum(line["batch_seconds"] for line in lines) > 0:
        raise TriAttentionError(f"{path} says that its replies took no time; give the file that run-one wrote")
    expected = settings["questions"] * settings["num_samples"]
    if torn or len(lines) < expected:
        print(f"note: {path} is not finished: it holds {len(lines)} of {expected} replies")
    return lines


def comparison(paths: Sequence[Path], runs: Sequence[Sequence[Line]]) -> list[str]:
    """The lines to print. Raises TriAttentionError for runs on different datasets, or without common questions."""
    a, b = (settings_of(lines) for lines in runs)
    if a["dataset"] != b["dataset"]:
        raise TriAttentionError(
            f"{paths[0]} is on the dataset {a['dataset']}, {paths[1]} on {b['dataset']}; compare runs on the same one"
        )
    summaries = [summarise(lines) for lines in runs]
    shares = [shares_of(lines) for lines in runs]
    shared = [question for question in shares[0] if question in shares[1]]
    if not shared:
        raise TriAttentionError(f"{paths[0]} and {paths[1]} have no question in common; compare runs on the same ones")
    rows = [["", "A", "B", "B / A"]]
    for heading, cell in COLUMNS.items():
        rows.append([heading, *map(cell, summaries), _ratio(summaries, _RATIOS.get(heading))])
    difference = paired_difference(*([share[question] for question in shared] for share in shares))
    differing = [
        f"{name} {shown(a.get(name))} / {shown(b.get(name))}" for name in {**a, **b} if a.get(name) != b.get(name)
    ]
    lines = [f"A: {paths[0]}", f"B: {paths[1]}", table(rows)]
    lines += [f"differing settings (A / B): {', '.join(differing) or 'none'}"]
    for letter, share in zip("AB", shares, strict=True):
        if len(share) > len(shared):
            lines.append(f"{len(share) - len(shared)} questions are only in {letter}")
    lines.append(
        f"accuracy B - A over {len(shared)} shared questions: {difference.estimate:+.3f}, "
        f"95 % interval {difference.low:+.3f} to {difference.high:+.3f}"
    )
    return lines


def _ratio(summaries: Sequence[dict[str, Any]], entry: str | None) -> str:
    if entry is None:
        return ""
    a, b = (summary[entry] for summary in summaries)
    return f"{b / a:.3f}" if a else "-"
