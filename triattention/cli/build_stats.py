"""``build-stats``: calibrate a model on text and write the statistics file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention import models
from triattention.cli.options import add_model_options, quiet_transformers, require_writable
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.statistics import Statistics

_RANGES = 5


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "build-stats",
        help="calibrate a model on text and write its statistics",
        description="Run text through a model, average its queries, write the statistics and print their concentration "
        "|E q| / E|q| by layer (1: all queries alike; 0: no centre, and nothing for TriAttention to use).",
    )
    add_model_options(parser)
    parser.add_argument("--input", metavar="TEXT", help="UTF-8 text to calibrate on (default: the bundled text)")
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="statistics file to write, replaced if it exists (default: the one that run-one uses, in the cache)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.output is None:
        _show_cached(args)
        return
    output = Path(args.output).expanduser()
    if output.is_dir():
        raise TriAttentionError(f"--output {output} is a directory; give the name of the file to write")
    require_writable(output.absolute().parent, "--output directory")
    from triattention import statistics
    from triattention.text_calibration import bundled_text, calibrate_on_text, read_text

    quiet_transformers()
    text = bundled_text() if args.input is None else read_text(Path(args.input).expanduser())
    source = models.find_source(args.model)
    loaded = models.load(source, dtype=args.dtype, device=args.device)
    result = calibrate_on_text(loaded, text)
    try:
        statistics.save(output, result)
    except OSError as error:
        raise TriAttentionError(f"cannot write {output}: {error.strerror}; give another --output") from error
    print(f"wrote {output}: {result.token_count} tokens of {args.input or 'the bundled text'}")
    print(*concentration_lines(result), sep="\n")


def _show_cached(args: argparse.Namespace) -> None:
    """Print the statistics that ``run-one`` uses, made now if there are none yet, and last where they are."""
    if args.input is not None:
        raise TriAttentionError(f"--input {args.input} needs --output: statistics in the cache are of the bundled text")
    from triattention import statistics
    from triattention.text_calibration import cached_statistics

    quiet_transformers()
    path = cached_statistics(models.load(models.find_source(args.model), dtype=args.dtype, device=args.device))
    print(*concentration_lines(statistics.load(path)), path, sep="\n")


def concentration_lines(result: Statistics) -> list[str]:
    """Mean and range of the concentration, for up to five ranges of layers."""
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
