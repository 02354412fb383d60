"""``run-default``: the recommended runs of one model, with the full cache and with TriAttention."""

from __future__ import annotations

import argparse
from typing import Any

from triattention.cli import compression
from triattention.cli.execution import run_many
from triattention.cli.options import add_model_options, add_run_options
from triattention.cli.plan import Plan

METHODS = ("full", "triattention")
DATASETS = ("aime24", "aime25", "math500")
#: Long enough for a reasoning model to finish on its own.
MAX_NEW_TOKENS = 32768


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run-default",
        allow_abbrev=False,
        help="the recommended runs of one model",
        description=f"Run run-one with the methods {' and '.join(METHODS)} on {', '.join(DATASETS)}, and print a table "
        "at the end. An interrupted command can be resumed by running it again.",
    )
    add_model_options(parser)
    add_run_options(parser, max_new_tokens=MAX_NEW_TOKENS, out="results")
    compression.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plans = [
        Plan.of(argparse.Namespace(**{**vars(args), "dataset": dataset, "method": method}))
        for dataset in DATASETS
        for method in METHODS
    ]
    run_many(plans, dry_run=args.dry_run)
