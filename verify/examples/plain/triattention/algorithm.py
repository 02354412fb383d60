"""The algorithm on tensors: the score of a cached key, when a round is due, and which keys stay.

Source: arXiv 2604.04921. Letters: B rows, L layers, H KV heads, G query heads per KV head, N keys, F frequencies.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

STYLES, AGGREGATIONS = ("half", "interleaved"), ("mean", "max")


def one_of(name: str, value: object, known: tuple[object, ...]) -> None:
    """Raises ValueError unless ``value`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(repr, known))}")


def complex_pairs(x: torch.Tensor, style: str) -> torch.Tensor:
    """The pairs that RoPE turns, complex128 ``[..., F]``: (f, f + F) for ``half``, (2f, 2f + 1) for ``interleaved``."""
    one_of("rope_style", style, STYLES)
    real, imag = x.double().chunk(2, dim=-1) if style == "half" else (x[..., ::2].double(), x[..., 1::2].double())
    return torch.complex(real, imag)


def score(
    keys: torch.Tensor, mean: torch.Tensor, mean_abs: torch.Tensor, weight: torch.Tensor, omega: torch.Tensor,
    offsets: torch.Tensor, t: int, *, aggregation: str, style: str, disable_mlr: bool, disable_trig: bool,
) -> torch.Tensor:  # fmt: skip
    """How much queries from position ``t`` on will want each key: float64 ``[B, H*G, N]``.

    S = agg_o sum_f Re(w m conj(k) exp(i (t + o) omega)) + sum_f w (a - |m|) |k|, with a in place of a - |m| under
    ``disable_mlr``, and the second sum alone under ``disable_trig``.

    ``keys`` ``[B, H, N, 2F]`` are rotated; ``mean`` (m, complex), ``mean_abs`` (a) and ``weight`` (w) are ``[H*G, F]``,
    and query head h reads KV head h // G. Raises ValueError for shapes or options that do not fit.
    """
    one_of("aggregation", aggregation, AGGREGATIONS)
    query_heads, freq = mean.shape
    if keys.shape[-1] != 2 * freq or query_heads % keys.shape[1] or not len(offsets):
        raise ValueError(
            f"keys {tuple(keys.shape)} do not go with statistics {tuple(mean.shape)} and {len(offsets)} offsets"
        )
    k = complex_pairs(keys, style).repeat_interleave(query_heads // keys.shape[1], dim=1)
    m, a, w = (x[:, None, :] for x in (mean.to(torch.complex128), mean_abs.double(), weight.double()))
    norm_term = (w * (a if disable_mlr else a - m.abs()) * k.abs()).sum(-1)
    if disable_trig:
        return norm_term
    product = w * m * k.conj()
    by_offset = []
    for offset in offsets.double():
        angle = (t + offset) * omega.double()
        by_offset.append((product * torch.polar(torch.ones_like(angle), angle)).real.sum(-1))
    trig_term = torch.stack(by_offset)
    return norm_term + (trig_term.amax(0) if aggregation == "max" else trig_term.mean(0))


@dataclass(frozen=True)
class Rule:
    """When a round is due, what it may evict, and how much it leaves. Lengths are tokens.

    With ``slack`` a round is due ``divide_length`` tokens past what the last one left; without, wherever the number of
    tokens seen passes a multiple of ``divide_length``. Raises ValueError naming the field that is out of range.
    """

    budget: int
    divide_length: int
    window: int = 0
    protect_prompt: bool = True
    count_prompt: bool = True
    slack: bool = True

    def __post_init__(self) -> None:
        if self.budget < 1 or self.divide_length < 1:
            raise ValueError(
                f"the budget is {self.budget} and divide_length {self.divide_length}; both must be at least 1"
            )
        if not 0 <= self.window < self.budget:
            raise ValueError(f"the window is {self.window} and must be at least 0 and below the budget, {self.budget}")

    def target(self, prompt: int) -> int:
        """What is left after a round: the budget, or what is protected where that is more."""
        if not self.protect_prompt:
            return self.budget
        return max(self.budget, prompt + self.window) if self.count_prompt else prompt + self.budget

    def due(self, length: int, prompt: int, seen_before: int, seen: int) -> bool:
        """Whether a row of ``length`` is due after the step that took it from ``seen_before`` to ``seen`` tokens."""
        if self.slack:
            return length >= self.target(prompt) + self.divide_length
        return length > self.target(prompt) and seen // self.divide_length > seen_before // self.divide_length

    def evictable(self, length: int, prompt: int, device: torch.device) -> torch.Tensor:
        """Bool ``[length]``: neither a token of a protected prompt nor one of the newest ``window``."""
        index = torch.arange(length, device=device)
        return (index >= (prompt if self.protect_prompt else 0)) & (index < length - self.window)


def keep_set(
    scores: torch.Tensor, evictable: torch.Tensor, count: int, *, mode: str, normalize: bool, group: str
) -> torch.Tensor:
    """The ``count`` keys that stay, by layer and KV head: ascending int64 ``[L, H, count]``.

    ``scores`` ``[L, H, G, N]``. What is not ``evictable`` stays; ``normalize`` makes z-scores over what is; ``group``
    joins the query heads of a KV head; ``mode`` says which layers and KV heads share a set. The lowest index wins a
    tie. Raises ValueError for a score that is not finite.
    """
    one_of("the aggregation of a group", group, AGGREGATIONS)
    region = scores[..., evictable]
    if not region.isfinite().all():
        raise ValueError("a score is NaN or Inf; look for it in the keys and in the statistics")
    if normalize:
        std = region.std(-1, correction=0, keepdim=True).clamp(min=1e-6)
        scores = (scores - region.mean(-1, keepdim=True)) / std
    heads = scores.amax(2) if group == "max" else scores.mean(2)
    if mode == "union":
        shared = heads.amax((0, 1), keepdim=True)
    elif mode == "per_head":
        shared = heads.mean(0, keepdim=True)
    elif mode == "per_layer":
        shared = heads.amax(1, keepdim=True)
    else:
        one_of("the mode", mode, ("per_layer_per_head",))
        shared = heads
    ranked = shared.masked_fill(~evictable, torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return ranked[..., :count].sort(dim=-1).values.expand(*heads.shape[:2], count)
