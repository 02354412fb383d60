"""The score of a cached key, S(k; t) of the paper in its folded form, in PyTorch and through the Triton kernel."""

from __future__ import annotations

import torch

from triattention.errors import TriAttentionError
from triattention.rope import check_style, split_pairs
from triattention.trig import Weights

KEY_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check_inputs(
    keys: torch.Tensor,
    statistics: dict[str, torch.Tensor],
    omega: torch.Tensor,
    style: str,
    q_pass: torch.Tensor | None = None,
) -> None:
    """Raise TriAttentionError, naming the argument and its shape, unless the shapes and dtypes fit together.

    ``keys`` ``[B, H, N, D]``; each of ``statistics`` ``[H*G, F]``; ``omega`` ``[F]``; ``q_pass`` ``[H*G, P]`` with
    D = 2 F + P, where P is 0 without it. Values are not checked, because that would wait for the device. A NaN key
    gets a NaN score and does not affect others.
    """
    check_style(style)
    if keys.ndim != 4:
        raise TriAttentionError(
            f"the keys have shape {tuple(keys.shape)}; they must be [batch, kv heads, tokens, head dim]"
        )
    if keys.dtype not in KEY_DTYPES:
        raise TriAttentionError(f"the keys are {keys.dtype}; use bfloat16, float16 or float32")
    n_freq, (heads, head_dim) = omega.numel(), (keys.shape[1], keys.shape[3])
    n_pass = 0 if q_pass is None else q_pass.shape[-1]
    if head_dim != 2 * n_freq + n_pass:
        raise TriAttentionError(
            f"the keys have head dim {head_dim}, omega {n_freq} frequencies and q_pass {n_pass} unrotated dims; "
            "head dim must be 2 x frequencies + unrotated dims"
        )
    query_heads = next(iter(statistics.values())).shape[0]
    if q_pass is not None and q_pass.shape[0] != query_heads:
        raise TriAttentionError(f"q_pass has {q_pass.shape[0]} query heads and the statistics {query_heads}")
    for name, tensor in statistics.items():
        if tensor.shape != (query_heads, n_freq):
            raise TriAttentionError(f"{name} has shape {tuple(tensor.shape)}; expected ({query_heads}, {n_freq})")
        if tensor.device != keys.device:
            raise TriAttentionError(f"{name} is on {tensor.device}, but the keys on {keys.device}; move one of them")
    if heads == 0 or query_heads % heads:
        raise TriAttentionError(f"the statistics' {query_heads} query heads are not a multiple of {heads} KV heads")


def score_torch(keys: torch.Tensor, weights: Weights, style: str) -> torch.Tensor:
    """Scores of rotated keys in PyTorch: ``[B, H, N, D]`` to float32 ``[B, H*G, N]``.

    The products run in float64, so TF32 and bf16 matmul settings do not apply, and the score of a key does not depend
    on how many keys or rows are scored together.
    """
    batch, heads, n_tokens, _ = keys.shape
    rows, query_heads, width, n_freq = weights.re.shape
    group = query_heads // heads
    real, imag = (x.to(torch.float64) for x in split_pairs(keys[..., : 2 * n_freq], style))
    w_re, w_im = (w.reshape(rows, heads, group * width, n_freq).mT for w in (weights.re, weights.im))
    trig = real @ w_re + imag @ w_im  # [B, H, N, G*A]
    trig = trig.view(batch, heads, n_tokens, group, width).amax(-1)
    total = trig + torch.hypot(real, imag) @ weights.norm.reshape(heads, group, n_freq).mT
    if weights.content is not None:
        unrotated = keys[..., 2 * n_freq :].to(torch.float64)
        total = total + unrotated @ weights.content.reshape(heads, group, -1).mT
    return total.mT.reshape(batch, query_heads, n_tokens).to(torch.float32)


def score(keys: torch.Tensor, weights: Weights, style: str, *, use_triton: bool | None = None) -> torch.Tensor:
    """Scores float32 ``[B, H*G, N]``; ``use_triton`` None is the kernel for keys on a GPU and PyTorch elsewhere."""
    if keys.is_cuda if use_triton is None else use_triton:
        from triattention.kernels import score_triton  # importing triton takes seconds, and a CPU run does not need it

        return score_triton(keys, weights, style)
    return score_torch(keys, weights, style)
