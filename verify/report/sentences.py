"""What is known of a target in numbers and in sentences: kernels built and simulated, and what runs proved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache

from verify.architectures import EMULATED
from verify.files import own_file
from verify.record.builds import BuildVerdict, Compilation
from verify.record.reading import rehearsing
from verify.record.schema import FAILING, Record, Verdict
from verify.record.simulation import Simulation
from verify.record.verdict import REHEARSAL, Assessment, TargetVerdict, assess_record
from verify.report.matrix import count, listed


def built(compilation: Compilation | None) -> str:
    """How many kernels were built for a target: ``21/21``, ``gap`` if the toolchain builds nothing, or ``-``."""
    if compilation is None:
        return "-"
    if compilation.gap:
        return "gap"
    good, wanted = _counted(compilation)
    return f"{good}/{wanted}"


def _counted(compilation: Compilation) -> tuple[int, int]:
    """How many kernels were built, of how many that the variants need."""
    needed = compilation.needed
    return sum(build.verdict is BuildVerdict.OK for build in needed), len(needed) + len(compilation.unlaunched)


def _compiles(one: Compilation) -> bool:
    """Whether every kernel that the variants need was built."""
    good, wanted = _counted(one)
    return 0 < good == wanted


def compiled_words(compilation: Compilation) -> str:
    """The kernels built for a target and their resources, in a sentence."""
    tools = f"triton {compilation.triton}, ptxas {compilation.ptxas}"
    if compilation.gap:
        return f"toolchain gap, {compilation.toolchain} with {tools}: {compilation.gap}"
    found = [build.resources for build in compilation.builds if build.resources]
    if not found:
        return f"{built(compilation)} kernels built with {tools}"
    registers, stack = [one.registers for one in found], max(one.stack_bytes for one in found)
    needs = f"{min(registers)} to {max(registers)} registers, {f'{stack} bytes of stack' if stack else 'no stack'}"
    return f"{built(compilation)} kernels built with {tools}; {needs}"


def simulated(assessment: Assessment) -> str:
    """How many must-pass checks passed in the simulator, of how many that it ran: ``199/199``, or ``-`` without any."""
    found = [cell.simulation.verdict for cell in assessment.must_pass if cell.simulation is not None]
    return f"{found.count(Verdict.PASS)}/{len(found)}" if found else "-"


def simulated_words(simulation: Simulation) -> str:
    """What was simulated for a target and how, in a sentence; and of which kernels a GPU may round differently."""
    launches = count(sum(one.launches for one in simulation.kernels), "launch")
    rounded = listed(simulation.modes) if simulation.modes else "unknown"
    told = [
        f"{count(len(simulation.kernels), 'kernel')}, {launches} of PTX compiled by triton {simulation.triton}",
        f"approximations {rounded}",
        f"not executed: {', '.join(simulation.not_executed) or 'unknown'}",
    ]
    doubts: dict[str, list[str]] = {}
    for one in simulation.kernels:
        if not one.rounds_alike:
            why = one.uncounted or "its machine code has other floating-point instructions"
            doubts.setdefault(why, []).append(one.kernel)
    told += [
        f"the rounding of {listed(list(dict.fromkeys(names)))} may differ from the GPU's ({why})"
        for why, names in doubts.items()
    ]
    return "; ".join(told)


def tally(assessment: Assessment) -> str:
    """What each class of evidence has of a GPU: ``sm120: built 22/22, simulated 199/199, hardware 0/345``."""
    hard = assessment.must_pass
    proved = f"hardware {sum(cell.passed for cell in hard)}/{len(hard)}"
    known = f"built {built(assessment.compilation)}, simulated {simulated(assessment)}"
    return f"{assessment.target.target}: {known}, {proved}"


def known_without_it(assessment: Assessment) -> list[str]:
    """A line for each thing that is known of a GPU without having it, and before them what each evidence has."""
    told = []
    if assessment.compilation:
        told.append(f"Compiled ahead of time: {compiled_words(assessment.compilation)}.")
    if assessment.simulation:
        told.append(f"Simulated: {simulated_words(assessment.simulation)}.")
    return [tally(assessment), *told] if told else []


#: The packages whose versions a verdict depends on most, by their names in a record and in ``ci/constraints.txt``.
_STACK = {"torch": "torch", "triton": "Triton", "transformers": "transformers", "vllm": "vLLM"}


@cache
def _pinned() -> dict[str, str]:
    """The version of each pinned package."""
    lines = own_file("ci/constraints.txt").read_text("utf-8").splitlines()
    return dict(line.split("==", 1) for line in lines if not line.startswith("#") and "==" in line)


def stack_words(versions: Mapping[str, str]) -> str:
    """How an installed stack differs from the pinned one: ``torch 2.11.0; the suite is pinned to 2.13.0``; empty if it
    does not. ``versions`` may have others; neither a missing package nor a local label (``+cpu``) is a difference.
    """
    found = {name: versions[name].split()[0].partition("+")[0] for name in _STACK if versions[name][:1].isdigit()}
    other = [name for name, version in found.items() if version != _pinned()[name]]
    if not other:
        return ""
    made = listed([f"{_STACK[name]} {found[name]}" for name in other])
    return f"{made}; the suite is pinned to {listed([_pinned()[name] for name in other])}"


def stacks(assessment: Assessment) -> list[str]:
    """A sentence for each stack other than the pinned one that records of a target were made with; it changes no
    verdict.
    """
    made: dict[str, list[str]] = {}
    for record in assessment.used:
        made.setdefault(stack_words(record.environment.model_dump()), []).append(record.run_id)
    return [
        f"Made with {words}." if len(made) == 1 else f"{listed(runs)}: made with {words}."
        for words, runs in made.items()
        if words
    ]


def soft_failures(assessment: Assessment) -> int:
    """How many SOFT checks failed on a target: warnings, which its verdict does not show."""
    return sum(cell.failed and cell.check.spec.gate == "soft" for cell in assessment.cells)


def waived_words(assessments: Sequence[Assessment]) -> str:
    """On which targets failures are waived, and how many on each: ``sm90 (2) and sm120 (1)``; empty without any."""
    found = [(one.target.target, len(one.waived)) for one in assessments if one.waived]
    return listed([f"{name} ({number})" for name, number in found]) if found else ""


def _of_simulations(gpus: Sequence[Assessment]) -> list[str]:
    """For which GPUs every check passes in the simulator, and for which any fails there; empty without simulations."""
    found = {
        one.target.target: {cell.simulation.verdict for cell in one.must_pass if cell.simulation is not None}
        for one in gpus
    }
    good = [name for name, verdicts in found.items() if verdicts == {Verdict.PASS}]
    bad = [name for name, verdicts in found.items() if verdicts & FAILING]
    told = [f"every simulated check passes for {listed(good)}"] if good else []
    return told + ([f"simulated checks fail for {listed(bad)}"] if bad else [])


_EMULATED = {
    TargetVerdict.EMULATED_PASS: "every must-pass check passes without a GPU",
    TargetVerdict.EMULATED_FAIL: "the run without a GPU failed",
    TargetVerdict.EMULATED_INCOMPLETE: "the run without a GPU is incomplete",
}


#: How many failures of a run next to the others are named.
_NAMED = 6


def headline(assessments: Sequence[Assessment]) -> str:
    """In one sentence: how many GPUs are verified, failed or only compile, where SOFT checks fail or failures are
    waived, what was simulated, and how the run without a GPU ended.
    """
    gpus = [one for one in assessments if one.target is not EMULATED]
    named: dict[TargetVerdict, list[str]] = {}
    for one in gpus:
        named.setdefault(one.verdict, []).append(one.target.target)
    verified = named.get(TargetVerdict.VERIFIED, [])
    told = [f"{len(verified)} of {len(gpus)} GPUs verified on hardware{f' ({listed(verified)})' if verified else ''}"]
    for verdict, words in ((TargetVerdict.FAILED, "failed"), (TargetVerdict.INFRA, "could not be judged")):
        told += [f"{listed(named[verdict])} {words}"] if verdict in named else []
    missed = [f"{one.target.target} ({one.verdict})" for one in gpus if one.absence is not None]
    told += [f"{listed(missed)} left no record last night"] if missed else []
    warned = [(one.target.target, number) for one in assessments if (number := soft_failures(one))]
    told += [f"SOFT checks fail on {listed([f'{name} ({number})' for name, number in warned])}"] if warned else []
    told += [f"failures are waived on {words}"] if (words := waived_words(assessments)) else []
    known = [(one.target.target, one.compilation) for one in gpus if one.compilation is not None]
    if compiled := sum(_compiles(one) for _, one in known):
        told.append(f"the kernels compile for {compiled}")
    gaps = [name for name, compilation in known if compilation.gap]
    told += [f"{listed(gaps)} cannot be compiled for yet"] if gaps else []
    told += _of_simulations(gpus)
    told += [_EMULATED[one.verdict] for one in assessments if one.used and one.verdict in _EMULATED]
    return f"{REHEARSAL if rehearsing() else ''}{'; '.join(told)}."


def beside_words(record: Record) -> str:
    """A run that is shown next to the others, in one sentence: its word, its versions, its verdict and its failures."""
    found, environment = assess_record(record), record.environment
    failed = [cell.check.id for cell in found.cells if cell.failed]
    more = f" and {len(failed) - _NAMED} more" if len(failed) > _NAMED else ""
    wrong = f"; failed: {', '.join(failed[:_NAMED])}{more}" if failed else ""
    versions = f"torch {environment.torch}, triton {environment.triton}, transformers {environment.transformers}"
    versions += f", vLLM {environment.vllm}" if environment.vllm != "not installed" else ""
    return f"{record.beside}, {record.target}: {found.verdict} on {record.time_utc[:10]} with {versions}{wrong}."


def in_short(assessments: Sequence[Assessment]) -> str:
    """The verdict on all targets in a few words: where it failed or, if nowhere, how many GPUs are verified."""
    start = REHEARSAL if rehearsing() else ""
    for verdict in (TargetVerdict.FAILED, TargetVerdict.EMULATED_FAIL, TargetVerdict.INFRA):
        if names := [one.target.target for one in assessments if one.verdict is verdict]:
            return f"{start}{verdict} {', '.join(names)}"
    gpus = [one for one in assessments if one.target is not EMULATED]
    return f"{start}{sum(one.verdict is TargetVerdict.VERIFIED for one in gpus)} of {len(gpus)} VERIFIED"
