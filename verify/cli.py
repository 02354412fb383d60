"""The command line: imports only what the verb needs, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from verify.arguments import parser
from verify.errors import ConfigurationError, Exit
from verify.files import INSTALLED, SET_UP, default_out, fault_of_the_machine, repository_root
from verify.run.request import parse_expect, parse_phases, request_of


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code: 3 after a ConfigurationError, 2 after Ctrl-C, each with one line on
    stderr.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal that cannot show a character shows another
    if INSTALLED:
        # else `python -m` in a child would take another package of our names in the current folder for this one
        os.environ["PYTHONSAFEPATH"] = "1"
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["gate"]:
        return _gate(words)
    chosen = parser().parse_args(words)
    try:
        code = _carried_out(chosen)
        if sys.stdout is not None:
            sys.stdout.flush()
        return code
    except ConfigurationError as error:
        print(f"verify: {error}", file=sys.stderr)
        return Exit.CANNOT
    except KeyboardInterrupt:
        print(f"verify: {chosen.verb} was interrupted; run it again", file=sys.stderr)
        return Exit.INTERRUPTED
    except BrokenPipeError:
        # the reader (head, less) closed the pipe; redirect stdout to /dev/null, so that the final flush is silent
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return Exit.OK if chosen.verb in _SHOWING else Exit.INTERRUPTED
    except (OSError, ModuleNotFoundError) as error:
        if not (sentence := fault_of_the_machine(error)):
            raise
        print(f"verify: {sentence}", file=sys.stderr)
        return Exit.CANNOT


def _gate(words: Sequence[str]) -> int:
    """``gate`` ends as its contract says, whatever happens, so nothing of the other verbs applies to it."""
    from verify.fleet import gate

    gate.heed()
    try:
        chosen = parser().parse_args(words)
        return gate.gate(chosen.contract, chosen.gpu, chosen.expect, chosen.within)
    except SystemExit as refused:
        if refused.code != Exit.CANNOT:
            raise  # after --help
        return gate.misused(words)
    except gate.Stopped:
        return gate.interrupted(words)


def _carried_out(chosen: argparse.Namespace) -> int:
    if not getattr(chosen, "rehearsal", False):
        return _VERBS[chosen.verb](chosen)
    from verify.record.reading import rehearsals_only

    with rehearsals_only():
        return _VERBS[chosen.verb](chosen)


def _compile(chosen: argparse.Namespace) -> int:
    from verify.build import verb

    try:
        return verb.compile_verb(
            chosen.sm, kernels=chosen.kernels, full=chosen.full, subject=chosen.subject, jobs=chosen.jobs,
            limit_s=chosen.timeout, fresh=chosen.fresh, as_json=chosen.json, out=chosen.out,
        )  # fmt: skip
    except KeyboardInterrupt:
        print("verify: interrupted, no record was written; finished builds are kept for the next run", file=sys.stderr)
        return Exit.INTERRUPTED


def _simulate(chosen: argparse.Namespace) -> int:
    if chosen.trace is not None:
        from verify.run.trace import trace
        from verify.selftest.faults import mutation_of

        others = {"--phases": chosen.phases, "-m": chosen.expression, "--resume": chosen.resume, "--jobs": chosen.jobs}
        if given := [option for option, value in others.items() if value is not None]:
            raise ConfigurationError(f"--trace runs no checks; drop {', '.join(given)}")
        change, out = None if chosen.fault is None else mutation_of(chosen.fault), chosen.out or default_out()
        runs = {"sm": chosen.sm, "against": chosen.against, "mutation": change}
        return trace(chosen.trace, subject=chosen.subject, out=out, **runs)
    if chosen.against is not None or chosen.fault is not None:
        raise ConfigurationError("--against and --fault say what a trace is compared with; add --trace KERNEL")
    from verify.machine.processors import cores
    from verify.run.simulate import simulate

    return simulate(
        chosen.sm, phases=chosen.phases, expression=chosen.expression, subject=chosen.subject, resume=chosen.resume,
        jobs=len(cores()) if chosen.jobs is None else chosen.jobs, out=chosen.out,
    )  # fmt: skip


def _quality(chosen: argparse.Namespace) -> int:
    from verify.model import quality

    return quality.quality_verb(chosen.subject, chosen.device, chosen.out)


def _selftest(chosen: argparse.Namespace) -> int:
    import importlib.util

    if importlib.util.find_spec("libcst") is None:
        step = "pip install libcst" if INSTALLED else SET_UP
        raise ConfigurationError(f"selftest needs libcst, which is not installed; run {step}")
    from verify.selftest import verb

    full = None if chosen.full is None else parse_phases(chosen.full)
    choice = verb.Choice(tuple(chosen.only), chosen.sample, full, chosen.seed, chosen.device)
    return verb.selftest(choice, chosen.subject, chosen.jobs, chosen.format, chosen.out)


def _run(chosen: argparse.Namespace) -> int:
    request = request_of(chosen)
    from verify.run import runner

    return runner.run(request)


def _fleet(chosen: argparse.Namespace) -> int:
    from verify.fleet import many

    if chosen.act == "status":
        return many.status(chosen.address)
    if chosen.act == "collect":
        return many.collect(chosen.address, chosen.run, chosen.out)
    return many.run(many.request_of(chosen))


def _report(chosen: argparse.Namespace) -> int:
    from verify.report import verb

    more = {"every_check": chosen.all, "out": chosen.out, "subject": chosen.subject}
    return verb.report(chosen.gpu, chosen.format, chosen.records, **more)


def _export(chosen: argparse.Namespace) -> int:
    from verify.report import export

    return export.export(chosen.record, chosen.form, chosen.out)


def _diff(chosen: argparse.Namespace) -> int:
    from verify.report import difference

    return difference.diff(chosen.runs, chosen.since, chosen.gpu, chosen.records, chosen.subject, as_json=chosen.json)


def _history(chosen: argparse.Namespace) -> int:
    from verify.report import history

    return history.history(chosen.check, chosen.gpu, chosen.records, chosen.subject, as_json=chosen.json)


def _check(chosen: argparse.Namespace) -> int:
    from verify.report import pack

    return pack.check(chosen.records, as_json=chosen.json)


def _pack(chosen: argparse.Namespace) -> int:
    from verify.report import pack

    return pack.make(chosen.record, chosen.subject, chosen.out)


def _doctor(chosen: argparse.Namespace) -> int:
    from verify.report import doctor
    from verify.subject.find import find_subject

    subject = find_subject(chosen.subject, repository_root()) if chosen.subject is not None else None
    expect = parse_expect(chosen.expect) if chosen.expect is not None else None
    return doctor.doctor(expect, subject, chosen.profile)


def _gates(chosen: argparse.Namespace) -> int:
    from verify import explain

    return explain.gates(chosen.format)


def _explain(chosen: argparse.Namespace) -> int:
    from verify import explain

    return explain.explain(chosen.id, chosen.records)


def _init(chosen: argparse.Namespace) -> int:
    from verify.subject import scaffold

    return scaffold.init(chosen.folder, chosen.profile, chosen.name)


def _contract(chosen: argparse.Namespace) -> int:
    from verify.subject import contract

    return contract.contract(chosen.format)


#: Verbs whose exit code answers nothing but whether they could show something.
_SHOWING = ("report", "history", "gates", "explain", "export", "contract")

_VERBS = {
    "run": _run,
    "fleet": _fleet,
    "compile": _compile,
    "simulate": _simulate,
    "quality": _quality,
    "selftest": _selftest,
    "report": _report,
    "export": _export,
    "pack": _pack,
    "diff": _diff,
    "history": _history,
    "check": _check,
    "doctor": _doctor,
    "gates": _gates,
    "explain": _explain,
    "init": _init,
    "contract": _contract,
}
