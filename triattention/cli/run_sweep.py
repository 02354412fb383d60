"""``run-sweep``: every combination of budgets, methods and datasets."""

from __future__ import annotations

import argparse
from typing import Any

from triattention.cli import compression
from triattention.cli.execution import run_many
from triattention.cli.options import add_model_options, add_run_options
from triattention.cli.plan import Plan
from triattention.errors import TriAttentionError


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run-sweep",
        allow_abbrev=False,
        help="every combination of budgets, methods and datasets",
        description="Run run-one for every combination and print a table at the end. Method full runs once, regardless "
        "of the budgets. An interrupted sweep can be resumed with the same command.",
    )
    add_model_options(parser)
    parser.add_argument("--datasets", type=_names, required=True, metavar="D,...", help="as for run-one --dataset")
    parser.add_argument(
        "--methods", type=_methods, required=True, metavar="M,...", help=f"any of {', '.join(compression.METHODS)}"
    )
    parser.add_argument(
        "--budgets", type=_budgets, default=[None], metavar="N,...", help=f"default: {compression.DEFAULT_BUDGET}"
    )
    add_run_options(parser, max_new_tokens=128, out="results")
    compression.add_options(parser, budget=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    plans: dict[str, Plan] = {}
    for dataset in args.datasets:
        for method in args.methods:
            for budget in args.budgets:
                one = argparse.Namespace(**{**vars(args), "dataset": dataset, "method": method, "budget": budget})
                plan = Plan.of(one)
                if plans.setdefault(plan.name, plan).questions != plan.questions:
                    raise TriAttentionError(f"two of the --datasets are called {plan.settings['dataset']}; rename one")
    run_many(list(plans.values()), dry_run=args.dry_run)


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r} has an empty name; separate names with single commas")
    return names


def _methods(text: str) -> list[str]:
    for name in _names(text):
        if name not in compression.METHODS:
            raise argparse.ArgumentTypeError(f"unknown method {name!r}; choose from {', '.join(compression.METHODS)}")
    return _names(text)


def _budgets(text: str) -> list[int]:
    try:
        return [int(name) for name in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of whole numbers such as 512,1024") from None
