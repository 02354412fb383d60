"""``build-stats``: calibrate models on text and write a statistics file for each."""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention import models
from triattention.cli import overrides
from triattention.cli.calibrate import calibrate_to_file, require_output
from triattention.cli.children import Job, run_jobs, slots_on, visible_gpus
from triattention.cli.options import (
    DEFAULT_MAX_LENGTH,
    MODEL_HELP,
    add_placement_options,
    quiet_transformers,
    require_at_least_one,
    source_of,
)
from triattention.errors import TriAttentionError
from triattention.files import expanded

if TYPE_CHECKING:
    from triattention.statistics import Statistics

_RANGES = 5


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "build-stats",
        allow_abbrev=False,
        help="calibrate models on text and write their statistics",
        description="Run text through each model, average its queries, write the statistics and print their "
        "concentration |E q| / E|q| by layer (1: all queries alike; 0: no centre, nothing for TriAttention to use). "
        "Without --output and --output-dir the statistics go to the cache, where run-one finds them, and the path is "
        "printed last.",
    )
    parser.add_argument(
        "--model", action="append", required=True, metavar="M", help=f"{MODEL_HELP}; may be given several times"
    )
    add_placement_options(parser)
    overrides.add_options(parser)
    parser.add_argument("--input", metavar="TEXT", help="UTF-8 text to calibrate on (default: the bundled text)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("--output", metavar="FILE", help="statistics file of one model, replaced if it exists")
    target.add_argument("--output-dir", metavar="DIR", help="directory for one file per model, MODEL.pt")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"use at most N tokens of the text (default: {DEFAULT_MAX_LENGTH})",
    )
    parser.add_argument(
        "--job-parallel", type=int, metavar="N", help="models to calibrate at once, spread over the GPUs (default: 1)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    require_at_least_one(args, "max_length", "job_parallel")
    outputs = _outputs(args)
    if not outputs:
        _show_cached(args)
        return
    for output in outputs.values():
        require_output(output, args.input)
    length = args.max_length or DEFAULT_MAX_LENGTH
    calls = [
        (source_of(args, model), args.input, str(output), length, args.dtype, args.device)
        for model, output in outputs.items()
    ]
    if len(calls) == 1:
        calibrate_to_file(*calls[0][:2], *outputs.values(), *calls[0][3:])
    else:
        _in_children(calls, args.job_parallel or 1)
    for output in outputs.values():
        _show(output, args.input)


def _outputs(args: argparse.Namespace) -> dict[str, Path]:
    """The file to write for each model; empty if the statistics go to the cache."""
    if args.output is not None:
        if len(args.model) > 1:
            raise TriAttentionError(
                f"--output {args.output} is one file, but there are {len(args.model)} models; use --output-dir"
            )
        return {args.model[0]: expanded(args.output)}
    if args.output_dir is None:
        for option, value in (
            ("input", args.input),
            ("max-length", args.max_length),
            ("job-parallel", args.job_parallel),
        ):
            if value is not None:
                raise TriAttentionError(
                    f"--{option} {value} needs --output or --output-dir: cached statistics are always of the bundled "
                    "text, made one model after the other"
                )
        return {}
    directory = expanded(args.output_dir)
    outputs = {model: directory / f"{source_of(args, model).label}.pt" for model in args.model}
    if len(set(outputs.values())) < len(outputs):
        raise TriAttentionError(f"two of the models would be written to the same file in {directory}; do one at a time")
    return outputs


def _in_children(calls: list[tuple[Any, ...]], at_once: int) -> None:
    names = ("source", "text_file", "output", "max_length", "dtype", "device")
    jobs = [
        Job(
            call[0].name,
            "triattention.cli.calibrate:calibrate_in_child",
            dict(zip(names, (asdict(call[0]), *call[1:]), strict=True)),
        )
        for call in calls
    ]
    gpus = visible_gpus(models.choose_device(calls[0][-1]).type)
    slots = slots_on(gpus, min(at_once, len(jobs)))
    failures = run_jobs(jobs, slots, note=lambda line: print(line, file=sys.stderr))
    if failures:
        raise TriAttentionError(f"{len(failures)} of {len(jobs)} models were not calibrated: {'; '.join(failures)}")


def _show(path: Path, text_file: str | None) -> None:
    from triattention import statistics

    result = statistics.load(path)
    print(f"wrote {path}: {result.token_count} tokens of {text_file or 'the bundled text'}")
    print(*concentration_lines(result), sep="\n")


def _show_cached(args: argparse.Namespace) -> None:
    """Print the concentration of the statistics that ``run-one`` uses and their path; calibrates if there are none."""
    from triattention import statistics
    from triattention.text_calibration import cached_statistics

    quiet_transformers()
    for source in [source_of(args, model) for model in args.model]:
        path = cached_statistics(models.load(source, dtype=args.dtype, device=args.device))
        print(*concentration_lines(statistics.load(path)), path, sep="\n")


def concentration_lines(result: Statistics) -> list[str]:
    """Mean and range of the concentration for up to five groups of layers."""
    by_layer = result.concentration().tolist()
    width = -(-len(by_layer) // _RANGES)
    lines = []
    for first in range(0, len(by_layer), width):
        part = by_layer[first : first + width]
        lines.append(
            f"concentration, layers {first:2d} to {first + len(part) - 1:2d}: "
            f"mean {sum(part) / len(part):.2f}, from {min(part):.2f} to {max(part):.2f}"
        )
    return lines
