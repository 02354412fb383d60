"""The global memory of a launch: its tensors, at addresses far apart, with a check of every access.

Arrays of addresses, values and threads are flat here: one entry for each active thread.
"""

from __future__ import annotations

from bisect import bisect_right
from typing import NoReturn

import numpy as np

from verify.simulator.errors import Fault, Located, Unsupported
from verify.simulator.threads import Changes, Threads

U8, U16, U32, U64 = np.uint8, np.uint16, np.uint32, np.uint64
I32, I64 = np.int32, np.int64
WORDS = {1: U8, 2: U16, 4: U32, 8: U64}

#: The distance between two tensors, each in the middle of its span: an overrun of one never ends in another's.
_SPACING_BITS = 40
#: Tensors keep their real alignment up to this many bytes.
_ALIGNMENT = 64


class Buffer:
    """The storage of a tensor, or a constant of the module.

    ``elements`` marks the bytes that a launch may touch, None for all. ``shape``, ``strides`` and ``offset`` (all in
    elements of ``element_bytes``) describe the view, for messages. An element of four bytes that holds ``unwritten``
    was allocated and never written. If only parts of a storage of ``storage_bytes`` are held, ``begin``, a multiple of
    _ALIGNMENT, is the first byte of this one, and ``part_of`` is the part that begins at 0.
    """

    def __init__(
        self,
        name: str,
        content: np.ndarray,
        *,
        address: int = 0,
        elements: np.ndarray | None = None,
        constant: bool = False,
        element_bytes: int = 1,
        shape: tuple[int, ...] = (),
        strides: tuple[int, ...] = (),
        offset: int = 0,
        unwritten: int | None = None,
        begin: int = 0,
        storage_bytes: int | None = None,
        part_of: Buffer | None = None,
    ) -> None:
        self.name, self.size, self.constant = name, len(content), constant
        self.begin, self.part_of = begin, part_of
        self.storage_bytes = len(content) if storage_bytes is None else storage_bytes
        self.skew = address % _ALIGNMENT
        self.base = 0
        self.element_bytes, self._shape, self._strides, self._offset = element_bytes, shape, strides, offset
        room = np.zeros(self.skew + self.size + 16, U8)
        room[self.skew : self.skew + self.size] = content
        self._room = room[: len(room) // 8 * 8]
        self.words = {width: self._room.view(kind) for width, kind in WORDS.items()}
        self.allowed: np.ndarray | None = None
        if elements is not None:
            self.restrict(elements)
        #: The bytes that are stored as one: the width of the narrowest store into the buffer.
        self.unit = 1
        self._written: np.ndarray | None = None
        self._put: np.ndarray | None = None
        self._unwritten = unwritten if element_bytes == 4 else None
        self._writer = self._when = self._warp_when = np.zeros(0, I64)
        #: Changes by atomic operations; None if there was none.
        self._changes: Changes | None = None
        #: Whether blocks may order their accesses by atomic operations, which is not followed here.
        self.synchronised = False

    @property
    def content(self) -> np.ndarray:
        """The bytes as they are now."""
        return self._room[self.skew : self.skew + self.size]

    @property
    def identity(self) -> tuple[object, ...]:
        """Everything about the buffer but its bytes that an access or a message may depend on."""
        view = (self.element_bytes, self._shape, self._strides, self._offset)
        return (self.name, self.size, self.begin, self.constant, self.skew, self._unwritten, *view)

    def put(self, at: np.ndarray, content: np.ndarray) -> None:
        """Store bytes at these places, as another run did."""
        self.content[at] = content
        self._put = np.zeros(self.size, bool)
        self._put[at] = True

    @property
    def written(self) -> np.ndarray | None:
        """Which bytes a thread stored; None if none did."""
        if self._written is None:
            return self._put
        return np.repeat(self._written, self.unit)[self.skew : self.skew + self.size]

    def restrict(self, elements: np.ndarray) -> None:
        """Allow only these bytes, and those that an earlier call allowed."""
        if self.allowed is not None:
            elements = elements | (np.diff(self.allowed) > 0)
        # how many bytes are allowed before each: one subtraction tells about an access of any width
        self.allowed = np.concatenate([np.zeros(1, I32), np.cumsum(elements, dtype=I32)])

    def described(self, byte: int) -> str:
        """A byte that is held by the index of its element in the view, if it belongs to one."""
        byte += self.begin
        number, within = divmod(byte, self.element_bytes)
        rest, index = number - self._offset, [0] * len(self._shape)
        order = sorted(range(len(self._shape)), key=lambda dim: -abs(self._strides[dim]))
        for dim in order:
            if self._shape[dim] > 1 and self._strides[dim] > 0 and rest >= 0:
                index[dim] = min(rest // self._strides[dim], self._shape[dim] - 1)
                rest -= index[dim] * self._strides[dim]
        if rest == 0 and self._shape:
            inside = f" + {within} bytes" if within else ""
            return f"{self.name}[{', '.join(map(str, index))}]{inside}"
        return self.told(byte)

    def told(self, byte: int) -> str:
        """A byte of the storage, or beyond it, in words."""
        return f"byte {byte} of the storage of {self.name}, which has {self.storage_bytes}"

    def require_elements(self, start: np.ndarray, size: int, threads: Threads, what: str, by: Located) -> None:
        """Raise Fault if an access of ``size`` bytes touches a byte between the elements."""
        if self.allowed is None:
            return
        bad = self.allowed[start + size] - self.allowed[start] != size
        if bad.any():
            place = int(bad.argmax())
            told = f"{what} {size} bytes at {self.described(int(start[place]))}"
            raise Fault("elements", f"{told}, not all of which are elements of the view", by, threads.named(place))

    def read(self, start: np.ndarray, width: int, count: int, threads: Threads, by: Located) -> list[np.ndarray]:
        """``count`` values of ``width`` bytes from ``start`` on. Raises Fault."""
        self.require_elements(start, width * count, threads, "reads", by)
        if self._written is not None:
            self._require_own(start, width * count, threads, "reads", by)
        index = (start + self.skew) // width
        words = self.words[width]
        found = [words[index + place] for place in range(count)]
        if self._unwritten is not None and width == 4:
            for number, values in enumerate(found):
                bad = values == U32(self._unwritten)
                if bad.any():
                    place = int(bad.argmax())
                    told = f"reads {self.described(int(start[place]) + width * number)}"
                    raise Fault("uninitialised", told, by, threads.named(place))
        return found

    def write(self, start: np.ndarray, values: list[np.ndarray], threads: Threads, by: Located) -> None:
        """Store one value after the other from ``start`` on. Raises Fault, also for two threads that disagree."""
        width = values[0].dtype.itemsize
        if self.constant:
            raise Fault("read_only", f"stores into {self.name}", by, threads.named(0))
        self.require_elements(start, width * len(values), threads, "writes", by)
        self._note_stores()
        assert self._written is not None
        if self._changes is not None:
            self._require_unchanged(self._changes, start, width * len(values), threads, "writes", by)
        words, first = self.words[width], (start + self.skew) // width
        parts, bits = width // self.unit, WORDS[self.unit]
        for place, value in enumerate(values):
            index = first + place
            units = [index * parts + part for part in range(parts)]
            for part, one in enumerate(units):
                if self._written[one].any():
                    doubtful = self._written[one] & ~self._after(one, threads)
                    differs = self.words[self.unit][one] != np.ascontiguousarray(value).view(bits)[part::parts]
                    far = self._writer[one] // threads.per_block != threads.number // threads.per_block
                    if self.synchronised and (doubtful & differs & far).any():
                        raise Unsupported("the order of blocks by atomic operations")
                    self._require_agreement(doubtful & differs, start + width * place, threads, by)
            words[index] = value
            self._require_agreement(words[index] != value, start + width * place, threads, by)
            for one in units:
                self._written[one] = True
                self._writer[one] = threads.number
                self._when[one], self._warp_when[one] = threads.epoch, threads.warp_epoch

    def _note_stores(self) -> None:
        if self._written is None:
            length = len(self._room) // self.unit
            self._written = np.zeros(length, bool)
            self._writer = np.full(length, -1, I64)
            self._when, self._warp_when = np.zeros(length, I64), np.zeros(length, I64)

    def change(self, start: np.ndarray, width: int, threads: Threads, by: Located) -> tuple[np.ndarray, bool]:
        """The places in ``words`` of values that atomic operations change, and whether several threads change one of
        them with no order between. Raises Fault, also where another thread stores or reads.
        """
        if self.constant:
            raise Fault("read_only", f"changes {self.name}", by, threads.named(0))
        self.require_elements(start, width, threads, "changes", by)
        self._note_stores()
        assert self._written is not None
        if self._changes is None:
            self._changes = Changes(len(self._written))
        self._require_own(start, width, threads, "changes", by, by_atomics=False)
        several = False
        for unit in range(0, width, self.unit):
            at = (start + self.skew + unit) // self.unit
            several |= self._changes.note(at, threads)
            self._written[at] = True
        return (start + self.skew) // width, several

    def _after(self, unit: np.ndarray, threads: Threads) -> np.ndarray:
        """Whether the last store into each unit came before: by the same thread, or a barrier of its block or warp ago.

        A writer of -1 is an atomic operation.
        """
        writer = self._writer[unit]
        same_block = writer // threads.per_block == threads.number // threads.per_block
        same_warp = same_block & (writer // 32 == threads.number // 32)
        return (
            (writer == threads.number)
            | (writer < 0)
            | (same_block & (self._when[unit] < threads.epoch))
            | (same_warp & (self._warp_when[unit] < threads.warp_epoch))
        )

    def _require_own(
        self, start: np.ndarray, size: int, threads: Threads, does: str, by: Located, *, by_atomics: bool = True
    ) -> None:
        """Raise Fault if another thread wrote what is used and no barrier lies between."""
        assert self._written is not None
        for unit in range(0, size, self.unit):
            at = (start + self.skew + unit) // self.unit
            foreign = self._written[at] & ~self._after(at, threads)
            near = self._writer[at] // threads.per_block == threads.number // threads.per_block
            self._require_none(foreign, near | (not by_atomics), does, "wrote", start + unit, threads, by)
        if by_atomics and self._changes is not None:
            self._require_unchanged(self._changes, start, size, threads, does, by)

    def _require_unchanged(
        self, changes: Changes, start: np.ndarray, size: int, threads: Threads, does: str, by: Located
    ) -> None:
        """Raise Fault if another thread changed what is used by an atomic operation and no barrier lies between."""
        for unit in range(0, size, self.unit):
            at = (start + self.skew + unit) // self.unit
            did = "changed by an atomic operation"
            self._require_none(
                ~changes.before(at, threads), changes.within(at, threads), does, did, start + unit, threads, by
            )

    def _require_none(
        self, foreign: np.ndarray, near: np.ndarray, does: str, did: str, start: np.ndarray, threads: Threads,
        by: Located,
    ) -> None:  # fmt: skip
        """Raise Fault if there is a foreign access; ``near`` are those of a thread's own block."""
        if not foreign.any():
            return
        if self.synchronised and not (foreign & near).any():
            raise Unsupported("the order of blocks by atomic operations")
        place = int(foreign.argmax())
        told = f"{does} {self.described(int(start[place]))}, which another thread of this launch {did}"
        raise Fault("race", told, by, threads.named(place))

    def _require_agreement(self, differs: np.ndarray, start: np.ndarray, threads: Threads, by: Located) -> None:
        if differs.any():
            place = int(differs.argmax())
            told = f"another thread stored another value to {self.described(int(start[place]))}"
            raise Fault("conflict", told, by, threads.named(place))


class GlobalMemory:
    """The tensors of a launch, at made-up addresses."""

    def __init__(self) -> None:
        #: In the order of their addresses, which ``_starts`` has.
        self.buffers: list[Buffer] = []
        self._starts: list[int] = []
        self._spans = 0

    def add(self, buffer: Buffer) -> int:
        """The address of the first byte of the buffer, which is aligned as its storage is."""
        if (first := buffer.part_of) is not None:
            buffer.base = first.base + buffer.begin
        else:
            self._spans += 1
            buffer.base = (2 * self._spans + 1 << _SPACING_BITS - 1) + buffer.skew
        self.buffers.append(buffer)
        self._starts.append(buffer.base)
        return buffer.base

    def groups(
        self, addresses: np.ndarray, size: int, threads: Threads, by: Located
    ) -> list[tuple[Buffer, np.ndarray | slice]]:
        """The buffers that accesses of ``size`` bytes are in, and which accesses those are. Raises Fault for one that
        is in none, or is not aligned to its size.
        """
        lost = addresses & U64(size - 1)
        if lost.any():
            place = int((lost != 0).argmax())
            told = f"an access of {size} bytes at {self._described(int(addresses[place]))}"
            raise Fault("misaligned", told, by, threads.named(place))
        low, high = int(addresses.min()), int(addresses.max())
        one = self._before(low)
        if one is not None and high + size <= one.base + one.size:
            return [(one, slice(None))]
        found: list[tuple[Buffer, np.ndarray | slice]] = []
        numbers = np.searchsorted(np.array(self._starts, U64), addresses, "right") - 1
        if one is None:
            self._outside(int(addresses.argmin()), addresses, size, threads, by)
        for number in np.unique(numbers):
            chosen = np.flatnonzero(numbers == number)
            buffer = self.buffers[number]
            bad = addresses[chosen] + U64(size) > U64(buffer.base + buffer.size)
            if bad.any():
                self._outside(int(chosen[bad.argmax()]), addresses, size, threads, by)
            found.append((buffer, chosen))
        return found

    def _before(self, address: int) -> Buffer | None:
        """The last buffer that begins at or before an address."""
        number = bisect_right(self._starts, address) - 1
        return self.buffers[number] if number >= 0 else None

    def _near(self, address: int) -> tuple[Buffer, int] | None:
        """The first part of the storage that is at, or near, an address, and the byte of the storage."""
        for one in self.buffers:
            if one.base >> _SPACING_BITS == address >> _SPACING_BITS:
                return one, address - one.base
        return None

    def _described(self, address: int) -> str:
        held = self._before(address)
        if held is not None and address < held.base + held.size:
            return held.described(address - held.base)
        if near := self._near(address):
            return near[0].told(near[1])
        return f"address {address:#x}, which belongs to no tensor of the launch"

    def _outside(self, place: int, addresses: np.ndarray, size: int, threads: Threads, by: Located) -> NoReturn:
        address = int(addresses[place])
        told = f"an access of {size} bytes at {self._described(address)}"
        near = self._near(address)
        if near is not None and 0 <= near[1] <= near[0].storage_bytes - size:  # between the parts that are held
            raise Fault("elements", f"{told}, which are not elements of the view", by, threads.named(place))
        raise Fault("bounds", told, by, threads.named(place))
