"""The command line: ``run-one``, ``build-stats``, ``download-models``.

Exit codes: 0 done, 1 an error that the message says how to mend, 2 usage, 130 interrupted. One file per verb; torch and
transformers are imported by the verb that runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any

from triattention import __version__
from triattention.cli import build_stats, download_models, run_one
from triattention.errors import TriAttentionError

_VERBS = (run_one, build_stats, download_models)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; argparse itself exits with 2 on a usage error."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    _log_to_stderr()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            args.run(args)
            sys.stdout.flush()
    except TriAttentionError as error:
        print(f"triattention: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("triattention"):
            raise  # a broken installation of this package, not a missing one beside it
        print(
            f"triattention: the package {error.name} is not installed; run: pip install {error.name}", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("triattention: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of a pipe has gone: keep Python's own flush at exit from failing as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m triattention",
        description="Answer questions with a compressed KV cache, and prepare what that needs.",
        epilog="Try: python -m triattention run-one --model embedded --dataset smoke --method full --max-questions 3",
    )
    parser.add_argument("--version", action="version", version=f"triattention {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser


def _log_to_stderr() -> None:
    logger = logging.getLogger("triattention")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"note: {message}", file=sys.stderr)
