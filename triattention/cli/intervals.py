"""95 % confidence intervals for pass@1, and for the difference of two runs on the same questions.

**pass@1.** Question i of n has m_i graded samples, a share p_i of them correct; pass@1 is P = mean(p_i). Samples of one
question are not independent, but questions are, so the variance is that over questions: Var(P) = s2 / n with
s2 = mean((p_i - P)^2). A proportion from N independent samples has Var = P (1 - P) / N; the N that gives the same
variance is the effective sample size

    N_eff = n P (1 - P) / s2.

With one sample per question every p_i is 0 or 1, so s2 = P (1 - P) and N_eff = n. Always s2 <= P (1 - P), so N_eff is
n or more; it is capped at the number of samples, the value for independent samples, because a smaller s2 is chance.
If P is 0 or 1, s2 is uninformative and N_eff is n: the samples of a question may be fully dependent. The interval is
Wilson's score interval (1927), the P' with |P - P'| <= z sqrt(P' (1 - P') / N), which stays inside [0, 1] and has a
width at 0/n and n/n, where P +- z sqrt(Var) has none:

    (P + z^2 / 2N  +-  z sqrt(P (1 - P) / N + z^2 / 4N^2)) / (1 + z^2 / N).

**Paired difference.** Question i has d_i = p_i(B) - p_i(A). The plain interval mean(d) +- z s / sqrt(n) has no width
when the runs agree on every question. Agresti and Min (2005) add one half to each cell of the 2 x 2 table of right and
wrong, which is two more questions with sum(d) = 0 and sum(d^2) = 1; the same two questions serve shares:

    D = sum(d) / (n + 2),  Var = ((sum(d^2) + 1) / (n + 2) - D^2) / (n + 2),  interval D +- z sqrt(Var) inside [-1, 1].

In 2,000 simulations with beta-distributed questions (n 30 and 500, 1 to 64 samples), the first interval covers the
truth in 94 to 96 %; the second in 95 % with one sample and in over 99 % with several, where it is wider than necessary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

#: The 97.5 % quantile of the normal distribution.
Z_95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its 95 % interval."""

    estimate: float
    low: float
    high: float


def wilson(share: float, samples: float) -> Interval:
    """Wilson's 95 % score interval of a ``share`` in [0, 1] out of ``samples``, which need not be a whole number."""
    z2 = Z_95**2
    centre = share + z2 / (2 * samples)
    half = Z_95 * math.sqrt(share * (1 - share) / samples + z2 / (4 * samples**2))
    scale = 1 + z2 / samples
    # rounding must not lift the ends off 0 and 1
    low = 0.0 if share == 0 else (centre - half) / scale
    high = 1.0 if share == 1 else (centre + half) / scale
    return Interval(share, low, high)


def effective_samples(shares: Sequence[float], samples: int) -> float:
    """N_eff for these ``shares`` of correct samples per question, ``samples`` in total; len(shares) to samples."""
    n = len(shares)
    mean = math.fsum(shares) / n
    variance = math.fsum((share - mean) ** 2 for share in shares) / n
    if mean in (0.0, 1.0):
        return n
    # rounding must not take it below n
    return min(max(n * mean * (1 - mean) / variance, n), samples) if variance > 0 else samples


def pass_at_1(shares: Sequence[float], samples: int) -> Interval:
    """Mean over questions of the ``shares`` of correct samples, with its clustered Wilson interval."""
    return wilson(math.fsum(shares) / len(shares), effective_samples(shares, samples))


def paired_difference(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Mean of ``b - a`` over the same questions, with the Agresti-Min interval; the estimate is the plain mean."""
    differences = [y - x for x, y in zip(a, b, strict=True)]
    n = len(differences)
    centre = math.fsum(differences) / (n + 2)
    variance = (math.fsum(d * d for d in differences) + 1) / (n + 2) - centre**2
    half = Z_95 * math.sqrt(variance / (n + 2))
    return Interval(math.fsum(differences) / n, max(centre - half, -1.0), min(centre + half, 1.0))
