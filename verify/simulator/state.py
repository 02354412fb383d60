"""What instructions may ask of the machine that runs them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np

from verify.simulator.block_memory import LocalMemory, SharedMemory
from verify.simulator.copies import Copies
from verify.simulator.memory import GlobalMemory
from verify.simulator.threads import Threads


class State(Protocol):
    """The blocks that run together. Values are arrays that broadcast to ``shape``, [blocks, threads]; ``carry`` is the
    flag of the instructions that carry. Atomic operations of one instruction run in the order of the threads, or
    ``backwards``; ``order_left_open`` notes that the results depend on it.
    """

    shape: tuple[int, int]
    warps: int
    special: Mapping[str, np.ndarray]
    parameters: Mapping[str, np.ndarray]
    constants: Mapping[str, np.ndarray]
    memory: GlobalMemory
    shared: SharedMemory
    local: LocalMemory
    copies: Copies
    carry: np.ndarray
    backwards: bool
    order_left_open: bool

    def value(self, index: int) -> np.ndarray: ...

    def set(self, index: int, value: np.ndarray, mask: np.ndarray | None) -> None: ...

    def approximated(self) -> str: ...

    def whole(self, mask: np.ndarray) -> np.ndarray: ...

    def threads(self, active: np.ndarray | None) -> Threads: ...

    def named(self, block: int, thread: int) -> tuple[tuple[int, int, int], int]: ...

    def flat(self, values: np.ndarray, active: np.ndarray | None) -> np.ndarray: ...

    def spread(self, flat: np.ndarray, active: np.ndarray | None) -> np.ndarray: ...

    def by_warp(self, mask: np.ndarray) -> np.ndarray: ...

    @property
    def living(self) -> np.ndarray: ...

    def pass_warp_barrier(self, active: np.ndarray | None) -> None: ...


#: Gives the value of an operand.
Get = Callable[[State], np.ndarray]
#: Carries out one instruction: for the active threads (None: all), changing registers of those in the mask (None: any).
Run = Callable[[State, "np.ndarray | None", "np.ndarray | None"], None]
#: Puts a value into a register of the threads in a mask.
Put = Callable[[State, Any, "np.ndarray | None"], None]
