"""The scoring kernel: reads each key once, for any number of offsets and of query heads per KV head.

S[n] = agg_a (k_re[n] . w_re[a] + k_im[n] . w_im[a]) + |k[n]| . w_abs [+ k_pass[n] . w_pass], with the weights of
``trig.fold``; a key is [rotated dims, 2 F | unrotated dims, P], and P is 0 for most models.

K tile [BLOCK_N, F] (re, im)  --- stays in registers --->  for g in G: for a in A: multiply, reduce over F,
aggregate

Set TRITON_INTERPRET=1 before triton is imported to run it on a CPU.
"""

from __future__ import annotations

import contextlib
import os

import torch
import triton
import triton.language as tl

from triattention.errors import TriAttentionError
from triattention.trig import Weights

#: Triton decides at decoration time whether a kernel is interpreted, so this is a constant of the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


# N changes at every round, and specializing on its divisibility by 16 widens no access: one build for all N
@triton.jit(do_not_specialize=["N"])
def score_kernel(
    # K, weights [Bw, H*G, A, 2, F], [H*G, F] and [H*G, P], scores [B, H*G, N]
    k_ptr, w_ptr, w_abs_ptr, w_pass_ptr, out_ptr,
    stride_kb, stride_kh, stride_kn, stride_kd, stride_wb,
    N, G, A,
    F: tl.constexpr, BLOCK_F: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr, MAX: tl.constexpr,
):  # fmt: skip
    tl.static_assert(BLOCK_F >= F, "one block must hold all frequencies")
    tl.static_assert(BLOCK_P >= P, "one block must hold all unrotated dims")
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_heads = tl.num_programs(1) * G
    # the cache of a long context exceeds 2^31 elements, so every address is computed in int64
    o_n = i_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_f = tl.arange(0, BLOCK_F)
    m_n, m_f = o_n < N, o_f < F
    p_row = k_ptr + i_b.to(tl.int64) * stride_kb + i_h.to(tl.int64) * stride_kh + o_n[:, None] * stride_kn
    if INTERLEAVED:
        # one contiguous load of the pairs, split in registers: [BLOCK_N, 2 F] is (re, im), (re, im), ...
        o_d = tl.arange(0, 2 * BLOCK_F)
        m_d = m_n[:, None] & (o_d < 2 * F)[None, :]
        b_k = tl.load(p_row + o_d[None, :].to(tl.int64) * stride_kd, mask=m_d, other=0.0).to(tl.float32)
        b_re, b_im = tl.split(tl.reshape(b_k, (BLOCK_N, BLOCK_F, 2)))
    else:
        m_k = m_n[:, None] & m_f[None, :]
        p_re = p_row + o_f[None, :].to(tl.int64) * stride_kd
        b_re = tl.load(p_re, mask=m_k, other=0.0).to(tl.float32)
        b_im = tl.load(p_re + tl.cast(stride_kd, tl.int64) * F, mask=m_k, other=0.0).to(tl.float32)
    b_abs = tl.sqrt(b_re * b_re + b_im * b_im)
    if P > 0:
        o_p = tl.arange(0, BLOCK_P)
        m_p = o_p < P
        p_pass = p_row + (2 * F + o_p)[None, :].to(tl.int64) * stride_kd
        b_pass = tl.load(p_pass, mask=m_n[:, None] & m_p[None, :], other=0.0).to(tl.float32)

    for g in range(G):
        i_q = i_h * G + g
        p_w = w_ptr + i_b.to(tl.int64) * stride_wb + i_q.to(tl.int64) * A * 2 * F + o_f
        b_wabs = tl.load(w_abs_ptr + i_q * F + o_f, mask=m_f, other=0.0)
        b_norm = b_abs * b_wabs[None, :]
        if MAX:
            b_best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
            for a in range(A):
                b_wre = tl.load(p_w + a * 2 * F, mask=m_f, other=0.0)
                b_wim = tl.load(p_w + a * 2 * F + F, mask=m_f, other=0.0)
                b_s = tl.sum(b_re * b_wre[None, :] + b_im * b_wim[None, :], axis=1)
                b_best = tl.maximum(b_best, b_s, propagate_nan=tl.PropagateNan.ALL)
            b_score = b_best + tl.sum(b_norm, axis=1)
        else:
            b_wre = tl.load(p_w, mask=m_f, other=0.0)
            b_wim = tl.load(p_w + F, mask=m_f, other=0.0)
            b_score = tl.sum(b_re * b_wre[None, :] + b_im * b_wim[None, :] + b_norm, axis=1)
        if P > 0:
            b_wpass = tl.load(w_pass_ptr + i_q * P + o_p, mask=m_p, other=0.0)
            b_score += tl.sum(b_pass * b_wpass[None, :], axis=1)
        p_out = out_ptr + (i_b.to(tl.int64) * n_heads + i_q) * N + o_n
        tl.store(p_out, b_score, mask=m_n)


#: Keys and warps per program, by head dim, bytes per key element and whether the tile is used only once (one query
#: head, and the mean). Each entry has the fewest instructions per key among the blocks that need at most 96 registers
#: and no stack on any architecture: 64 values of K per thread, or 32 where fp32 values, or values and norms kept for
#: another head or offset, need more registers. ``python -m verify compile`` measures them.
_BLOCKS = {
    (64, 2, True): (64, 2), (64, 4, True): (32, 2), (64, 2, False): (64, 4), (64, 4, False): (64, 4),
    (128, 2, True): (64, 4), (128, 4, True): (32, 4), (128, 2, False): (32, 4), (128, 4, False): (32, 4),
    (256, 2, True): (64, 8), (256, 4, True): (32, 8), (256, 2, False): (32, 8), (256, 4, False): (16, 8),
}  # fmt: skip


def block(head_dim: int, key_bytes: int, passes: int) -> tuple[int, int]:
    """``(BLOCK_N, num_warps)`` for keys of ``head_dim`` values of ``key_bytes`` each.

    ``passes`` is the number of products per key: query heads times offsets. A head dim between two rows of the table
    uses the larger one; above 256 the tile size in values stays the same.
    """
    padded = triton.next_power_of_2(head_dim)
    keys, warps = _BLOCKS[min(max(padded, 64), 256), key_bytes, passes == 1]
    return max(1, keys * 256 // max(padded, 256)), warps


def score_triton(keys: torch.Tensor, weights: Weights, style: str) -> torch.Tensor:
    """Scores of rotated keys by the Triton kernel: ``[B, H, N, D]`` in bf16, fp16 or fp32 to float32 ``[B, H*G, N]``.

    Works for any strides and storage offset. Raises TriAttentionError for CPU keys outside the interpreter.
    """
    if not keys.is_cuda and not INTERPRETED:
        raise TriAttentionError(
            f"the keys are on {keys.device}, but the Triton kernel needs a CUDA device; use the PyTorch path "
            "(use_triton_scoring=False), or set TRITON_INTERPRET=1 before triton is imported"
        )
    batch, heads, n_tokens, _ = keys.shape
    n_weight_rows, n_query_heads, width, n_freq = weights.re.shape
    out = torch.empty((batch, n_query_heads, n_tokens), dtype=torch.float32, device=keys.device)
    if out.numel() == 0:
        return out
    table = torch.stack([weights.re, weights.im], dim=-2).to(torch.float32).contiguous()
    norm = weights.norm.to(torch.float32).contiguous()
    # with None the kernel is built without this part, which saves registers
    content = None if weights.content is None else weights.content.to(torch.float32).contiguous()
    n_pass = 0 if content is None else content.shape[-1]
    group = n_query_heads // heads
    keys_per_program, warps = block(2 * n_freq + n_pass, keys.element_size(), group * width)
    grid = (triton.cdiv(n_tokens, keys_per_program), heads, batch)
    # Triton launches on the current device, which may not be that of the keys
    with torch.cuda.device(keys.device) if keys.is_cuda else contextlib.nullcontext():
        score_kernel[grid](
            keys, table, norm, content, out,
            *keys.stride(), table.stride(0) if n_weight_rows > 1 else 0,
            n_tokens, group, width,
            F=n_freq, BLOCK_F=triton.next_power_of_2(n_freq),
            P=n_pass, BLOCK_P=triton.next_power_of_2(max(n_pass, 1)), BLOCK_N=keys_per_program,
            INTERLEAVED=style == "interleaved", MAX=width > 1, num_warps=warps,
        )  # fmt: skip
    return out
