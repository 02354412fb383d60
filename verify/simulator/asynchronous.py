"""Asynchronous copies from global to shared memory: ``cp.async`` and its groups, PTX ISA 8.x, section 9.7.9.25.3.

A copy is checked, and its source read, where it is issued. Its bytes arrive where its thread waits for its group; until
then nobody may touch them.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from verify.simulator.decode import Decoder, Effect
from verify.simulator.errors import Unsupported
from verify.simulator.operation import Modifiers
from verify.simulator.ptx import Instruction
from verify.simulator.state import Run, State

U8, U32, U64, I64 = np.uint8, np.uint32, np.uint64, np.int64


def _copy(decoder: Decoder, instruction: Instruction) -> Run:
    """cp.async, perhaps with the number of bytes to read, after which the rest is filled with zeros."""
    words = Modifiers(instruction.opcode)
    words.choice(("async",))
    level = words.choice(("ca", "cg"))
    words.choice(("shared__cta", "shared"))
    words.choice(("global",))
    words.choice(("L2__64B", "L2__128B", "L2__256B"), "")
    words.end()
    target, source, size, *rest = instruction.operands
    width = int(size, 0)
    if width not in ((16,) if level == "cg" else (4, 8, 16)) or len(rest) > 1:
        raise Unsupported(instruction.text)
    get_target, get_source = decoder.address(target), decoder.address(source)
    get_size = decoder.read(rest[0] if rest else size, np.dtype(U32))

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        threads = machine.threads(active)
        start = machine.shared.starts(machine.flat(get_target(machine), active), width, threads, instruction)
        addresses = machine.flat(get_source(machine), active)
        sizes = machine.flat(get_size(machine), active)
        content = np.zeros((len(start), width), U8)
        for read in np.unique(sizes[sizes > 0]):
            if read not in (1, 2, 4, 8, 16) or read > width:
                raise Unsupported(f"{instruction.opcode} of {read} bytes out of {width}", instruction.line)
            chosen = np.flatnonzero(sizes == read)
            some = threads.some(chosen)
            for buffer, inner in machine.memory.groups(addresses[chosen], int(read), some, instruction):
                begin = (addresses[chosen][inner] - U64(buffer.base)).astype(I64)
                word = min(int(read), 8)
                found = buffer.read(begin, word, int(read) // word, some.some(inner), instruction)
                content[chosen[inner], : int(read)] = np.stack(found, axis=1).view(U8)
        machine.shared.begin_copy(start, width, threads, instruction)
        machine.copies.issue(start, content, threads)

    return run


def _commit(decoder: Decoder, instruction: Instruction) -> Run:
    return lambda machine, active, mask: machine.copies.close(machine.threads(active))


def _wait(decoder: Decoder, instruction: Instruction) -> Run:
    """cp.async.wait_group N leaves the last N groups under way, and wait_all nothing."""
    left = int(instruction.operands[0], 0) if instruction.operands else None
    if (left is None) != instruction.opcode.endswith("wait_all"):
        raise Unsupported(instruction.text)
    return lambda machine, active, mask: machine.copies.arrive(machine.threads(active), left, machine.shared)


EFFECTS: Mapping[str, Effect] = {
    "cp.async.ca": _copy, "cp.async.cg": _copy, "cp.async.commit_group": _commit, "cp.async.wait_group": _wait,
    "cp.async.wait_all": _wait,
}  # fmt: skip
