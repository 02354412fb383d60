"""Options and checks that the verbs share."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from triattention.errors import TriAttentionError
from triattention.models import DEVICES, DTYPES


def add_model_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        required=True,
        metavar="M",
        help="'embedded' (SmolLM2-135M-Instruct), a model directory, or a hub name",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="auto", help="weights and cache (default: the checkpoint's own)"
    )
    parser.add_argument("--device", choices=DEVICES, default="auto", help="default: the GPU where torch sees one")


def quiet_transformers() -> None:
    """No progress bars and no advice from transformers: the verbs print their own lines."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


def require_writable(directory: Path, what: str) -> None:
    """Raise TriAttentionError unless ``directory`` can be written to, or made; makes nothing."""
    existing = directory
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise TriAttentionError(f"{what} {directory}: {existing} is a file; give a directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise TriAttentionError(f"{what} {directory}: {existing} cannot be written to; give another directory")
