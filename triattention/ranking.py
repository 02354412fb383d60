"""The order of keys, for engines that evict by rank and need no scores."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def rank_keys(
    key_states: torch.Tensor,
    head_stats: Mapping[str, torch.Tensor],
    omega: torch.Tensor,
    offsets: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    round_start: int,
) -> torch.Tensor:
    """The indices of the keys of each KV head, best first: int64 ``[B, H, N]``.

    ``key_states`` ``[B, H, N, D]`` are rotated keys in the half layout; the statistics ``head_stats``
    (``q_mean_complex [H*G, F, 2]``, ``q_abs_mean [H*G, F]``) and weights ``freq_scale_sq`` ``[H*G, F]`` are those of
    ``compute_scores``. Scores are averaged over ``offsets``, z-scored per query head over the keys, and joined by the
    maximum over the query heads of a KV head. Keys with equal scores keep their order.
    """
    from triattention.vllm.core.config import TriAttentionConfig
    from triattention.vllm.core.scoring import compute_scores_pytorch

    config = TriAttentionConfig(pruning_mode="per_head", use_triton_scoring=False)
    scores = compute_scores_pytorch(
        key_states, None, head_stats, omega, offsets, freq_scale_sq, config, round_start=round_start
    )
    z = scores - scores.mean(-1, keepdim=True)
    z = z / scores.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
    joined = z.unflatten(1, (key_states.shape[1], -1)).amax(2)
    return joined.argsort(dim=-1, descending=True, stable=True)
