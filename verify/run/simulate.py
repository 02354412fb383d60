"""``python -m verify simulate``: the checks that launch kernels, on one simulated GPU after the other."""

from __future__ import annotations

import os
import shlex
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import Architecture, parse_targets
from verify.errors import ConfigurationError, Exit
from verify.files import default_out
from verify.record.schema import FAILING, Record, Verdict, read_record
from verify.record.simulation import UNSUPPORTED
from verify.run import events
from verify.run.request import RunRequest, parse_phases
from verify.run.runner import carry_out
from verify.run.simulated import PHASES
from verify.simulator.errors import NotAvailable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Ended:
    """How one GPU ended: the exit code of its run, its record, and why it could not be simulated (empty if it was)."""

    gpu: Architecture
    code: int
    record: Record | None = None
    seconds: float = 0.0
    gap: str = ""


def simulate(
    sm: str,
    *,
    phases: str | None = None,
    subject: str = "bundled",
    resume: str | None = None,
    out: Path | None = None,
) -> int:
    """Run the checks on each GPU that ``sm`` names, with a record for each, and return the exit code.

    ``resume`` names an interrupted run to finish first. A GPU that the toolchain cannot build for is listed, and does
    not count. 0 nothing failed, 1 a HARD check failed on one of the GPUs, 2 interrupted, 3 the machine is at fault
    or none of the GPUs can be simulated. Raises ConfigurationError if the request cannot be carried out.
    """
    from rich.console import Console

    console, gpus, out = Console(highlight=False), list(parse_targets(sm)), out or default_out()
    chosen = parse_phases(phases) if phases else tuple(sorted(PHASES))
    if not PHASES.issuperset(chosen):
        raise ConfigurationError(f"--phases {phases} cannot be simulated; use phases among {min(PHASES)}-{max(PHASES)}")
    ended: list[Ended] = []
    while gpus:
        gpu = gpus[0]
        if resume is not None:
            request = RunRequest(resume=resume, out=out)
        else:
            request = RunRequest(phases=chosen, device=f"sim:{gpu.target}", subject=subject, out=out)
        begun = time.monotonic()
        try:
            code, run_dir = carry_out(request, console, brief=True)
        except NotAvailable as error:
            ended.append(Ended(gpus.pop(0), Exit.OK, gap=str(error)))
            continue
        if code == Exit.INTERRUPTED:
            again = {"--sm": ",".join(one.target for one in gpus), "--resume": run_dir and run_dir.name}
            again |= {"--phases": phases, "--subject": None if subject == "bundled" else subject}
            again |= {"--out": None if out == default_out() else os.path.relpath(out)}
            words = shlex.join(word for option, value in again.items() if value for word in (option, value))
            told = f"interrupted; go on with: python -m verify simulate {words}"
            console.print(told, markup=False, soft_wrap=True)
            return code
        record = read_record(run_dir / events.RECORD) if run_dir is not None else None
        if resume is not None and record is not None:
            gpu = next((one for one in gpus if one.target == record.target), gpu)
        resume = None
        gpus.remove(gpu)
        ended.append(Ended(gpu, code, record, time.monotonic() - begun))
    return _conclude(ended, console)


def _conclude(ended: list[Ended], console: Console) -> int:
    """Print every failure and a line for each GPU, and return the worst exit code."""
    for one in ended:
        for result in one.record.results if one.record else ():
            if result.verdict in FAILING or result.code == UNSUPPORTED:
                console.print(f"{one.gpu.target} {_words(result.verdict)} {result.id}: {result.said}", markup=False)
    for one in ended:
        console.print(f"{one.gpu.target}: {_line(one)}", markup=False, soft_wrap=True)
    simulated = [one for one in ended if one.record is not None]
    if not simulated:
        return Exit.CANNOT
    codes = {one.code for one in simulated}
    return next((code for code in (Exit.FAILED, Exit.CANNOT) if code in codes), Exit.OK)


def _words(verdict: Verdict) -> str:
    return UNSUPPORTED if verdict is Verdict.SKIP else str(verdict)


def _line(one: Ended) -> str:
    if one.record is None:
        return f"not simulated ({one.gap.partition(';')[0]})"
    results = [result for result in one.record.results if result.evidence == "simulated"]
    counts = Counter(_words(result.verdict) for result in results)
    told = ", ".join(f"{number} {word}" for word, number in sorted(counts.items()))
    launches = sum(kernel.launches for kernel in one.record.simulation.kernels) if one.record.simulation else 0
    others = len(one.record.results) - len(results)
    return f"{told} with {launches} launches in {one.seconds:.0f} s; {others} checks launched no kernel"
