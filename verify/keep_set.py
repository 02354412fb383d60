"""The keep set by the oracle: from float64 scores through the published rules, with how far honest errors can move it.

Independent of any subject, in NumPy. Per query head a z-score over the evictable region (where asked for), per KV head
the maximum over its group, then over the layers the mean (``per_head``) or over everything the maximum (``union``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verify import oracle, tolerance

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Selection:
    """What a round keeps the best of: ``scores`` ``[S, N]`` for S sets, each certain to ``error``."""

    scores: np.ndarray
    error: float

    def inversion(self, kept: np.ndarray, evictable: np.ndarray) -> float:
        """By how much the best evicted token beats the worst kept one: bool ``[S, N]``, bool ``[N]``; 0 if it does not.

        Exactly the oracle's keep set has 0; within a score gap below the error either choice is right.
        """
        import numpy as np

        worst_kept = np.where(kept & evictable, self.scores, np.inf).min(-1)
        best_evicted = np.where(~kept & evictable, self.scores, -np.inf).max(-1)
        return float(np.maximum(best_evicted - worst_kept, 0.0).max())

    @property
    def allowed(self) -> float:
        """Two scores are compared, so an honest inversion is at most twice the error of one."""
        return 2 * self.error


def select(cases: Sequence[oracle.Case], evictable: np.ndarray, *, per_head: bool, normalize: bool) -> Selection:
    """The selection scores of one sequence from one scoring problem per layer (batch of 1)."""
    import numpy as np

    grouped, errors = [], []
    for case in cases:
        scores, error = oracle.scores(case)[0], tolerance.budget_b(case)[0]
        if normalize:
            inside = scores[:, evictable]
            std = np.maximum(inside.std(-1, keepdims=True), 1e-6)
            z = (scores - inside.mean(-1, keepdims=True)) / std
            # a score, the mean and the standard deviation are each off by at most the largest error of the head
            error = error.max(-1, keepdims=True) / std * (2 + np.abs(z))
            scores = z
        kv_heads = case.k0.shape[1]
        grouped.append(scores.reshape(kv_heads, -1, scores.shape[-1]).max(1))
        errors.append(float(error.max()))
    if per_head:
        return Selection(np.mean(grouped, axis=0), float(np.mean(errors)))
    return Selection(np.max(grouped, axis=(0, 1))[None], max(errors))
