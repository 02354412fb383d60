"""Worker processes that answer JSON lines within a time limit, and are replaced when they die; the parent survives."""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")

#: Importing torch from a cold disk takes most of a minute on small machines.
_START_LIMIT_S = 180.0

_PR_SET_PDEATHSIG = 1  # of linux/prctl.h

#: How much of the end of a dead process's stderr is kept.
_TAIL_BYTES = 8_000


def end_with_parent(how: signal.Signals = signal.SIGKILL) -> None:
    """Make Linux send this process a signal when the thread that started it ends, for whatever reason."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, how)


class WorkerDied(Exception):
    """The process ended without an answer.

    ``returncode`` is as subprocess gives it, ``said`` the end of its stderr, ``started`` whether it had started far
    enough to read the question.
    """

    def __init__(self, returncode: int, said: str, *, started: bool) -> None:
        super().__init__(returncode, said)
        self.returncode, self.said, self.started = returncode, said, started

    @property
    def by_itself(self) -> bool:
        """Whether the question ended it, and not the user or a lack of memory."""
        return self.started and self.returncode not in (
            -signal.SIGKILL,
            -signal.SIGTERM,
            -signal.SIGINT,
            -signal.SIGHUP,
        )

    @property
    def how(self) -> str:
        if self.returncode < 0:
            return f"died of signal {-self.returncode} ({signal.strsignal(-self.returncode)})"
        return f"ended with exit code {self.returncode}"


class WorkerHung(Exception):
    """The process gave no answer in time and was killed."""


class Worker:
    """One process running ``python -m MODULE FD`` in a session of its own, started by the first question.

    It may write to ``scratch``; what it leaves there is not removed.
    """

    def __init__(self, module: str, environment: Mapping[str, str], scratch: Path) -> None:
        self._module, self._scratch = module, scratch
        self._environment = {**environment, "TMPDIR": str(scratch), "TRITON_CACHE_DIR": str(scratch / "triton")}
        self._process: subprocess.Popen[bytes] | None = None
        self._answers = -1
        self._read = b""
        self._mark = 0
        self._started = False

    def ask(self, question: Any, limit_s: float) -> Any:
        """The answer to one question. Raises WorkerDied or WorkerHung; then the next question gets a new process."""
        try:
            if self._process is None:
                self._start()
                self._line(_START_LIMIT_S)
                self._started = True
            self._mark = self._stderr.seek(0, os.SEEK_END)
            with suppress(BrokenPipeError):  # it is dead; the read below says why
                self._process.stdin.write(json.dumps(question).encode() + b"\n")
                self._process.stdin.flush()
            return json.loads(self._line(limit_s))
        except BaseException:
            self.close()
            raise

    def kill(self) -> None:
        """Kill the process and everything that it started; a pending ``ask`` raises WorkerDied."""
        if process := self._process:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def close(self) -> None:
        """``kill``, and release the process's resources; call it in the thread that asks."""
        self.kill()
        process, self._process = self._process, None
        if process is None:
            return
        process.wait()
        with suppress(BrokenPipeError):
            process.stdin.close()
        os.close(self._answers)
        self._read = b""

    def _start(self) -> None:
        self._started = False
        self._answers, theirs = os.pipe()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", self._module, str(theirs)],
            env=self._environment, pass_fds=(theirs,), start_new_session=True,
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr,
        )  # fmt: skip
        os.close(theirs)

    def _line(self, limit_s: float) -> bytes:
        until = time.monotonic() + limit_s
        while b"\n" not in self._read:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise WorkerHung(f"no answer within {limit_s:g} s")
            part = os.read(self._answers, 1 << 16)
            if not part:
                raise self._death()
            self._read += part
        line, _, self._read = self._read.partition(b"\n")
        return line

    def _death(self) -> WorkerDied:
        # the descriptor closes a moment before the process can be reaped
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(5)
        self._stderr.seek(max(self._mark, self._stderr.seek(0, os.SEEK_END) - _TAIL_BYTES))
        code = self._process.returncode
        said = self._stderr.read().decode(errors="replace")
        return WorkerDied(-signal.SIGKILL if code is None else code, said, started=self._started)


class Pool:
    """``size`` workers, each with a thread; a context manager that leaves no process and no file behind."""

    def __init__(self, module: str, environment: Mapping[str, str], size: int) -> None:
        self._module, self._environment = module, environment
        self._executor = ThreadPoolExecutor(size)
        self._own = threading.local()
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._folder = tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self._executor.shutdown()
        for worker in self._workers:
            worker.close()
        self._folder.cleanup()

    def each(self, act: Callable[[Worker, T], R], jobs: Iterable[T]) -> Iterator[R]:
        """What ``act`` returns for each job, in order of completion, ``size`` at a time. An exception ends them all."""
        futures = [self._executor.submit(lambda job: act(self._worker(), job), job) for job in jobs]
        try:
            for future in as_completed(futures):
                yield future.result()
        finally:
            for future in futures:
                future.cancel()
            while not all(future.done() for future in futures):
                for worker in self._workers:
                    worker.kill()
                time.sleep(0.05)

    def _worker(self) -> Worker:
        if not hasattr(self._own, "worker"):
            with self._lock:
                scratch = Path(self._folder.name) / str(len(self._workers))
                scratch.mkdir()
                self._own.worker = Worker(self._module, self._environment, scratch)
                self._workers.append(self._own.worker)
        return self._own.worker
