"""Scoring problems for the checks: the same inputs as torch tensors for a subject and as float64 for the oracle."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify import oracle

if TYPE_CHECKING:
    import torch

#: 1, 2, 4, ..., 65536: the 17 distances of the paper.
OFFSETS_17 = tuple(float(1 << i) for i in range(17))


@dataclass(frozen=True)
class Shape:
    """Sizes and options of one scoring problem; the letters are those of the oracle."""

    n: int = 255
    d: int = 128
    b: int = 1
    h: int = 2
    g: int = 1
    t: int = 4096
    dtype: str = "bfloat16"
    style: str = "half"
    aggregation: str = "mean"
    offsets: tuple[float, ...] = OFFSETS_17
    theta: float = 1e6
    disable_mlr: bool = False
    disable_trig: bool = False
    strides: str = "contiguous"
    cached: bool = False


@dataclass(frozen=True)
class Problem:
    """Inputs of a scoring call on ``device`` and the oracle's view of exactly the same numbers.

    ``head_stats`` is what the published ``compute_scores`` takes in place of the three q tensors.
    """

    shape: Shape
    keys: torch.Tensor
    q_mean_real: torch.Tensor
    q_mean_imag: torch.Tensor
    q_abs_mean: torch.Tensor
    freq_weight: torch.Tensor
    omega: torch.Tensor
    offsets: torch.Tensor
    case: oracle.Case
    head_stats: dict[str, torch.Tensor]

    def scoring_arguments(self) -> dict[str, Any]:
        """Keyword arguments of the published ``triattention_scoring``."""
        return {
            "K_rot": self.keys,
            "position_indices": None,
            "q_mean_real": self.q_mean_real,
            "q_mean_imag": self.q_mean_imag,
            "q_abs_mean": self.q_abs_mean,
            "freq_scale_sq": self.freq_weight,
            "omega": self.omega,
            "offsets": self.offsets,
            "round_start": self.shape.t,
            "aggregation": self.shape.aggregation,
            "rope_style": self.shape.style,
            "disable_mlr": self.shape.disable_mlr,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """Every tensor a scoring call is given, and the buffer around strided keys, for the check that none changes."""
        names = ("keys", "q_mean_real", "q_mean_imag", "q_abs_mean", "freq_weight", "omega", "offsets")
        around = self.keys if self.keys._base is None else self.keys._base
        return {name: getattr(self, name) for name in names} | self.head_stats | {"buffer of the keys": around}


def make(shape: Shape, seed: int, device: str) -> Problem:
    """A problem with structure: concentrated queries, keys of mixed size, frequencies of a real RoPE base.

    The same numbers on every device: they are drawn on the CPU. Values are what the dtypes hold, so inputs are exact.
    """
    import numpy as np
    import torch

    draw = torch.Generator().manual_seed(seed)
    freq, query_heads = shape.d // 2, shape.h * shape.g

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    keys = (normal(shape.b, shape.h, shape.n, shape.d) * (1 + normal(shape.b, shape.h, shape.n, 1).abs())).to(
        getattr(torch, shape.dtype)
    )
    real, imag = normal(query_heads, freq), normal(query_heads, freq)
    a = torch.hypot(real, imag) * (1 + torch.rand(query_heads, freq, generator=draw))
    weight = 0.5 + torch.rand(query_heads, freq, generator=draw)
    omega = 1.0 / (shape.theta ** (torch.arange(0, freq, dtype=torch.float32) / freq))
    offsets = torch.tensor(shape.offsets)
    positions = np.sort(np.random.default_rng(seed).choice(max(shape.t, shape.n) + 1, size=shape.n, replace=False))
    case = oracle.Case(
        k0=oracle.unrotated(keys.double().numpy(), positions, omega.double().numpy(), shape.style),
        positions=positions,
        m=real.double().numpy() + 1j * imag.double().numpy(),
        a=a.double().numpy(),
        w=weight.double().numpy(),
        omega=omega.double().numpy(),
        offsets=offsets.double().numpy(),
        t=shape.t,
        aggregation=shape.aggregation,
        disable_mlr=shape.disable_mlr,
        disable_trig=shape.disable_trig,
    )
    moved = [x.to(device) for x in (real, imag, a, weight, omega, offsets)]
    head_stats = {"q_mean_complex": torch.stack(moved[:2], -1), "q_abs_mean": moved[2]}
    return Problem(shape, restride(keys.to(device), shape.strides), *moved, case, head_stats)


def restride(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The same values behind other strides: ``contiguous``, ``transposed`` (tokens before heads), ``sliced`` (a
    view into a larger buffer at an offset) or ``spread`` (every second element, so the last stride is 2).
    """
    import torch

    if strides == "contiguous":
        return x.contiguous()
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    b, h, n, d = x.shape
    if strides == "sliced":
        buffer = torch.full((b, h, n + 5, d + 24), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[:, :, 3 : 3 + n, 8 : 8 + d]
    elif strides == "spread":
        buffer = torch.full((b, h, n, 2 * d + 1), torch.nan, dtype=x.dtype, device=x.device)
        view = buffer[..., 1::2]
    else:
        raise ValueError(f"unknown strides {strides!r}")
    view.copy_(x)
    return view
