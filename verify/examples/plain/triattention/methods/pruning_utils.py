"""RoPE, the published statistics file, and the score of a key before RoPE."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..algorithm import AGGREGATIONS, STYLES, complex_pairs, one_of

#: omega of these depends on the length of the sequence.
_CHANGING_ROPE = ("dynamic", "longrope")


@dataclass(frozen=True)
class HeadFrequencyStats:
    """The queries q of one head before RoPE: ``q_mean_complex`` is E[q], complex, ``q_abs_mean`` E|q|; ``[F]`` both."""

    q_mean_complex: torch.Tensor
    q_abs_mean: torch.Tensor


def _key(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def save_head_frequency_stats(
    output_path: str | Path, sampled_heads: Iterable[tuple[int, int]],
    stats_map: Mapping[tuple[int, int], HeadFrequencyStats], metadata: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the published layout. Raises ValueError for a sampled head without statistics."""
    heads = [(int(layer), int(head)) for layer, head in sampled_heads]
    if absent := [head for head in heads if head not in stats_map]:
        raise ValueError(f"layer {absent[0][0]}, head {absent[0][1]} is sampled and has no statistics")
    stats = {
        _key(*head): {
            "q_mean_real": stats_map[head].q_mean_complex.real.float().cpu().clone(),
            "q_mean_imag": stats_map[head].q_mean_complex.imag.float().cpu().clone(),
            "q_abs_mean": stats_map[head].q_abs_mean.float().cpu().clone(),
        }
        for head in heads
    }
    torch.save({"metadata": {**metadata, "sampled_heads": [list(head) for head in heads]}, "stats": stats}, output_path)


def load_head_frequency_stats(
    stats_path: str | Path, device: torch.device | str
) -> tuple[dict[str, Any], dict[tuple[int, int], HeadFrequencyStats]]:
    """Metadata and statistics by (layer, query head).

    Raises ValueError for another layout, a sampled head that is absent, and numbers that no queries can have.
    """
    content = torch.load(stats_path, map_location=device, weights_only=True)
    if not isinstance(content, dict) or not {"metadata", "stats"} <= content.keys():
        raise ValueError(f"{stats_path} does not have the published layout, a dict of metadata and stats")
    metadata, found = content["metadata"], {}
    for layer, head in metadata["sampled_heads"]:
        entry = content["stats"].get(_key(layer, head))
        if entry is None:
            raise ValueError(f"{stats_path} lists layer {layer}, head {head} and has no statistics of it")
        mean = torch.complex(entry["q_mean_real"].float(), entry["q_mean_imag"].float())
        mean_abs = entry["q_abs_mean"].float()
        # in float32 the mean of equal queries may be a rounding longer than their mean length
        if not (mean_abs * (1 + 1e-5) >= mean.abs()).all() or not mean_abs.isfinite().all():
            raise ValueError(f"{stats_path}: layer {layer}, head {head} has E|q| below |E[q]|, or a NaN or Inf")
        found[layer, head] = HeadFrequencyStats(mean, mean_abs)
    return metadata, found


def build_rotary(
    cache_device: torch.device | str, model_path: str | Path | None, dtype: torch.dtype, config: Any = None
) -> torch.nn.Module:
    """The rotary module of the model in ``model_path``, or of ``config``, as transformers makes it.

    Raises ValueError where its frequencies depend on the length.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    config = AutoConfig.from_pretrained(model_path) if config is None else config
    module = sys.modules[MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].__module__]
    made = next(value for name, value in vars(module).items() if name.endswith("RotaryEmbedding"))(config=config)
    if getattr(made, "rope_type", "default") in _CHANGING_ROPE:
        raise ValueError(f"rope_type is {made.rope_type!r}, whose frequencies change with the length; it is not served")
    return made.to(device=cache_device)


def compute_frequency_scaling(
    rotary: torch.nn.Module, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """The weight of keys before RoPE, ``[head_dim / 2]``: the square of what attention multiplies q and k by."""
    return torch.full((head_dim // 2,), rotary.attention_scaling**2, dtype=dtype, device=device)


def build_geometric_offsets(max_length: int, device: torch.device | str) -> torch.Tensor:
    """1, 2, 4, ... up to ``max_length``, float32. Raises ValueError below 1."""
    if max_length < 1:
        raise ValueError(f"the largest offset is {max_length}; it must be at least 1")
    return torch.tensor([float(1 << i) for i in range(int(max_length).bit_length())], device=device)


def rotate_half(x: torch.Tensor, *, style: str = "half") -> torch.Tensor:
    """Every pair turned by a quarter: (real, imag) becomes (-imag, real)."""
    one_of("rope_style", style, STYLES)
    if style == "half":
        real, imag = x.chunk(2, dim=-1)
        return torch.cat([-imag, real], dim=-1)
    return torch.stack([-x[..., 1::2], x[..., ::2]], dim=-1).flatten(-2)


def invert_rope(
    rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float, *, style: str = "half"
) -> torch.Tensor:
    """The keys before RoPE; ``cos`` and ``sin`` are the rotary module's, which ``scale`` has multiplied."""
    return (rotated * cos - rotate_half(rotated, style=style) * sin) / scale**2


def to_complex_pairs(tensor: torch.Tensor, *, style: str = "half") -> torch.Tensor:
    """Complex128 ``[..., F]`` of real ``[..., 2F]``."""
    return complex_pairs(tensor, style)


def compute_frequency_statistics_from_means(
    q_mean_complex: torch.Tensor, q_abs_mean: torch.Tensor, k_unrot: torch.Tensor, *, style: str = "half",
    disable_mlr: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Amplitude, phase and norm term of keys before RoPE, float64 ``[N, F]`` each: |m||k|, arg m conj(k), (a - |m|)|k|.

    ``q_mean_complex`` and ``q_abs_mean`` ``[F]``, ``k_unrot`` ``[N, 2F]``. Under ``disable_mlr`` the last is a |k|.
    """
    mean, k = q_mean_complex.to(torch.complex128), complex_pairs(k_unrot, style)
    rest = q_abs_mean.double() if disable_mlr else q_abs_mean.double() - mean.abs()
    product = mean * k.conj()
    return product.abs(), product.angle(), rest * k.abs()


def score_keys_for_round(
    key_indices: torch.Tensor, round_start: int, amp: torch.Tensor, phi: torch.Tensor, omega: torch.Tensor,
    extra: torch.Tensor, offsets: torch.Tensor, aggregation: str, freq_scale_sq: torch.Tensor,
    disable_trig: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The scores ``[N]``, float32, of keys at the positions ``key_indices`` ``[N]``, for a query at ``round_start``."""
    one_of("aggregation", aggregation, AGGREGATIONS)
    weight = freq_scale_sq.double()
    norm_term = (extra * weight).sum(-1)
    if disable_trig:
        return norm_term.float()
    distance = round_start + offsets.double()[:, None] - key_indices.double()
    trig_term = (amp * weight * torch.cos(distance[..., None] * omega.double() + phi)).sum(-1)
    return (norm_term + (trig_term.amax(0) if aggregation == "max" else trig_term.mean(0))).float()
