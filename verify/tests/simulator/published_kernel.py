"""The kernel of ``published_design``; importing this imports triton."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def published_kernel(
    k_ptr, mean_ptr, weight_ptr, omega_ptr, offset_ptr, out_ptr, position, N, A,
    F: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    h = tl.program_id(1)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    f = tl.arange(0, F)
    inside = n < N
    row = k_ptr + (h * N + n)[:, None] * 2 * F + f[None, :]
    k_re = tl.load(row, mask=inside[:, None], other=0.0).to(tl.float32)
    k_im = tl.load(row + F, mask=inside[:, None], other=0.0).to(tl.float32)
    m_re = tl.load(mean_ptr + h * 2 * F + f)[None, :]
    m_im = tl.load(mean_ptr + h * 2 * F + F + f)[None, :]
    weight = tl.load(weight_ptr + h * F + f)[None, :]
    omega = tl.load(omega_ptr + f)
    c_re = m_re * k_re + m_im * k_im
    c_im = m_im * k_re - m_re * k_im
    best = tl.full((BLOCK_N,), float("-inf"), tl.float32)
    for a in range(A):
        phase = (position + tl.load(offset_ptr + a)) * omega
        terms = c_re * tl.cos(phase)[None, :] - c_im * tl.sin(phase)[None, :]
        best = tl.maximum(best, tl.sum(weight * terms, axis=1))
    tl.store(out_ptr + h * N + n, best, mask=inside)
