"""``download-models``: put a model where ``run-one`` finds it, and print the directory."""

from __future__ import annotations

import argparse
from typing import Any

from triattention import models
from triattention.cli.options import quiet_transformers


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "download-models",
        help="convert the embedded model, or fetch a hub model, and print its directory",
        description="Convert the embedded model once, or fetch a hub model into the hub's cache; print the directory.",
    )
    parser.add_argument("--model", default=models.EMBEDDED, metavar="M", help="'embedded' (default) or a hub name")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    quiet_transformers()
    print(models.fetch(models.find_source(args.model)))
