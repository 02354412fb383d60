"""How busy the machine is, and how much of that is this run; it decides how a check that timed out is judged.

Read from Linux's /proc. On other systems nothing is known, and a TIMEOUT stays a TIMEOUT.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from verify.record.schema import MachineState

#: The variable that names a process's run, in the environment of everything that a run starts.
RUN_VARIABLE = "TRIATTENTION_VERIFY_RUN"

#: If other processes take more than this share of the cores, the machine was busy.
BUSY_SHARE = 0.5

_PROC = Path("/proc")

#: utime, stime, and those of the children that ended and were waited for; starttime (proc(5), counted after the name).
_TIMES, _STARTED = slice(11, 15), 19


def use_one_thread() -> None:
    """Give this process and its children one compute thread each, unless the user chose another number.

    libgomp threads spin while they wait for each other: on a busy machine two of them take twenty times as long as one,
    and on an idle one a second thread gains nothing for the models of this suite. Call before torch or numpy is
    imported.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def cores() -> set[int]:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def state() -> MachineState:
    """The present load of the cores that this process may use."""
    usable = cores()
    busy_s, steal_s = _processor_seconds(usable)
    return MachineState(cores=len(usable), load_average=os.getloadavg()[0], busy_s=busy_s, steal_s=steal_s)


@dataclass(frozen=True, slots=True)
class Watch:
    """Measures how much of the machine others have taken since the watch began.

    ``root`` is the process that the run began with. The run's own processes are its descendants, and those that have
    ``run`` in RUN_VARIABLE, even if their parents have ended.
    """

    root: int
    run: str
    begun: float
    before: MachineState
    own: dict[tuple[int, str], float]
    seen: dict[tuple[int, str], float] = field(default_factory=dict)

    @classmethod
    def begin(cls, root: int, run: str) -> Watch:
        return cls(root, run, time.monotonic(), state(), dict(_tree(root)))

    def look(self) -> None:
        """Note what the run's processes took so far; one that ends without its parents leaves no other trace."""
        self.seen.update(_tree(self.root))

    def outside_cores(self) -> float:
        """How many cores, on average, were taken by processes of others, or by a hypervisor for other guests.

        Time that cannot be attributed counts as the run's own, so that the machine is never blamed for it.
        """
        now, seconds = state(), time.monotonic() - self.begun
        own = {**self.seen, **dict(_marked(self.run)), **dict(_tree(self.root))}
        # the time of a process that was waited for is in its parent's too, so it may be counted twice
        ours = sum(own.values()) - sum(self.own[one] for one in self.own.keys() & own.keys())
        theirs = now.busy_s - self.before.busy_s - ours + now.steal_s - self.before.steal_s
        return max(theirs, 0.0) / max(seconds, 1e-3)

    def busy(self) -> str | None:
        """A clause that says that others took more than BUSY_SHARE of the cores; None if they did not."""
        cores, outside = self.before.cores, self.outside_cores()
        if outside <= BUSY_SHARE * cores:
            return None
        return f"the machine was busy: processes outside this run took {outside:.1f} of its {cores} cores meanwhile"


def _processor_seconds(cores: set[int]) -> tuple[float, float]:
    """Seconds since boot in which ``cores`` were busy, and which a hypervisor gave to other guests."""
    busy = steal = 0
    with suppress(OSError):
        for line in (_PROC / "stat").read_text().splitlines():
            name, *fields = line.split()
            if name.removeprefix("cpu").isdecimal() and name.startswith("cpu") and int(name[3:]) in cores:
                user, nice, system, _idle, _iowait, irq, softirq, stolen, *_guests = map(int, fields)
                busy, steal = busy + user + nice + system + irq + softirq, steal + stolen
    tick = os.sysconf("SC_CLK_TCK")
    return busy / tick, steal / tick


def _tree(root: int) -> Iterator[tuple[tuple[int, str], float]]:
    """The (pid, start time) of a process and each descendant, and their CPU seconds with those of ended children."""
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        if found := _process(pid):
            yield found
        with suppress(OSError):  # the process or the thread has ended
            for children in (_PROC / str(pid) / "task").glob("*/children"):
                waiting += map(int, children.read_text().split())


def _marked(run: str) -> Iterator[tuple[tuple[int, str], float]]:
    """The same for every process whose environment names the run."""
    mark = f"{RUN_VARIABLE}={run}".encode()
    for folder in _PROC.glob("[0-9]*"):
        with suppress(OSError):  # ended, or another user's
            if mark in (folder / "environ").read_bytes().split(b"\0") and (found := _process(int(folder.name))):
                yield found


def _process(pid: int) -> tuple[tuple[int, str], float] | None:
    with suppress(OSError):
        # the name is in parentheses, and may contain some
        fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
        return (pid, fields[_STARTED]), sum(map(int, fields[_TIMES])) / os.sysconf("SC_CLK_TCK")
    return None
