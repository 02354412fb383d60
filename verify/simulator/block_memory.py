"""The shared memory of blocks and the local memory of threads, with a check of every access."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from verify.simulator.errors import Fault, Located
from verify.simulator.memory import WORDS
from verify.simulator.threads import Changes, Threads

U8, U64, I32, I64 = np.uint8, np.uint64, np.int32, np.int64

#: What unwritten memory holds.
_UNWRITTEN = 0xAB
#: In place of a reader's number, where more than one thread of a warp read.
_SEVERAL = -2


class SharedMemory:
    """The shared memory of the blocks that run together, and who last read and wrote each part of it.

    Two accesses of one part, at least one of them a store, are a race unless they are one thread's, or a barrier of
    the block or, within a warp, of the warp lies between. ``part_bytes`` is the width of the narrowest access in the
    program, so that two threads at neighbours within one word do not race.

    Where several threads of one warp store different values to one place in one instruction, PTX leaves open which is
    kept: here that of the last thread or, if ``first_wins``, of the first; ``left_open`` notes that it happened.
    """

    def __init__(self, blocks: int, size: int, part_bytes: int, *, first_wins: bool = False) -> None:
        self.size = size
        self.left_open = False
        self._turn = slice(None, None, -1) if first_wins else slice(None)
        self._stride = max(16, -(-size // 16) * 16)
        self._part = part_bytes
        content = np.full(blocks * self._stride, _UNWRITTEN, U8)
        self.words = {width: content.view(kind) for width, kind in WORDS.items()}
        parts = blocks * self._stride // part_bytes
        self._written_by = np.full(parts, -1, I32)
        self._written_in, self._written_warp = np.full(parts, -1, I32), np.full(parts, -1, I32)
        self._read_in, self._read_warp = np.full(parts, -1, I32), np.full(parts, -1, I32)
        self._read_by, self._readers = np.full(parts, -1, I32), np.zeros(parts, U64)
        self._changes: Changes | None = None  #: by atomic operations
        self._copier: np.ndarray | None = None  #: the thread whose asynchronous copy is under way, -1 without one

    def starts(self, addresses: np.ndarray, size: int, threads: Threads, by: Located) -> np.ndarray:
        """Where accesses of ``size`` bytes begin. Raises Fault outside the block's memory, or where not aligned."""
        lost = addresses & addresses.dtype.type(size - 1)
        if lost.any():
            place = int((lost != 0).argmax())
            told = f"an access of {size} bytes at byte {int(addresses[place])} of shared memory"
            raise Fault("misaligned", told, by, threads.named(place))
        starts = addresses.astype(I64)
        if int(starts.max()) + size > self.size:
            place = int(starts.argmax())
            told = f"an access of {size} bytes at byte {int(starts[place])} of shared memory, which has {self.size}"
            raise Fault("bounds", told, by, threads.named(place))
        return threads.block * self._stride + starts

    def read(self, start: np.ndarray, width: int, count: int, threads: Threads, by: Located) -> list[np.ndarray]:
        """``count`` values of ``width`` bytes from ``start`` on. Raises Fault."""
        warp = threads.thread // 32
        bit = U64(1) << warp.astype(U64)
        for offset in range(0, width * count, self._part):
            at = (start + offset) // self._part
            self._require_settled(at, "reads", start + offset, threads, by)
            self._require_written(at, start + offset, threads, by)
            writer = self._written_by[at]
            foreign = (writer != threads.thread) & (self._written_in[at] == threads.epoch)
            if foreign.any():
                foreign &= ~((writer // 32 == warp) & (self._written_warp[at] < threads.warp_epoch))
                self._require_order(foreign, _by(writer, "wrote"), "reads", start + offset, threads, by)
            self._require_unchanged(at, "reads", start + offset, threads, by)
            old = self._read_in[at] != threads.epoch
            if old.any():
                self._readers[at[old]] = U64(0)
            several = ~old & (self._read_by[at] != threads.thread) & (self._read_warp[at] == threads.warp_epoch)
            self._read_in[at] = threads.epoch
            np.bitwise_or.at(self._readers, at, bit)
            self._read_by[at], self._read_warp[at] = threads.thread, threads.warp_epoch
            several |= self._read_by[at] != threads.thread
            self._read_by[at[several]] = _SEVERAL
        words, index = self.words[width], start // width
        return [words[index + place] for place in range(count)]

    def write(self, start: np.ndarray, values: list[np.ndarray], threads: Threads, by: Located) -> None:
        """Store one value after the other from ``start`` on. Raises Fault.

        Storing what is there already races with nobody: Triton's threads may hold copies of one value.
        """
        width = values[0].dtype.itemsize
        words, index = self.words[width], start // width
        changes = np.zeros(len(start), bool)
        for place, value in enumerate(values):
            changes |= words[index + place] != value
        warp = threads.thread // 32
        for offset in range(0, width * len(values), self._part):
            at = (start + offset) // self._part
            self._require_settled(at, "writes", start + offset, threads, by)
            self._require_free(at, changes, "writes", start + offset, threads, by)
            self._require_unchanged(at, "writes", start + offset, threads, by)
            turn = self._turn
            self._written_by[at[turn]] = threads.thread[turn]
            self._written_in[at], self._written_warp[at] = threads.epoch, threads.warp_epoch
        for place, value in enumerate(values):
            words[(index + place)[self._turn]] = value[self._turn]
            differs = words[index + place] != value
            if differs.any():
                here = start + width * place
                winner = self._written_by[here // self._part]
                self._require_order(
                    differs & (winner // 32 != warp), _by(winner, "writes"), "writes", here, threads, by
                )
                self.left_open = True

    def _by_readers(self, at: np.ndarray) -> Callable[[int], str]:
        return lambda place: f"{self._readers_named(int(at[place]))} read"

    def change(self, start: np.ndarray, width: int, threads: Threads, by: Located) -> tuple[np.ndarray, bool]:
        """The places in ``words`` of values that atomic operations change, and whether several threads change one of
        them with no order between. Raises Fault.
        """
        if self._changes is None:
            self._changes = Changes(len(self._written_by))
        several = False
        for offset in range(0, width, self._part):
            at = (start + offset) // self._part
            self._require_settled(at, "changes", start + offset, threads, by)
            self._require_written(at, start + offset, threads, by)
            self._require_free(at, np.ones(len(at), bool), "changes", start + offset, threads, by)
            several |= self._changes.note(at, threads)
        return start // width, several

    def begin_copy(self, start: np.ndarray, width: int, threads: Threads, by: Located) -> None:
        """Reserve places for asynchronous copies of ``width`` bytes. Raises Fault."""
        if self._copier is None:
            self._copier = np.full(len(self._written_by), -1, I32)
        for offset in range(0, width, self._part):
            at = (start + offset) // self._part
            self._require_settled(at, "copies to", start + offset, threads, by)
            self._require_free(at, np.ones(len(at), bool), "copies to", start + offset, threads, by)
            self._require_unchanged(at, "copies to", start + offset, threads, by)
            self._copier[at] = threads.thread
            other = self._copier[at] != threads.thread
            self._require_order(other, _by(self._copier[at], "copies to"), "copies to", start + offset, threads, by)

    def finish_copy(self, start: np.ndarray, content: np.ndarray, threads: Threads) -> None:
        """Let bytes arrive, [copies, bytes]; from now on they count as stored by these threads."""
        assert self._copier is not None
        words = np.ascontiguousarray(content).view(WORDS[4])
        for place in range(words.shape[1]):
            self.words[4][start // 4 + place] = words[:, place]
        for offset in range(0, content.shape[1], self._part):
            at = (start + offset) // self._part
            self._copier[at] = -1
            self._written_by[at] = threads.thread
            self._written_in[at], self._written_warp[at] = threads.epoch, threads.warp_epoch

    def _require_settled(self, at: np.ndarray, does: str, start: np.ndarray, threads: Threads, by: Located) -> None:
        """Raise Fault where a copy is under way."""
        if self._copier is not None:
            copier = self._copier[at]
            self._require_order(copier >= 0, _by(copier, "is still copying to"), does, start, threads, by)

    def _require_written(self, at: np.ndarray, start: np.ndarray, threads: Threads, by: Located) -> None:
        unwritten = self._written_by[at] < 0
        if unwritten.any():
            place = int(unwritten.argmax())
            told = f"reads byte {int(start[place] % self._stride)} of shared memory"
            raise Fault("uninitialised", told, by, threads.named(place))

    def _require_free(
        self, at: np.ndarray, changing: np.ndarray, does: str, start: np.ndarray, threads: Threads, by: Located
    ) -> None:
        """Raise Fault if another thread read or wrote what is changed and no barrier lies between."""
        reader, writer = self._read_by[at], self._written_by[at]
        warp = threads.thread // 32
        own = U64(1) << warp.astype(U64)
        other_warps = (self._readers[at] & ~own) != 0
        own_warp = (self._readers[at] & own != 0) & (reader != threads.thread)
        own_warp &= self._read_warp[at] == threads.warp_epoch
        read = changing & (self._read_in[at] == threads.epoch) & (other_warps | own_warp)
        self._require_order(read, self._by_readers(at), does, start, threads, by)
        wrote = changing & (writer >= 0) & (writer != threads.thread) & (self._written_in[at] == threads.epoch)
        wrote &= ~((writer // 32 == warp) & (self._written_warp[at] < threads.warp_epoch))
        self._require_order(wrote, _by(writer, "wrote"), does, start, threads, by)

    def _require_unchanged(self, at: np.ndarray, does: str, start: np.ndarray, threads: Threads, by: Located) -> None:
        """Raise Fault if another thread changed this by an atomic operation and no barrier lies between."""
        if self._changes is not None:
            foreign = ~self._changes.before(at, threads)
            told = "another thread changed by an atomic operation"
            self._require_order(foreign, lambda place: told, does, start, threads, by)

    def _require_order(
        self, races: np.ndarray, other: Callable[[int], str], does: str, start: np.ndarray, threads: Threads,
        by: Located,
    ) -> None:  # fmt: skip
        if races.any():
            place = int(races.argmax())
            told = f"it {does} byte {int(start[place] % self._stride)} of shared memory, which {other(place)}"
            raise Fault("race", told, by, threads.named(place))

    def _readers_named(self, part: int) -> str:
        """The warps that read a part since the last barrier of their block, for a message."""
        warps = [warp for warp in range(64) if int(self._readers[part]) >> warp & 1]
        return f"threads of warp{'s' * (len(warps) > 1)} {', '.join(map(str, warps))}"


def _by(threads: np.ndarray, did: str) -> Callable[[int], str]:
    return lambda place: f"thread {threads[place]} {did}"


class LocalMemory:
    """The local memory of each thread of the blocks that run together."""

    #: The address of its first byte; addresses of spaces are apart.
    BASE = 1 << 20

    def __init__(self, threads: int, size: int) -> None:
        self._size = max(8, -(-size // 8) * 8)
        content = np.full(threads * self._size, _UNWRITTEN, U8)
        self.words = {width: content.view(kind) for width, kind in WORDS.items()}
        self._written = np.zeros(threads * self._size, bool)

    def starts(self, addresses: np.ndarray, size: int, threads: Threads, by: Located) -> np.ndarray:
        """Where accesses of ``size`` bytes begin. Raises Fault outside the thread's memory, or where not aligned."""
        within = addresses.astype(I64) - self.BASE
        for bad, kind in (((within < 0) | (within + size > self._size), "bounds"), (within % size != 0, "misaligned")):
            if bad.any():
                place = int(bad.argmax())
                told = f"an access of {size} bytes at byte {int(within[place])} of local memory"
                raise Fault(kind, told, by, threads.named(place))
        return (threads.block * threads.per_block + threads.thread) * self._size + within

    def read(self, start: np.ndarray, width: int, count: int, threads: Threads, by: Located) -> list[np.ndarray]:
        """``count`` values of ``width`` bytes from ``start`` on. Raises Fault if it did not write them all."""
        for byte in range(width * count):
            unwritten = ~self._written[start + byte]
            if unwritten.any():
                place = int(unwritten.argmax())
                raise Fault("uninitialised", "reads its local memory", by, threads.named(place))
        words, index = self.words[width], start // width
        return [words[index + place] for place in range(count)]

    def write(self, start: np.ndarray, values: list[np.ndarray], threads: Threads, by: Located) -> None:
        """Store one value after the other from ``start`` on."""
        width = values[0].dtype.itemsize
        words, index = self.words[width], start // width
        for place, value in enumerate(values):
            words[index + place] = value
            for byte in range(width):
                self._written[start + width * place + byte] = True
