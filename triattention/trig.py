"""The parts of a score that do not depend on the key: phases of t, offsets and omega, and weights folded from them.

Phases are computed and reduced in float64 (a few thousand numbers per round), so that the error does not grow with t.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch

from triattention.errors import TriAttentionError


def geometric_offsets(max_length: int, device: torch.device | str | None = None) -> torch.Tensor:
    """1, 2, 4, ... up to ``max_length``, float32 ``[O]`` (17 offsets for 65536; paper, section on future distances)."""
    if max_length < 1:
        raise TriAttentionError(f"offset_max_length is {max_length}; it must be at least 1")
    return torch.tensor([float(1 << i) for i in range(int(max_length).bit_length())], device=device)


def check_position(t: int) -> int:
    """``t`` as a Python int. Raises TriAttentionError when it is not a whole number >= 0."""
    if (isinstance(t, float) and not t.is_integer()) or int(t) < 0:
        raise TriAttentionError(f"round_start is {t}; it must be a whole number >= 0, the position of the next token")
    return int(t)


def phases(t: int | torch.Tensor, offsets: torch.Tensor, omega: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of (t + o) omega in float64: ``[O, F]`` for one t, ``[B, O, F]`` for a tensor of B positions t.

    ``omega`` ``[F]`` and ``offsets`` ``[O]`` are converted to float64 exactly.
    """
    if offsets.numel() == 0:
        raise TriAttentionError("there are no offsets; give at least one (1, 2, 4, ... up to 65536 is usual)")
    o = offsets.to(device=omega.device, dtype=torch.float64)
    position = o + t if isinstance(t, int) else o + t.to(device=omega.device, dtype=torch.float64)[:, None]
    angle = position[..., None] * omega.to(torch.float64)
    return angle.cos(), angle.sin()


@dataclass(frozen=True, slots=True)
class Weights:
    """The weights that multiply a key: S = agg_o (k_re . re + k_im . im) + |k| . norm [+ k_pass . content].

    ``re`` and ``im`` are float64 ``[Bw, H*G, A, F]``, where Bw is 1 or B and A is 1 (mean: folded over the offsets,
    which is exact because the mean is linear) or O (max); ``norm`` is float64 ``[H*G, F]``; ``content`` is float64
    ``[H*G, P]`` for the P dims of a key that are not rotated, None if all are.
    """

    re: torch.Tensor
    im: torch.Tensor
    norm: torch.Tensor
    content: torch.Tensor | None = None


def fold(
    q_mean_real: torch.Tensor,
    q_mean_imag: torch.Tensor,
    q_abs_mean: torch.Tensor,
    freq_weight: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    aggregation: str,
    disable_mlr: bool = False,
    disable_trig: bool = False,
    q_pass: torch.Tensor | None = None,
) -> Weights:
    """Fold statistics and phases into the weights of one layer.

    q_* and ``freq_weight`` are ``[H*G, F]``; ``cos`` and ``sin`` ``[O, F]`` or ``[B, O, F]``; ``q_pass`` ``[H*G, P]``:
    the means of the unrotated dims, which are not weighted. ``disable_mlr`` replaces a - |m| by a in the norm term;
    ``disable_trig`` leaves only the norm term. There is no epsilon: zero statistics give exactly 0. Raises
    TriAttentionError for an unknown aggregation.
    """
    if aggregation not in ("mean", "max"):
        raise TriAttentionError(f"aggregation is {aggregation!r}; use 'mean' or 'max'")
    m_re, m_im, a, w = (x.to(torch.float64) for x in (q_mean_real, q_mean_imag, q_abs_mean, freq_weight))
    cos, sin = (x.to(torch.float64) for x in (cos, sin))
    if cos.ndim == 2:
        cos, sin = cos[None], sin[None]
    if aggregation == "mean" or disable_trig:
        cos, sin = cos.mean(-2, keepdim=True), sin.mean(-2, keepdim=True)
    cos, sin = cos[:, None], sin[:, None]  # [Bw, 1, A, F] against [H*G, 1, F]
    re = (w * m_re)[:, None] * cos - (w * m_im)[:, None] * sin
    im = (w * m_im)[:, None] * cos + (w * m_re)[:, None] * sin
    if disable_trig:
        re, im = torch.zeros_like(re), torch.zeros_like(im)
    norm = w * (a if disable_mlr else a - torch.hypot(m_re, m_im))
    content = None if q_pass is None or q_pass.shape[-1] == 0 else q_pass.to(torch.float64)
    return Weights(re, im, norm, torch.zeros_like(content) if content is not None and disable_trig else content)


def _versions(*tensors: torch.Tensor) -> list[int | None]:
    """How often each tensor was modified in place, None if torch does not count it."""
    return [None if tensor.is_inference() else tensor._version for tensor in tensors]


class TrigTableCache:
    """cos and sin of (t + o) omega at t = interval, 2 interval, ... up to ``max_seq_len`` (plan 3.3).

    ``cos_table`` and ``sin_table`` are float32 ``[num_positions, O, F]`` on ``device``, each entry the float64
    value rounded once. Raises TriAttentionError (a ValueError) when the table would be empty.
    """

    def __init__(
        self,
        max_seq_len: int,
        compress_interval: int,
        offsets: torch.Tensor,
        omega: torch.Tensor,
        device: torch.device | str,
    ) -> None:
        if compress_interval < 1 or max_seq_len < compress_interval:
            raise TriAttentionError(
                f"max_seq_len is {max_seq_len} and compress_interval {compress_interval}; "
                "the table needs 1 <= compress_interval <= max_seq_len"
            )
        self.max_seq_len = int(max_seq_len)
        self.compress_interval = int(compress_interval)
        self.device = torch.device(device)
        self.num_positions = self.max_seq_len // self.compress_interval
        self.offsets = offsets.to(self.device, torch.float32, copy=True)
        self.omega = omega.to(self.device, copy=True)
        self.num_offsets, self.freq_count = offsets.numel(), omega.numel()
        self._checked = (offsets, omega, _versions(offsets, omega))
        rows = torch.arange(1, self.num_positions + 1, device=self.device, dtype=torch.float64) * self.compress_interval
        shape = (self.num_positions, self.num_offsets, self.freq_count)
        self.cos_table = torch.empty(shape, dtype=torch.float32, device=self.device)
        self.sin_table = torch.empty(shape, dtype=torch.float32, device=self.device)
        for part in torch.arange(self.num_positions, device=self.device).split(1024):  # limits the float64 memory
            self.cos_table[part], self.sin_table[part] = (
                x.to(torch.float32) for x in phases(rows[part], self.offsets, self.omega)
            )

    @property
    def memory_mb(self) -> float:
        """Size of both tables in MiB."""
        return 2 * self.cos_table.numel() * self.cos_table.element_size() / 2**20

    def get_trig_values(self, round_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The row of ``round_start``: cos and sin, float32 ``[O, F]``. Raises ValueError if there is no such row."""
        t = check_position(round_start)
        if t % self.compress_interval:
            raise TriAttentionError(f"round_start is {t}; the table has rows at multiples of {self.compress_interval}")
        row = t // self.compress_interval - 1
        if not 0 <= row < self.num_positions:
            last = self.num_positions * self.compress_interval
            raise TriAttentionError(f"round_start is {t}; the table covers {self.compress_interval} to {last}")
        return self.cos_table[row], self.sin_table[row]

    def phases_at(self, round_start: int) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin at any integer up to ``max_seq_len``, float64 ``[O, F]``: a row rotated by the residual angle.

        Raises TriAttentionError beyond the table.
        """
        t = check_position(round_start)
        if t > self.max_seq_len:
            raise TriAttentionError(
                f"round_start is {t}, but the trig table ends at {self.max_seq_len}; "
                "build it with a larger max_seq_len or call without trig_cache"
            )
        row = min(max(t // self.compress_interval, 1), self.num_positions)
        cos, sin = (x.to(torch.float64) for x in self.get_trig_values(row * self.compress_interval))
        residual = t - row * self.compress_interval
        if residual == 0:
            return cos, sin
        angle = residual * self.omega.to(torch.float64)
        turn_cos, turn_sin = angle.cos(), angle.sin()
        return cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin

    def require_same(self, offsets: torch.Tensor, omega: torch.Tensor) -> None:
        """Raise TriAttentionError unless the table was made with these offsets and frequencies.

        Values are compared once per pair of tensors, and again after a change in place, because reading a GPU tensor
        waits for the device. Changes to tensors created in inference mode are not detected: torch does not count them.
        """
        versions = _versions(offsets, omega)
        if offsets is self._checked[0] and omega is self._checked[1] and versions == self._checked[2]:
            return
        mine, given = (self.num_offsets, self.freq_count), (offsets.numel(), omega.numel())
        if mine != given:
            raise TriAttentionError(
                f"trig_cache has {mine[0]} offsets and {mine[1]} frequencies, the call {given[0]} and {given[1]}; "
                "build it with the same offsets and omega"
            )
        same = torch.equal(self.offsets, offsets.to(self.device, torch.float32)) and torch.equal(
            self.omega.to(torch.float64), omega.to(self.device, torch.float64)
        )
        if not same:
            raise TriAttentionError(
                "trig_cache was built with different offsets or omega than this call; build it with the same ones"
            )
        self._checked = (offsets, omega, versions)

    def __repr__(self) -> str:
        return (
            f"TrigTableCache(positions={self.num_positions}, interval={self.compress_interval}, "
            f"offsets={self.num_offsets}, frequencies={self.freq_count}, {self.memory_mb:.2f} MiB, "
            f"device={self.device})"
        )


def create_trig_cache(
    max_seq_len: int,
    compress_interval: int,
    offsets: torch.Tensor,
    omega: torch.Tensor,
    device: torch.device | str,
    warn_threshold_mb: float = 100.0,
) -> TrigTableCache:
    """A ``TrigTableCache``, with a UserWarning when its tables take more than ``warn_threshold_mb`` MiB."""
    cache = TrigTableCache(max_seq_len, compress_interval, offsets, omega, device)
    if cache.memory_mb > warn_threshold_mb:
        warnings.warn(
            f"the trig tables take {cache.memory_mb:.1f} MiB, above {warn_threshold_mb:.1f}; "
            "a larger compress_interval makes them smaller",
            UserWarning,
            stacklevel=2,
        )
    return cache
