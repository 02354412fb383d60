"""``python -m verify gate``: is the GPU of this machine fit for TriAttention, within seconds, in a fleet's own terms.

This process only watches. Whatever may hang, the driver included, runs in a child (``verify/fleet/trial.py``), so that
the answer comes in time even if the child cannot be killed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from verify.errors import ConfigurationError
from verify.fleet.contracts import CONTRACTS, TERMINATION_BYTES, Answer, Outcome, code, told
from verify.fleet.trial import read_answer

#: Kept back of the time limit, to stop the child and to answer.
_RESERVE_S = 2.0

#: The shortest limit that leaves the checks any time, and the longest that a fleet's slot could mean.
_SHORTEST_S, _LONGEST_S = 5.0, 3600.0

#: How often the child is looked at.
_POLL_S = 0.05

#: The last lines of the child's output that go to stderr.
_LOG_LINES = 200

#: What a container writes for whoever runs it; the file is there if somebody reads it.
_TERMINATION = Path("/dev/termination-log")

#: The child that a gate runs. Tests give another one; the command line cannot.
_TRIAL = (sys.executable, "-m", "verify.fleet.trial")


class _Stopped(Exception):
    """Somebody asked this process to stop."""


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

    ``gpu`` is an index or a UUID, as in CUDA_VISIBLE_DEVICES. Raises nothing: a wrong option is an answer too.
    """
    deadline = time.monotonic() - _age_s() + within_s - _RESERVE_S
    before = {number: signal.signal(number, _stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        answer = _answer(gpu, expect, within_s, deadline, trial)
    except _Stopped:
        answer = Answer(Outcome.INTERRUPTED, "the gate was interrupted; run it again")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return tell(contract, answer, termination)


def tell(contract: str | None, answer: Answer, termination: Path = _TERMINATION) -> int:
    """Print an answer on stdout, leave a termination message unless it is a pass, and return the exit code."""
    print(told(contract, answer), flush=True)
    if answer.outcome is not Outcome.PASS and termination.is_file():
        with suppress(OSError):  # the container's owner may have mounted it read-only
            message = f"{answer.outcome}: {answer.words}\n".encode()
            termination.write_bytes(message[:TERMINATION_BYTES])
    return code(contract, answer.outcome)


def misused(words: Sequence[str]) -> int:
    """The end of a gate whose options argparse has refused: the exit code of the contract that they name."""
    pairs = zip(words, [*words[1:], ""], strict=True)
    given = [value for word, value in pairs if word == "--contract"]
    given += [word.partition("=")[2] for word in words if word.startswith("--contract=")]
    contract = next((one for one in given if one in CONTRACTS), None)
    return tell(contract, Answer(Outcome.CONFIGURATION, "the options are wrong; stderr says which"))


def _answer(gpu: str | None, expect: str | None, within_s: float, deadline: float, trial: Sequence[str]) -> Answer:
    try:
        options, environment = _checked(gpu, expect, within_s)
        folder = Path(tempfile.mkdtemp(prefix="triattention-gate-"))
    except (ConfigurationError, OSError) as error:
        print(f"verify: {error}", file=sys.stderr)
        return Answer(Outcome.CONFIGURATION, str(error))
    try:
        return _tried([*trial, str(folder), *options], environment, folder, within_s, deadline)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # a child that cannot be killed may still write to it


def _checked(gpu: str | None, expect: str | None, within_s: float) -> tuple[list[str], dict[str, str]]:
    """The child's options and environment. Raises ConfigurationError for an option that makes no sense."""
    from verify.run.request import parse_expect

    if not _SHORTEST_S <= within_s <= _LONGEST_S:
        raise ConfigurationError(f"--within {within_s:g} is not a limit; use {_SHORTEST_S:g} to {_LONGEST_S:g} seconds")
    environment = dict(os.environ)
    if gpu is not None:
        if not re.fullmatch(r"\d{1,3}|(GPU|MIG)-[\w./-]+", gpu):
            raise ConfigurationError(f"--gpu {gpu!r} names no card; give its index or UUID (nvidia-smi -L lists both)")
        environment["CUDA_VISIBLE_DEVICES"] = gpu
    return ([] if expect is None else [str(parse_expect(expect))]), environment


def _tried(
    command: Sequence[str], environment: Mapping[str, str], folder: Path, within_s: float, deadline: float
) -> Answer:
    # a cache of its own, so that the kernels are built and not only loaded
    environment = {**environment, "TRITON_CACHE_DIR": str(folder / "triton")}
    log = folder / "log"
    with log.open("wb") as stream:
        # not our stdout and stderr: whoever called us waits until every process has closed them
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, start_new_session=True
        )
    try:
        while child.poll() is None:
            if time.monotonic() > deadline:
                return Answer(Outcome.TIMEOUT, f"{_running(folder)} after {within_s:g} s")
            time.sleep(_POLL_S)
    finally:
        _kill(child)
        said = log.read_text("utf-8", "replace").splitlines()[-_LOG_LINES:]
        print("\n".join(said), file=sys.stderr, flush=True)
    if answer := read_answer(folder):
        return answer
    last = next((line for line in reversed(said) if line.strip()), "it printed nothing")
    return Answer(Outcome.UNJUDGED, f"the gate's own process ended with exit code {child.returncode}: {last}")


def _running(folder: Path) -> str:
    """The check that was running when the time was over."""
    running: dict[str, None] = {}
    for log in folder.glob("*/events.jsonl"):
        for line in log.read_text("utf-8", "replace").splitlines():
            with suppress(ValueError):  # the line that is being written
                event = json.loads(line)
                if event.get("event") == "start":
                    running[event["id"]] = None
                elif event.get("event") == "result":
                    running.pop(event["result"]["id"], None)
    return f"{next(iter(running))} was still running" if running else "no check had begun, or the last had ended,"


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kill the child and all processes that it started, which have sessions of their own; waits for none of them."""
    if child.poll() is not None:
        return
    with suppress(psutil.Error):
        for process in psutil.Process(child.pid).children(recursive=True):
            with suppress(psutil.Error):
                process.kill()
    child.kill()


def _age_s() -> float:
    """How many seconds ago this process started."""
    # the 22nd field; the second one may have spaces and ends with the last parenthesis
    ticks = int(Path("/proc/self/stat").read_text("utf-8").rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    raise _Stopped
