"""The threads that carry out one instruction, and which of them changed a place in memory by atomic operations."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

I64 = np.int64

#: Beyond the number of any thread.
_NOBODY = np.iinfo(I64).max


@dataclass(frozen=True, slots=True)
class Threads:
    """The active threads of one instruction: the number of each one's block among those that run together, its number
    within the block, and its number in the grid; ``epoch`` counts the barriers that its block has passed, and
    ``warp_epoch`` those of its warp alone.
    """

    block: np.ndarray
    thread: np.ndarray
    number: np.ndarray
    epoch: np.ndarray
    warp_epoch: np.ndarray
    per_block: int
    coordinates: np.ndarray  #: [blocks, 3], of those that run together

    def some(self, chosen: np.ndarray | slice) -> Threads:
        """These entries."""
        if isinstance(chosen, slice):
            return self
        parts = (self.block, self.thread, self.number, self.epoch, self.warp_epoch)
        block, thread, number, epoch, warp_epoch = (one[chosen] for one in parts)
        return Threads(block, thread, number, epoch, warp_epoch, self.per_block, self.coordinates)

    def named(self, place: int) -> tuple[tuple[int, int, int], int]:
        """Block and thread of one entry, for a message."""
        x, y, z = (int(one) for one in self.coordinates[self.block[place]])
        return (x, y, z), int(self.thread[place])


class Changes:
    """Who changed each place of a memory by atomic operations, since all threads that did were last ordered before the
    next one that did.
    """

    def __init__(self, places: int) -> None:
        self._first, self._last = np.full(places, _NOBODY, I64), np.full(places, -1, I64)
        self._when, self._warp_when = np.zeros(places, I64), np.zeros(places, I64)

    def before(self, at: np.ndarray, threads: Threads) -> np.ndarray:
        """Whether every change of these places came before what each of the threads does now."""
        first, last = self._first[at], self._last[at]
        low, high = first // threads.per_block, last // threads.per_block
        same_block = (low == high) & (low == threads.number // threads.per_block)
        same_warp = same_block & (first // 32 == last // 32) & (first // 32 == threads.number // 32)
        found = (last < 0) | ((first == last) & (last == threads.number))
        found |= same_block & (self._when[at] < threads.epoch)
        return found | (same_warp & (self._warp_when[at] < threads.warp_epoch))

    def within(self, at: np.ndarray, threads: Threads) -> np.ndarray:
        """Whether every change of these places is by a thread of the same block."""
        block = threads.number // threads.per_block
        return (self._first[at] // threads.per_block == block) & (self._last[at] // threads.per_block == block)

    def note(self, at: np.ndarray, threads: Threads) -> bool:
        """Note that each thread changes one place; whether others change it too, with no order between."""
        over = self.before(at, threads)
        self._first[at[over]], self._last[at[over]] = _NOBODY, -1
        np.minimum.at(self._first, at, threads.number)
        np.maximum.at(self._last, at, threads.number)
        self._when[at], self._warp_when[at] = threads.epoch, threads.warp_epoch
        return not over.all() or bool((self._first[at] != self._last[at]).any())
