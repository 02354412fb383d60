"""How much the newest queries attend to each cached key, as used by SnapKV and R-KV."""

from __future__ import annotations

import torch

from triattention.architecture import Architecture
from triattention.compression import View
from triattention.rope import rotate


def window_attention(view: View, layer: int, live: Architecture, *, outside_only: bool) -> torch.Tensor:
    """Mean attention weight of the newest W queries to the keys before them, float32 ``[B, H*G, N - W]``.

    The queries are those of the window, which is protected and so still cached. ``outside_only`` normalises over the
    keys before the window instead of over all keys. Padding is excluded from queries and keys.
    """
    keys, valid = view.keys[layer].float(), view.valid
    queries = view.queries[layer].transpose(1, 2).float()  # [B, H*G, W, D]
    (batch, heads, n_tokens, head_dim), width = keys.shape, queries.shape[2]
    back = torch.arange(width, 0, -1, device=keys.device)
    positions = (torch.as_tensor(view.seen, device=keys.device).reshape(-1, 1) - back).clamp_min(0)  # [B or 1, W]
    rotated = rotate(queries, positions[:, None], live.omega.to(keys.device), live.attention_scaling, live.rope_style)
    grouped = rotated.view(batch, heads, -1, head_dim)  # G queries of each of the W tokens
    logits = (grouped @ keys.mT).view(batch, -1, width, n_tokens) * head_dim**-0.5
    column = torch.arange(n_tokens, device=keys.device)
    limit = n_tokens - width if outside_only else column[-width:, None] + 1
    seen = (column < limit) & valid[:, None, None]
    weights = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)[..., : n_tokens - width]
    asking = valid[:, None, -width:, None]
    return (weights * asking).sum(2) / asking.sum(2).clamp_min(1)
