"""``calibrate``: statistics of one model on a text, with the concentration of every layer."""

from __future__ import annotations

import argparse
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention import models
from triattention.cli.options import (
    DEFAULT_MAX_LENGTH,
    add_model_options,
    quiet_transformers,
    require_at_least_one,
    require_writable,
    source_of,
)
from triattention.errors import TriAttentionError
from triattention.files import expanded
from triattention.reading import read_text

if TYPE_CHECKING:
    from triattention.models import ModelSource
    from triattention.statistics import Statistics

_log = logging.getLogger(__name__)


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "calibrate",
        allow_abbrev=False,
        help="statistics of one model on a text, layer by layer",
        description="Run a text through a model, average its queries, write the statistics and print the concentration "
        "|E q| / E|q| of every layer (1: all queries alike; 0: no centre, nothing for TriAttention to use). "
        "Without --output the statistics go to the cache, where run-one and the vLLM plugin find them.",
    )
    add_model_options(parser)
    parser.add_argument("--input", metavar="TEXT", help="UTF-8 text to calibrate on (default: the bundled text)")
    parser.add_argument("--output", metavar="FILE", help="statistics file to write, replaced if it exists")
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="N",
        help=f"use at most N tokens of the text (default: {DEFAULT_MAX_LENGTH})",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    if args.output is None:
        output, result = _calibrate_to_cache(args)
    else:
        length = DEFAULT_MAX_LENGTH if args.max_length is None else args.max_length
        require_at_least_one(args, "max_length")
        output = expanded(args.output)
        require_output(output, args.input)
        result = calibrate_to_file(source_of(args), args.input, output, length, args.dtype, args.device)
    print(f"wrote {output}: {result.token_count} tokens of {args.input or 'the bundled text'}")
    for layer, concentration in enumerate(result.concentration().tolist()):
        print(f"concentration, layer {layer:2d}: {concentration:.3f}")


def _calibrate_to_cache(args: argparse.Namespace) -> tuple[Path, Statistics]:
    from triattention import statistics
    from triattention.text_calibration import cached_statistics

    for option, value in (("input", args.input), ("max-length", args.max_length)):
        if value is not None:
            raise TriAttentionError(
                f"--{option} {value} needs --output: cached statistics are always of the bundled text"
            )
    quiet_transformers()
    path = cached_statistics(models.load(source_of(args), dtype=args.dtype, device=args.device))
    return path, statistics.load(path)


def require_output(output: Path, text_file: str | None) -> None:
    """Raise TriAttentionError unless the file can be written, and replaces at most statistics; called early."""
    if output.is_dir():
        raise TriAttentionError(f"--output {output} is a directory; give the name of the file to write")
    if text_file is not None and output.exists() and output.samefile(expanded(text_file)):
        raise TriAttentionError(f"--output {output} is the text of --input; give another file to write")
    if output.exists() and (not output.is_file() or not _is_archive(output)):
        raise TriAttentionError(f"--output {output} is there and is not a statistics file; give another name")
    require_writable(output.absolute().parent, "--output directory")


def _is_archive(path: Path) -> bool:
    """Whether a file is empty or begins as torch saves one."""
    with path.open("rb") as stream:
        return stream.read(2) in (b"", b"PK")


def calibrate_to_file(
    source: ModelSource, text_file: str | None, output: Path, max_length: int, dtype: str, device: str
) -> Statistics:
    """Calibrate a model on a text file (None: the bundled text) and write its statistics."""
    from tqdm import tqdm

    from triattention import statistics
    from triattention.text_calibration import bundled_text, calibrate_on_text

    quiet_transformers()
    text = (
        bundled_text()
        if text_file is None
        else read_text(expanded(text_file), "the calibration text", "give a text file")
    )
    loaded = models.load(source, dtype=dtype, device=device)
    with tqdm(unit="token", desc=source.name, file=sys.stderr, disable=not sys.stderr.isatty()) as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        result = calibrate_on_text(loaded, text, max_length=max_length, progress=progress)
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        statistics.save(output, result)
    except OSError as error:
        raise TriAttentionError(f"cannot write {output}: {error.strerror}; give another --output") from error
    return result


def calibrate_in_child(
    source: dict[str, Any], text_file: str | None, output: str, max_length: int, dtype: str, device: str
) -> None:
    """``calibrate_to_file`` for a child process, with a line on stderr when it is done."""
    result = calibrate_to_file(models.ModelSource(**source), text_file, Path(output), max_length, dtype, device)
    _log.info("wrote %s: %d tokens", output, result.token_count)
