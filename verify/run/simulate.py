"""``python -m verify simulate``: the checks that launch kernels, on one simulated GPU after the other."""

from __future__ import annotations

import io
import multiprocessing
import os
import shlex
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import Architecture, parse_targets
from verify.errors import ConfigurationError, Exit
from verify.files import default_out
from verify.record.reading import read_record
from verify.record.schema import BLOCKING, Record, Verdict
from verify.record.simulation import UNSUPPORTED
from verify.record.without_gpu import SIMULATED_PHASES
from verify.run import events
from verify.run.request import RunRequest, parse_phases
from verify.run.runner import carry_out
from verify.run.simulated import LEFT_OUT
from verify.simulator.errors import NotAvailable

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True, slots=True)
class Ended:
    """How one GPU ended: the exit code of its run, its record, and why it could not be simulated (empty if it was).

    ``run`` is the id of its run, if there is one.
    """

    gpu: Architecture
    code: int
    record: Record | None = None
    seconds: float = 0.0
    gap: str = ""
    run: str = ""


def simulate(
    sm: str,
    *,
    phases: str | None = None,
    expression: str | None = None,
    subject: str = "bundled",
    resume: str | None = None,
    jobs: int = 1,
    out: Path | None = None,
) -> int:
    """Run the checks on each GPU that ``sm`` names, with a record for each, and return the exit code.

    ``expression`` is a pytest marker expression. ``resume`` names an interrupted run to finish first. ``jobs`` GPUs are
    simulated at a time. A GPU that the toolchain cannot build for is listed, and does not count. 0 nothing failed, 1 a
    HARD check failed on one of the GPUs, 2 interrupted, 3 the machine is at fault or none of the GPUs can be simulated.
    Raises ConfigurationError if the request cannot be carried out.
    """
    from rich.console import Console

    console, gpus, out = Console(highlight=False), list(parse_targets(sm)), out or default_out()
    chosen = parse_phases(phases) if phases else tuple(sorted(SIMULATED_PHASES))
    if not SIMULATED_PHASES.issuperset(chosen):
        possible = f"{min(SIMULATED_PHASES)}-{max(SIMULATED_PHASES)}"
        raise ConfigurationError(f"--phases {phases} cannot be simulated; use phases among {possible}")
    if jobs < 1:
        raise ConfigurationError(f"--jobs {jobs} must be at least 1")
    requests = {
        gpu: RunRequest(phases=chosen, expression=expression, device=f"sim:{gpu.target}", subject=subject, out=out)
        for gpu in gpus
    }
    console.print(f"note: {LEFT_OUT}", markup=False, soft_wrap=True)
    ended: list[Ended] = []
    if resume is not None:
        ended.append(_one(gpus[0], RunRequest(resume=resume, out=out), console))
        requests.pop(ended[0].gpu, None)
    interrupted = any(one.code == Exit.INTERRUPTED for one in ended)
    if not interrupted and requests:
        more, interrupted = _each(requests, min(jobs, len(requests)), console)
        ended += more
    if interrupted:
        again = {"--phases": phases, "-m": expression, "--subject": None if subject == "bundled" else subject}
        again |= {"--out": None if out == default_out() else os.path.relpath(out)}
        _tell_how_to_go_on(gpus, ended, again, console)
        return Exit.INTERRUPTED
    return _conclude(ended, console)


def _one(gpu: Architecture, request: RunRequest, console: Console) -> Ended:
    """Simulate one GPU, or the one of a run that is resumed."""
    begun = time.monotonic()
    try:
        code, run_dir = carry_out(request, console, brief=True)
    except NotAvailable as error:
        return Ended(gpu, Exit.OK, gap=str(error))
    run = run_dir.name if run_dir is not None else ""
    if code == Exit.INTERRUPTED:
        return Ended(gpu, code, run=run)
    record = read_record(run_dir / events.RECORD) if run_dir is not None else None
    if request.resume is not None and record is not None:
        (gpu,) = parse_targets(record.target)
    return Ended(gpu, code, record, time.monotonic() - begun, run=run)


def _each(requests: Mapping[Architecture, RunRequest], jobs: int, console: Console) -> tuple[list[Ended], bool]:
    """Simulate the GPUs, ``jobs`` at a time, in processes of their own if there are several; the lines of each then
    begin with its name. Returns how they ended, and whether the user interrupted: then no further one begins.
    """
    ended: list[Ended] = []
    if jobs <= 1:
        for gpu, request in requests.items():
            ended.append(_one(gpu, request, console))
            if ended[-1].code == Exit.INTERRUPTED:
                return ended, True
        return ended, False
    stopped = threading.Event()

    def one_of(gpu: Architecture, request: RunRequest) -> Ended | None:
        if stopped.is_set():
            return None
        try:
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                one = process.submit(_one_beside_others, gpu, request).result()
        except KeyboardInterrupt:  # of the other process, before its run began
            one = Ended(gpu, Exit.INTERRUPTED)
        except BrokenProcessPool:
            return Ended(gpu, Exit.CANNOT, gap="its process ended without an answer, perhaps for want of memory")
        if one.code == Exit.INTERRUPTED:
            stopped.set()  # before this thread takes the next GPU
        return one

    interrupted = False
    with ThreadPoolExecutor(jobs) as pool:
        waiting = [pool.submit(one_of, gpu, request) for gpu, request in requests.items()]
        try:
            wait(waiting, return_when=FIRST_EXCEPTION)
        except KeyboardInterrupt:  # which the processes got as well: each ends as soon as its record is written
            interrupted = True
        finally:
            stopped.set()
            pool.shutdown(cancel_futures=True)
    found = [one for each in waiting if not each.cancelled() and (one := each.result()) is not None]
    interrupted |= any(one.code == Exit.INTERRUPTED for one in found)
    if interrupted:  # a process that just began dies of it
        found = [one for one in found if one.code != Exit.CANNOT or one.record is not None]
    return found, interrupted


def _one_beside_others(gpu: Architecture, request: RunRequest) -> Ended:
    from rich.console import Console

    return _one(gpu, request, Console(file=_Prefixed(f"{gpu.target}: "), highlight=False))


class _Prefixed(io.StringIO):
    """Standard output, with a prefix before each line."""

    def __init__(self, prefix: str) -> None:
        super().__init__()
        self._prefix, self._begun = prefix, ""

    def write(self, text: str) -> int:
        *lines, self._begun = (self._begun + text).split("\n")
        for line in lines:
            print(f"{self._prefix}{line}", flush=True)
        return len(text)


def _tell_how_to_go_on(
    gpus: Sequence[Architecture], ended: Sequence[Ended], options: Mapping[str, str | None], console: Console
) -> None:
    """``simulate`` resumes one run, and does what was not begun; other interrupted runs are resumed by ``run``."""
    begun = [one for one in ended if one.code == Exit.INTERRUPTED and one.run]
    finished = {one.gpu for one in ended if one.code != Exit.INTERRUPTED} | {one.gpu for one in begun[1:]}
    place = shlex.join(["--out", out]) if (out := options["--out"]) else ""
    commands = [f"python -m verify run --resume {one.run} {place}".rstrip() for one in begun[1:]]
    given: dict[str, str | None] = {"--sm": ",".join(gpu.target for gpu in gpus if gpu not in finished)}
    given |= {"--resume": begun[0].run if begun else None, **options}
    words = shlex.join(word for option, value in given.items() if value for word in (option, value))
    told = "; ".join([*commands, f"python -m verify simulate {words}"])
    console.print(f"interrupted; go on with: {told}", markup=False, soft_wrap=True)


def _conclude(ended: list[Ended], console: Console) -> int:
    """Print every failure, waived or not, and a line for each GPU, and return the worst exit code."""
    ended.sort(key=lambda one: one.gpu.sm)
    for one in ended:
        for result in one.record.results if one.record else ():
            if result.verdict in BLOCKING or result.code == UNSUPPORTED:
                console.print(f"{one.gpu.target} {_words(result.verdict)} {result.id}: {result.said}", markup=False)
    for one in ended:
        console.print(f"{one.gpu.target}: {_line(one)}", markup=False, soft_wrap=True)
    simulated = [one for one in ended if one.record is not None]
    if not simulated:
        return Exit.CANNOT
    codes = {one.code for one in ended}
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
