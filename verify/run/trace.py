"""``python -m verify simulate --trace``: the first source line at which two runs of one kernel hold different values.

The runs differ in their architecture, in their compiler (a trace that was written before), or in one planted fault.
Each is a process of its own, because a process has one simulated GPU.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import parse_targets
from verify.errors import ConfigurationError, Exit
from verify.files import repository_root
from verify.machine.environment import version_of
from verify.report.matrix import count
from verify.run.mutation import Mutation
from verify.simulator.control import require
from verify.simulator.errors import Fault
from verify.simulator.trace import Trace, differences, read_trace

if TYPE_CHECKING:
    from rich.console import Console

    from verify.judge.problems import Shape
    from verify.simulator.program import Program

#: How long one run may take, in seconds.
_LIMIT_S = 600
#: How many lines of the table are printed; the first one matters.
_LINES = 12


@dataclass(frozen=True, slots=True)
class _Run:
    """What one process traces."""

    sm: int
    kernel: str
    subject: str
    mutation: Mutation | None

    @property
    def about(self) -> str:
        changed = f" with {self.mutation.fault}" if self.mutation else ""
        return f"sm{self.sm}{changed} (Triton {version_of('triton')})"

    def place(self, out: Path) -> Path:
        """The file that the trace is written to."""
        words = ["trace", self.kernel, f"sm{self.sm}", f"triton-{version_of('triton')}"]
        words += [self.mutation.fault] if self.mutation else []
        return out / f"{'-'.join(words)}.npz"


def trace(
    kernel: str, *, sm: str, subject: str, out: Path, against: Path | None = None, mutation: Mutation | None = None
) -> int:
    """Trace the kernel on the GPUs that ``sm`` names, or on one and compare it with the trace ``against``, or with the
    same after ``mutation``. Returns the exit code: 0, whatever differs.

    Raises ConfigurationError if the request cannot be carried out.
    """
    from rich.console import Console

    gpus = list(parse_targets(sm))
    others = (against is not None) + (mutation is not None)
    if others > 1 or len(gpus) != 2 - others:
        raise ConfigurationError(
            f"--trace compares two runs, and --sm {sm} names {count(len(gpus), 'GPU')}; name two GPUs, or one and "
            "--against TRACE, or one and --fault ID"
        )
    found = [] if against is None else [read_trace(against)]
    for gpu in gpus:
        require(gpu.sm)
    runs = [_Run(gpu.sm, kernel, subject, None) for gpu in gpus]
    if mutation is not None:
        runs.append(replace(runs[0], mutation=mutation))
    if against is not None and against.resolve() == runs[0].place(out).resolve():
        raise ConfigurationError(f"{against} is the trace that this run would write; name another folder by --out")
    console = Console(highlight=False)
    for one, (problem, finding) in zip(runs, _in_processes(runs, out), strict=True):
        if problem:
            raise ConfigurationError(problem)
        console.print(f"{one.about}: {one.place(out)}", markup=False, soft_wrap=True)
        if finding:
            console.print(f"{one.about} ended there: {finding}", markup=False, soft_wrap=True)
        found.append(read_trace(one.place(out)))
    _tell(kernel, found, repository_root(), subject, console)
    return Exit.OK


def _in_processes(runs: Sequence[_Run], out: Path) -> list[tuple[str, str]]:
    """What ``_traced`` returns for each run. Raises ConfigurationError for a process that ends without an answer."""
    with ProcessPoolExecutor(len(runs), multiprocessing.get_context("spawn"), max_tasks_per_child=1) as pool:
        try:
            return [*pool.map(_traced, runs, (one.place(out) for one in runs))]
        except BrokenProcessPool as error:
            raise ConfigurationError(
                f"a traced process ended without an answer, for want of memory or because it took over {_LIMIT_S} s; "
                "try again"
            ) from error


def _tell(kernel: str, found: list[tuple[str, Trace]], root: Path, subject: str, console: Console) -> None:
    (first, one), (second, other) = found
    differ = [*differences(one, other)]
    if not differ:
        lines = len({line for line, _ in one.values})
        told = f"{kernel}: {first} and {second} hold the same values at {count(lines, 'line')} of the source"
        console.print(told, markup=False, soft_wrap=True)
        return
    line = differ[0].place[0]
    told, text = f"{kernel}: {first} and {second} first hold different values at {line}", _text_of(line, root, subject)
    console.print(f"{told}: {text}" if text else told, markup=False, soft_wrap=True)
    for each in differ[:_LINES]:
        (line, kind), (value, instead) = each.place, each.pair
        told = " and ".join(f"{len(only)} of {total}" for only, total in zip(each.only, each.counts, strict=True))
        console.print(f"  {line} {kind}: {told} differ, such as {value} and {instead}", markup=False, soft_wrap=True)
    if len(differ) > _LINES:
        console.print(f"  and {count(len(differ) - _LINES, 'further place')}", markup=False)


def _text_of(line: str, root: Path, subject: str) -> str:
    """The text of a line of the subject's source; empty if no file of that name has one."""
    from verify.subject.find import find_subject

    name, _, number = line.rpartition(":")
    for path in sorted(find_subject(subject, root).folder.rglob(name)):
        lines = path.read_text("utf-8").splitlines()
        if 0 < int(number) <= len(lines):
            return lines[int(number) - 1].strip()
    return ""


def _shapes() -> list[Shape]:
    from verify.judge.problems import Shape

    usual = Shape(n=65, t=64, offsets=(1.0, 2.0, 4.0))
    return [
        replace(usual, dtype=dtype, aggregation=aggregation)
        for dtype in ("bfloat16", "float32")
        for aggregation in ("mean", "max")
    ]


def _traced(run: _Run, path: Path) -> tuple[str, str]:
    """Trace one run in this process, which is new, and write the trace. Returns a problem in words, empty if there is
    none, and the finding that ended the run, if one did: then the trace has what was before.
    """
    from verify.checks import DEFAULT_SEED
    from verify.judge.problems import make
    from verify.judge.scoring import scorers
    from verify.simulator.driver import install
    from verify.subject.find import find_subject

    signal.alarm(_LIMIT_S)  # a process that hangs is ended by it
    found, names, finding = Trace(), set(), ""
    changed: list[str] = []

    def watch(name: str, program: Program) -> None:
        names.add(name)
        if name == run.kernel:
            found.watch(program)

    try:
        simulation = install(run.sm)
        simulation.watch = watch
        if run.mutation is not None:
            simulation.alter = run.mutation.alteration(changed.append)
        subject = find_subject(run.subject, repository_root())
        subject.activate()
        for scorer in scorers(subject, "triton", "cpu"):
            for attempt in scorer.offers.several(_shapes()):
                with attempt as taken:
                    scorer(make(taken, DEFAULT_SEED, "cpu"))
    except Fault as error:
        finding = str(error)
    except Exception as error:  # a subject may crash in any way
        return f"{run.about} cannot be traced: {type(error).__name__}: {error}", ""
    if run.kernel not in names:
        return f"the subject launches no kernel {run.kernel!r}; --trace takes {', '.join(sorted(names)) or 'none'}", ""
    if run.mutation is not None and run.kernel not in changed:
        return f"{run.mutation.fault} changes nothing in {run.kernel} on sm{run.sm}; name another fault", ""
    found.write(path, run.about)
    return "", finding
