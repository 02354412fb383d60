"""``run-one``: load a model, answer a dataset, grade the answers."""

from __future__ import annotations

import argparse
from typing import Any

from triattention.cli import compression
from triattention.cli.execution import dry, execute
from triattention.cli.options import add_model_options, add_run_options
from triattention.cli.plan import Plan
from triattention.evaluation.datasets import KNOWN


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run-one",
        allow_abbrev=False,
        help="answer a dataset with one model and one method, and grade it",
        description="Answer the questions in batches, print and grade each reply, and print the accuracy at the end. "
        "With --out the replies are saved, one JSON line each, and running the same command again resumes an "
        "interrupted run.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="D",
        help=f"{', '.join(KNOWN)}, or a .jsonl file with question and answer on each line",
    )
    parser.add_argument("--method", choices=compression.METHODS, required=True, help="full: no compression")
    add_run_options(parser, max_new_tokens=128, out=None)
    compression.add_options(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plan = Plan.of(args)
    unused = compression.without_effect(args, plan.method)
    if unused:
        why = "does not compress" if plan.method == "full" else "needs no statistics"
        print(f"note: --method {args.method} {why}, so {', '.join(unused)} has no effect")
    if args.dry_run:
        dry([plan])
    else:
        execute(plan)
