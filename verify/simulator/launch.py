"""One launch: a grid run in sets of blocks, once or as often as its evidence needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from verify.simulator import POISONS
from verify.simulator.errors import Fault
from verify.simulator.machine import Machine
from verify.simulator.memory import Buffer, GlobalMemory
from verify.simulator.operation import dtype_of
from verify.simulator.program import Program

#: Threads that run together: more than fit into the caches of a core are slower.
_THREADS_TOGETHER = 16_384
#: Steps of one set of blocks, after which a loop is taken to be endless.
_STEP_LIMIT = 20_000_000


@dataclass(frozen=True, slots=True)
class Settings:
    """How one run of a launch resolves what PTX leaves open.

    ``mode`` is how approximate instructions round (``MODES``); in the mode ``lowest`` the first of several threads of a
    warp that store to one place in one instruction also wins, otherwise the last, and atomic operations of one
    instruction run in the reversed order of the threads. ``poison`` is the word in undefined
    registers, ``order_seed`` draws the order in which the warps of a block run; None runs them together.
    ``step_limit`` is the number of steps of one set of blocks after which a loop is taken to be endless.
    """

    mode: str = "nearest"
    poison: int = POISONS[0]
    order_seed: int | None = None
    step_limit: int = _STEP_LIMIT


@dataclass(frozen=True, slots=True)
class Ran:
    """What one run of a launch did: how many instructions all threads executed, whether its results rest on undefined
    registers, whether they depend on the mode, and whether on the order of atomic operations, which PTX leaves open.
    """

    thread_instructions: int
    read_undefined: bool
    depends_on_mode: bool
    order_left_open: bool


def run_grid(
    program: Program,
    buffers: Sequence[Buffer],
    arguments: Sequence[int | float | tuple[int, int]],
    grid: tuple[int, int, int],
    shared_bytes: int,
    settings: Settings,
) -> Ran:
    """Run every block of ``grid``; the buffers then hold what the kernel stored.

    ``arguments`` are in the order of the kernel's parameters: numbers, or (buffer number, offset in bytes). Raises
    Fault for what no kernel may do, Unsupported for what is not executed here.
    """
    memory = GlobalMemory()
    bases = []
    for buffer in buffers:
        buffer.unit, buffer.synchronised = min(program.store_bytes, buffer.element_bytes), program.synchronises
        bases.append(memory.add(buffer))
    constants = {
        name: np.array(
            [[memory.add(Buffer(name, np.frombuffer(one.content or b"", np.uint8), constant=True))]], np.uint64
        )
        for name, one in program.kernel.constants.items()
    }
    given = [bases[one[0]] + one[1] if isinstance(one, tuple) else one for one in arguments]
    parameters = _parameters(program, given)
    blocks = np.stack(np.unravel_index(np.arange(grid[0] * grid[1] * grid[2]), grid[::-1])[::-1], axis=1)
    together = max(1, _THREADS_TOGETHER // program.kernel.threads)
    order = None
    if settings.order_seed is not None:
        order = np.random.default_rng(settings.order_seed).permutation(-(-program.kernel.threads // 32)).tolist()
    shared = program.static_shared_bytes + shared_bytes
    instructions, undefined, open_, order_open = 0, False, False, False
    with np.errstate(all="ignore"):
        for begin in range(0, len(blocks), together):
            machine = Machine(
                program, memory, parameters, constants, blocks[begin : begin + together], grid, shared,
                mode=settings.mode, poison=settings.poison, first_lane_wins=settings.mode == "lowest",
                warp_order=order, step_limit=settings.step_limit,
            )  # fmt: skip
            machine.run()
            instructions += machine.thread_instructions
            undefined |= machine.read_undefined
            order_open |= machine.order_left_open
            open_ |= machine.used_approximation or machine.shared.left_open or machine.order_left_open
    return Ran(instructions, undefined, open_, order_open)


def _parameters(program: Program, arguments: Sequence[int | float]) -> dict[str, np.ndarray]:
    """The parameters as arrays. Triton passes fewer than there are: the last two are its own scratch memory."""
    found = {}
    padded = [*arguments, *[0] * (len(program.kernel.parameters) - len(arguments))]
    for (name, kind), value in zip(program.kernel.parameters, padded, strict=True):
        dtype = dtype_of(kind)
        if dtype.kind == "f" or isinstance(value, float):
            found[name] = np.array([[value]], f"f{dtype.itemsize}").view(f"u{dtype.itemsize}")
        else:
            word = int(value) & ((1 << 8 * dtype.itemsize) - 1)
            found[name] = np.array([[word]], object).astype(f"u{dtype.itemsize}")
    return found


def require_same(one: Sequence[Buffer], other: Sequence[Buffer], kind: str, told: str) -> None:
    """Raise Fault of this kind, naming the first byte, unless two runs stored the same bits."""
    for first, second in zip(one, other, strict=True):
        differs = first.content != second.content
        if differs.any():
            raise Fault(kind, f"{first.described(int(differs.argmax()))} {told}")
