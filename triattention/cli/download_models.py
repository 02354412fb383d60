"""``download-models``: download or convert models for ``run-one``, and print their directories."""

from __future__ import annotations

import argparse
from typing import Any

from triattention import models
from triattention.cli.options import quiet_transformers


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "download-models",
        help="convert the embedded model, or fetch hub models, and print their directories",
        description="Convert the embedded model once, or fetch hub models into the hub's cache; print each directory.",
    )
    parser.add_argument(
        "--model", action="append", metavar="M", help="'embedded' (default) or a hub name; may be given several times"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    quiet_transformers()
    for source in [models.find_source(name) for name in args.model or [models.EMBEDDED]]:
        print(models.fetch(source), flush=True)
