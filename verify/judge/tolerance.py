"""Every tolerance of the suite, with its derivation. All numeric comparisons take their bound from here.

An fp32 implementation that reads exact keys makes, per score, a handful of roundings of 2^-24 relative to the sum
of the absolute terms T (a tree sum of n terms rounds log2 n times, each weight and product once, |k| twice);
prototypes with folded weights measured 0.6 to 2.5 units of 2^-24 T. Class A allows 8. Class B adds the error of fp32
phases: an angle x = (t + o) omega in fp32 is off by up to |x| 2^-24, and computing it from rounded factors doubles
that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from verify.judge import perturb
from verify.record import trail

if TYPE_CHECKING:
    import numpy as np

    from verify.judge.oracle import Case

#: Half a unit in the last place of 1.0 in float32.
UNIT = 2.0**-24

#: Class A, in units of 2^-24 T.
CLASS_A_UNITS = 8.0

#: For two engines that compute the same model in float32 in different orders. Logits of about 20 are sums of about a
#: thousand terms over thirty layers, 2^-24 x 20 x 1000, so with a gap below this either token can be the greedy one.
NEAR_TIE = 1e-3

#: Plan 3.2: the fixed bound on the difference between the Triton and the PyTorch path.
PLAN_MAX_DIFF = 1e-2


class Worst(NamedTuple):
    """The element that uses the largest share of its allowed error: its absolute error, and the allowed one.

    ``measure(name, *worst)`` records both. An error of NaN is within no bound.
    """

    error: float
    allowed: float

    @property
    def ratio(self) -> float:
        """error / allowed; 0 if both are 0."""
        return float(_ratio(self.error, self.allowed))


@dataclass(frozen=True)
class Accuracy:
    """How far scores are from the oracle, in the worst place.

    ``units`` is the largest error over 2^-24 T (class A allows 8), at the score ``units_where``; ``class_b`` the error
    that uses the largest share of its class B budget, at the score ``where``. Both are NaN if a score is NaN, which is
    within no bound.
    """

    units: float
    units_where: str
    class_b: Worst
    where: str

    @property
    def accuracy_class(self) -> str:
        """``A``: within 8 x 2^-24 T; ``B``: within that plus the error of fp32 phases; ``C``: neither."""
        if self.units <= CLASS_A_UNITS:
            return "A"
        return "B" if self.class_b.ratio <= 1.0 else "C"


def budget_a(case: Case) -> np.ndarray:
    """Class A's allowed error per score, ``[B, H*G, N]``."""
    from verify.judge import oracle

    return CLASS_A_UNITS * UNIT * oracle.term_sum(case)


def budget_b(case: Case) -> np.ndarray:
    """Class B's allowed error per score, ``[B, H*G, N]``."""
    return budget_a(case) + _phase_error(case)


def _phase_error(case: Case) -> np.ndarray:
    from verify.judge import oracle

    return 2 * UNIT * oracle.phase_sum(case)


def budget_pre_rope(case: Case) -> np.ndarray:
    """Allowed error of a score computed from float32 amplitudes and phases of keys before RoPE, ``[B, H*G, N]``.

    Class B plus another 8 units of class A: a complex product is off by 2.3 units of its size, a modulus by one more,
    an angle of up to pi by pi.
    """
    return budget_b(case) + budget_a(case)


def key_rounding(case: Case) -> np.ndarray:
    """How much a score may change when its key is rounded to float32 once, ``[B, H*G, N]``.

    Each component of a pair changes by at most 2^-24 of itself, so a pair by 2^-24 |k_f|, and the score by 2^-24 T.
    """
    from verify.judge import oracle

    return UNIT * oracle.term_sum(case)


def worst(error: Any, allowed: np.ndarray | float, result: np.ndarray | None = None) -> Worst:
    """The element of ``error`` that uses the largest share of ``allowed``; one that is NaN, if any is.

    ``result``, of the same shape, is the result that has these errors, if known.
    """
    import numpy as np

    allowed = np.broadcast_to(allowed, np.shape(error))
    return _worst(_planted(np.asarray(error, dtype=np.float64), allowed, result), allowed)


def accuracy(got: Any, case: Case) -> Accuracy:
    """Compare the scores ``[B, H*G, N]`` of a subject with the oracle's. Raises AssertionError if the shapes differ."""
    import numpy as np

    from verify.judge import oracle

    want = oracle.scores(case)
    got = np.asarray(got, dtype=np.float64)
    assert got.shape == want.shape, f"the scores have shape {got.shape}, expected {want.shape}"
    within_a = budget_a(case)
    allowed = within_a + _phase_error(case)
    error = np.abs(_planted(got - want, allowed, want))
    units = _ratio(error, within_a) * CLASS_A_UNITS

    def told(place: tuple[np.intp, ...]) -> str:
        return "row {}, query head {}, key {}".format(*map(int, place)) + f" (oracle {want[place]:.6g})"

    by_units, (class_b, by_budget) = _place_of_largest(units), _worst_at(error, allowed)
    found = Accuracy(float(units[by_units]), told(by_units), class_b, told(by_budget))
    trail.judged(found.accuracy_class)
    return found


def blamed(paths: Mapping[str, Accuracy]) -> str:
    """Which of the ``paths`` is wrong according to the oracle: ``the PyTorch path is wrong (45x its class B budget from
    the float64 oracle), the Triton path is right (class A)``.
    """
    told = {
        name: f"right (class {found.accuracy_class})"
        if found.class_b.ratio <= 1.0
        else f"wrong ({found.class_b.ratio:.3g}x its class B budget from the float64 oracle)"
        for name, found in paths.items()
    }
    wrong_first = sorted(told, key=lambda name: paths[name].class_b.ratio <= 1.0)
    return ", ".join(f"the {name} path is {told[name]}" for name in wrong_first)


def paths_differ(one: Any, other: Any, case: Case) -> tuple[float, Worst]:
    """The difference of two results of one problem, ``[B, H*G, N]``: its maximum, and its worst element against twice
    the class A error.

    ``PLAN_MAX_DIFF`` bounds the maximum; the worst element is about the error that each path may have.
    """
    import numpy as np

    one, other = (np.asarray(scores, dtype=np.float64) for scores in (one, other))
    allowed = 2 * budget_a(case)
    difference = _planted(one - other, np.minimum(allowed, PLAN_MAX_DIFF), other)
    return float(np.abs(difference).max()), _worst(difference, allowed)


def matmul_error(got: Any, a: Any, b: Any) -> Worst:
    """The worst element of a bf16 product ``[M, N]`` of float64 ``[M, K]`` and ``[K, N]``.

    Each output is rounded once to bf16, 2^-8 relative; the fp32 accumulation adds K x 2^-24 of the absolute terms.
    """
    import numpy as np

    got, a, b = (np.asarray(x, dtype=np.float64) for x in (got, a, b))
    exact, terms = a @ b, np.abs(a) @ np.abs(b)
    return worst(got - exact, np.abs(exact) * 2.0**-8 + terms * a.shape[1] * UNIT, exact)


def _planted(error: np.ndarray, allowed: np.ndarray, result: np.ndarray | None) -> np.ndarray:
    """``error``, with the planted error added if a run plants one."""
    return perturb.judged(error, perturb.element(error, allowed, result), lambda judged: _worst(judged, allowed).ratio)


def _worst(error: np.ndarray, allowed: np.ndarray) -> Worst:
    return _worst_at(error, allowed)[0]


def _worst_at(error: np.ndarray, allowed: np.ndarray) -> tuple[Worst, tuple[np.intp, ...]]:
    """The worst element, and where it is."""
    import numpy as np

    size = np.abs(error)
    ratio = _ratio(size, allowed)
    place = _place_of_largest(ratio)
    # an infinite error of an infinite allowance is no number, and within no bound
    return Worst(float("nan") if np.isnan(ratio[place]) else float(size[place]), float(allowed[place])), place


def _place_of_largest(ratio: np.ndarray) -> tuple[np.intp, ...]:
    """Where a ratio is largest; the first NaN, if there is one."""
    import numpy as np

    missing = np.isnan(ratio)
    return np.unravel_index(int(np.argmax(missing if missing.any() else ratio)), ratio.shape)


def _ratio(error: Any, budget: Any) -> np.ndarray:
    """error / budget, with 0 / 0 = 0: a score without terms must be exactly 0."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((error == 0) & (budget == 0), 0.0, np.divide(error, budget))


#: Largest difference of float32 log-probabilities between two attention implementations over the same cache. Each
#: layer sums the same terms in another order: about 2^-24 sqrt(terms) relative, 1e-6 after a few hundred terms. Thirty
#: layers and a softmax over logits of size 20 turn that into about 1e-4 at worst.
ATTENTION_LOG_PROB = 1e-3


#: For selection scores of two engines in float32, z-scores of a few units averaged over layers. Their keys differ like
#: their log-probabilities: 2^-24 sqrt(terms) relative, about 7e-7 per layer, 2e-5 after thirty. A z-score, its mean
#: and its deviation are each off by that, together about four times as much. Below this either keep set is right.
KEEP_SET_TIE = 1e-4


#: Largest error of calibrated means, relative to E|q| of the same frequency. They are float64 sums of the model's
#: queries, rounded once to float32, which is 2^-24 = 6e-8; the rest is room for a second forward pass, which a GPU may
#: compute with other kernels.
CALIBRATION = 1e-6

#: The same for a program that loads the model in bfloat16. A query goes through about 16 roundings of at most 2^-9,
#: relative: the norms and sums of the two layers before it, the projection, q_norm, and RoPE applied and undone. The
#: mean of the errors is at most the largest. Measured: 1.5e-3, and 6e-3 with extreme q_norm weights.
CALIBRATION_BF16 = 2.0**-5


def trig_entry_error(table: Any, exact: np.ndarray, angle: np.ndarray) -> Worst:
    """The worst entry of a table of cos or sin values.

    An entry rounded once from float64 is within half a unit of 2^-24, and one more unit is left for the libm. A phase x
    computed in fp32 adds 2 |x| units to its entry.
    """
    import numpy as np

    return worst(np.asarray(table, dtype=np.float64) - exact, UNIT * (1.5 + 2 * np.abs(angle)), exact)
