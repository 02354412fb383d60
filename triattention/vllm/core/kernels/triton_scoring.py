"""The published kernel module (plan 3.1 to 3.3): thin front ends over ``triattention.kernels`` and
``triattention.trig``.
"""

from __future__ import annotations

import torch

from triattention.errors import TriAttentionError
from triattention.kernels import score_kernel, score_triton
from triattention.scoring import check_inputs
from triattention.trig import TrigTableCache, check_position, create_trig_cache, fold, phases

__all__ = ["TrigTableCache", "create_trig_cache", "score_kernel", "triattention_scoring"]


def triattention_scoring(
    K_rot: torch.Tensor,
    position_indices: torch.Tensor | None,
    q_mean_real: torch.Tensor,
    q_mean_imag: torch.Tensor,
    q_abs_mean: torch.Tensor,
    freq_scale_sq: torch.Tensor,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    round_start: int,
    aggregation: str = "max",
    trig_cache: TrigTableCache | None = None,
    trig_values: tuple[torch.Tensor, torch.Tensor] | None = None,
    rope_style: str = "interleaved",
    disable_mlr: bool = False,
    *,
    disable_trig: bool = False,
    q_pass: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score cached, already rotated keys with the Triton kernel: float32 ``[B, H*G, N]``.

    ``K_rot`` ``[B, H, N, D]`` in bf16, fp16 or fp32, any strides; ``q_*`` and ``freq_scale_sq`` (the weight w, used
    as given) ``[H*G, F]``, query head h reading KV head ``h // G``; ``omega`` ``[F]``; ``offsets`` ``[O]``.
    ``position_indices`` is ignored, because keys are already rotated. ``trig_values`` = (cos, sin) ``[O, F]`` takes
    precedence over ``trig_cache``, which works for any integer ``round_start`` it covers. ``q_pass`` ``[H*G, P]`` is
    for models that rotate only 2 F = D - P dims of a head. A NaN key gets a NaN score. Source: paper, score of a key;
    plan 3.1.

    Raises TriAttentionError (a ValueError) if shapes, dtypes, devices or ``round_start`` are invalid.
    """
    named = {
        "q_mean_real": q_mean_real,
        "q_mean_imag": q_mean_imag,
        "q_abs_mean": q_abs_mean,
        "freq_scale_sq": freq_scale_sq,
    }
    check_inputs(K_rot, named, omega, rope_style, q_pass)
    cos, sin = _trig(check_position(round_start), offsets, omega, trig_cache, trig_values)
    weights = fold(
        q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, cos, sin,
        aggregation=aggregation, disable_mlr=disable_mlr, disable_trig=disable_trig, q_pass=q_pass,
    )  # fmt: skip
    return score_triton(K_rot, weights, rope_style)


def _trig(
    t: int,
    offsets: torch.Tensor,
    omega: torch.Tensor,
    trig_cache: TrigTableCache | None,
    trig_values: tuple[torch.Tensor, torch.Tensor] | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin ``[O, F]``: the explicit values, else from the table, else computed here."""
    expected = (offsets.numel(), omega.numel())
    if trig_values is not None:
        cos, sin = trig_values
        source = "trig_values"
    elif trig_cache is not None:
        trig_cache.require_same(offsets, omega)
        cos, sin = trig_cache.phases_at(t)
        source = "trig_cache"
    else:
        return phases(t, offsets, omega)
    if tuple(cos.shape) != expected or tuple(sin.shape) != expected:
        raise TriAttentionError(
            f"{source} has shape {tuple(cos.shape)}; {expected[0]} offsets and {expected[1]} frequencies "
            f"need {expected}"
        )
    return cos, sin
