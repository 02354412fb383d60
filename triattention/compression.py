"""Compression of a live cache: budget, trigger and eviction rounds. A method only scores tokens."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch

from triattention.errors import TriAttentionError
from triattention.selection import (
    check_budget,
    check_mode,
    combine,
    keep_indices,
    keep_mask,
    layer_indices,
    protection_exceeds,
    to_device,
)

if TYPE_CHECKING:
    from triattention.architecture import Architecture
    from triattention.cache import CacheState


@dataclass(frozen=True)
class Budget:
    """How many cached tokens a row may hold, and when a round is due.

    ``kv_budget`` excludes the prompt unless ``count_prompt_tokens``. The newest ``window_size`` tokens are protected,
    and the prompt unless ``allow_prefill_compression``. With ``use_slack_trigger`` a round is due at kv_budget +
    divide_length tokens; without it, when the tokens seen reach a multiple of ``divide_length`` above the budget. The
    defaults are the recommended setting. Raises TriAttentionError for values that contradict each other.
    """

    kv_budget: int
    divide_length: int = 128
    window_size: int = 0
    count_prompt_tokens: bool = True
    allow_prefill_compression: bool = True
    use_slack_trigger: bool = True

    def __post_init__(self) -> None:
        check_budget(self.kv_budget, self.divide_length, self.window_size)

    def limits(self, prompt: int) -> tuple[int, int]:
        """Tokens that a row with ``prompt`` prompt tokens keeps, and how many of them are protected."""
        protected = (0 if self.allow_prefill_compression else prompt) + self.window_size
        return self.kv_budget + (0 if self.count_prompt_tokens else prompt), protected

    def protected(self, valid: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Which real tokens ``valid`` ``[B, N]`` are in the window or in the prompt ``[B]``: bool ``[B, N]``."""
        rank = valid.to(torch.int64).cumsum(-1) - 1
        in_window = rank >= valid.sum(-1, keepdim=True) - self.window_size
        in_prompt = rank < (0 if self.allow_prefill_compression else prompt[:, None])
        return valid & (in_window | in_prompt)

    def until_due(self, length: int, limit: int, seen: int, *, after: bool = False) -> int:
        """Tokens that a row of ``length`` can still take before a round is due; it is due at 0 or less.

        Without the slack trigger a round is due at the first multiple of ``divide_length`` tokens seen after the row
        exceeded ``limit``, or, ``after`` the current step was handled, at the next multiple.
        """
        if self.use_slack_trigger:
            return limit + self.divide_length - length
        first_over = seen - (length - limit) + 1  # tokens seen when the row first exceeded its limit
        earliest = max(first_over, seen + 1) if after else first_over
        return -(-earliest // self.divide_length) * self.divide_length - seen


@dataclass(frozen=True)
class View:
    """The input of a method: a cache that is due for a round.

    ``keys`` and ``values`` hold one ``[B, H, N, D]`` per layer, as cached (keys rotated); ``seen`` is the position of
    the next token, one for all rows or int64 ``[B]``; ``valid`` and ``region`` bool ``[B, N]``: the real tokens, and
    the evictable ones among them. ``queries`` ``[L, B, W, H*G, D]``, before RoPE, are those of the last W columns, for
    methods with ``observes``.
    """

    keys: Sequence[torch.Tensor]
    values: Sequence[torch.Tensor]
    seen: torch.Tensor | int
    valid: torch.Tensor
    region: torch.Tensor
    queries: torch.Tensor | None = None


class Compression(ABC):
    """A compression method: a budget, a selection mode, and the scores, which the subclass defines.

    ``rounds`` and ``peak_length`` (physical tokens of the longest row, after a step and its round) count since
    ``reset``.
    """

    #: Whether ``scores`` needs the queries of the window.
    observes = False
    #: What ``forward.patch`` notes: the patched model, the longest sequence that its RoPE allows (None if unlimited),
    #: the hook on its decoder, and the functions that another library had set on it.
    live: Architecture
    max_positions: int | None = None
    guard: Any = None
    replaced: Mapping[str, Any] = MappingProxyType({})

    def __init__(self, budget: Budget, mode: str) -> None:
        self.budget = budget
        self.mode = check_mode(mode)
        self.reset()

    def reset(self) -> None:
        """Reset the counters before a new sequence."""
        self.rounds = 0
        self.peak_length = 0

    @abstractmethod
    def scores(self, view: View) -> Iterator[torch.Tensor]:
        """One ``[B, H, N]`` per layer; higher scores are kept. Values outside the region are ignored."""

    def selection_scores(self, view: View) -> torch.Tensor:
        """The scores that decide the S keep sets of the mode, ``[B, S, N]`` (``selection.combine``)."""
        return combine(self.scores(view), self.mode)

    def after_step(self, cache: Any, state: CacheState) -> None:
        """Compress the rows of ``cache`` that are due after a forward step, and update the counters."""
        if state.until_due <= 0:
            budget = self.budget
            # the only wait for the device before a round: three small vectors
            lengths, prompts, seen = torch.stack([state.valid.sum(-1), state.prompt, state.seen]).tolist()
            limits = [self._limit(state, n, prompt) for n, prompt in zip(lengths, prompts, strict=True)]
            evict = [
                n - limit if n > limit and budget.until_due(n, limit, s) <= 0 else 0
                for n, limit, s in zip(lengths, limits, seen, strict=True)
            ]
            if any(evict):
                self._round(cache, state, lengths, evict)
            kept = [n - gone for n, gone in zip(lengths, evict, strict=True)]
            state.longest = max(kept)
            state.until_due = min(
                budget.until_due(n, limit, s, after=True) for n, limit, s in zip(kept, limits, seen, strict=True)
            )
        self.peak_length = max(self.peak_length, state.longest)

    def _limit(self, state: CacheState, length: int, prompt: int) -> int:
        """How many tokens a row holds after a round: the larger of its budget and its protected tokens."""
        budget, protected = self.budget.limits(prompt)
        if min(length, protected) > budget and not state.warned:
            state.warned = True
            warnings.warn(protection_exceeds(protected, budget), stacklevel=2)
        return max(budget, protected)

    def _round(self, cache: Any, state: CacheState, lengths: list[int], evict: list[int]) -> None:
        keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
        protected = self.budget.protected(state.valid, state.prompt)
        view = View(
            keys, values, state.seen, state.valid, state.valid & ~protected, state.observed(self.budget.window_size)
        )
        n_kv_heads = keys[0].shape[1]
        scores = self.selection_scores(view)
        del keys, values, view  # else the whole old cache would stay alive next to the new one
        finite = scores.masked_fill(~state.valid[:, None], 0).isfinite().all()
        mask = keep_mask(scores, state.valid, protected, evict)
        kept = [n - gone for n, gone in zip(lengths, evict, strict=True)]
        width = max(kept)
        indices = keep_indices(mask, width)
        for number, layer in enumerate(cache.layers):
            layer.keep(layer_indices(indices, self.mode, number, n_kv_heads))
        column = torch.arange(width, device=state.valid.device)
        state.valid = column >= width - to_device(kept, column.device)[:, None]
        state.ragged = min(kept) < width
        self.rounds += 1
        require_finite(finite)  # waits for the device, so it comes after the whole round is queued


def require_finite(finite: torch.Tensor) -> None:
    """Raise TriAttentionError unless ``finite``, a bool scalar, is true."""
    if not finite:
        raise TriAttentionError(
            "a score is NaN or Inf, so a cached key is NaN or Inf; load the model with dtype float32 or "
            "bfloat16 and try again"
        )
