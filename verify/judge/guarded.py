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
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from verify.errors import Refused, Wrong
from verify.judge.interpreter import quicken
from verify.judge.offers import Attempt, Offers
from verify.judge.problems import BETWEEN_FLOAT16_KEYS, BETWEEN_KEYS, UNWRITTEN, Problem, Shape
from verify.record import trail
from verify.subject.launches import counted
from verify.subject.published import CONFIG_DEFAULTS
from verify.subject.refusal import REFUSALS, refusal
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import torch

#: On each side of an allocation: a multiple of every alignment, and two rows of 512 keys in float32.
GUARD_BYTES = 4096
#: The byte in the guards; as a float of any width it is small, negative and not a plausible score.
GUARD = 0xA5

KERNELS, SCORING, CONFIG = "vllm.core.kernels.triton_scoring", "vllm.core.scoring", "vllm.core.config"
KERNEL, DISPATCH, RANKER = "triattention_scoring", "compute_scores", "rank_keys"

#: The modules of the functions that are not in ``SCORING``.
_MODULES = {KERNEL: KERNELS, RANKER: "ranking"}

#: The two published paths: the name in their functions, and the name in messages.
PATHS = {"triton": "Triton", "pytorch": "PyTorch"}


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
class Scorer:
    """One published scoring function of a subject, and the path on which it scores."""

    subject: Subject
    path: str
    name: str
    device: str

    def __call__(self, problem: Problem) -> np.ndarray:
        """The scores in float64 on the CPU, ``[B, H*G, N]``. Raises AssertionError for another shape."""
        found, shape = self.call(problem), problem.shape
        given, wanted = tuple(found.result.shape), (shape.b, shape.h * shape.g, shape.n)
        assert given == wanted, f"{self.where(shape)}: the scores have shape {given}, expected {wanted}"
        return found.scores

    def call(self, problem: Problem) -> Call:
        return engine(self.subject, self.path, problem, through=self.name)

    def where(self, shape: Shape) -> str:
        """The path and the problem in words, for a message."""
        return f"{path_name(self.subject, self.path)} path, {self.name}, {shape.told()}"

    @property
    def offers(self) -> Offers:
        key = (self.subject.option, self.path, self.name, self.device)
        if key not in _OFFERS:
            _OFFERS[key] = Offers(
                self.subject,
                lambda problem: engine_call(self.subject, self.path, problem, through=self.name)(),
                self.device,
                dict(self.subject.narrowed),
            )
        return _OFFERS[key]


#: What the functions that refused something take, as long as this process lives.
_OFFERS: dict[tuple[str, ...], Offers] = {}


def scorers(subject: Subject, path: str, device: str) -> list[Scorer]:
    """Every published function of the subject that scores on a path. Raises SubjectLacks if there is none."""
    return [Scorer(subject, path, name, device) for name in entries(subject, path)]


def draws(
    subject: Subject, path: str, device: str, seed: int, count: int, **choices: tuple[Any, ...]
) -> Iterator[tuple[Attempt, Scorer]]:
    """Attempts to judge ``count`` random problems, spread over the functions of a path, each within what it takes.

    Raises SubjectLacks if the path has no function, Refused if every problem is refused.
    """
    return spread(subject, path, device, lambda offers, part: offers.drawn(seed, count, part, **choices))


def spread(
    subject: Subject, path: str, device: str, attempts: Callable[[Offers, slice], Iterator[Attempt]]
) -> Iterator[tuple[Attempt, Scorer]]:
    """``attempts`` with every function of a path, which gets a part of the problems; see ``draws``."""
    found = scorers(subject, path, device)
    refused: Refused | None = None
    judged = False
    for number, scorer in enumerate(found):
        try:
            for attempt in attempts(scorer.offers, slice(number, None, len(found))):
                yield attempt, scorer
                judged |= attempt.refused is None
        except Refused as error:
            refused = error
    if refused is not None and not judged:
        raise refused


#: The published functions that score on each path, first the one that most checks call.
ENTRIES = {
    "triton": ("compute_scores_triton", KERNEL),
    "pytorch": ("compute_scores_pytorch",),
    "ranking": (RANKER,),
}


def entries(subject: Subject, path: str) -> tuple[str, ...]:
    """The functions by which a subject scores on a path. Raises SubjectLacks if it has none.

    ``compute_scores`` alone, without a function for either path, is a scorer without Triton.
    """
    by_path = {
        one: [name for name in names if subject.offers(_module_of(name), name)] for one, names in ENTRIES.items()
    }
    if path == "pytorch" and not by_path["triton"] and not by_path["pytorch"] and subject.offers(SCORING, DISPATCH):
        return (DISPATCH,)
    if not by_path[path]:
        subject.attribute(_module_of(ENTRIES[path][0]), ENTRIES[path][0])  # says what is absent
    return tuple(by_path[path])


def _module_of(name: str) -> str:
    return _MODULES.get(name, SCORING)


def path_name(subject: Subject, path: str) -> str:
    """The name of a path in messages; a subject may score with something else than PyTorch."""
    return subject.plain_path if path == "pytorch" else PATHS.get(path, path)


def kernel(subject: Subject, problem: Problem, **more: Any) -> Call:
    """A guarded call of the published ``triattention_scoring``, or of the engine function where a subject has only
    that; ``more`` are further arguments. Raises Refused as ``engine`` does.
    """
    return engine(subject, "triton", problem, through=KERNEL if more else entries(subject, "triton")[-1], **more)


def engine(subject: Subject, path: str, problem: Problem, *, through: str | None = None, **more: Any) -> Call:
    """A guarded call of the first of ``entries``, or of the function ``through``.

    Raises SubjectLacks if the subject has no such function, Refused if it refuses this problem and takes a plainer
    one, and whatever else the call raises.
    """
    name = through or entries(subject, path)[0]
    trail.note(path=path_name(subject, path), function=name, **problem.shape.properties(), **{"class": "unknown"})
    try:
        return call(engine_call(subject, path, problem, through=name, **more), problem.tensors())
    except REFUSALS as error:
        if at := refusal(error, subject):
            Scorer(subject, path, name, problem.keys.device.type).offers.judge(error, at, problem.shape, more)
        raise


def engine_call(
    subject: Subject, path: str, problem: Problem, *, through: str | None = None, **more: Any
) -> Callable[[], Any]:
    """The call that ``engine`` guards, unguarded, for a check that times it."""
    shape = problem.shape
    quicken()
    name = through or entries(subject, path)[0]
    compute = subject.attribute(_module_of(name), name)
    if name == KERNEL:
        return lambda: compute(**problem.scoring_arguments(), **more)
    options = {
        "kv_budget": 256, "pruning_mode": "per_head", "score_aggregation": shape.aggregation, "rope_style": shape.style,
        "use_triton_scoring": path == "triton", "head_dim": shape.d, "num_kv_heads": shape.h,
        "disable_mlr": shape.disable_mlr, "disable_trig": shape.disable_trig,
    }  # fmt: skip
    arguments = {
        "key_states": problem.keys, "cache_positions": None, "head_stats": problem.head_stats, "omega": problem.omega,
        "offsets": problem.offsets, "freq_scale_sq": problem.freq_weight, "round_start": shape.t,
    }  # fmt: skip
    if name == RANKER:
        del arguments["cache_positions"]
        return lambda: compute(**arguments)
    # made within the call, because a configuration may refuse an option too
    return lambda: compute(**arguments, config=configuration(subject, options), **more)


def configuration(subject: Subject, options: Mapping[str, Any]) -> Any:
    """The subject's configuration with these options, or a stand-in with the published fields if it has no class."""
    import torch

    if subject.offers(CONFIG, "TriAttentionConfig"):
        return subject.attribute(CONFIG, "TriAttentionConfig")(**options)
    return SimpleNamespace(**{**CONFIG_DEFAULTS[CONFIG], "topk_dtype": torch.float32, **options})


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
