"""Guarded calls: the only way in which phases 3 to 5 ask a subject for scores, so that none can be right by accident.

Tensors that a subject allocates from Python lie between guard bytes, which shows out-of-bounds writes. Uninitialised
ones are filled with NaN, which shows scores that were never written. Inputs are compared with copies of themselves,
kernel launches are counted, and all comparisons wait until the whole device is idle. The oracle runs afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from verify.errors import Wrong
from verify.judge.interpreter import quicken
from verify.judge.problems import BETWEEN_FLOAT16_KEYS, BETWEEN_KEYS, UNWRITTEN
from verify.subject.launches import counted

if TYPE_CHECKING:
    import numpy as np
    import torch

#: On each side of an allocation: a multiple of every alignment, and two rows of 512 keys in float32.
GUARD_BYTES = 4096
#: The byte in the guards; as a float of any width it is small, negative and not a plausible score.
GUARD = 0xA5


@dataclass(frozen=True)
class Call:
    """The result of a call and its side effects: the kernels launched, the inputs changed, and, in words, its writes
    outside its own tensors.
    """

    result: Any
    launched: tuple[str, ...]
    overruns: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def scores(self) -> np.ndarray:
        """The result in float64 on the CPU.

        Raises Wrong if a score was never written, or was computed from memory outside the keys.
        """
        for mark, words in _MARKS.items():
            count = _marked(self.result, mark)
            if count:
                raise Wrong(f"{count} of {self.result.numel()} scores are NaN: {words}", words)
        return self.result.double().cpu().numpy()


def call(function: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> Call:
    """Run ``function``, which reads ``inputs`` and may write only what it allocates. Its exceptions are passed on."""
    quicken()
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    with counted() as launched, poisoned() as allocations:
        result = function()
    _wait_for_all()
    return Call(
        result,
        tuple(launched),
        tuple(told for one in allocations if (told := one.overrun())),
        tuple(name for name, tensor in inputs.items() if not _same_bits(before[name], tensor)),
    )


@dataclass(frozen=True)
class Allocation:
    """A tensor that a subject allocated: its ``size`` bytes lie between the guards in ``buffer``."""

    buffer: torch.Tensor
    size: int
    described: str

    def overrun(self) -> str:
        """How many guard bytes were overwritten, in words; empty if none."""
        sides = {"before": self.buffer[:GUARD_BYTES], "after": self.buffer[GUARD_BYTES + self.size :]}
        written = {side: int((guard != GUARD).sum()) for side, guard in sides.items()}
        told = [f"{count} bytes {side}" for side, count in written.items() if count]
        return f"wrote {' and '.join(told)} {self.described}" if told else ""


@contextmanager
def poisoned() -> Iterator[list[Allocation]]:
    """Inside, tensors allocated from Python lie between guards; uninitialised ones hold NaN, or the guard byte."""
    allocations: list[Allocation] = []
    with _poison()(allocations):
        yield allocations


@cache
def _poison() -> type:
    import torch
    from torch.overrides import TorchFunctionMode

    without_value = {
        torch.empty, torch.empty_like, torch.empty_strided, torch.empty_permuted,
        torch.Tensor.new_empty, torch.Tensor.new_empty_strided,
    }  # fmt: skip
    with_value = {
        torch.zeros, torch.zeros_like, torch.full, torch.full_like, torch.Tensor.new_zeros, torch.Tensor.new_full,
    }  # fmt: skip

    class Poison(TorchFunctionMode):
        def __init__(self, allocations: list[Allocation]) -> None:
            super().__init__()
            self._allocations = allocations

        def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
            made = func(*args, **(kwargs or {}))
            if func not in without_value | with_value or made.layout is not torch.strided or not made.numel():
                return made
            if made.device.type not in ("cpu", "cuda") or made.is_pinned():
                return made
            guarded = _between_guards(made, self._allocations)
            return guarded.copy_(made) if func in with_value else guarded

    return Poison


def _between_guards(made: torch.Tensor, allocations: list[Allocation]) -> torch.Tensor:
    """A tensor with the size, strides, dtype and device of ``made``, between guards, and filled with NaN if its dtype
    has one.
    """
    import torch

    span = 1 + sum((size - 1) * stride for size, stride in zip(made.size(), made.stride(), strict=True))
    size = span * made.element_size()
    buffer = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=made.device)
    payload = buffer[GUARD_BYTES : GUARD_BYTES + size].view(made.dtype)
    if made.dtype == torch.float32:
        payload.view(torch.int32).fill_((UNWRITTEN << 16) + UNWRITTEN)
    elif made.dtype.is_floating_point or made.dtype.is_complex:
        payload.fill_(torch.nan)
    allocations.append(Allocation(buffer, size, f"a tensor {list(made.shape)} of {made.dtype}"))
    return payload.as_strided(made.size(), made.stride())


#: What a NaN in the scores means, by the upper half of its bits in float32; arithmetic passes them on.
_OUTSIDE = "memory between or around the keys was read, outside the view that was given (look at the strides)"
_MARKS = {
    UNWRITTEN: "memory that was allocated and never written",
    BETWEEN_KEYS: _OUTSIDE,
    BETWEEN_FLOAT16_KEYS: _OUTSIDE,
}


def _marked(result: torch.Tensor, mark: int) -> int:
    """How many elements of a float32 tensor are NaN with these upper bits; 0 for any other dtype."""
    import torch

    if result.dtype != torch.float32:
        return 0
    bits = result.contiguous().view(torch.int32)
    return int(((bits >> 16 & 0x7FFF) == mark).sum())


def _wait_for_all() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))
