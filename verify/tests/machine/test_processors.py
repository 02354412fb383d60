"""How busy the machine is: what is the run's own, what is others', and what that makes of a check that hangs."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from verify.machine import processors
from verify.machine.processors import RUN_VARIABLE, Watch
from verify.record.schema import MachineState

#: Seconds of a watch: long enough for a hundred ticks of a core.
_WATCHED_S = 1.0

_SPIN = "while True: pass"
#: Starts a process that spins and has lost its parent, as a daemon has.
_DAEMON = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {_SPIN!r}], start_new_session=True)"


@pytest.fixture
def spinning() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", _SPIN])
    yield process
    process.kill()
    process.wait()


def _processor_s(pid: int) -> float:
    (_, seconds) = processors._process(pid)
    return seconds


def test_what_descends_from_the_run_is_its_own(spinning: subprocess.Popen[bytes]) -> None:
    own, other = Watch.begin(os.getpid(), "mine"), Watch.begin(spinning.pid + 10_000_000, "none's")
    before = _processor_s(spinning.pid)
    time.sleep(_WATCHED_S)
    spun = _processor_s(spinning.pid) - before
    assert spun > 0.1, "the process did not spin"
    # both saw the same machine, and only one of them calls the spinning process its own
    assert other.outside_cores() - own.outside_cores() >= 0.8 * spun / _WATCHED_S - 0.1


def test_a_process_without_parents_is_known_by_the_run_in_its_environment() -> None:
    watch = Watch.begin(os.getpid(), "run-that-daemonises")
    subprocess.run([sys.executable, "-c", _DAEMON], env=os.environ | {RUN_VARIABLE: "run-that-daemonises"}, check=True)
    try:
        time.sleep(_WATCHED_S)
        found = dict(processors._marked("run-that-daemonises"))
        assert len(found) == 1
        assert not found.keys() & dict(processors._tree(os.getpid())).keys()
        unmarked = Watch(watch.root, "another", watch.begun, watch.before, watch.own)
        assert unmarked.outside_cores() - watch.outside_cores() > 0.1
    finally:
        for (pid, _), _ in processors._marked("run-that-daemonises"):
            os.kill(pid, 9)
    assert not dict(processors._marked("run-that-starts-nothing"))


def test_the_time_of_a_process_that_ended_is_its_parent_s() -> None:
    watch = Watch.begin(os.getpid(), "mine")
    before = sum(dict(processors._tree(os.getpid())).values())
    subprocess.run([sys.executable, "-c", "import time\nwhile time.process_time() < 0.5: pass"], check=True)
    assert sum(dict(processors._tree(os.getpid())).values()) - before >= 0.45
    assert watch.outside_cores() <= watch.before.cores


@pytest.mark.parametrize(
    ("busy_s", "steal_s", "own_s", "words"),
    [
        (20.0, 0.0, 19.0, None),  # the run itself takes the whole machine
        (20.0, 0.0, 10.0, None),  # exactly half is not more than half
        (20.0, 0.0, 9.0, "processes outside this run took 1.1 of its 2 cores"),
        (9.0, 11.0, 9.0, "processes outside this run took 1.1 of its 2 cores"),  # a hypervisor took it
        (0.0, 0.0, 5.0, None),  # a kernel that counts nothing
    ],
)
def test_more_than_half_of_the_cores_is_busy(
    monkeypatch: pytest.MonkeyPatch, busy_s: float, steal_s: float, own_s: float, words: str | None
) -> None:
    before = MachineState(cores=2, load_average=0.1, busy_s=100, steal_s=5)
    after = MachineState(cores=2, load_average=3, busy_s=100 + busy_s, steal_s=5 + steal_s)
    monkeypatch.setattr(processors, "state", lambda: after)
    monkeypatch.setattr(processors, "_tree", lambda root: iter([((1, "0"), 7 + own_s)]))
    monkeypatch.setattr(processors, "_marked", lambda run: iter([]))
    monkeypatch.setattr(processors.time, "monotonic", lambda: 10.0)
    told = Watch(1, "r", 0.0, before, {(1, "0"): 7.0}).busy()
    assert told is None if words is None else words in told


def test_what_cannot_be_told_apart_is_the_run_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that was there and is waited for has all its time in its parent's, what it had before included."""
    before = MachineState(cores=2, load_average=0, busy_s=0, steal_s=0)
    monkeypatch.setattr(processors, "state", lambda: before.model_copy(update={"busy_s": 15.0}))
    monkeypatch.setattr(processors, "_tree", lambda root: iter([((1, "0"), 20.0)]))
    monkeypatch.setattr(processors, "_marked", lambda run: iter([]))
    monkeypatch.setattr(processors.time, "monotonic", lambda: 10.0)
    assert Watch(1, "r", 0.0, before, {(1, "0"): 0.0, (2, "0"): 8.0}).outside_cores() == 0


def test_only_the_cores_of_this_process_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "stat").write_text(
        "cpu  1000 0 0 0 0 0 0 0 0 0\n"
        "cpu0 100 10 20 900 5 1 2 30 99 0\n"
        "cpu1 800 0 0 0 0 0 0 0 0 0\n"
        "cpu10 700 0 0 0 0 0 0 0 0 0\nintr 5\n"
    )  # fmt: skip
    monkeypatch.setattr(processors, "_PROC", tmp_path)
    tick = os.sysconf("SC_CLK_TCK")
    assert processors._processor_seconds({0}) == (133 / tick, 30 / tick)


def test_one_thread_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS")
    processors.use_one_thread()
    assert os.environ["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    processors.use_one_thread()
    assert os.environ["OMP_NUM_THREADS"] == "3"
