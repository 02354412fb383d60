"""The published scoring entry points (plan 3.2): fold the weights, then run the kernel or PyTorch."""

from __future__ import annotations

import torch

from triattention.errors import TriAttentionError
from triattention.scoring import check_inputs, score
from triattention.trig import TrigTableCache, check_position, fold, phases
from triattention.vllm.core.config import TriAttentionConfig

HeadStats = dict[str, torch.Tensor]


def compute_scores(
    key_states: torch.Tensor,
    cache_positions: torch.Tensor | None,
    head_stats: HeadStats,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    config: TriAttentionConfig,
    round_start: int | None = None,
    trig_cache: TrigTableCache | None = None,
) -> torch.Tensor:
    """Scores ``[B, H*G, N]`` (``[B, N]`` for ``per_layer``) by the path ``config.use_triton_scoring`` selects; there is
    no fallback.

    ``key_states`` ``[B, H, N, D]``; ``head_stats`` has ``q_mean_complex`` ``[H*G, F, 2]`` and ``q_abs_mean``
    ``[H*G, F]`` (default: |q_mean|), and ``q_pass_mean`` ``[H*G, D - 2 F]`` for a model that does not rotate every dim.
    ``round_start=None`` is the maximum of ``cache_positions``, else N - 1. The dtype is ``config.topk_dtype``. Phases
    for a round beyond ``trig_cache`` are computed directly. Raises TriAttentionError if shapes, dtypes or devices do
    not match.
    """
    scoring = compute_scores_triton if config.use_triton_scoring else compute_scores_pytorch
    args = (key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start)
    return scoring(*args, trig_cache) if config.use_triton_scoring else scoring(*args, trig_cache=trig_cache)


def compute_scores_triton(
    key_states: torch.Tensor,
    cache_positions: torch.Tensor | None,
    head_stats: HeadStats,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    config: TriAttentionConfig,
    round_start: int | None = None,
    trig_cache: TrigTableCache | None = None,
) -> torch.Tensor:
    """``compute_scores`` through the Triton kernel."""
    return _scores(
        key_states,
        cache_positions,
        head_stats,
        omega,
        offsets,
        freq_scale_sq,
        config,
        round_start,
        trig_cache,
        use_triton=True,
    )


def compute_scores_pytorch(
    key_states: torch.Tensor,
    cache_positions: torch.Tensor | None,
    head_stats: HeadStats,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    config: TriAttentionConfig,
    round_start: int | None = None,
    *,
    trig_cache: TrigTableCache | None = None,
) -> torch.Tensor:
    """``compute_scores`` in PyTorch, on any device."""
    return _scores(
        key_states,
        cache_positions,
        head_stats,
        omega,
        offsets,
        freq_scale_sq,
        config,
        round_start,
        trig_cache,
        use_triton=False,
    )


def _scores(
    key_states: torch.Tensor,
    cache_positions: torch.Tensor | None,
    head_stats: HeadStats,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    config: TriAttentionConfig,
    round_start: int | None,
    trig_cache: TrigTableCache | None,
    *,
    use_triton: bool,
) -> torch.Tensor:
    if "q_mean_complex" not in head_stats:
        raise TriAttentionError(
            f"head_stats has {sorted(head_stats)}; it needs q_mean_complex, and q_abs_mean unless it is |q_mean|"
        )
    m = head_stats["q_mean_complex"]
    m_re, m_im = (m.real, m.imag) if m.is_complex() else (m[..., 0], m[..., 1])
    a = head_stats.get("q_abs_mean")
    a = torch.hypot(m_re, m_im) if a is None else a
    weight = freq_scale_sq.expand_as(a) if freq_scale_sq.shape == a.shape[-1:] else freq_scale_sq
    named = {"q_mean_complex": m_re, "q_abs_mean": a, "freq_scale_sq": weight}
    q_pass = head_stats.get("q_pass_mean")
    check_inputs(key_states, named, omega, config.rope_style, q_pass)
    t = _round_start(key_states, cache_positions, round_start)
    covered = trig_cache is not None and config.use_trig_cache and t <= trig_cache.max_seq_len
    if trig_cache is not None:
        trig_cache.require_same(offsets, omega)
    cos, sin = trig_cache.phases_at(t) if covered else phases(t, offsets, omega)
    weights = fold(
        m_re, m_im, a, weight, cos, sin,
        aggregation=config.score_aggregation, disable_mlr=config.disable_mlr, disable_trig=config.disable_trig,
        q_pass=q_pass,
    )  # fmt: skip
    scores = score(key_states, weights, config.rope_style, use_triton=use_triton)
    if config.pruning_mode == "per_layer":
        scores = scores.mean(1)
    return scores.to(config.topk_dtype)


def _round_start(keys: torch.Tensor, positions: torch.Tensor | None, round_start: int | None) -> int:
    if round_start is None:
        round_start = int(positions.max()) if positions is not None and positions.numel() else max(keys.shape[2] - 1, 0)
    return check_position(round_start)
