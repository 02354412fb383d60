"""Counters that the engine's processes write and that the server shows in ``/metrics``, next to vLLM's own.

Each process adds to its own small memory-mapped file; the server sums them on request. So the engine never waits, and
vLLM's messages need no extra fields.
"""

from __future__ import annotations

import atexit
import fcntl
import mmap
import os
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

#: Environment variable with the directory of the files: set by a server's first process, inherited by the others.
DIRECTORY = "TRIATTENTION_METRICS_DIRECTORY"

NAMES = {
    "rounds": "Eviction rounds, each of one request.",
    "evicted_tokens": "Tokens evicted from the KV cache.",
    "blocks_freed": "KV cache blocks freed by eviction rounds.",
    "rounds_put_off": "Steps at which a round was due but postponed, because the pool lacked free blocks for it.",
    "rounds_missed": "Requests that exceeded budget + divide_length without a round, which is an error.",
    "compactions": "Rounds that a worker carried out.",
    "round_seconds": "Time that workers spent scoring keys and compacting blocks.",
}
_LAYOUT = struct.Struct("d")
_PREFIX = "triattention-metrics-"


class Counters:
    """The counters of this process, which only grow. Without a directory they stay in this process."""

    def __init__(self, directory: str | None = None) -> None:
        size = _LAYOUT.size * len(NAMES)
        if directory is None:
            self._values: Any = bytearray(size)
            return
        handle, _ = tempfile.mkstemp(dir=directory, prefix=f"{os.getpid()}.")
        os.ftruncate(handle, size)
        self._values = mmap.mmap(handle, size)
        os.close(handle)

    def add(self, name: str, amount: float = 1.0) -> None:
        """Add ``amount`` to the counter ``name``."""
        at = _LAYOUT.size * list(NAMES).index(name)
        _LAYOUT.pack_into(self._values, at, _LAYOUT.unpack_from(self._values, at)[0] + amount)

    def get(self, name: str) -> float:
        return _LAYOUT.unpack_from(self._values, _LAYOUT.size * list(NAMES).index(name))[0]


def counters() -> Counters:
    """New counters of this process, in the server's directory."""
    directory = os.environ.get(DIRECTORY)
    return Counters(directory if directory and os.path.isdir(directory) else None)


def expose() -> None:
    """In the first process of a server: create the directory, and show its counters in ``/metrics``."""
    if DIRECTORY in os.environ:
        return
    from prometheus_client import REGISTRY

    owner = os.getpid()
    for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        if (lock := _locked(path)) is not None:  # left by a server that was killed
            shutil.rmtree(path, ignore_errors=True)
            os.close(lock)
    made = Path(tempfile.mkdtemp(prefix=f".{_PREFIX}"))
    _locked(made)  # until the last process of this server exits; locked before another server's cleanup can see it
    directory = made.rename(made.with_name(made.name[1:]))
    os.environ[DIRECTORY] = str(directory)
    atexit.register(lambda: shutil.rmtree(directory, ignore_errors=True) if os.getpid() == owner else None)
    REGISTRY.register(_Collector(directory))


def _locked(directory: Path) -> int | None:
    """A descriptor that locks the directory; None if another process holds the lock, or access is denied."""
    try:
        descriptor = os.open(directory, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


class _Collector:
    """Sums the files of all processes, including those that have exited."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterator[Any]:
        from prometheus_client.core import CounterMetricFamily, SummaryMetricFamily

        totals = dict.fromkeys(NAMES, 0.0)
        for path in self._directory.glob("*"):  # empty if somebody cleared the temporary folder
            for name, value in zip(NAMES, _LAYOUT.iter_unpack(path.read_bytes()), strict=True):
                totals[name] += value[0]
        for name, text in NAMES.items():
            if name == "round_seconds":
                yield SummaryMetricFamily(f"triattention:{name}", text, totals["compactions"], totals[name])
            else:
                yield CounterMetricFamily(f"triattention:{name}", text, totals[name])
