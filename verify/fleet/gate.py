"""``python -m verify gate``: are the GPUs of this machine fit for TriAttention, within seconds, in a fleet's own terms.

This process only watches. Whatever may hang, the driver included, runs in children (``verify/fleet/trial.py``), so that
the answer comes in time even if they cannot be killed.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from verify.errors import ConfigurationError
from verify.files import IMPORT_ROOT, INSTALLED, end_of
from verify.fleet.contracts import CONTRACTS, TERMINATION_BYTES, Answer, Outcome, code, told, worst
from verify.fleet.trial import read_answer, read_several

#: Kept back of the time limit, to stop the children and to answer.
_RESERVE_S = 2.0

#: How long the children may take to die, and the answer and the log may wait for somebody to read them.
_PATIENCE_S = 0.5

#: The shortest limit that leaves the checks any time, and the longest that a fleet's slot could mean.
_SHORTEST_S, _LONGEST_S = 5.0, 3600.0

#: How often the children are looked at.
_POLL_S = 0.05

#: How much of the end of the children's output goes to stderr.
_LOG_BYTES = 32_000

#: A pipe of which ``select`` says that it can be written to takes so many bytes without waiting.
_PIPE_BYTES = 4096

#: What a container writes for whoever runs it; the file is there if somebody reads it.
_TERMINATION = Path("/dev/termination-log")

#: The child that a gate runs. Tests give another one; the command line cannot.
_TRIAL = (sys.executable, "-P", "-m", "verify.fleet.trial")

_PR_SET_CHILD_SUBREAPER = 36  # of linux/prctl.h

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


_INTERRUPTED = Answer(Outcome.INTERRUPTED, "the gate was interrupted; run it again")


class Stopped(Exception):
    """Somebody asked this process to stop."""


def heed() -> None:
    """From now on, a signal that asks this process to stop makes it answer that it was interrupted."""
    for number in _SIGNALS:
        signal.signal(number, _stop)


def gate(
    contract: str | None,
    gpu: str | None,
    expect: str | None,
    within_s: float,
    *,
    trial: Sequence[str] = _TRIAL,
    termination: Path = _TERMINATION,
) -> int:
    """Print the answer as ``contract`` expects it, within ``within_s`` seconds of the start of this process, and return
    its exit code. Logs go to stderr, and a reason to the container's termination message if it has one.

    ``gpu`` is an index or a UUID, as in CUDA_VISIBLE_DEVICES; None means every GPU that is visible, and the worst
    answer counts. Raises nothing: a wrong option, and a fault of this suite, are answers too.
    """
    deadline = time.monotonic() - _age_s() + within_s - _RESERVE_S
    log = b""
    try:
        folder, options, environment = _prepared(gpu, expect, within_s)
        try:
            answer = _answered([*trial, str(folder), *options], environment, folder, within_s, deadline)
        finally:
            log = _log(folder)
            shutil.rmtree(folder, ignore_errors=True)  # a child that cannot be killed may still write to it
    except Stopped:
        answer = _INTERRUPTED
    except ConfigurationError as error:
        answer, log = Answer(Outcome.CONFIGURATION, str(error)), f"verify: {error}\n".encode()
    except Exception as error:  # whatever is wrong with this suite or this machine's disk says nothing about the GPU
        answer = Answer(Outcome.UNJUDGED, f"the gate itself failed ({type(error).__name__}: {error})")
        log = traceback.format_exc().encode()
    return tell(contract, answer, log, termination)


def tell(contract: str | None, answer: Answer, log: bytes = b"", termination: Path = _TERMINATION) -> int:
    """Print an answer on stdout and then its log on stderr, leave a termination message unless it is a pass, and return
    the exit code. Nobody has to read any of it.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is _stop:
            signal.signal(number, signal.SIG_IGN)  # it is over, and the code is what counts
    _write(sys.stdout, f"{told(contract, answer)}\n".encode(errors="replace"))
    if answer.outcome is not Outcome.PASS and termination.is_file():
        with suppress(OSError):  # the container's owner may have mounted it read-only
            message = f"{answer.outcome}: {answer.words}\n".encode()[:TERMINATION_BYTES]
            termination.write_bytes(message.decode(errors="ignore").encode())
    _write(sys.stderr, log)
    return code(contract, answer.outcome)


def misused(words: Sequence[str]) -> int:
    """The end of a gate whose options argparse has refused, in the terms of the contract that they name."""
    return tell(_contract(words), Answer(Outcome.CONFIGURATION, "the options are wrong; stderr says which"))


def interrupted(words: Sequence[str]) -> int:
    """The end of a gate that was asked to stop before or after its work."""
    return tell(_contract(words), _INTERRUPTED)


def _contract(words: Sequence[str]) -> str | None:
    """The contract that the words of a command line name, however wrong they are."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = [value for word, value in pairs if word == "--contract"]
    given += [word.partition("=")[2] for word in words if word.startswith("--contract=")]
    return next((one for one in given if one in CONTRACTS), None)


def _write(stream: object, data: bytes) -> None:
    """Write to the file behind ``stream`` what somebody takes: its reader may be gone, or never read."""
    try:
        descriptor = stream.fileno()  # type: ignore[attr-defined]  # None where the process was started without one
    except (AttributeError, OSError, ValueError):
        return
    until = time.monotonic() + _PATIENCE_S
    with suppress(OSError):
        while data and select.select([], [descriptor], [], max(0.0, until - time.monotonic()))[1]:
            data = data[os.write(descriptor, data[:_PIPE_BYTES]) :]


def _prepared(gpu: str | None, expect: str | None, within_s: float) -> tuple[Path, list[str], dict[str, str]]:
    """The children's folder, options and environment. Raises ConfigurationError for an option that makes no sense."""
    from verify.run.request import parse_expect

    if not _SHORTEST_S <= within_s <= _LONGEST_S:
        raise ConfigurationError(f"--within {within_s:g} is not a limit; use {_SHORTEST_S:g} to {_LONGEST_S:g} seconds")
    if gpu is not None and not re.fullmatch(r"\d{1,3}|(GPU|MIG)-[\w./-]+", gpu):
        raise ConfigurationError(f"--gpu {gpu!r} names no card; give its index or UUID (nvidia-smi -L lists both)")
    options = ["any" if expect is None else str(parse_expect(expect))]
    options += ["one"] if gpu is not None else []
    environment = dict(os.environ) | ({} if gpu is None else {"CUDA_VISIBLE_DEVICES": gpu})
    if not INSTALLED:  # the children import the same suite, whatever the current folder holds
        path = [str(IMPORT_ROOT), *filter(None, [environment.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
    return Path(tempfile.mkdtemp(prefix="triattention-gate-")), options, environment


def _answered(
    command: list[str], environment: Mapping[str, str], folder: Path, within_s: float, deadline: float
) -> Answer:
    """The answer of a first child, or of one for each GPU if it found several."""
    before = {one.pid for one in _descendants()}
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)  # so that processes whose parents die become children of ours
    try:
        answer = _watched({"": _Child(command, environment, folder)}, within_s, deadline)[""]
        if not (names := read_several(folder)):
            return answer
        children = {}
        for name in names:
            own = folder / f"gpu{len(children)}"
            own.mkdir()
            one = [str(own) if word == str(folder) else word for word in command]
            children[name] = _Child([*one, "one"], {**environment, "CUDA_VISIBLE_DEVICES": name}, own)
        return worst(_watched(children, within_s, deadline))
    finally:
        _kill_children(before)
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 0)


class _Child:
    """A child that examines one GPU, in a folder of its own."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str], folder: Path) -> None:
        self.folder = folder
        # a cache of its own, so that the kernels are built and not only loaded
        environment = {**environment, "TRITON_CACHE_DIR": str(folder / "triton")}
        with (folder / "log").open("wb") as log:
            # not our stdout and stderr: whoever called us waits until every process has closed them
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def answer(self) -> Answer:
        """What it found out before it ended."""
        if found := read_answer(self.folder):
            return found
        last = _tail(self.folder / "log").decode(errors="replace").rpartition("\n")[2].strip()
        ended = f"the gate's own process ended with exit code {self.process.returncode}"
        return Answer(Outcome.UNJUDGED, f"{ended}: {last or 'it printed nothing'}")


def _watched(children: Mapping[str, _Child], within_s: float, deadline: float) -> dict[str, Answer]:
    """The answer of each child; TIMEOUT of those that have not ended before the deadline."""
    while any(child.process.poll() is None for child in children.values()) and time.monotonic() < deadline:
        time.sleep(_POLL_S)
    return {
        name: child.answer()
        if child.process.poll() is not None
        else Answer(Outcome.TIMEOUT, f"{_running(child.folder)} after {within_s:g} s")
        for name, child in children.items()
    }


def _running(folder: Path) -> str:
    """The check that was running when the time was over."""
    running: dict[str, None] = {}
    for log in folder.glob("*/events.jsonl"):
        for line in log.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the line that is being written
                event = json.loads(line)
                if event["event"] == "start":
                    running[event["id"]] = None
                elif event["event"] == "result":
                    running.pop(event["result"]["id"], None)
    return f"{next(iter(running))} was still running" if running else "no check had begun, or the last had ended,"


def _log(folder: Path) -> bytes:
    """The ends of the children's logs."""
    logs = sorted(folder.glob("**/log"))
    return b"".join(_tail(log, _LOG_BYTES // len(logs)) + b"\n" for log in logs if log.stat().st_size)


def _tail(log: Path, limit: int = _LOG_BYTES) -> bytes:
    with suppress(OSError):
        return end_of(log, limit).rstrip()
    return b""


def _kill_children(before: set[int]) -> None:
    """Kill every process that was started since ``before``, also those whose parents have ended; wait for none."""
    until = time.monotonic() + _PATIENCE_S
    while time.monotonic() < until:  # again, for what was forked meanwhile
        left = [one for one in _descendants() if one.pid not in before]
        if not left:
            return
        for process in left:
            with suppress(psutil.Error):
                process.kill()
        time.sleep(_POLL_S)


def _descendants() -> list[psutil.Process]:
    """The processes that live below this one."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _age_s() -> float:
    """How many seconds ago this process started; 0 where the system does not tell."""
    with suppress(OSError):
        # the 22nd field; the second one may have spaces and ends with the last parenthesis
        ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    return 0.0


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    for one in _SIGNALS:
        signal.signal(one, signal.SIG_IGN)  # one is enough, and the answer must come out
    raise Stopped
