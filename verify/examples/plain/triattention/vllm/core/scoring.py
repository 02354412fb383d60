"""The published scoring calls: one by the kernel, one by PyTorch in float64."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from ...algorithm import score
from .config import TriAttentionConfig
from .kernels.triton_scoring import TrigTableCache, triattention_scoring


def _round_start(round_start: int | None, cache_positions: torch.Tensor | None, keys: torch.Tensor) -> int:
    if round_start is not None:
        return int(round_start)
    return keys.shape[2] - 1 if cache_positions is None else int(cache_positions.max())


def _means(head_stats: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """E[q], complex ``[H*G, F]``, and E|q|, which is |E[q]| where it is not given."""
    mean = torch.view_as_complex(head_stats["q_mean_complex"].float().contiguous())
    mean_abs = head_stats.get("q_abs_mean")
    return mean, mean.abs() if mean_abs is None else mean_abs


def _result(scores: torch.Tensor, config: TriAttentionConfig) -> torch.Tensor:
    return (scores.mean(1) if config.pruning_mode == "per_layer" else scores).to(config.topk_dtype)


def compute_scores(
    key_states: torch.Tensor, cache_positions: torch.Tensor | None, head_stats: Mapping[str, torch.Tensor],
    omega: torch.Tensor, offsets: torch.Tensor, freq_scale_sq: torch.Tensor, config: TriAttentionConfig,
    round_start: int | None = None, trig_cache: TrigTableCache | None = None,
) -> torch.Tensor:  # fmt: skip
    """The scores ``[B, H*G, N]``, or their mean over heads ``[B, N]`` for ``per_layer``, in ``config.topk_dtype``.

    Without ``round_start`` it is the largest of ``cache_positions``, or else N - 1.
    """
    given = (key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start)
    return compute_scores_triton(*given, trig_cache) if config.use_triton_scoring else compute_scores_pytorch(*given)


def compute_scores_triton(
    key_states: torch.Tensor, cache_positions: torch.Tensor | None, head_stats: Mapping[str, torch.Tensor],
    omega: torch.Tensor, offsets: torch.Tensor, freq_scale_sq: torch.Tensor, config: TriAttentionConfig,
    round_start: int | None = None, trig_cache: TrigTableCache | None = None,
) -> torch.Tensor:  # fmt: skip
    """``compute_scores`` by the kernel; past the table's end phases are formed anew."""
    mean, mean_abs = _means(head_stats)
    t = _round_start(round_start, cache_positions, key_states)
    covered = config.use_trig_cache and trig_cache is not None and trig_cache.covers(t)
    scores = triattention_scoring(
        key_states, None, mean.real, mean.imag, mean_abs, freq_scale_sq, omega, offsets, t, config.score_aggregation,
        trig_cache if covered else None, None, config.rope_style, config.disable_mlr, disable_trig=config.disable_trig,
    )  # fmt: skip
    return _result(scores, config)


def compute_scores_pytorch(
    key_states: torch.Tensor, cache_positions: torch.Tensor | None, head_stats: Mapping[str, torch.Tensor],
    omega: torch.Tensor, offsets: torch.Tensor, freq_scale_sq: torch.Tensor, config: TriAttentionConfig,
    round_start: int | None = None,
) -> torch.Tensor:  # fmt: skip
    """``compute_scores`` by ``algorithm.score``."""
    scores = score(
        key_states, *_means(head_stats), freq_scale_sq, omega, offsets,
        _round_start(round_start, cache_positions, key_states),
        aggregation=config.score_aggregation, style=config.rope_style,
        disable_mlr=config.disable_mlr, disable_trig=config.disable_trig,
    )  # fmt: skip
    return _result(scores, config)
