"""Guarded calls: the only way in which phases 3 to 5 ask a subject for scores, so that none can be right by accident.

What a subject allocates from Python lies between known bytes, so that a write beside it is seen, and what it allocates
without a value is full of NaN, so that a score that was never written is seen too. Inputs are compared with copies of
themselves, kernels are counted, and everything is compared after the whole device is idle. The oracle is asked
afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from verify.judge.interpreter import quicken
from verify.judge.problems import Problem
from verify.subject.launches import counted
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import torch

#: On each side of an allocation: a multiple of any alignment, and two rows of 512 keys in float32.
GUARD_BYTES = 4096
#: What the guards hold; as a float of any width it is small, negative and no score.
GUARD = 0xA5

KERNELS, SCORING = "vllm.core.kernels.triton_scoring", "vllm.core.scoring"

#: The two published paths, as their functions are named and as a message names them.
PATHS = {"triton": "Triton", "pytorch": "PyTorch"}


@dataclass(frozen=True)
class Call:
    """What a call gave, and what it did beside: the kernels it launched, the inputs it changed, and in words what it
    wrote beside its own tensors.
    """

    result: Any
    launched: tuple[str, ...]
    overruns: tuple[str, ...]
    changed: tuple[str, ...]

    @property
    def scores(self) -> np.ndarray:
        """The result in float64 on the CPU."""
        return self.result.double().cpu().numpy()


def call(function: Callable[[], Any], inputs: Mapping[str, torch.Tensor]) -> Call:
    """Run ``function``, which reads ``inputs`` and may write nothing but what it allocates. Raises what it raises."""
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


def kernel(subject: Subject, problem: Problem, **more: Any) -> Call:
    """A guarded call of the published ``triattention_scoring``; ``more`` are further arguments of it."""
    scoring = subject.attribute(KERNELS, "triattention_scoring")
    return call(lambda: scoring(**problem.scoring_arguments(), **more), problem.tensors())


def engine(subject: Subject, path: str, problem: Problem, *, through: str | None = None) -> Call:
    """A guarded call of ``compute_scores_triton`` or ``compute_scores_pytorch``, or ``through`` another name there."""
    return call(engine_call(subject, path, problem, through=through), problem.tensors())


def engine_call(subject: Subject, path: str, problem: Problem, *, through: str | None = None) -> Callable[[], Any]:
    """The call that ``engine`` guards, for a check that times it."""
    shape = problem.shape
    config = subject.attribute("vllm.core.config", "TriAttentionConfig")(
        kv_budget=256, pruning_mode="per_head", score_aggregation=shape.aggregation, rope_style=shape.style,
        use_triton_scoring=path == "triton", head_dim=shape.d, num_kv_heads=shape.h,
        disable_mlr=shape.disable_mlr, disable_trig=shape.disable_trig,
    )  # fmt: skip
    quicken()
    compute = subject.attribute(SCORING, through or f"compute_scores_{path}")
    arguments = {
        "key_states": problem.keys, "cache_positions": None, "head_stats": problem.head_stats, "omega": problem.omega,
        "offsets": problem.offsets, "freq_scale_sq": problem.freq_weight, "config": config, "round_start": shape.t,
    }  # fmt: skip
    return lambda: compute(**arguments)


@dataclass(frozen=True)
class Allocation:
    """A tensor that a subject asked for, in a ``buffer`` of bytes that holds ``size`` of its own between the guards."""

    buffer: torch.Tensor
    size: int
    described: str

    def overrun(self) -> str:
        """How many guard bytes were written, in words, or an empty string."""
        sides = {"before": self.buffer[:GUARD_BYTES], "after": self.buffer[GUARD_BYTES + self.size :]}
        written = {side: int((guard != GUARD).sum()) for side, guard in sides.items()}
        told = [f"{count} bytes {side}" for side, count in written.items() if count]
        return f"wrote {' and '.join(told)} {self.described}" if told else ""


@contextmanager
def poisoned() -> Iterator[list[Allocation]]:
    """Inside, tensors allocated from Python lie between guards; without a value they hold NaN, or the guard's bytes."""
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
    """A tensor of the size, strides, dtype and device of ``made``, between guards and full of NaN where it can be."""
    import torch

    span = 1 + sum((size - 1) * stride for size, stride in zip(made.size(), made.stride(), strict=True))
    size = span * made.element_size()
    buffer = torch.full((size + 2 * GUARD_BYTES,), GUARD, dtype=torch.uint8, device=made.device)
    payload = buffer[GUARD_BYTES : GUARD_BYTES + size].view(made.dtype)
    if made.dtype.is_floating_point or made.dtype.is_complex:
        payload.fill_(torch.nan)
    allocations.append(Allocation(buffer, size, f"a tensor {list(made.shape)} of {made.dtype}"))
    return payload.as_strided(made.size(), made.stride())


def _wait_for_all() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    import torch

    return a.shape == b.shape and torch.equal(*(x.contiguous().view(torch.uint8) for x in (a, b)))
