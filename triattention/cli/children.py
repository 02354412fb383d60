"""Child processes that share work: started, monitored and stopped together.

A child runs ``triattention.cli.child``, which exits when its standard input is closed, so no child outlives its parent,
however that ended. Each has its own session, so a terminal's Ctrl-C reaches only the parent, which stops the children.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import triattention

_POLL_S = 0.1
_STOP_LIMIT_S = 10
_PREFIX = "triattention: "


@dataclass(frozen=True, slots=True)
class Job:
    """One child: ``function`` is ``module:name`` of a function of this package, called with ``arguments``."""

    label: str
    function: str
    arguments: Mapping[str, Any]


class _Child:
    def __init__(self, job: Job, slot: Mapping[str, str]) -> None:
        self.label, self.slot = job.label, slot
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - closed in stop, with the process
        self._shown = 0
        path = [str(Path(triattention.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
        self.process = subprocess.Popen(
            [sys.executable, "-m", "triattention.cli.child"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr, start_new_session=True,
            env={**os.environ, **slot, "PYTHONPATH": os.pathsep.join(path)},
        )  # fmt: skip
        call = {"function": job.function, "arguments": job.arguments}
        with suppress(BrokenPipeError):  # it died at once; its exit code and last line are reported as usual
            self.process.stdin.write((json.dumps(call) + "\n").encode())
            self.process.stdin.flush()

    def notes(self) -> list[str]:
        """The complete lines written to stderr since the last call, except the message of a fatal error."""
        end = os.fstat(self._stderr.fileno()).st_size
        data = os.pread(self._stderr.fileno(), end - self._shown, self._shown)
        whole = data[: data.rfind(b"\n") + 1]
        self._shown += len(whole)
        return [line for line in whole.decode(errors="replace").splitlines() if not line.startswith(_PREFIX)]

    def failure(self) -> str:
        """The exit code and the last line on stderr."""
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").strip().splitlines()
        code = self.process.returncode
        name = f" ({signal.Signals(-code).name})" if code < 0 and -code in {*signal.Signals} else ""
        last = lines[-1].removeprefix(_PREFIX) if lines else "no output"
        return f"{self.label} ended with exit code {code}{name}: {last}"

    def close(self) -> None:
        self._stderr.close()
        with suppress(BrokenPipeError):  # it died before it read its call
            self.process.stdin.close()


def run_jobs(
    jobs: Sequence[Job],
    slots: Sequence[Mapping[str, str]],
    *,
    note: Callable[[str], None],
    tick: Callable[[], None] = lambda: None,
) -> list[str]:
    """Run ``jobs``, one at a time in each slot, and return a sentence for each that failed; the others continue.

    A slot is a set of environment variables for a child. ``tick`` is called ten times a second, ``note`` with each line
    that a child writes to stderr. Any exception raised here, including an interrupt, first stops every child.
    """
    waiting, free, failures = list(jobs), list(slots), []
    running: list[_Child] = []
    try:
        while waiting or running:
            while waiting and free:
                running.append(_Child(waiting.pop(0), free.pop(0)))
            time.sleep(_POLL_S)
            ended = [child for child in running if child.process.poll() is not None]
            for child in running:
                for line in child.notes():
                    note(f"{child.label}: {line}" if len(jobs) > 1 else line)
            tick()
            for child in ended:
                running.remove(child)
                free.append(child.slot)
                if child.process.returncode:
                    failures.append(child.failure())
                    if running or waiting:
                        note(f"note: {failures[-1]}; the others continue")
                child.close()
    finally:
        _stop(running)
    return failures


def visible_gpus(device: str) -> list[str]:
    """The GPUs that torch sees, as ``CUDA_VISIBLE_DEVICES`` names them; none for the CPU. Creates no CUDA context."""
    if device == "cpu":
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return ([name.strip() for name in named.split(",")] if named else [str(n) for n in range(count)])[:count]


def slots_on(gpus: Sequence[str], count: int) -> list[dict[str, str]]:
    """``count`` slots, each of which sees one of ``gpus``; slots share a GPU if there are fewer GPUs.

    On a CPU every child has as many threads as a single one would have, because their number affects the rounding of
    sums; they must then wait without spinning, or they block each other's cores (measured: 150 s instead of 10 s).
    """
    if gpus:
        return [{"CUDA_VISIBLE_DEVICES": gpus[n % len(gpus)]} for n in range(count)]
    return [{"OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")} if count > 1 else {}] * count


def _stop(children: Sequence[_Child]) -> None:
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + _STOP_LIMIT_S
    for child in children:
        try:
            child.process.wait(max(deadline - time.monotonic(), 0))
        except subprocess.TimeoutExpired:
            child.process.kill()
            child.process.wait(_STOP_LIMIT_S)
        child.close()
