"""Scoring problems for the checks: the same inputs as torch tensors for a subject and as float64 for the oracle."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

from verify.judge import oracle

if TYPE_CHECKING:
    import numpy as np
    import torch

#: 1, 2, 4, ..., 65536: the 17 distances of the paper.
OFFSETS_17 = tuple(float(1 << i) for i in range(17))


#: The upper half of the bits of two NaN in float32: in memory that a subject allocates, and around the keys it gets.
UNWRITTEN, BETWEEN_KEYS = 0x7FE5, 0x7FEB
#: A NaN in float16, and the upper half of its bits in float32.
_IN_FLOAT16, BETWEEN_FLOAT16_KEYS = 0x7E5A, 0x7FCB


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
    low_norm: bool = False  #: E|q| below |E[q]|, as in the plan's own calls; no set of queries has such statistics
    weights: str = "drawn"  #: of the frequencies: ``drawn`` from 0.5 to 1.5, or ``ones``

    def told(self) -> str:
        """How it differs from the default problem, in words for a failure message."""
        here = {field.name: getattr(self, field.name) for field in fields(self)}
        usual = Shape()
        changed = {name: value for name, value in here.items() if value != getattr(usual, name)}
        few = len(self.offsets) <= 3  # which are shown
        words = (
            f"{name}={value}" if name == "offsets" and few else in_words(name, value) for name, value in changed.items()
        )
        return ", ".join(words) or "the default problem"

    def properties(self) -> dict[str, str]:
        """What may cause a failure, as words by name; sizes that only add work are left out."""
        counts = {"n": self.n, "b": self.b, "h": self.h, "g": self.g, "offsets": len(self.offsets)}
        words = {name: "1" if count == 1 else "several" for name, count in counts.items()}
        names = ("d", "dtype", "style", "aggregation", "disable_mlr", "disable_trig", "strides", "cached", "low_norm")
        return words | {name: str(getattr(self, name)) for name in (*names, "weights")}


def in_words(name: str, value: Any) -> str:
    """A property of a problem in words for a message: ``aggregation=max``, ``17 offsets``, ``weights other than 1``."""
    if name == "offsets":
        return f"{len(value)} offset{'' if len(value) == 1 else 's'}"
    if name == "low_norm":
        return f"E|q| {'' if value else 'not '}below |E[q]|"
    if name == "weights":
        return "weights of 1" if value == "ones" else "weights other than 1"
    return f"{name}={value}"


@dataclass(frozen=True)
class Problem:
    """Inputs of a scoring call on one device and the oracle's view of exactly the same numbers.

    ``head_stats`` is the argument of the published ``compute_scores`` in place of the three q tensors.
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
        """Every tensor passed to a scoring call, and the buffer behind strided keys, to check that none changes."""
        around = self.keys if self.keys._base is None else self.keys._base
        return {name: getattr(self, name) for name in _DRAWN} | self.head_stats | {"buffer of the keys": around}

    def changed(self, **parts: Any) -> Problem:
        """The same problem with another shape, other tensors or other ``positions``; the oracle's view follows."""
        same = {name: getattr(self, name) for name in ("shape", *_DRAWN)} | {"positions": self.case.positions}
        return assemble(**same | parts)


#: The tensors that define a problem.
_DRAWN = ("keys", "q_mean_real", "q_mean_imag", "q_abs_mean", "freq_weight", "omega", "offsets")


def make(shape: Shape, seed: int, device: str) -> Problem:
    """A realistic problem: concentrated queries, keys of mixed size, frequencies of a real RoPE base.

    The numbers are drawn on the CPU, so they are the same on every device. The dtypes hold them exactly.
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
    spread = torch.rand(query_heads, freq, generator=draw)
    a = torch.hypot(real, imag) * (0.1 + 0.8 * spread if shape.low_norm else 1 + spread)
    weight = 0.5 + torch.rand(query_heads, freq, generator=draw)
    if shape.weights == "ones":
        weight = torch.ones_like(weight)
    omega = 1.0 / (shape.theta ** (torch.arange(0, freq, dtype=torch.float32) / freq))
    offsets = torch.tensor(shape.offsets)
    positions = np.sort(np.random.default_rng(seed).choice(max(shape.t, shape.n) + 1, size=shape.n, replace=False))
    keys, real, imag, a, weight, omega, offsets = (x.to(device) for x in (keys, real, imag, a, weight, omega, offsets))
    return assemble(shape, keys, real, imag, a, weight, omega, offsets, positions)


def assemble(
    shape: Shape,
    keys: torch.Tensor,
    q_mean_real: torch.Tensor,
    q_mean_imag: torch.Tensor,
    q_abs_mean: torch.Tensor,
    freq_weight: torch.Tensor,
    omega: torch.Tensor,
    offsets: torch.Tensor,
    positions: np.ndarray,
) -> Problem:
    """The problem with these tensors, which are on one device, and with the strides of the keys that ``shape`` says."""
    import torch

    real, imag, a, weight, frequencies, distances = (
        x.double().cpu().numpy() for x in (q_mean_real, q_mean_imag, q_abs_mean, freq_weight, omega, offsets)
    )
    case = oracle.Case(
        k0=oracle.unrotated(keys.double().cpu().numpy(), positions, frequencies, shape.style),
        positions=positions,
        m=real + 1j * imag,
        a=a,
        w=weight,
        omega=frequencies,
        offsets=distances,
        t=shape.t,
        aggregation=shape.aggregation,
        disable_mlr=shape.disable_mlr,
        disable_trig=shape.disable_trig,
    )
    head_stats = {"q_mean_complex": torch.stack([q_mean_real, q_mean_imag], -1), "q_abs_mean": q_abs_mean}
    keys = restride(keys, shape.strides)
    return Problem(shape, keys, q_mean_real, q_mean_imag, q_abs_mean, freq_weight, omega, offsets, case, head_stats)


#: The defaults that ``drawn`` draws from, simplest first: tails of any block, head dims with and without padding, odd
#: positions, every stride.
CHOICES = {
    "n": (33, 1, 31, 64, 65, 129, 200),
    "d": (64, 96, 128, 256),
    "b": (1, 2, 3),
    "h": (1, 2, 3, 8, 40),
    "t": (64, 0, 1, 255, 4097, 32767),
    "dtype": ("float32", "bfloat16", "float16"),
    "style": ("half", "interleaved"),
    "aggregation": ("mean", "max"),
    "offsets": ((1.0, 2.0, 4.0), (1.0,), OFFSETS_17),
    "theta": (1e4, 1e6),
    "strides": ("contiguous", "transposed", "sliced", "spread"),
    "low_norm": (False, True),
}

#: From so many KV heads on, a drawn problem has one row and few tokens: its programs are interpreted one by one.
_MANY_HEADS, _FEW_TOKENS = 8, 33


def drawn(seed: int, count: int, **choices: tuple[Any, ...]) -> list[Shape]:
    """At most ``count`` shapes drawn by hypothesis from ``seed`` alone, least work first; ``choices`` are by field.

    They are drawn before any is tried, because hypothesis reruns failing examples and a numeric check is never retried.
    """
    from hypothesis import HealthCheck, Phase, given, settings, strategies
    from hypothesis import seed as seeded

    shapes: dict[Shape, None] = {}
    fields_of = {name: strategies.sampled_from(values) for name, values in (CHOICES | choices).items()}

    @seeded(seed)
    @settings(
        max_examples=count, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(strategies.builds(Shape, **fields_of))
    def note(shape: Shape) -> None:
        if shape.h >= _MANY_HEADS:
            shape = replace(shape, b=1, n=min(shape.n, _FEW_TOKENS))
        shapes[shape] = None

    note()
    return sorted(shapes, key=lambda shape: shape.b * shape.h * shape.n * shape.d * len(shape.offsets))


def restride(x: torch.Tensor, strides: str) -> torch.Tensor:
    """The same values with other strides: ``contiguous``, ``transposed`` (tokens before heads), ``sliced`` (a view
    into a larger buffer at an offset) or ``spread`` (every second element, so the last stride is 2).
    """

    if strides == "contiguous":
        return x.contiguous()
    if strides == "transposed":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    b, h, n, d = x.shape
    if strides == "sliced":
        buffer = _not_keys((b, h, n + 5, d + 24), x)
        view = buffer[:, :, 3 : 3 + n, 8 : 8 + d]
    elif strides == "spread":
        buffer = _not_keys((b, h, n, 2 * d + 1), x)
        view = buffer[..., 1::2]
    else:
        raise ValueError(f"unknown strides {strides!r}")
    view.copy_(x)
    return view


def strides_of(x: torch.Tensor) -> str:
    """What ``restride`` calls the strides of ``x``."""
    if x.is_contiguous():
        return "contiguous"
    if x.stride(-1) != 1:
        return "spread"
    return "transposed" if x.transpose(1, 2).is_contiguous() else "sliced"


def _not_keys(size: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    """A buffer of NaN that can be told apart from others."""
    import torch

    if like.dtype == torch.float32:
        mark = torch.tensor([BETWEEN_KEYS << 16], dtype=torch.int32)
    else:
        mark = torch.tensor([BETWEEN_KEYS if like.dtype == torch.bfloat16 else _IN_FLOAT16], dtype=torch.int16)
    return mark.view(like.dtype).to(like.device).expand(size).clone()
