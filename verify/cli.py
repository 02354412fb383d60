"""The command line: parses, imports what the verb needs and nothing else, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from verify.outcome import ConfigurationError
from verify.request import DEFAULT_SEED, RunRequest, parse_expect, parse_phases

EXIT_CONFIGURATION = 3

_FORMATS = ("terminal", "markdown", "json")

#: What a run is started with and keeps, by the option that chooses it.
_FIXED = {
    "phases": "--phases", "expression": "-m", "device": "--device", "model": "--model", "subject": "--subject",
    "seed": "--seed",
}  # fmt: skip

_EXAMPLES = """\
examples:
  python -m verify run                           everything, on whatever this machine has
  python -m verify run --phases 1-4 --expect sm120
  python -m verify run --phase 4 -m hard
  python -m verify run --resume RUN              go on with an interrupted run
  python -m verify report                        one line for every GPU
  python -m verify report --gpu sm120 --format markdown
  python -m verify doctor --expect sm90          is this machine ready, and is it the right one
  python -m verify explain p4.triton_oracle

exit codes: 0 fine; 1 a HARD check failed; 2 interrupted, can be resumed; 3 configuration or usage;
  4 a SOFT check failed under --strict-soft; 5 a report was made, but some records were unreadable
"""

_RUN_EXAMPLES = """\
examples:
  python -m verify run --phases 1,3-5
  python -m verify run --subject ../another-checkout --device cpu
  python -m verify run -m 'hard and not slow' --out results
"""


class _Parser(argparse.ArgumentParser):
    """argparse, but a usage error is exit 3: 2 means that a run was interrupted."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_CONFIGURATION, f"verify: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    top = _Parser(
        prog="python -m verify",
        description="Verify a TriAttention implementation on this machine, and report what is known about each GPU.",
        epilog=_EXAMPLES,
        formatter_class=plain,
        allow_abbrev=False,
    )
    verbs = top.add_subparsers(dest="verb", metavar="VERB", required=True)
    _add_run(verbs)
    report = _add(verbs, "report", "the gate matrix of a GPU from the records, or one line for every GPU")
    report.add_argument("--gpu", metavar="GPU", help="sm120, 120 or 12.0; or emulated (default: all, one line each)")
    _add_format(report)
    _add_records(report)
    doctor = _add(verbs, "doctor", "found and minimum versions, what will be skipped and why, the next step")
    doctor.add_argument("--expect", metavar="GPU", help="the GPU this machine must have")
    _add_format(_add(verbs, "gates", "every check: its gate, where it is must-pass, its claim"))
    explain = _add(verbs, "explain", "one check in full: claim, reason, tolerance, remedy, last results")
    explain.add_argument("id", metavar="ID", help="a check (p4.triton_oracle.n33) or a family (p4.triton_oracle)")
    _add_records(explain)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code; a ConfigurationError is one line on stderr and exit 3."""
    chosen = parser().parse_args(arguments)
    try:
        code = _VERBS[chosen.verb](chosen)
        sys.stdout.flush()
        return code
    except ConfigurationError as error:
        print(f"verify: {error}", file=sys.stderr)
        return EXIT_CONFIGURATION
    except BrokenPipeError:
        # the reader (head, less) left; point stdout at nothing so that the interpreter's last flush is silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def request_of(chosen: argparse.Namespace) -> RunRequest:
    """The validated request of ``run``. Raises ConfigurationError; ``--resume`` refuses what its run has fixed."""
    given = {name: value for name, value in vars(chosen).items() if name != "verb"}
    if "resume" in given and (fixed := [flag for name, flag in _FIXED.items() if name in given]):
        raise ConfigurationError(f"--resume keeps the options that its run was started with; drop {', '.join(fixed)}")
    if "phases" in given:
        given["phases"] = parse_phases(",".join(given["phases"]))
    if "expect" in given:
        given["expect"] = parse_expect(given["expect"])
    return RunRequest(**given)


def _add(verbs: argparse._SubParsersAction, name: str, claim: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=claim, description=claim[0].upper() + claim[1:] + ".", allow_abbrev=False)


def _add_format(verb: argparse.ArgumentParser) -> None:
    verb.add_argument("--format", choices=_FORMATS, default="terminal")


def _add_records(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--records",
        metavar="DIR",
        type=Path,
        action="append",
        default=[],
        help="read the records under DIR (repeatable; default: reports/evidence and reports/runs)",
    )


def _add_run(verbs: argparse._SubParsersAction) -> None:
    run = _add(verbs, "run", "run the checks here, print the gate matrix and write a record")
    run.epilog, run.formatter_class = _RUN_EXAMPLES, argparse.RawDescriptionHelpFormatter
    # an option that is not given is absent, so that one beside --resume is seen; RunRequest has the defaults
    run.argument_default = argparse.SUPPRESS
    run.add_argument(
        "--phases", "--phase", metavar="P", action="append", help="4, 1,3-5 or 1-8 (repeatable; default: all)"
    )
    run.add_argument("-m", dest="expression", metavar="EXPR", help="a pytest marker expression, such as hard")
    run.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: a GPU if there is one")
    run.add_argument("--expect", metavar="GPU", help="refuse to run on any other GPU (sm120, 120 or 12.0)")
    run.add_argument("--model", metavar="M", help="embedded (default), or a directory")
    run.add_argument("--subject", metavar="S", help="bundled (default), or a checkout")
    run.add_argument("--seed", type=int, metavar="N", help=f"default: {DEFAULT_SEED}")
    run.add_argument("--out", type=Path, metavar="DIR", help="default: reports/runs of the repository")
    run.add_argument("--resume", metavar="RUN", help="the id or directory of an interrupted run; it keeps its options")
    run.add_argument("--strict-soft", action="store_true", help="exit 4 when a SOFT check fails")


def _run(chosen: argparse.Namespace) -> int:
    request = request_of(chosen)
    from verify import runner

    return runner.run(request)


def _report(chosen: argparse.Namespace) -> int:
    from verify import report

    return report.report(chosen.gpu, chosen.format, chosen.records)


def _doctor(chosen: argparse.Namespace) -> int:
    from verify import doctor

    return doctor.doctor(parse_expect(chosen.expect) if chosen.expect is not None else None)


def _gates(chosen: argparse.Namespace) -> int:
    from verify import pages

    return pages.gates(chosen.format)


def _explain(chosen: argparse.Namespace) -> int:
    from verify import pages

    return pages.explain(chosen.id, chosen.records)


_VERBS = {"run": _run, "report": _report, "doctor": _doctor, "gates": _gates, "explain": _explain}
