"""The published helper functions (plan 2.3): pre-RoPE scoring, statistics files, offsets and rotary utilities."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from triattention import statistics
from triattention.architecture import build_rotary
from triattention.errors import TriAttentionError
from triattention.rope import invert_rope, rotate_half, to_complex_pairs
from triattention.trig import check_position, geometric_offsets

__all__ = [
    "HeadFrequencyStats",
    "build_geometric_offsets",
    "build_rotary",
    "compute_frequency_scaling",
    "compute_frequency_statistics_from_means",
    "invert_rope",
    "load_head_frequency_stats",
    "rotate_half",
    "save_head_frequency_stats",
    "score_keys_for_round",
    "to_complex_pairs",
]


@dataclass(frozen=True)
class HeadFrequencyStats:
    """m = E[q] complex64 ``[F]`` and a = E|q| float32 ``[F]`` of one query head."""

    q_mean_complex: torch.Tensor
    q_abs_mean: torch.Tensor


def compute_frequency_scaling(
    rotary: torch.nn.Module, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """s^2 per frequency, ``[head_dim / 2]`` in ``dtype``: the weight of unrotated keys; cached keys contain one s."""
    scaling = float(getattr(rotary, "attention_scaling", 1.0))
    return torch.full((head_dim // 2,), scaling**2, dtype=dtype, device=device)


def build_geometric_offsets(max_length: int, device: torch.device | str) -> torch.Tensor:
    """1, 2, 4, ... up to ``max_length``, float32 ``[O]``."""
    return geometric_offsets(max_length, device)


def compute_frequency_statistics_from_means(
    q_mean_complex: torch.Tensor,
    q_abs_mean: torch.Tensor,
    k_unrot: torch.Tensor,
    *,
    style: str = "half",
    disable_mlr: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Amplitude |m||k|, phase arg(m conj k) and extra term (a - |m|)|k| of unrotated keys, each ``[N, F]``.

    ``q_mean_complex`` and ``q_abs_mean`` ``[F]`` of one head, ``k_unrot`` ``[N, D]``. With ``disable_mlr`` the extra
    term is a |k|.
    """
    k = to_complex_pairs(k_unrot, style=style)
    relative = q_mean_complex * k.conj()
    amplitude, k_abs, m_abs = relative.abs(), k.abs(), q_mean_complex.abs()
    extra = (q_abs_mean if disable_mlr else q_abs_mean - m_abs) * k_abs
    return amplitude, relative.angle(), extra


def score_keys_for_round(
    key_indices: torch.Tensor,
    round_start: int,
    amp: torch.Tensor,
    phi: torch.Tensor,
    omega: torch.Tensor,
    extra: torch.Tensor,
    offsets: torch.Tensor,
    aggregation: str,
    freq_scale_sq: torch.Tensor,
    disable_trig: bool = False,
) -> torch.Tensor:
    """Scores of one head's unrotated keys from their positions, float32 ``[N]`` (paper; the pre-RoPE form).

    ``key_indices`` ``[N]``, ``amp``, ``phi``, ``extra`` ``[N, F]``, ``omega`` and ``freq_scale_sq`` (s^2) ``[F]``,
    ``offsets`` ``[O]``. Phases in float64. Raises TriAttentionError for an unknown aggregation.
    """
    if aggregation not in ("mean", "max"):
        raise TriAttentionError(f"aggregation is {aggregation!r}; use 'mean' or 'max'")
    weight, omega = freq_scale_sq.to(torch.float64), omega.to(torch.float64)
    additive = (extra.to(torch.float64) * weight).sum(-1)
    if disable_trig:
        return additive.to(torch.float32)
    distance = check_position(round_start) - key_indices.to(torch.float64)
    base = distance[:, None] * omega + phi.to(torch.float64)
    shift = offsets.to(torch.float64)[:, None] * omega  # [O, F]
    in_phase, quadrature = (amp.to(torch.float64) * weight * x for x in (base.cos(), base.sin()))
    # cos(base + shift) by the addition theorem: a matrix product instead of [N, O, F] cosines
    by_offset = in_phase @ shift.cos().mT - quadrature @ shift.sin().mT
    trig = by_offset.mean(-1) if aggregation == "mean" else by_offset.amax(-1)
    return (trig + additive).to(torch.float32)


def load_head_frequency_stats(
    stats_path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Any], dict[tuple[int, int], HeadFrequencyStats]]:
    """``(metadata, {(layer, head): HeadFrequencyStats})`` of a file in either layout, tensors on ``device``.

    The result has exactly the heads in the file; a published file may lack some. Raises TriAttentionError naming the
    file and the problem.
    """
    payload, source = statistics.read_payload(stats_path), str(stats_path)
    if payload.get("format") == statistics.FORMAT:
        loaded = statistics.parse(payload, source)
        metadata = {**loaded.architecture.to_dict(), "token_count": loaded.token_count}
        m = torch.complex(loaded.q_mean_real, loaded.q_mean_imag)
        layers, heads, _ = m.shape
        rows = {(i, j): (m[i, j], loaded.q_abs_mean[i, j]) for i in range(layers) for j in range(heads)}
    else:
        entries = statistics.published_heads(payload, source)
        metadata = payload.get("metadata", {})
        rows = {
            key: (torch.complex(entry["q_mean_real"], entry["q_mean_imag"]), entry["q_abs_mean"])
            for key, entry in entries.items()
        }
    by_head = {key: HeadFrequencyStats(m.to(device), a.to(device)) for key, (m, a) in rows.items()}
    return {**metadata, "sampled_heads": [list(key) for key in by_head]}, by_head


def save_head_frequency_stats(
    output_path: str | os.PathLike[str],
    sampled_heads: Iterable[tuple[int, int]],
    stats_map: Mapping[tuple[int, int], HeadFrequencyStats],
    metadata: Mapping[str, Any],
) -> None:
    """Write the published layout atomically. Raises TriAttentionError when a sampled head has no statistics."""
    heads = [tuple(head) for head in sampled_heads]
    absent = [head for head in heads if head not in stats_map]
    if absent:
        raise TriAttentionError(
            f"layer {absent[0][0]}, head {absent[0][1]} is sampled but has no statistics; calibrate it"
        )
    statistics.save_published(output_path, {head: stats_map[head] for head in heads}, dict(metadata))
