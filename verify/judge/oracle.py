"""The arbiter: scores in float64 from the pre-RoPE form with positions, sharing no code with any subject.

A subject scores keys that are already rotated. The oracle starts from the key before RoPE and the key's position p,
and computes

S = agg_o sum_f w |m_f| |k_f| cos((t + o - p) omega_f + arg m_f - arg k0_f) + sum_f w e_f |k_f|,   |k_f| = s |k0_f|

in NumPy float64, where e_f is a - |m| (a under ``disable_mlr``). A model that does not rotate every dim adds the
product of its unrotated dims, q_pass . k_pass. Source: the paper's definition of the score of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Case:
    """One scoring problem, float64 throughout.

    ``k0`` complex ``[B, H, N, F]``: keys before RoPE and scaling; ``positions`` ``[N]``; ``m`` complex, ``a`` and
    ``w`` ``[H*G, F]``; ``omega`` ``[F]``; ``offsets`` ``[O]``; ``t`` the position of the next token; ``s`` the
    attention scaling; ``k_pass`` ``[B, H, N, P]`` and ``q_pass`` ``[H*G, P]`` the dims that are not rotated, if any.
    """

    k0: np.ndarray
    positions: np.ndarray
    m: np.ndarray
    a: np.ndarray
    w: np.ndarray
    omega: np.ndarray
    offsets: np.ndarray
    t: int
    s: float = 1.0
    aggregation: str = "mean"
    disable_mlr: bool = False
    disable_trig: bool = False
    k_pass: np.ndarray | None = None
    q_pass: np.ndarray | None = None

    def shifted(self, by: int) -> Case:
        """The problem with t and every position moved by ``by``, which has the same scores."""
        return replace(self, t=self.t + by, positions=self.positions + by)


def pairs(x: Any, style: str) -> np.ndarray:
    """Complex128 ``[..., F]`` of real ``[..., D]``: (f, f + F) for ``half``, (2f, 2f + 1) for ``interleaved``."""
    import numpy as np

    x = np.asarray(x, dtype=np.float64)
    if style == "half":
        middle = x.shape[-1] // 2
        return x[..., :middle] + 1j * x[..., middle:]
    return x[..., ::2] + 1j * x[..., 1::2]


def unrotated(rotated: Any, positions: np.ndarray, omega: np.ndarray, style: str, s: float = 1.0) -> np.ndarray:
    """Keys before RoPE, complex ``[..., N, F]``, from the rotated keys ``[..., N, D]`` in a cache."""
    import numpy as np

    return pairs(rotated, style) * np.exp(-1j * positions[:, None] * omega) / s


def rotated(k0: np.ndarray, positions: np.ndarray, omega: np.ndarray, style: str) -> np.ndarray:
    """The inverse of ``unrotated`` at s = 1: keys before RoPE, complex ``[..., N, F]``, to float64 ``[..., N, D]``."""
    import numpy as np

    turned = k0 * np.exp(1j * positions[:, None] * omega)
    if style == "half":
        return np.concatenate([turned.real, turned.imag], -1)
    return np.stack([turned.real, turned.imag], -1).reshape(*turned.shape[:-1], -1)


def scores(case: Case) -> np.ndarray:
    """The scores, float64 ``[B, H*G, N]``; query head h reads KV head ``h // G``."""
    import numpy as np

    k0 = _per_query_head(case)
    k_abs = case.s * np.abs(k0)
    m_abs = np.abs(case.m)
    extra = case.a if case.disable_mlr else case.a - m_abs
    total = np.einsum("hf,bhnf->bhn", case.w * extra, k_abs)
    if case.disable_trig:
        return total
    amplitude = (case.w * m_abs)[:, None] * k_abs
    constant = np.angle(case.m)[:, None] - np.angle(k0)
    best = np.full(total.shape, -np.inf)
    sum_over_offsets = np.zeros(total.shape)
    for o in case.offsets:
        distance = (case.t + o - case.positions)[:, None] * case.omega
        value = (amplitude * np.cos(distance + constant)).sum(-1)
        best, sum_over_offsets = np.maximum(best, value), sum_over_offsets + value
    return total + (best if case.aggregation == "max" else sum_over_offsets / len(case.offsets)) + _content(case)


def term_sum(case: Case) -> np.ndarray:
    """T = sum_f |w| |k_f| (|m_f| + |e_f|) + sum |q_pass k_pass|, ``[B, H*G, N]``: rounding errors are relative to it,
    however the score is computed.
    """
    import numpy as np

    m_abs = np.abs(case.m)
    extra = np.abs(case.a if case.disable_mlr else case.a - m_abs)
    if case.disable_trig:
        return np.einsum("hf,bhnf->bhn", np.abs(case.w) * extra, case.s * np.abs(_per_query_head(case)))
    rotated = np.einsum("hf,bhnf->bhn", np.abs(case.w) * (m_abs + extra), case.s * np.abs(_per_query_head(case)))
    return rotated + _content(case, np.abs)


def phase_sum(case: Case) -> np.ndarray:
    """sum_f |w| |m_f| |k_f| |(t + o) omega_f|, ``[B, H*G, N]``, at the largest offset (max) or averaged over them
    (mean).

    Times 2^-23 this is the error from phases in fp32.
    """
    import numpy as np

    if case.disable_trig:  # no phase is formed
        return np.zeros((case.k0.shape[0], case.m.shape[0], case.k0.shape[2]))
    reach = case.t + (case.offsets.max() if case.aggregation == "max" else case.offsets.mean())
    weight = np.abs(case.w) * np.abs(case.m) * np.abs(reach * case.omega)
    return np.einsum("hf,bhnf->bhn", weight, case.s * np.abs(_per_query_head(case)))


def _per_query_head(case: Case) -> np.ndarray:
    import numpy as np

    return np.repeat(case.k0, case.m.shape[0] // case.k0.shape[1], axis=1)


def _content(case: Case, of: Callable[[np.ndarray], np.ndarray] = lambda x: x) -> np.ndarray | float:
    """sum q_pass k_pass of each score, ``[B, H*G, N]``, with ``of`` applied to both factors; 0 if all dims rotate."""
    import numpy as np

    if case.q_pass is None:
        return 0.0
    assert case.k_pass is not None  # a model has unrotated dims in both its queries and its keys, or in neither
    k_pass = np.repeat(case.k_pass, case.q_pass.shape[0] // case.k_pass.shape[1], axis=1)
    return np.einsum("hp,bhnp->bhn", of(case.q_pass), of(k_pass))
