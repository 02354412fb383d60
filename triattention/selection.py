"""From scores to keep sets: one implementation for every engine, given the evictions per row and protected tokens."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from triattention.errors import TriAttentionError

#: One keep set per KV head, shared by all layers; one for everything; one per layer; one per layer and KV head.
MODES = ("per_head", "union", "per_layer", "per_layer_per_head")
_ALIASES = {"per_layer_perhead": "per_layer_per_head"}


def check_mode(mode: str) -> str:
    """The mode with aliases resolved. Raises TriAttentionError for an unknown one."""
    mode = _ALIASES.get(mode, mode)
    if mode not in MODES:
        raise TriAttentionError(f"the pruning mode is {mode!r}; use one of {', '.join(MODES)}")
    return mode


def default_window(kv_budget: int) -> int:
    """The default window, ``min(128, kv_budget // 2)``, so that any budget of 1 or more is usable."""
    return min(128, kv_budget // 2)


def check_budget(kv_budget: int, divide_length: int, window_size: int) -> None:
    """Raise TriAttentionError, naming the value, for an invalid budget, interval or window."""
    if kv_budget < 1:
        raise TriAttentionError(f"the KV budget is {kv_budget}; it must be at least 1 token (2048 is usual)")
    if divide_length < 1:
        raise TriAttentionError(f"divide_length is {divide_length}; it must be at least 1 token (128 is usual)")
    if window_size < 0 or window_size >= kv_budget:
        raise TriAttentionError(
            f"the window is {window_size} and the KV budget {kv_budget}; give a window from 0 to "
            f"{kv_budget - 1}, or leave it out"
        )


def protection_exceeds(protected: int, budget: int) -> str:
    """The warning, given once, that the protected tokens alone exceed the budget."""
    return (
        f"{protected} protected tokens (prompt and window) exceed the budget of {budget}; they are kept "
        "and the rest is "
        "compressed, so give a larger budget or let the prompt be compressed"
    )


def to_device(values: list[int] | np.ndarray, device: torch.device) -> torch.Tensor:
    """Host integers as int64 on ``device``, through pinned memory for a GPU, so that the host does not wait.

    torch reuses pinned memory only when the copy from it has ended.
    """
    tensor = torch.as_tensor(values, dtype=torch.int64)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def z_score(scores: torch.Tensor, region: torch.Tensor) -> torch.Tensor:
    """Standardise each query head over its evictable region: ``[B, H*G, N]`` with region ``[B, N]``, float64 out.

    Population standard deviation (ddof 0), at least 1e-6, computed from deviations from the mean, not as E[x^2] -
    E[x]^2. float64 makes the result independent of padding and batching.
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
    """Combine per-layer scores ``[B, H, N]`` into those of a mode's S keep sets, ``[B, S, N]``.

    per_head: mean over the layers, S = H. union: maximum over everything, S = 1. per_layer: maximum over the heads,
    S = L. per_layer_per_head: unchanged, S = L H, layer by layer.
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
    """The indices ``[B, H, K]`` of one layer, from those of a mode's keep sets ``[B, S, K]``."""
    if mode == "per_layer_per_head":
        return indices[:, layer * n_kv_heads : (layer + 1) * n_kv_heads]
    if mode == "per_layer":
        indices = indices[:, layer : layer + 1]
    return indices.expand(-1, n_kv_heads, -1)


def keep_mask(scores: torch.Tensor, valid: torch.Tensor, protected: torch.Tensor, evict: list[int]) -> torch.Tensor:
    """Which cached tokens are kept: bool ``[B, S, N]`` for S sets per row.

    ``scores`` ``[B, S, N]``; ``valid`` and ``protected`` bool ``[B, N]`` (real tokens; those never evicted);
    ``evict``: the number of valid tokens to evict from each row. The highest scores are kept; among equal scores the
    lowest index wins. The caller must refuse NaN scores. Raises TriAttentionError if ``evict`` has another number of
    rows than the scores, or a count below 0 or above N.
    """
    if len(evict) != scores.shape[0]:
        raise TriAttentionError(f"evict has {len(evict)} rows, but the scores have {scores.shape[0]}")
    if min(evict, default=0) < 0 or max(evict, default=0) > scores.shape[-1]:
        raise TriAttentionError(f"evict is {evict}; each must be from 0 to {scores.shape[-1]}, the cached tokens")
    # two stable sorts, the less significant key first: by score, then protected before evictable before absent; a
    # marker value such as +inf would tie with real scores
    order = scores.argsort(dim=-1, descending=True, stable=True)
    kind = torch.where(protected, 0, torch.where(valid, 1, 2)).to(torch.uint8)[:, None].expand_as(order)
    order = order.gather(-1, kind.gather(-1, order).argsort(dim=-1, stable=True))
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    n_keep = valid.sum(-1) - to_device(evict, valid.device)
    return (rank < n_keep[:, None, None]) & valid[:, None]


def keep_indices(mask: torch.Tensor, width: int) -> torch.Tensor:
    """Ascending indices of the kept tokens, right-aligned: bool ``[B, S, N]`` to int64 ``[B, S, width]``.

    A row that keeps fewer than ``width`` tokens starts with indices of evicted ones; its mask must hide those
    columns.
    """
    order = mask.to(torch.uint8).argsort(dim=-1, stable=True)
    return order[..., order.shape[-1] - width :]


def evictable(length: int, budget: int, protected: int) -> int:
    """How many of ``length`` tokens a round evicts: down to the budget, or to the protected tokens if more."""
    return max(0, length - max(budget, min(protected, length)))
