"""Options and checks that the verbs share."""

from __future__ import annotations

import argparse
import os
import reprlib
from pathlib import Path

from triattention import models
from triattention.cli import extra_config, overrides
from triattention.errors import TriAttentionError

DEFAULT_TEMPERATURE = 0.6
DEFAULT_TOP_P = 0.95
DEFAULT_MAX_LENGTH = 32768

MODEL_HELP = "'embedded' (SmolLM2-135M-Instruct), a model directory, or a hub name"


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="M", help=MODEL_HELP)
    add_placement_options(parser)
    overrides.add_options(parser)


def source_of(args: argparse.Namespace, name: str | None = None) -> models.ModelSource:
    """The model ``name`` (default: ``--model``) with the configuration that the options of ``args`` give it."""
    return models.find_source(
        name or args.model, revision=args.revision, config_path=args.hf_config_path, overrides=args.hf_overrides or None
    )


def add_placement_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--dtype", choices=models.DTYPES, default="auto", help="weights and cache (default: the checkpoint's own)"
    )
    parser.add_argument(
        "--device", choices=models.DEVICES, default="auto", help="default: the GPU if torch sees one, else the CPU"
    )


def add_run_options(parser: argparse.ArgumentParser, *, max_new_tokens: int, out: str | None) -> None:
    """Add the options common to run-one and the verbs with many runs: all except dataset, method and budget."""
    parser.add_argument(
        "--attn-implementation", choices=models.ATTENTION, default="sdpa", help="attention of the model (default: sdpa)"
    )
    parser.add_argument("--max-questions", type=int, metavar="K", help="only the first K questions")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        default=max_new_tokens,
        metavar="N",
        help=f"longest reply in tokens (default: {max_new_tokens})",
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, metavar="N", help="replies generated together (default: 1)"
    )
    parser.add_argument(
        "--num-samples", type=int, default=1, metavar="N", help="replies per question, for pass@1 (default: 1)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        metavar="T",
        help=f"sampling temperature (default: greedy, or {DEFAULT_TEMPERATURE} with several samples)",
    )
    parser.add_argument(
        "--top-p", type=float, metavar="P", help=f"nucleus sampling (default: {DEFAULT_TOP_P} when sampling)"
    )
    parser.add_argument("--seed", type=int, default=0, help="every batch's seed is derived from it (default: 0)")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that share the batches (default: one per GPU; one on a CPU)"
    )
    where = "nothing is saved" if out is None else out
    parser.add_argument(
        "--out",
        metavar="DIR",
        default=out,
        help=f"directory for JSON lines and summary; an unfinished run there is resumed (default: {where})",
    )
    parser.add_argument("--run-tag", metavar="TAG", help="appended to the file names")
    extra_config.add_option(parser)
    parser.add_argument(
        "--dry-run", action="store_true", help="print what would run, without loading weights or writing files"
    )


def require_at_least_one(args: argparse.Namespace, *names: str) -> None:
    """Raise TriAttentionError for an option that is given and below 1."""
    for name in names:
        value = getattr(args, name)
        if value is not None and not 1 <= value < 2**31:
            wanted = "1 or more" if value < 1 else f"at most {2**31 - 1}"
            raise TriAttentionError(f"--{name.replace('_', '-')} is {reprlib.repr(value)}; give {wanted}")


def quiet_transformers() -> None:
    """Disable progress bars and warnings of transformers: the verbs print their own messages."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def require_writable(directory: Path, what: str) -> None:
    """Raise TriAttentionError unless ``directory`` is or could be made writable; creates nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise TriAttentionError(f"{what} {directory}: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TriAttentionError(f"{what} {directory}: {existing} cannot be written to; give another directory")
