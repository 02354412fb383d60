"""The score in one naive Triton kernel: a loop over offsets, with phases that are formed in float64 outside."""

from __future__ import annotations

import warnings

import torch
import triton
import triton.language as tl

from ....algorithm import AGGREGATIONS, STYLES, one_of

_BLOCK_N = 64


@triton.jit
def score_kernel(
    p_keys, p_real, p_imag, p_abs, p_weight, p_cos, p_sin, p_scores,
    stride_b, stride_h, stride_n, stride_d,
    query_heads, n_keys, n_offsets,
    GROUP: tl.constexpr, F: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_N: tl.constexpr,
    INTERLEAVED: tl.constexpr, MAX: tl.constexpr, DISABLE_MLR: tl.constexpr, DISABLE_TRIG: tl.constexpr,
):  # fmt: skip
    """A block of keys for one row and one query head."""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
    # 64 bits, because a cache can have more elements than 32 can count
    which = tl.program_id(1).to(tl.int64)
    row, head = which // query_heads, which % query_heads
    f = tl.arange(0, BLOCK_F)
    m_n, m_f = n < n_keys, f < F
    if INTERLEAVED:
        at_real, at_imag = 2 * f, 2 * f + 1
    else:
        at_real, at_imag = f, f + F
    p_key = p_keys + row * stride_b + (head // GROUP) * stride_h + n[:, None] * stride_n
    mask = m_n[:, None] & m_f[None, :]
    k_real = tl.load(p_key + at_real[None, :] * stride_d, mask, 0.0).to(tl.float32)
    k_imag = tl.load(p_key + at_imag[None, :] * stride_d, mask, 0.0).to(tl.float32)
    q_real = tl.load(p_real + head * F + f, m_f, 0.0)
    q_imag = tl.load(p_imag + head * F + f, m_f, 0.0)
    q_abs = tl.load(p_abs + head * F + f, m_f, 0.0)
    weight = tl.load(p_weight + head * F + f, m_f, 0.0)

    rest = q_abs if DISABLE_MLR else q_abs - tl.sqrt_rn(q_real * q_real + q_imag * q_imag)
    score = tl.sum(weight * rest * tl.sqrt_rn(k_real * k_real + k_imag * k_imag), 1)
    if not DISABLE_TRIG:
        # m conj(k)
        c_real = q_real * k_real + q_imag * k_imag
        c_imag = q_imag * k_real - q_real * k_imag
        total = tl.zeros((BLOCK_N,), tl.float32)
        best = tl.full((BLOCK_N,), -float("inf"), tl.float32)
        for o in range(n_offsets):
            cos = tl.load(p_cos + o * F + f, m_f, 0.0)
            sin = tl.load(p_sin + o * F + f, m_f, 0.0)
            value = tl.sum(weight * (c_real * cos - c_imag * sin), 1)
            total += value
            best = tl.maximum(best, value)
        score += best if MAX else total / n_offsets
    tl.store(p_scores + which * n_keys + n, score, m_n)


def _phases(t: int | torch.Tensor, offsets: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of (t + o) omega, float32 ``[..., O, F]``; formed in float64, so exact at any t."""
    angle = (t + offsets.double())[..., None] * omega.double()
    return angle.cos().float(), angle.sin().float()


class TrigTableCache:
    """cos and sin of (t + o) omega at t = interval, 2 interval, ... up to ``max_seq_len``: ``[positions, O, F]``.

    Raises ValueError for an interval that is below 1 or above ``max_seq_len``.
    """

    def __init__(
        self, max_seq_len: int, compress_interval: int, offsets: torch.Tensor, omega: torch.Tensor,
        device: torch.device | str,
    ) -> None:  # fmt: skip
        if not 1 <= compress_interval <= max_seq_len:
            raise ValueError(f"compress_interval is {compress_interval}; use 1 to max_seq_len, {max_seq_len}")
        self.compress_interval, self.device = compress_interval, torch.device(device)
        # copies, so that a call can tell that its tensors have other numbers by now
        self.offsets, self.omega = offsets.to(device, copy=True), omega.to(device, copy=True)
        self.num_positions = max_seq_len // compress_interval
        self.num_offsets, self.freq_count = len(offsets), len(omega)
        rows = compress_interval * torch.arange(1, self.num_positions + 1, device=device)
        self.cos_table, self.sin_table = _phases(rows[:, None], self.offsets, self.omega)

    @property
    def memory_mb(self) -> float:
        """Both tables, in MiB."""
        return 2 * self.cos_table.numel() * 4 / 2**20

    def get_trig_values(self, round_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of ``round_start``: cos and sin, ``[O, F]``. Raises ValueError where there is none."""
        row, residual = divmod(round_start, self.compress_interval)
        if residual or not 1 <= row <= self.num_positions:
            raise ValueError(f"the table has no row for {round_start}: {self!r}")
        return self.cos_table[row - 1], self.sin_table[row - 1]

    def covers(self, round_start: int) -> bool:
        """Whether ``round_start`` lies in the table's range, on a row or between two."""
        return 0 <= round_start <= self.num_positions * self.compress_interval

    def __repr__(self) -> str:
        last = self.num_positions * self.compress_interval
        return (
            f"TrigTableCache(t = {self.compress_interval} to {last} in steps of {self.compress_interval}, "
            f"{self.num_offsets} offsets, {self.freq_count} frequencies, {self.memory_mb:.2f} MiB on {self.device})"
        )


def create_trig_cache(
    max_seq_len: int, compress_interval: int, offsets: torch.Tensor, omega: torch.Tensor,
    device: torch.device | str, warn_threshold_mb: float = 100.0,
) -> TrigTableCache:  # fmt: skip
    """A TrigTableCache; a UserWarning where it takes more than ``warn_threshold_mb``."""
    table = TrigTableCache(max_seq_len, compress_interval, offsets, omega, device)
    if table.memory_mb > warn_threshold_mb:
        warnings.warn(f"{table!r} takes more than {warn_threshold_mb:g} MiB; lower max_seq_len", stacklevel=2)
    return table


def _trig_values(
    round_start: int, offsets: torch.Tensor, omega: torch.Tensor, table: TrigTableCache | None
) -> tuple[torch.Tensor, torch.Tensor]:
    if table is None:
        return _phases(round_start, offsets, omega)
    if not (torch.equal(table.offsets, offsets) and torch.equal(table.omega, omega)):
        raise ValueError(f"{table!r} was made for other offsets or another omega")
    if not table.covers(round_start):
        raise ValueError(f"round_start is {round_start}, beyond {table!r}")
    if round_start and round_start % table.compress_interval == 0:
        return table.get_trig_values(round_start)
    return _phases(round_start, offsets, omega)


def triattention_scoring(
    K_rot: torch.Tensor, position_indices: torch.Tensor | None, q_mean_real: torch.Tensor, q_mean_imag: torch.Tensor,
    q_abs_mean: torch.Tensor, freq_scale_sq: torch.Tensor, omega: torch.Tensor, offsets: torch.Tensor,
    round_start: int, aggregation: str = "max", trig_cache: TrigTableCache | None = None,
    trig_values: tuple[torch.Tensor, torch.Tensor] | None = None, rope_style: str = "interleaved",
    disable_mlr: bool = False, *, disable_trig: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The score of ``algorithm.score`` by the kernel: float32 ``[B, H*G, N]``.

    ``K_rot`` ``[B, H, N, 2F]`` with any strides; statistics and weight ``[H*G, F]``. A rotated key says where it is, so
    ``position_indices`` are not needed. ``trig_values`` (cos and sin, ``[O, F]``) win over ``trig_cache``. Raises
    ValueError for shapes or options that do not fit, and for a round that the table does not cover.
    """
    one_of("aggregation", aggregation, AGGREGATIONS)
    one_of("rope_style", rope_style, STYLES)
    rows, kv_heads, n_keys, dim = K_rot.shape
    query_heads, freq = q_mean_real.shape
    shapes = {tuple(x.shape) for x in (q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq)}
    if dim != 2 * freq or query_heads % kv_heads or shapes != {(query_heads, freq)} or not len(offsets):
        raise ValueError(
            f"keys {tuple(K_rot.shape)}, statistics and weights {sorted(shapes)} and {len(offsets)} offsets "
            "do not go together"
        )
    cos, sin = trig_values if trig_values is not None else _trig_values(round_start, offsets, omega, trig_cache)
    if {tuple(cos.shape), tuple(sin.shape)} != {(len(offsets), freq)}:
        raise ValueError(f"trig_values are {tuple(cos.shape)} and {tuple(sin.shape)}, not {(len(offsets), freq)}")
    scores = torch.empty(rows, query_heads, n_keys, dtype=torch.float32, device=K_rot.device)
    if scores.numel() == 0:
        return scores
    tables = [x.float().contiguous() for x in (q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, cos, sin)]
    score_kernel[(triton.cdiv(n_keys, _BLOCK_N), rows * query_heads)](
        K_rot, *tables, scores, *K_rot.stride(), query_heads, n_keys, len(offsets),
        GROUP=query_heads // kv_heads, F=freq, BLOCK_F=triton.next_power_of_2(freq), BLOCK_N=_BLOCK_N,
        INTERLEAVED=rope_style == "interleaved", MAX=aggregation == "max",
        DISABLE_MLR=disable_mlr, DISABLE_TRIG=disable_trig,
    )  # fmt: skip
    return scores
