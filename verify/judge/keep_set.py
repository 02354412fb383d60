"""The oracle's keep set: float64 scores through the published rules, with the effect that rounding errors may have.

In NumPy, and independent of any subject. Scores are z-scored per query head over the evictable region (if asked for),
and maximised per KV head over its group. Then the mode applies: the mean over the layers (``per_head``), the maximum
over everything (``union``) or over the heads of each layer (``per_layer``), or nothing (``per_layer_per_head``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from verify.judge import oracle, perturb, tolerance

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Selection:
    """The scores by which a round selects: ``scores`` ``[S, N]`` for S sets, each off by at most ``error``."""

    scores: np.ndarray
    error: float

    def compares(self, kept: np.ndarray, evictable: np.ndarray) -> np.ndarray:
        """Which sets both keep and evict tokens that can be evicted, bool ``[S]``; the others were not ranked."""
        return (kept & evictable).any(-1) & (~kept & evictable).any(-1)

    def inversion(self, kept: np.ndarray, evictable: np.ndarray) -> float:
        """By how much the best evicted token beats the worst kept one, 0 if it does not; bool ``[S, N]``, bool ``[N]``.

        The oracle's own keep set has 0. Where two scores differ by less than their error, either choice is right.
        """
        return self._inversion(
            perturb.judged(
                kept,
                lambda factor, seed: self._swapped(kept, evictable, factor, seed),
                lambda decided: self._inversion(decided, evictable) / self.allowed,
            ),
            evictable,
        )

    def _inversion(self, kept: np.ndarray, evictable: np.ndarray) -> float:
        import numpy as np

        worst_kept = np.where(kept & evictable, self.scores, np.inf).min(-1)
        best_evicted = np.where(~kept & evictable, self.scores, -np.inf).max(-1)
        return float(np.maximum(best_evicted - worst_kept, 0.0).max())

    def _swapped(
        self, kept: np.ndarray, evictable: np.ndarray, factor: float, seed: int
    ) -> perturb.Error[np.ndarray] | None:
        """``kept`` with one kept and one evicted token of a set swapped, whose scores differ by about ``factor`` times
        the allowed gap.

        Only the existing gaps are available. For a factor above 1 it is the next larger gap, or the largest one; up to
        1 it is the next smaller gap, or no swap if all are larger. So the error is on the intended side of the bound.
        """
        import numpy as np

        free = kept & evictable, ~kept & evictable
        both = np.flatnonzero(self.compares(kept, evictable))
        if not len(both):
            return None
        at = np.random.default_rng(seed).choice(both)
        inside, outside = (np.flatnonzero(side[at]) for side in free)
        gaps = self.scores[at, inside][:, None] - self.scores[at, outside]
        wanted = factor * self.allowed
        if factor > 1:
            gap = min(gaps[gaps >= wanted].min(initial=np.inf), gaps.max())
        else:
            gap = gaps[gaps <= wanted].max(initial=0.0)
            if gap <= 0:
                return perturb.Error(kept, 0.0, 0.0, float(self.scores[at, inside].min()))
        i, j = np.argwhere(gaps == gap)[0]
        decided = kept.copy()
        decided[at, [inside[i], outside[j]]] = False, True
        return perturb.Error(decided, float(gap / self.allowed), float(gap), float(self.scores[at, inside[i]]))

    def told(self, kept: np.ndarray, evictable: np.ndarray) -> str:
        """The worst inversion in words: the set, the token that it evicts, and the one that it keeps instead."""
        import numpy as np

        inside = np.where(kept & evictable, self.scores, np.inf)
        outside = np.where(~kept & evictable, self.scores, -np.inf)
        at = int((outside.max(-1) - inside.min(-1)).argmax())
        evicted, held = int(outside[at].argmax()), int(inside[at].argmin())
        return (
            f"set {at}: token {evicted} (score {outside[at, evicted]:.4g}) is evicted, "
            f"token {held} ({inside[at, held]:.4g}) is kept"
        )

    def fits(self, kept: np.ndarray, evictable: np.ndarray) -> bool:
        """Whether a keep set is right by these scores."""
        return self._inversion(kept, evictable) <= self.allowed

    @property
    def allowed(self) -> float:
        """Two scores are compared, so rounding can cause an inversion of at most twice the error of one."""
        return 2 * self.error


def select(
    cases: Sequence[oracle.Case], evictable: np.ndarray, *, mode: str, normalize: bool, group: str = "max",
    heads: str = "max", region: np.ndarray | None = None,
) -> Selection:  # fmt: skip
    """The selection scores of one sequence from one scoring problem per layer (batch of 1).

    The sets are ``per_head``: one for each KV head; ``union``: one; ``per_layer``: one for each layer;
    ``per_layer_per_head``: one for each layer and KV head, layer by layer. ``group`` (``max`` or ``mean``) joins the
    query heads of a KV head, ``heads`` the KV heads of ``per_layer``. z-scores are over the evictable tokens, or over
    those of ``region``.
    """
    import numpy as np

    region = evictable if region is None else region
    grouped, errors = [], []
    for case in cases:
        scores, error = oracle.scores(case)[0], tolerance.budget_b(case)[0]
        if normalize:
            inside = scores[:, region]
            std = np.maximum(inside.std(-1, keepdims=True), 1e-6)
            z = (scores - inside.mean(-1, keepdims=True)) / std
            # the score, the mean and the standard deviation are each off by at most the largest error in the region
            error = error[:, region].max(-1, keepdims=True) / std * (2 + np.abs(z))
            scores = z
        by_head = scores.reshape(case.k0.shape[1], -1, scores.shape[-1])
        grouped.append(by_head.mean(1) if group == "mean" else by_head.max(1))
        errors.append(float(error[:, evictable].max()))
    joined = np.stack(grouped)  # [L, H, N]
    if mode == "per_head":
        return Selection(joined.mean(0), float(np.mean(errors)))
    if mode == "union":
        return Selection(joined.max((0, 1))[None], max(errors))
    if mode == "per_layer":
        return Selection(joined.mean(1) if heads == "mean" else joined.max(1), max(errors))
    return Selection(joined.reshape(-1, joined.shape[-1]), max(errors))


def sets_of(kept: np.ndarray, mode: str) -> np.ndarray:
    """The sets of a mode, bool ``[S, N]``, from the tokens that each layer and KV head holds, bool ``[L, H, N]``.

    Raises AssertionError if heads or layers that share a set hold different tokens.
    """
    if mode == "per_layer_per_head":
        return kept.reshape(-1, kept.shape[-1])
    shared = {"per_head": kept[:1], "per_layer": kept[:, :1], "union": kept[:1, :1]}[mode]
    differs = (kept != shared).any(-1).nonzero()
    assert not len(differs[0]), (
        f"layer {differs[0][0]}, KV head {differs[1][0]} holds other tokens than the rest of its {mode} set"
    )
    return shared.reshape(-1, kept.shape[-1])
