"""Rotary pairs: how the D dims of a head form F = D / 2 complex numbers, rotating them, and undoing a rotation.

Letters used in the whole package: B batch, H KV heads, G query heads per KV head, N cached tokens, D head dim,
F frequencies, O offsets, t position of the next token, s attention scaling.
"""

from __future__ import annotations

from typing import Literal

import torch

from triattention.errors import TriAttentionError

RopeStyle = Literal["half", "interleaved"]


def check_style(style: str) -> None:
    """Raise TriAttentionError unless ``style`` is ``half`` (f, f + F) or ``interleaved`` (2f, 2f + 1)."""
    if style not in ("half", "interleaved"):
        raise TriAttentionError(f"rope_style is {style!r}; use 'half' or 'interleaved'")


def split_pairs(x: torch.Tensor, style: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Views of the real and the imaginary parts: ``[..., D]`` to two ``[..., F]``."""
    check_style(style)
    if x.shape[-1] % 2:
        raise TriAttentionError(f"the last dimension is {x.shape[-1]}; rotary pairs need an even number of dims")
    if style == "half":
        half = x.shape[-1] // 2
        return x[..., :half], x[..., half:]
    return x[..., 0::2], x[..., 1::2]


def join_pairs(real: torch.Tensor, imag: torch.Tensor, style: str) -> torch.Tensor:
    """The inverse of ``split_pairs``: two ``[..., F]`` to ``[..., D]``."""
    check_style(style)
    if style == "half":
        return torch.cat([real, imag], dim=-1)
    return torch.stack([real, imag], dim=-1).flatten(-2)


def rotate_half(x: torch.Tensor, *, style: str = "half") -> torch.Tensor:
    """Multiply every pair by i: (re, im) becomes (-im, re). Shape ``[..., D]`` in and out."""
    real, imag = split_pairs(x, style)
    return join_pairs(-imag, real, style)


def rotate(x: torch.Tensor, positions: torch.Tensor, omega: torch.Tensor, scaling: float, style: str) -> torch.Tensor:
    """RoPE: rotate pair f of ``x`` ``[..., T, D]`` by position times omega_f and multiply by ``scaling``.

    ``positions`` int ``[..., T]``, broadcast over the leading dims; ``omega`` ``[F]``. The first 2 F dims are rotated
    and scaled, the others are unchanged. Phases are computed in float64.
    """
    angle = positions[..., None].to(torch.float64) * omega.to(torch.float64)
    cos, sin = ((scaling * part).to(x.dtype) for part in (angle.cos(), angle.sin()))
    n_rotated = 2 * omega.numel()
    real, imag = split_pairs(x[..., :n_rotated], style)
    turned = join_pairs(real * cos - imag * sin, real * sin + imag * cos, style)
    return torch.cat([turned, x[..., n_rotated:]], dim=-1)


def invert_rope(
    rotated: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, scale: float | torch.Tensor, *, style: str = "half"
) -> torch.Tensor:
    """Undo rotation and attention scaling: the key before RoPE, ``[..., D]``.

    ``cos`` and ``sin`` ``[..., D]`` are the output of the model's rotary module, so they contain ``scale`` (s), as the
    rotated key does; the result does not. Raises TriAttentionError if ``scale`` is the number 0.
    """
    if isinstance(scale, (int, float)) and scale == 0:
        raise TriAttentionError(
            "the attention scaling is 0; pass the rotary module's attention_scaling (1.0 without YaRN)"
        )
    # rotated = s R k and cos = s cos(angle), so the inverse rotation gives s^2 k
    return (rotated * cos - rotate_half(rotated, style=style) * sin) / scale**2


def to_complex_pairs(tensor: torch.Tensor, *, style: str = "half") -> torch.Tensor:
    """``[..., D]`` real to ``[..., F]`` complex64 (complex128 for float64 input)."""
    real, imag = split_pairs(tensor if tensor.dtype == torch.float64 else tensor.float(), style)
    return torch.complex(real.contiguous(), imag.contiguous())
