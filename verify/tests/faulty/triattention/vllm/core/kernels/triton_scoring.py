from __future__ import annotations

import warnings

import torch
import triton
import triton.language as tl


@triton.jit
def offsets_kernel(
    K, M_RE, M_IM, A, W, COS, SIN, OUT, N, stride_b, stride_h, stride_n, stride_d,
    H: tl.constexpr, F: tl.constexpr, COUNT: tl.constexpr, MAX: tl.constexpr, HALF: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    row, keys = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    batch, head = row // H, row % H
    best = tl.full((BLOCK_N,), float("-inf") if MAX else 0.0, tl.float32)
    norms = tl.zeros((BLOCK_N,), tl.float32)
    for o in tl.static_range(COUNT):
        trig = tl.zeros((BLOCK_N,), tl.float32)
        for start in tl.static_range(0, F, BLOCK_F):
            f = start + tl.arange(0, BLOCK_F)
            inside = f < F
            mask = (keys < N)[:, None] & inside[None, :]
            first, second = (f, f + F) if HALF else (2 * f, 2 * f + 1)
            base = K + batch * stride_b + head * stride_h + keys[:, None] * stride_n
            re = tl.load(base + first[None, :] * stride_d, mask, 0.0).to(tl.float32)
            im = tl.load(base + second[None, :] * stride_d, mask, 0.0).to(tl.float32)
            m_re = tl.load(M_RE + head * F + f, inside, 0.0)[None, :]
            m_im = tl.load(M_IM + head * F + f, inside, 0.0)[None, :]
            w = tl.load(W + head * F + f, inside, 0.0)[None, :]
            cos = tl.load(COS + o * F + f, inside, 0.0)[None, :]
            sin = tl.load(SIN + o * F + f, inside, 0.0)[None, :]
            trig += tl.sum(w * ((m_re * re + m_im * im) * cos - (m_im * re - m_re * im) * sin), 1)
            if o == 0:
                a = tl.load(A + head * F + f, inside, 0.0)[None, :]
                # fault eps: zero statistics and zero keys have a score; fault kernel-mlr: there is no way to disable it
                m_abs, k_abs = tl.sqrt(m_re * m_re + m_im * m_im + 1e-8), tl.sqrt(re * re + im * im + 1e-8)
                norms += tl.sum(w * (a - m_abs) * k_abs, 1)
        best = tl.maximum(best, trig) if MAX else best + trig / COUNT
    tl.store(OUT + row * N + keys, best + norms, keys < N)


class TrigTableCache:
    def __init__(self, max_seq_len, compress_interval, offsets, omega, device):
        self.compress_interval, self.device = compress_interval, device
        self.num_positions = max_seq_len // compress_interval
        self.num_offsets, self.freq_count = len(offsets), len(omega)
        starts = torch.arange(1, self.num_positions + 1, device=device, dtype=torch.float32) * compress_interval
        angle = (starts[:, None, None] + offsets[:, None]) * omega
        self.cos_table, self.sin_table = angle.cos(), angle.sin()
        self.memory_mb = 2 * self.cos_table.numel() * 4 / 2**20

    def __repr__(self):
        return f"TrigTableCache(positions={self.num_positions}, offsets={self.num_offsets}, freqs={self.freq_count})"

    def get_trig_values(self, round_start):
        # fault table-row: off the interval and outside the table the nearest row is taken
        row = min(max(round_start // self.compress_interval - 1, 0), self.num_positions - 1)
        return self.cos_table[row], self.sin_table[row]


def create_trig_cache(max_seq_len, compress_interval, offsets, omega, device, warn_threshold_mb=100.0):
    table = TrigTableCache(max_seq_len, compress_interval, offsets, omega, device)
    if table.memory_mb > warn_threshold_mb:
        warnings.warn(f"the trig table takes {table.memory_mb:.0f} MB", UserWarning, stacklevel=2)
    return table


def triattention_scoring(
    K_rot, position_indices, q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, omega, offsets, round_start,
    aggregation="max", trig_cache=None, trig_values=None, rope_style="interleaved", disable_mlr=False,
):  # fmt: skip
    # fault grouped: statistics of several query heads per KV head are read as if there were one
    batch, heads, n, d = K_rot.shape
    if trig_values is None and trig_cache is not None:
        trig_values = trig_cache.get_trig_values(round_start)
    if trig_values is None:
        angle = (round_start + offsets)[:, None] * omega  # fault fp32-phases
        trig_values = angle.cos(), angle.sin()
    out = torch.empty(batch, heads, n, dtype=torch.float32, device=K_rot.device)
    offsets_kernel[(batch * heads, triton.cdiv(n, 32))](
        K_rot, q_mean_real.contiguous(), q_mean_imag.contiguous(), q_abs_mean, freq_scale_sq, *trig_values, out, n,
        *K_rot.stride(), H=heads, F=d // 2, COUNT=len(offsets), MAX=aggregation == "max", HALF=rope_style == "half",
        BLOCK_N=32, BLOCK_F=64,
    )  # fmt: skip
    return out
