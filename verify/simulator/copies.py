"""The asynchronous copies that are under way, and the groups that threads close and wait for."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from verify.simulator.block_memory import SharedMemory
from verify.simulator.threads import Threads

I64 = np.int64


@dataclass(frozen=True, slots=True)
class _Issued:
    """Copies of one instruction: of which thread, in which of its groups, to where, and what."""

    thread: np.ndarray
    group: np.ndarray
    start: np.ndarray
    content: np.ndarray

    def some(self, chosen: np.ndarray) -> _Issued:
        return _Issued(self.thread[chosen], self.group[chosen], self.start[chosen], self.content[chosen])


class Copies:
    """The copies under way of the blocks that run together, and how many groups each thread has closed."""

    def __init__(self, threads: int) -> None:
        self._closed = np.zeros(threads, I64)
        self._under_way: list[_Issued] = []

    def issue(self, start: np.ndarray, content: np.ndarray, threads: Threads) -> None:
        thread = _places(threads)
        self._under_way.append(_Issued(thread, self._closed[thread], start, content))

    def close(self, threads: Threads) -> None:
        """End the open group of each thread."""
        self._closed[_places(threads)] += 1

    def arrive(self, threads: Threads, left: int | None, memory: SharedMemory) -> None:
        """Let the copies of these threads arrive, except those of the last ``left`` groups; None: all copies."""
        entry = np.full(len(self._closed), -1, I64)
        entry[_places(threads)] = np.arange(len(threads.thread))
        remaining = []
        for one in self._under_way:
            here = entry[one.thread] >= 0
            if left is not None:
                here &= one.group < self._closed[one.thread] - left
            if here.any():
                arrived = one.some(here)
                memory.finish_copy(arrived.start, arrived.content, threads.some(entry[arrived.thread]))
            if not here.all():
                remaining.append(one.some(~here))
        self._under_way = remaining


def _places(threads: Threads) -> np.ndarray:
    """The numbers of threads among all those that run together."""
    return threads.block * threads.per_block + threads.thread
