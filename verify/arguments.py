"""The options of every verb of the command line, and its help."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from verify.checks import DEFAULT_SEED, PROFILES
from verify.errors import Exit
from verify.files import INSTALLED
from verify.fleet.contracts import CONTRACTS
from verify.run.levels import LEVELS

_SUBJECT = "bundled (default), installed, the path of a checkout, or module:NAME"

_RECORD = "a file, the directory of a run, or a run's id"
_OUT = f"default: reports/runs of the {'current folder' if INSTALLED else 'repository'}"

_FORMATS = ("terminal", "markdown", "json")

_EXAMPLES = """\
examples:
  python -m verify run                           every check that this machine can run
  python -m verify run --phases 1-4 --expect sm120
  python -m verify run --resume RUN              continue an interrupted run
  python -m verify compile                       build every kernel for every GPU; needs no GPU
  python -m verify simulate --sm 120             execute the compiled kernels of an sm120 without one
  python -m verify quality                       model quality under compression, compared with simple controls
  python -m verify selftest                      plant faults in the subject: does the suite catch them?
  python -m verify report --gpu sm120            one GPU; without --gpu a line for each
  python -m verify diff --since last-green       on every target, what got worse since its last green run
  python -m verify history --check p4.triton_oracle
  python -m verify check reports/runs/RUN        is the record sound, with nothing missing
  python -m verify pack reports/runs/RUN         one archive of it for a third party
  python -m verify report --format html          HTML pages; start at reports/site/index.html
  python -m verify gate --contract nagios        for a fleet: does this GPU work, within 45 seconds
  python -m verify fleet run --address 10.0.0.5:6379     one run on many machines
  python -m verify doctor --expect sm90          is this machine ready, and is its GPU an sm90
  python -m verify explain p4.triton_oracle
  python -m verify init DIR --profile scorer     start an implementation: stubs, to be filled in and judged
  python -m verify contract                      what each published name is given and must return

exit codes: 0 success; 1 a HARD check failed; 2 interrupted, can be continued; 3 configuration or usage error;
  4 a SOFT check failed under --strict-soft; 5 the report was made, but some records were unreadable
"""

_SIMULATE_EXAMPLES = """\
examples:
  python -m verify simulate --sm sm120           one GPU: the phases that a simulation has, and a record
  python -m verify simulate -m brief             every GPU, the variants of the scoring kernel only
  python -m verify simulate --trace score_kernel --sm sm80,sm120

exit codes: 0 nothing failed, or the trace was made; 1 a HARD check failed; 2 interrupted, the last line says how to
  go on; 3 configuration or usage error, or none of the GPUs can be simulated
"""

_RUN_EXAMPLES = """\
examples:
  python -m verify run --phases 1,3-5 --device cpu
  python -m verify run --subject ../another-checkout --profile scorer
  python -m verify run -m 'hard and not slow' --out results
"""


_GATE_EXAMPLES = """\
examples:
  python -m verify gate --expect sm90
  python -m verify gate --contract nagios --gpu 1 --within 30

Only a run on the GPU counts: without one, the answer is that nothing is known. One line goes to stdout, logs to stderr.
No record is written; `run --level 1` runs the same checks and writes one.

exit codes: 0 the checks passed; 1 a HARD check failed; 3 nothing is known: no GPU, another one than expected, in use,
  interrupted, out of time, or an option that makes no sense. --contract has its own; docs/fleet.md lists them
"""


_FLEET_EXAMPLES = """\
examples:
  python -m verify fleet run --address 10.0.0.5:6379 --gpus sm90,sm120 --phases 1-5
  python -m verify fleet run --address local     every GPU of this machine, one of each kind
  python -m verify fleet status --address 10.0.0.5:6379
  python -m verify fleet collect --address 10.0.0.5:6379 fleet-20261201T101500Z-1f2e

ADDRESS is that of a Ray cluster: HOST:PORT on one of its nodes, ray://HOST:PORT elsewhere. Each node names its GPU:
`ray start --address HOST:PORT --resources '{"sm90": 1}'`; one without a GPU names `emulated`. Whoever reaches the
address can run code on every node, so use it in a trusted network only.

exit codes: 0 every target's run ended with 0; 1 a HARD check failed; 2 interrupted; 3 a target has no record, or no
  verdict because of its machine, or the cluster cannot be used
"""


_COMPILE_TEXT = """\
Builds every kernel that the subject launches, for every architecture, with the installed Triton. Needs no GPU.
A successful build is compiled evidence: the kernel builds for that GPU, but has not run on it. A build that hangs is
reported as TIMEOUT, one that crashes the compiler as CRASH; the others continue. Builds are cached by source and
toolchain.
"""

_COMPILE_EXAMPLES = """\
examples:
  python -m verify compile                       the default variants for every GPU from sm80 to sm121
  python -m verify compile --sm sm120            one GPU: the resources of every kernel
  python -m verify compile --subject ../another-checkout --kernels their_kernel

exit codes: 0 everything was built, except for GPUs that the toolchain does not support; 1 a kernel was not built;
  2 interrupted, finished builds are kept; 3 configuration or usage error, or the toolchain supports none of the GPUs
"""


class _Parser(argparse.ArgumentParser):
    """argparse, except that a usage error exits with 3, because 2 means an interrupted run."""

    def error(self, message: str) -> NoReturn:
        self.exit(Exit.CANNOT, f"verify: {message}; see `{self.prog} --help`\n")


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
    _add_compile(verbs)
    _add_simulate(verbs)
    _add_quality(verbs)
    _add_selftest(verbs)
    _add_gate(verbs)
    _add_fleet(verbs)
    report = _add(verbs, "report", "the gate matrix of one GPU from the records, or one line per GPU")
    which = report.add_mutually_exclusive_group()
    which.add_argument("--gpu", metavar="GPU", help="sm120, 120 or 12.0; or emulated (default: all, one line each)")
    which.add_argument("--all", action="store_true", help="the matrix of every check on every GPU")
    report.add_argument("--format", choices=(*_FORMATS, "html", "junit", "badge", "github"), default="terminal")
    report.add_argument("--out", metavar="PATH", type=Path, help="the file or folder to write")
    _add_records(report)
    _add_export(verbs)
    diff = _add(
        verbs, "diff", "what changed between two runs, or on every target: exit 1 if a HARD check got worse, else 0"
    )
    diff.add_argument("runs", metavar="RUN", nargs="*", help="the earlier and the later run: ids, files or directories")
    diff.add_argument(
        "--since",
        choices=("last-green",),
        help="compare the newest run of every target, or RUN, with the last green one of the same selection",
    )
    diff.add_argument("--gpu", metavar="GPU", help="with --since: only the newest run of this target")
    diff.add_argument("--json", action="store_true", help="print every change as JSON")
    _add_records(diff)
    history = _add(verbs, "history", "how verdicts and headroom changed from run to run")
    history.add_argument("--check", metavar="ID", help="the whole history of this check or family")
    history.add_argument("--gpu", metavar="GPU", help="only this target, every family of checks")
    history.add_argument("--json", action="store_true", help="print every result as JSON")
    _add_records(history)
    check = _add(verbs, "check", "check that records are sound, from their files alone: exit 0, or 1 and every problem")
    check.add_argument("records", metavar="RECORD", nargs="+", help=f"{_RECORD}; or an archive that `pack` made")
    check.add_argument("--json", action="store_true", help="print the problems as JSON")
    _add_rehearsal(check)
    doctor = _add(verbs, "doctor", "found and minimum versions, what will be skipped and why, the next step")
    doctor.add_argument("--expect", metavar="GPU", help="the GPU this machine must have")
    doctor.add_argument("--subject", metavar="S", help=f"also examine what it offers: {_SUBJECT}")
    _add_profile(doctor)
    _add_format(_add(verbs, "gates", "every check: its gate, where it is must-pass, its claim"))
    explain = _add(verbs, "explain", "one check in full: claim, reason, tolerance, remedy, last results")
    explain.add_argument("id", metavar="ID", help="a check (p4.triton_oracle.n33) or a family (p4.triton_oracle)")
    _add_records(explain, whose=False)
    init = _add(verbs, "init", "start an implementation: a package of stubs, a subject.toml and a workflow")
    init.add_argument("folder", metavar="DIR", type=Path, help="a new or empty directory")
    init.add_argument("--profile", choices=tuple(PROFILES), required=True, help="what it will have to pass")
    init.add_argument("--name", metavar="NAME", help="its name in records (default: that of the directory)")
    contract = _add(
        verbs, "contract", "what each published name is given and must return, with shapes, dtypes and units"
    )
    contract.add_argument("--format", choices=("text", "markdown"), default="text")
    return top


def _add(verbs: argparse._SubParsersAction, name: str, claim: str) -> argparse.ArgumentParser:
    return verbs.add_parser(name, help=claim, description=claim[0].upper() + claim[1:] + ".", allow_abbrev=False)


def _add_format(verb: argparse.ArgumentParser, *formats: str) -> None:
    verb.add_argument("--format", choices=formats or _FORMATS, default="terminal")


def _add_profile(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--profile", choices=tuple(PROFILES), help="what the subject must pass (default: what its subject.toml claims)"
    )


def _add_records(verb: argparse.ArgumentParser, *, whose: bool = True) -> None:
    verb.add_argument(
        "--records", metavar="DIR", type=Path, action="append", default=[],
        help="read the records under DIR (repeatable; default: reports/evidence and reports/runs)",
    )  # fmt: skip
    if whose:
        verb.add_argument("--subject", metavar="S", help="whose records: bundled (default), or a name in a record")
    _add_rehearsal(verb)


def _add_rehearsal(verb: argparse.ArgumentParser) -> None:
    verb.add_argument(
        "--rehearsal", action="store_true", help="read the made-up records of `make nightly-local`, and no others"
    )


def _add_run(verbs: argparse._SubParsersAction) -> None:
    run = _add(verbs, "run", "run the checks on this machine, print the gate matrix and write a record")
    run.epilog, run.formatter_class = _RUN_EXAMPLES, argparse.RawDescriptionHelpFormatter
    # an option that is not given is absent, so that options next to --resume are detected; RunRequest has the defaults
    run.argument_default = argparse.SUPPRESS
    run.add_argument(
        "--phases", "--phase", metavar="P", action="append", help="4, 1,3-5 or 1-8 (repeatable; default: all)"
    )
    run.add_argument(
        "--level", type=int, choices=tuple(LEVELS), metavar="L",
        help="1: under a minute on a GPU; 2: phases 1 to 5, about five; 3: all that is not slow; 4: all, also under "
        "compute-sanitizer",
    )  # fmt: skip
    run.add_argument(
        "-m",
        dest="expression",
        metavar="EXPR",
        help="a pytest marker expression (default: all; without a GPU: not slow)",
    )
    run.add_argument("--device", metavar="D", help="auto (default: a GPU if there is one), cpu, cuda, or sim:sm120")
    run.add_argument("--expect", metavar="GPU", help="refuse to run on any other GPU (sm120, 120 or 12.0)")
    run.add_argument("--model", metavar="M", help="embedded (default), or a directory")
    run.add_argument("--subject", metavar="S", help=_SUBJECT)
    _add_profile(run)
    run.add_argument("--seed", type=int, metavar="N", help=f"default: {DEFAULT_SEED}")
    run.add_argument("--out", type=Path, metavar="DIR", help=_OUT)
    run.add_argument("--resume", metavar="RUN", help="the id or directory of an interrupted run; it keeps its options")
    run.add_argument("--confirm", metavar="RUN", help="try its HARD failures once more; the record changes no verdict")
    run.add_argument("--beside", metavar="WORD", help="show the record next to the others, and merge it with none")
    run.add_argument(
        "--sanitize", action="store_true", help="also run the kernel checks under compute-sanitizer (up to three hours)"
    )
    run.add_argument("--strict-soft", action="store_true", help="exit 4 when a SOFT check fails")


def _add_gate(verbs: argparse._SubParsersAction) -> None:
    verb = _add(verbs, "gate", "within seconds, for a fleet: do the GPU and its software work at all")
    verb.epilog, verb.formatter_class = _GATE_EXAMPLES, argparse.RawDescriptionHelpFormatter
    verb.add_argument(
        "--contract", choices=CONTRACTS, help="answer with the exit code and the line or JSON of this fleet tool"
    )
    verb.add_argument("--gpu", metavar="GPU", help="the card's index or UUID (default: the first that is visible)")
    verb.add_argument("--expect", metavar="GPU", help="the GPU that this machine must have (sm120, 120 or 12.0)")
    verb.add_argument(
        "--within", type=float, default=45.0, metavar="S", help="answer after so many seconds at most; default: 45"
    )


def _add_export(verbs: argparse._SubParsersAction) -> None:
    export = _add(verbs, "export", "a record in the format of another tool")
    form = export.add_mutually_exclusive_group(required=True)
    for name, about in (
        ("junit", "JUnit XML, a suite per phase"),
        ("attestation", "in-toto test result, v0.1"),
        ("ctrf", "Common Test Report Format, JSON"),
        ("prometheus", "metrics for the node exporter's textfile collector, which reads files named *.prom"),
    ):
        form.add_argument(f"--{name}", dest="form", action="store_const", const=name, help=about)
    export.add_argument("record", metavar="RECORD", help=_RECORD)
    export.add_argument("--out", metavar="FILE", type=Path, help="default: stdout")
    pack = _add(verbs, "pack", "one archive for a third party: a record, git status and log, statement and hashes")
    pack.add_argument("record", metavar="RECORD", help=_RECORD)
    pack.add_argument("--subject", metavar="S", help="where it is, for its git log: bundled (default) or its checkout")
    pack.add_argument("--out", metavar="FILE", type=Path, help="default: the run's id with .tar.gz, here")


def _add_fleet(verbs: argparse._SubParsersAction) -> None:
    fleet = _add(verbs, "fleet", "one run on many machines, by way of a Ray cluster: a node for each kind of GPU")
    fleet.epilog, fleet.formatter_class = _FLEET_EXAMPLES, argparse.RawDescriptionHelpFormatter
    acts = fleet.add_subparsers(dest="act", metavar="ACT", required=True)
    run = _add(acts, "run", "run the checks on one node for each GPU, fetch the records, and print one matrix")
    run.add_argument(
        "--gpus", metavar="GPUS", help="sm90,sm120 or emulated (default: every one that the cluster's nodes name)"
    )
    run.add_argument("--phases", "--phase", metavar="P", help="as for `run`")
    run.add_argument("-m", dest="expression", metavar="EXPR", help="as for `run`")
    run.add_argument(
        "--subject", metavar="S", default="bundled", help="bundled (default), installed, or module:NAME, on every node"
    )
    _add_profile(run)
    run.add_argument("--seed", type=int, metavar="N", default=DEFAULT_SEED, help="default: %(default)s")
    run.add_argument(
        "--wait", type=float, metavar="S", default=60.0, help="seconds that a GPU waits for a node; default: 60"
    )
    run.add_argument(
        "--limit", type=float, metavar="MIN", default=360.0, help="minutes that a node's run may take; default: 360"
    )
    status = _add(acts, "status", "the cluster's nodes with their GPUs, and the fleet runs that it holds")
    collect = _add(acts, "collect", "attend a fleet run whose command died: fetch its records, print the matrix")
    collect.add_argument("run", metavar="RUN", nargs="?", help="its name (default: the only one of the cluster)")
    for act in (run, status, collect):
        act.add_argument("--address", metavar="ADDRESS", required=True, help="HOST:PORT, ray://HOST:PORT or local")
    for act in (run, collect):
        act.add_argument("--out", type=Path, metavar="DIR", help=_OUT)


def _add_compile(verbs: argparse._SubParsersAction) -> None:
    verb = _add(verbs, "compile", "build every kernel for every GPU ahead of time; no GPU is needed")
    verb.description, verb.epilog = _COMPILE_TEXT, _COMPILE_EXAMPLES
    verb.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_argument("--sm", metavar="GPUS", default="all", help="all (default), 80-121, 120,121, sm120 or 12.0")
    verb.add_argument("--kernels", metavar="NAMES", help="only these kernels, by name, such as score_kernel")
    verb.add_argument("--full", action="store_true", help="every combination, not only the default variants")
    verb.add_argument("--subject", metavar="S", default="bundled", help=_SUBJECT)
    verb.add_argument("--jobs", type=int, metavar="N", help="parallel builds (default: one per processor)")
    verb.add_argument("--timeout", type=float, metavar="S", help="time limit of one build, in seconds (default: 60)")
    verb.add_argument("--fresh", action="store_true", help="ignore cached builds")
    verb.add_argument("--json", action="store_true", help="print the builds as JSON")
    verb.add_argument("--out", type=Path, metavar="DIR", help=_OUT)


def _add_simulate(verbs: argparse._SubParsersAction) -> None:
    verb = _add(verbs, "simulate", "execute the compiled kernels of phases 3 to 6 for every GPU; no GPU is needed")
    verb.epilog, verb.formatter_class = _SIMULATE_EXAMPLES, argparse.RawDescriptionHelpFormatter
    verb.add_argument("--sm", metavar="GPUS", default="all", help="all (default), 80-121, 120,121, sm120 or 12.0")
    verb.add_argument("--phases", metavar="P", help="3-6 (default), 4 or 3,5")
    verb.add_argument("-m", dest="expression", metavar="EXPR", help="a pytest marker expression, such as brief or hard")
    verb.add_argument("--subject", metavar="S", default="bundled", help=_SUBJECT)
    verb.add_argument("--jobs", type=int, metavar="N", help="GPUs at a time (default: one per processor)")
    verb.add_argument("--resume", metavar="RUN", help="first finish this interrupted run, then the others")
    verb.add_argument("--trace", metavar="KERNEL", help="the first source line at which two runs hold other values")
    verb.add_argument("--against", type=Path, metavar="TRACE", help="with --trace: the other run, an earlier trace")
    verb.add_argument("--fault", metavar="ID", help="with --trace: the other run, with a planted fault, ptx.NAME")
    verb.add_argument("--out", type=Path, metavar="DIR", help=_OUT)


def _add_quality(verbs: argparse._SubParsersAction) -> None:
    verb = _add(
        verbs, "quality", "perplexity and needle recall, compared with controls at the same budget, over five seeds"
    )
    verb.add_argument("--subject", metavar="S", default="bundled", help=_SUBJECT)
    verb.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: a GPU if there is one"
    )
    verb.add_argument("--out", type=Path, metavar="FILE", help="write every value as JSON")


def _add_selftest(verbs: argparse._SubParsersAction) -> None:
    verb = _add(verbs, "selftest", "plant faults in copies of the subject, and show which check catches which fault")
    verb.add_argument(
        "--only", metavar="FAULT", action="append", default=[], help="a fault by its id, or a layer (repeatable)"
    )
    verb.add_argument("--sample", metavar="N", type=int, help="try only N faults, spread over the layers")
    verb.add_argument("--seed", metavar="N", type=int, default=DEFAULT_SEED, help="of the sample; default: %(default)s")
    verb.add_argument(
        "--full", metavar="PHASES", nargs="?", const="1-8",
        help="run every check of these phases (default: all) against each fault, not only those that claim it",
    )  # fmt: skip
    verb.add_argument("--subject", metavar="S", default="bundled", help="bundled (default), or a checkout")
    verb.add_argument("--device", default="cpu", help="cpu (default), or a simulated GPU such as sim:sm90")
    verb.add_argument("--jobs", type=int, metavar="N", help="faults tried in parallel (default: one per processor)")
    verb.add_argument(
        "--out", type=Path, metavar="FILE", help="default: reports/selftest, unless --only or --sample is given"
    )
    _add_format(verb)
