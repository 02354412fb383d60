"""A kernel, decoded, and where its threads may come to."""

from __future__ import annotations

import re

import numpy as np

from verify.simulator import asynchronous, atomics, tensor_cores
from verify.simulator.decode import Decoder, free_dead
from verify.simulator.effects import EFFECTS
from verify.simulator.ptx import Kernel

_EFFECTS = {**EFFECTS, **atomics.EFFECTS, **asynchronous.EFFECTS, **tensor_cores.EFFECTS}
#: What orders the accesses of a thread around an atomic operation.
_ORDERS = {"acquire", "release", "acq_rel"}


class Program:
    """A kernel, decoded. Raises Unsupported, before anything runs, for what is not executed here."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.code_sha256 = kernel, kernel.code_sha256  # a launch asks for it each time
        decoder = Decoder(kernel)
        self.steps = [decoder.decode(one, _EFFECTS) for one in kernel.instructions]
        self.types, self.names = decoder.types, decoder.names
        self.static_shared_bytes = decoder.static_shared_bytes
        free_dead(self.steps)
        #: Whether blocks may order their accesses by atomic operations.
        self.synchronises = any(
            one.base in ("atom", "red") and _ORDERS & {*one.modifiers} for one in kernel.instructions
        )
        begins = {0, *kernel.labels.values()}
        begins |= {place + 1 for place, step in enumerate(self.steps) if step.kind in ("branch", "exit")}
        self._block_of = np.cumsum([place in begins for place in range(len(self.steps))]).tolist()
        self._last_of = {block: place for place, block in enumerate(self._block_of)}
        self._places_after: dict[int, set[int]] = {}
        self.shared_part_bytes = _narrowest(kernel, "shared")
        self.store_bytes = _narrowest(kernel, "global")

    def reaches(self, start: int, end: int) -> bool:
        """Whether a thread at one place may come to another."""
        block = self._block_of
        if block[start] == block[end] and start <= end:
            return True
        return end in self._after(block[start])

    def _after(self, block: int) -> set[int]:
        """Every place that a thread may come to from the end of a basic block."""
        if block not in self._places_after:
            found: set[int] = set()
            waiting = [*self._next(self._last_of[block])]
            while waiting:
                place = waiting.pop()
                if place not in found and place < len(self.steps):
                    last = self._last_of[self._block_of[place]]
                    found.update(range(place, last + 1))
                    waiting += self._next(last)
            self._places_after[block] = found
        return self._places_after[block]

    def _next(self, place: int) -> list[int]:
        step = self.steps[place]
        targets = [step.target] if step.kind == "branch" else []
        return targets + ([place + 1] if step.kind not in ("branch", "exit") or step.guard >= 0 else [])


def _narrowest(kernel: Kernel, space: str) -> int:
    """The bytes of the narrowest access to a space, at most 4."""
    names = {space, f"{space}__cta"}
    kinds = (re.match(r"[a-z]+(\d+)", one.modifiers[-1]) for one in kernel.instructions if names & {*one.modifiers})
    return min([4, *(int(one[1]) // 8 for one in kinds if one)])
