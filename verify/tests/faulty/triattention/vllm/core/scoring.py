from __future__ import annotations

import torch

from .kernels.triton_scoring import triattention_scoring


def compute_scores(
    key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None, trig_cache=None
):
    if config.use_triton_scoring:
        return compute_scores_triton(
            key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start, trig_cache
        )
    return compute_scores_pytorch(
        key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start
    )


def compute_scores_triton(
    key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None, trig_cache=None
):
    mean = head_stats["q_mean_complex"]
    # fault trig-option: disable_trig is accepted and ignored
    return triattention_scoring(
        key_states, None, mean[..., 0], mean[..., 1], head_stats["q_abs_mean"], freq_scale_sq, omega, offsets,
        _start(key_states, cache_positions, round_start), config.score_aggregation, trig_cache, None,
        config.rope_style, config.disable_mlr,
    )  # fmt: skip


def compute_scores_pytorch(
    key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None
):
    if len(head_stats["q_abs_mean"]) != key_states.shape[1]:
        raise ValueError("statistics of another number of heads")
    mean = torch.view_as_complex(head_stats["q_mean_complex"].contiguous())
    # fault bf16-norms: keys, and so |k|, in bfloat16; fault layout: always the half layout
    first, second = key_states.to(config.compute_dtype).chunk(2, -1)
    k, k_abs = torch.complex(first.float(), second.float()), (first * first + second * second).sqrt().float()
    extra = head_stats["q_abs_mean"] if config.disable_mlr else head_stats["q_abs_mean"] - mean.abs()
    total = (k_abs * (freq_scale_sq * extra)[:, None]).sum(-1)
    if config.disable_trig:
        return total
    product = mean[:, None] * k.conj() * freq_scale_sq[:, None]
    angle = (_start(key_states, cache_positions, round_start) + offsets)[:, None] * omega
    by_offset = product.real @ angle.cos().T - product.imag @ angle.sin().T
    return total + (by_offset.amax(-1) if config.score_aggregation == "max" else by_offset.mean(-1))


def _start(key_states, cache_positions, round_start):
    if round_start is not None:
        return round_start
    return int(cache_positions.max()) if cache_positions is not None else key_states.shape[2] - 1
