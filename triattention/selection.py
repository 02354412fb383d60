"""From scores to a keep set. One function decides for every engine, given how many to evict and what is protected."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from triattention.errors import TriAttentionError

#: One keep set per KV head shared by the layers; one for all; one per layer; one per layer and KV head.
MODES = ("per_head", "union", "per_layer", "per_layer_per_head")
_ALIASES = {"per_layer_perhead": "per_layer_per_head"}


def check_mode(mode: str) -> str:
    """The mode under its own name. Raises TriAttentionError for an unknown one."""
    mode = _ALIASES.get(mode, mode)
    if mode not in MODES:
        raise TriAttentionError(f"the pruning mode is {mode!r}; use one of {', '.join(MODES)}")
    return mode


def default_window(kv_budget: int) -> int:
    """The window where none is given: ``min(128, kv_budget // 2)``, so that any budget of 1 or more is usable."""
    return min(128, kv_budget // 2)


def check_budget(kv_budget: int, divide_length: int, window_size: int) -> None:
    """Raise TriAttentionError, naming the value, for a budget, interval or window that cannot work together."""
    if kv_budget < 1:
        raise TriAttentionError(f"the KV budget is {kv_budget}; it must be at least 1 token (2048 is usual)")
    if divide_length < 1:
        raise TriAttentionError(f"divide_length is {divide_length}; it must be at least 1 token (128 is usual)")
    if window_size < 0 or window_size >= kv_budget:
        raise TriAttentionError(
            f"the window is {window_size} and the KV budget {kv_budget}; give a window from 0 to "
            f"{kv_budget - 1}, or none"
        )


def protection_exceeds(protected: int, budget: int) -> str:
    """What to say, once, when the protected tokens alone do not fit the budget."""
    return (
        f"{protected} protected tokens (prompt and window) exceed the budget of {budget}; they are kept "
        "and the rest is "
        "compressed, so give a larger budget or let the prompt be compressed"
    )


def to_device(values: list[int], device: torch.device) -> torch.Tensor:
    """Host integers as int64 on ``device``, through pinned memory for a GPU, so that nothing waits for it."""
    if device.type == "cuda":
        return torch.tensor(values, pin_memory=True).to(device, non_blocking=True)
    return torch.tensor(values, device=device)


def z_score(scores: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Standardise each query head over its evictable region: ``[B, H*G, N]`` with region ``[B, N]``, float64 out.

    Population standard deviation (ddof 0) clamped at 1e-6, from deviations about the mean and never from E[x^2] -
    E[x]^2. float64 makes the result independent of how a row was padded or batched.
    """
    x, inside = scores.to(torch.float64), region[:, None]
    count = inside.sum(-1, keepdim=True).clamp_min(1)
    mean = torch.where(inside, x, 0).sum(-1, keepdim=True) / count
    deviation = torch.where(inside, x - mean, 0)
    std = (deviation.square().sum(-1, keepdim=True) / count).sqrt().clamp_min(1e-6)
    return (x - mean) / std


def group_max(scores: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """The maximum over the G query heads of each KV head: ``[B, H*G, N]`` to ``[B, H, N]``."""
    batch, query_heads, n_tokens = scores.shape
    return scores.view(batch, n_kv_heads, query_heads // n_kv_heads, n_tokens).amax(2)


def group_mean(scores: torch.Tensor, n_kv_heads: int) -> torch.Tensor:
    """``group_max`` with the mean instead."""
    batch, query_heads, n_tokens = scores.shape
    return scores.view(batch, n_kv_heads, query_heads // n_kv_heads, n_tokens).mean(2)


def combine(layers: Iterable[torch.Tensor], mode: str) -> torch.Tensor:
    """Per-layer scores ``[B, H, N]`` to those of the S keep sets of a mode, ``[B, S, N]``.

    per_head: mean over the layers, S = H. union: maximum over everything, S = 1. per_layer: maximum over the heads,
    S = L. per_layer_per_head: as they are, S = L H, layer by layer.
    """
    if mode == "per_layer_per_head":
        return torch.cat(list(layers), dim=1)
    if mode == "per_layer":
        return torch.stack([scores.amax(1) for scores in layers], dim=1)
    total, count = None, 0
    for scores in layers:
        count += 1
        if mode == "per_head":
            total = scores if total is None else total + scores
        else:
            best = scores.amax(1, keepdim=True)
            total = best if total is None else torch.maximum(total, best)
    return total / count if mode == "per_head" else total


def layer_indices(indices: torch.Tensor, mode: str, layer: int, n_kv_heads: int) -> torch.Tensor:
    """The indices ``[B, H, K]`` of one layer among those of a mode's keep sets ``[B, S, K]``."""
    if mode == "per_layer_per_head":
        return indices[:, layer * n_kv_heads : (layer + 1) * n_kv_heads]
    if mode == "per_layer":
        indices = indices[:, layer : layer + 1]
    return indices.expand(-1, n_kv_heads, -1)


def keep_mask(scores: torch.Tensor, valid: torch.Tensor, protected: torch.Tensor, evict: list[int]) -> torch.Tensor:
    """Which cached tokens stay: bool ``[B, S, N]`` for S sets per row.

    ``scores`` ``[B, S, N]``; ``valid`` and ``protected`` bool ``[B, N]`` (real tokens; those never evicted);
    ``evict`` how many of the valid tokens of each row go. The highest scores stay; among equal scores the lowest
    index wins. NaN scores are the caller's to refuse. Raises TriAttentionError when a row is asked to evict
    protected or absent tokens, where that can be known without waiting for the device.
    """
    if len(evict) != scores.shape[0]:
        raise TriAttentionError(f"evict names {len(evict)} rows and the scores have {scores.shape[0]}")
    if min(evict, default=0) < 0 or max(evict, default=0) > scores.shape[-1]:
        raise TriAttentionError(f"evict is {evict}; it must lie between 0 and the {scores.shape[-1]} cached tokens")
    # two stable sorts, the lesser key first: by score, then protected before evictable before absent; a marker value
    # such as +inf would tie with real scores
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kind = torch.where(protected, 0, torch.where(valid, 1, 2)).to(torch.uint8)[:, None].expand_as(order)
    order = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    n_keep = valid.sum(-1) - to_device(evict, valid.device)
    return (rank < n_keep[:, None, None]) & valid[:, None]


def keep_indices(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Ascending indices of the kept tokens, right-aligned in ``width`` columns: bool ``[B, S, N]`` to int64 ``[B,
    S, width]``.

    A row that keeps fewer than ``width`` tokens begins with indices of evicted ones; its mask must hide those
    columns.
    """
    order = mask.to(torch.uint8).argsort(dim=-1, stable=True)
    return order[..., order.shape[-1] - width :]


def evictable(length: int, budget: int, protected: int) -> int:
    """How many of ``length`` tokens go in a round: down to the budget, or to the protected ones if those alone
    exceed it.
    """
    return max(0, length - max(budget, min(protected, length)))
