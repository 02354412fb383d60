"""The command line, one file per verb.

Exit codes: 0 success, 1 an error whose message says how to fix it, 2 usage, 3 nothing to compare (``vllm-check``), 130
interrupted. torch and transformers are imported by the verb that runs, so that ``--help`` is quick.
"""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from triattention import __version__
from triattention.cli import (
    build_stats,
    calibrate,
    compare,
    download_models,
    extra_config,
    overrides,
    run_default,
    run_one,
    run_sweep,
    vllm_check,
)
from triattention.cli.heartbeat import signs_of_life
from triattention.errors import TriAttentionError

_VERBS = (run_one, run_default, run_sweep, compare, build_stats, calibrate, download_models, vllm_check)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code; argparse exits with 2 on a usage error, vllm-check with 3.

    On a CPU it uses one thread unless OMP_NUM_THREADS is set: threads spin while they wait for each other, which is
    many times slower on a busy machine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return guarded(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def guarded(call: Callable[[], None]) -> int:
    """The exit code of ``call``; user errors become one sentence on stderr, and warnings become notes there."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    _log_to_stderr()
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning
            call()
            sys.stdout.flush()
    except TriAttentionError as error:
        print(f"triattention: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("triattention"):
            raise  # a broken installation of this package, not a missing dependency
        print(
            f"triattention: {error.name} is not installed; `make setup` or triattention-verify[hf] brings it",
            file=sys.stderr,
        )
        return 3
    except KeyboardInterrupt:
        print("triattention: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # the reader of the pipe is gone: prevent Python's own flush at exit from failing as well
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


def _run(argv: list[str]) -> None:
    parser, verbs = _parsers()
    if argv and argv[0] in verbs:
        verb, *words = argv
        if any(overrides.OPTION in action.option_strings for action in verbs[verb]._actions):
            words = overrides.joined(words)
        argv = [verb, *extra_config.expand(words, verbs[verb])]
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
    else:
        with signs_of_life(args.verb):
            args.run(args)


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The main parser, and the parser of each verb."""
    parser = argparse.ArgumentParser(
        prog="python -m triattention",
        description="Answer questions with a compressed KV cache, and prepare models and statistics for it.",
        epilog="Try: python -m triattention run-one --model embedded --dataset smoke --method full --max-questions 3",
    )
    parser.add_argument("--version", action="version", version=f"triattention {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", title="verbs")
    for verb in _VERBS:
        verb.add_parser(verbs)
    return parser, verbs.choices


def _log_to_stderr() -> None:
    logger = logging.getLogger("triattention")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


def _show_warning(message: Warning | str, *_: Any) -> None:
    print(f"note: {message}", file=sys.stderr)
