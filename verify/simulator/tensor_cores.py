"""Matrix instructions of a warp: ``ldmatrix``, ``stmatrix`` and ``mma.sync``, PTX ISA 8.x, section 9.7.14.

PTX documents neither the order in which a tensor core adds nor how it rounds. What is known of it are its habits: it
multiplies exactly, shifts the addends of one step to the largest exponent among them, cuts off the bits below 24 or
more, adds, and cuts the sum. It may take several steps for one instruction, the sum of one step being an addend of the
next. So the result is taken to be within a bound of the exact sum, which is derived as follows.

Let S be the sum of the sizes of all addends, the K products and the accumulator, and u the unit in the last place of a
float32 of that size. In no step is any number larger than S, apart from errors for which a thousandth is added. Cutting
one addend loses less than u, and so does cutting the sum of a step. With at least four products to a step there are at
most K/4 steps, so that K products, K/4 accumulators and K/4 sums lose less than 3K/2 u together. If every addend is a
multiple of u, nothing is ever cut and the sum is exact.

The mode ``nearest`` gives the exact sum, rounded once, and the others the ends of the interval. A tf32 operand is the
upper 19 bits of a float32; the lower 13 are ignored, as Triton relies on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import fsum

import numpy as np

from verify.simulator import floats
from verify.simulator.decode import Decoder, Effect, parts_of
from verify.simulator.effects import require_members
from verify.simulator.errors import Unsupported
from verify.simulator.operation import Modifiers
from verify.simulator.ptx import Instruction
from verify.simulator.state import Get, Run, State
from verify.simulator.threads import Threads

U16, U32, F16, F32, F64 = np.uint16, np.uint32, np.float16, np.float32, np.float64
_EVERY_LANE = np.ones(32, bool)
_LANE = np.arange(32)
#: Of a lane, in every fragment: its group of four and its number in it.
_GROUP, _IN_GROUP = _LANE // 4, _LANE % 4
_SMALLEST = 2.0**-149


def _matrices(instruction: Instruction) -> tuple[int, bool]:
    """How many 8x8 matrices of 16 bits are moved, and whether transposed."""
    words = Modifiers(instruction.opcode)
    words.kind("b16")
    for name in ("sync", "aligned", "m8n8"):
        words.choice((name,))
    count = int(words.choice(("x1", "x2", "x4"))[1:])
    transposed = words.flag("trans")
    words.choice(("shared__cta", "shared"))
    words.end()
    return count, transposed


def _rows(machine: State, active: np.ndarray | None, count: int) -> np.ndarray:
    """The threads that name the rows of ``count`` matrices: the first 8 lanes, 16 or all of each active warp."""
    named = (np.arange(machine.shape[1]) % 32 < 8 * count)[None, :]
    return machine.whole(named if active is None else active & named)


def _holders(threads: Threads) -> Threads:
    """Of the four lanes that hold a row, the first, by the lanes that name the rows."""
    shift = 4 * (threads.thread % 8) - threads.thread % 32
    return replace(threads, thread=threads.thread + shift, number=threads.number + shift)


def _places(
    machine: State, active: np.ndarray | None, count: int, get: Get, by: Instruction
) -> tuple[np.ndarray, Threads]:
    """Where in shared memory the rows of ``count`` matrices begin, and which threads hold them. Raises Fault."""
    require_members(machine, active, _EVERY_LANE, by)
    rows = _rows(machine, active, count)
    threads = machine.threads(rows)
    return machine.shared.starts(machine.flat(get(machine), rows), 16, threads, by), _holders(threads)


def _load_matrices(decoder: Decoder, instruction: Instruction) -> Run:
    """ldmatrix: lane 8 m + r names row r of matrix m, and each lane gets two neighbours of one row."""
    count, transposed = _matrices(instruction)
    target, place = instruction.operands
    puts = [decoder.write(name, np.dtype(U32)) for name in parts_of(target)]
    if len(puts) != count:
        raise Unsupported(instruction.text)
    get = decoder.address(place)

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        start, holders = _places(machine, active, count, get, instruction)
        found = np.stack(machine.shared.read(start, 2, 8, holders, instruction), axis=1).reshape(-1, count, 8, 8)
        found = found.swapaxes(2, 3) if transposed else found
        for matrix, put in enumerate(puts):
            low, high = (found[:, matrix, _GROUP, 2 * _IN_GROUP + half].astype(U32) for half in (0, 1))
            put(machine, machine.spread((low | high << U32(16)).ravel(), active), mask)

    return run


def _store_matrices(decoder: Decoder, instruction: Instruction) -> Run:
    """stmatrix, the opposite of ldmatrix."""
    count, transposed = _matrices(instruction)
    place, source = instruction.operands
    gets = [decoder.read(name, np.dtype(U32)) for name in parts_of(source)]
    if len(gets) != count:
        raise Unsupported(instruction.text)
    get = decoder.address(place)

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        start, holders = _places(machine, active, count, get, instruction)
        content = np.zeros((len(start) // (8 * count), count, 8, 8), U16)
        for matrix, one in enumerate(gets):
            values = machine.flat(one(machine), active).reshape(-1, 32)
            for half in (0, 1):
                content[:, matrix, _GROUP, 2 * _IN_GROUP + half] = (values >> U32(16 * half)).astype(U16)
        rows_of_8 = (content.swapaxes(2, 3) if transposed else content).reshape(-1, 8)
        columns = [np.ascontiguousarray(rows_of_8[:, column]) for column in range(8)]
        machine.shared.write(start, columns, holders, instruction)

    return run


@dataclass(frozen=True, slots=True)
class _Shape:
    """m16n8kK of inputs of one type; ``packed`` of them are in one register."""

    kind: str
    depth: int
    packed: int

    @property
    def registers(self) -> tuple[int, int]:
        """Of one lane, in the fragments of A and B."""
        blocks = self.depth // (4 * self.packed)
        return 2 * blocks, blocks

    def column(self, block: int, element: int) -> np.ndarray:
        """Along K: where each lane's element of a register is, in a block of registers."""
        return self.packed * _IN_GROUP + element + 4 * self.packed * block

    def numbers(self, registers: np.ndarray, element: int) -> np.ndarray:
        """The values of one element of some registers."""
        if self.kind == "tf32":
            values = registers.view(F32)
            return np.where(np.isnan(values), values, (registers & U32(0xFFFFE000)).view(F32)).astype(F64)
        bits = (registers >> U32(16 * element)).astype(U16)
        return (bits.view(F16) if self.kind == "f16" else floats.widened(bits)).astype(F64)


def _shape(instruction: Instruction) -> _Shape:
    words = Modifiers(instruction.opcode)
    for name in ("sync", "aligned"):
        words.choice((name,))
    depth = int(words.choice(("m16n8k4", "m16n8k8", "m16n8k16")).rpartition("k")[2])
    for name in ("row", "col", "f32", "f32"):  # the accumulators
        words.choice((name,))
    kind = words.choice(("f16", "bf16", "tf32"))
    words.choice((kind,))
    words.end()
    if depth not in ((4, 8) if kind == "tf32" else (8, 16)):
        raise Unsupported(instruction.opcode)
    if instruction.modifiers[-4] != "f32" or instruction.modifiers[-1] != "f32":
        raise Unsupported(instruction.opcode)
    return _Shape(kind, depth, 1 if kind == "tf32" else 2)


def _multiply(decoder: Decoder, instruction: Instruction) -> Run:
    """mma.sync: D = A B + C of a warp, A 16 x K by rows, B K x 8 by columns, C and D float32."""
    shape = _shape(instruction)
    names = [parts_of(one) for one in instruction.operands]
    if [len(one) for one in names] != [4, *shape.registers, 4]:
        raise Unsupported(instruction.text)
    first, second, addend = ([decoder.read(one, np.dtype(U32)) for one in some] for some in names[1:])
    puts = [decoder.write(one, np.dtype(F32)) for one in names[0]]

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        require_members(machine, active, _EVERY_LANE, instruction)

        def registers(gets: list[Get]) -> list[np.ndarray]:
            return [machine.flat(get(machine), active).reshape(-1, 32) for get in gets]

        a, b, c = registers(first), registers(second), registers(addend)
        warps = len(c[0])
        left, right = np.zeros((warps, 16, shape.depth)), np.zeros((warps, 8, shape.depth))
        start = np.zeros((warps, 16, 8))
        for element in range(shape.packed):
            for number, one in enumerate(a):
                left[:, _GROUP + 8 * (number % 2), shape.column(number // 2, element)] = shape.numbers(one, element)
            for number, one in enumerate(b):
                right[:, _GROUP, shape.column(number, element)] = shape.numbers(one, element)
        for number, one in enumerate(c):
            start[:, _GROUP + 8 * (number // 2), 2 * _IN_GROUP + number % 2] = one.view(F32)
        products = left[:, :, None, :] * right[:, None, :, :]
        nearest, bound, total = sums(np.concatenate([start[..., None], products], axis=-1))
        found = nearest
        if bound.any():
            found = end_of_interval(nearest, total, bound, machine.approximated())
        for number, put in enumerate(puts):
            values = found[:, _GROUP + 8 * (number // 2), 2 * _IN_GROUP + number % 2]
            put(machine, machine.spread(values.ravel(), active), mask)

    return run


def sums(addends: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sums along the last axis, of an accumulator and K products: rounded once to float32, how far a tensor core's
    may be from the exact sum, and the exact sum in float64, rounded to odd.
    """
    total, error, exact = addends[..., 0], np.zeros(addends.shape[:-1]), np.ones(addends.shape[:-1], bool)
    for place in range(1, addends.shape[-1]):
        total, lost = floats.exact_sum(total, addends[..., place])
        error, left = floats.exact_sum(error, lost)
        exact &= left == 0
    whole, rest = floats.exact_sum(total, error)
    total, error = np.where(error == 0, total, whole), np.where(error == 0, 0.0, rest)  # which keeps -0
    for doubtful in zip(*np.nonzero(~exact & np.isfinite(total)), strict=True):  # errors that do not add exactly
        values = addends[doubtful].tolist()
        total[doubtful] = fsum(values)
        error[doubtful] = fsum([*values, -total[doubtful]])
    total = floats.to_odd(total, error)
    size = np.abs(addends).sum(-1) * (1 + 2.0**-10)
    finite = np.isfinite(size)
    unit = np.maximum(np.ldexp(1.0, np.frexp(np.where(finite, size, 1.0))[1] - 24), _SMALLEST)
    scaled = np.where(finite[..., None], addends, 0.0) / unit[..., None]
    cut = (scaled != np.rint(scaled)).any(-1)
    depth = addends.shape[-1] - 1
    return floats.canonical(floats.narrowed(total, "rn")), np.where(cut, 1.5 * depth * unit, 0.0), total


def end_of_interval(nearest: np.ndarray, total: np.ndarray, bound: np.ndarray, mode: str) -> np.ndarray:
    """What a tensor core may give in one of ``verify.record.simulation.MODES``."""
    if mode == "nearest":
        return nearest
    if mode == "lowest":
        end = np.minimum(floats.narrowed(total - bound, "rp"), nearest)
    else:
        end = np.maximum(floats.narrowed(total + bound, "rm"), nearest)
    return np.where(bound > 0, end, nearest)


EFFECTS: Mapping[str, Effect] = {"ldmatrix": _load_matrices, "stmatrix": _store_matrices, "mma": _multiply}
