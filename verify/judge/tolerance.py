"""Every tolerance of the suite, with its derivation. Nothing is compared with a number that does not come from here.

An fp32 implementation that reads exact keys makes, per score, a handful of roundings of 2^-24 relative to the sum
of the absolute terms T (a sum of n terms in a tree rounds log2 n times, each weight and product once, |k| twice);
folded prototypes measured 0.6 to 2.5 units of 2^-24 T. Class A allows 8. Class B adds what honest fp32 phases cost:
an angle x = (t + o) omega held in fp32 is off by up to |x| 2^-24, and forming it from rounded factors doubles that.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify.judge import perturb

if TYPE_CHECKING:
    import numpy as np

    from verify.judge.oracle import Case

#: Half a unit in the last place of 1.0 in float32.
UNIT = 2.0**-24

#: Class A, in units of 2^-24 T.
CLASS_A_UNITS = 8.0

#: Two engines that compute the same model in float32 in another order: logits of about 20 are sums of some thousand
#: terms over thirty layers, 2^-24 x 20 x 1000, so a gap below this decides nothing about which token is greedy.
NEAR_TIE = 1e-3

#: Plan 3.2: the fixed bound on the difference of the Triton and the PyTorch path.
PLAN_MAX_DIFF = 1e-2


@dataclass(frozen=True)
class Accuracy:
    """How far scores are from the oracle, in the worst place.

    ``units`` is the largest error over 2^-24 T (class A allows 8); ``of_b`` the largest error over the class B budget
    (allows 1); ``max_error`` the largest absolute error. NaN where a score is NaN, which no bound admits.
    """

    units: float
    of_b: float
    max_error: float
    where: str

    @property
    def accuracy_class(self) -> str:
        """``A``, ``B`` or ``C`` of spec: within 8 x 2^-24 T; within that plus honest fp32 phases; neither."""
        if self.units <= CLASS_A_UNITS:
            return "A"
        return "B" if self.of_b <= 1.0 else "C"


def budget_a(case: Case) -> np.ndarray:
    """Class A's allowed error per score, ``[B, H*G, N]``."""
    from verify.judge import oracle

    return CLASS_A_UNITS * UNIT * oracle.term_sum(case)


def budget_b(case: Case) -> np.ndarray:
    """Class B's allowed error per score, ``[B, H*G, N]``."""
    from verify.judge import oracle

    return budget_a(case) + 2 * UNIT * oracle.phase_sum(case)


def budget_pre_rope(case: Case) -> np.ndarray:
    """Allowed error of a score made from float32 amplitudes and phases of keys before RoPE, ``[B, H*G, N]``.

    Class B, and once more class A's 8 units: a complex product is off by 2.3 units of its size, a modulus by one more,
    an angle of up to pi by pi.
    """
    return budget_b(case) + budget_a(case)


def key_rounding(case: Case) -> np.ndarray:
    """By how much a score may move when its key is rounded to float32 once, ``[B, H*G, N]``.

    Each part of a pair moves by at most 2^-24 of itself, so a pair by 2^-24 |k_f|, and the score by 2^-24 T.
    """
    from verify.judge import oracle

    return UNIT * oracle.term_sum(case)


def over(error: Any, allowed: np.ndarray, result: np.ndarray | None = None) -> float:
    """The largest error over what is allowed there; NaN where an error is NaN, 0 where nothing is off by nothing.

    ``result``, of the same shape, is what the errors are in, where that is known.
    """
    import numpy as np

    return _largest(_planted(np.asarray(error, dtype=np.float64), allowed, result), allowed)


def accuracy(got: Any, case: Case) -> Accuracy:
    """Compare the scores ``[B, H*G, N]`` of a subject with the oracle's. Raises AssertionError for another shape."""
    import numpy as np

    from verify.judge import oracle

    want = oracle.scores(case)
    got = np.asarray(got, dtype=np.float64)
    assert got.shape == want.shape, f"the scores have shape {got.shape}, expected {want.shape}"
    allowed = budget_b(case)
    error = np.abs(_planted(got - want, allowed, want))
    relative = _ratio(error, budget_a(case)) * CLASS_A_UNITS
    worst = np.unravel_index(int(np.argmax(np.where(np.isnan(relative), np.inf, relative))), relative.shape)
    place = "row {}, query head {}, key {}".format(*(int(i) for i in worst))
    of_b = _largest(error, allowed)
    return Accuracy(float(relative[worst]), of_b, float(error.max()), f"{place} (oracle {want[worst]:.6g})")


def blamed(paths: Mapping[str, Accuracy]) -> str:
    """Which of the ``paths`` is wrong by the oracle, in words: ``the PyTorch path is wrong (45x its class B budget from
    the float64 oracle), the Triton path is right (class A)``.
    """
    told = {
        name: f"right (class {found.accuracy_class})"
        if found.of_b <= 1.0
        else f"wrong ({found.of_b:.3g}x its class B budget from the float64 oracle)"
        for name, found in paths.items()
    }
    wrong_first = sorted(told, key=lambda name: paths[name].of_b <= 1.0)
    return ", ".join(f"the {name} path is {told[name]}" for name in wrong_first)


def paths_differ(one: Any, other: Any, case: Case) -> tuple[float, float]:
    """How far two results of one problem, ``[B, H*G, N]``, are apart: absolutely, and over twice class A's error.

    The one may be ``PLAN_MAX_DIFF``, the other 1: each path may be off by class A's error.
    """
    import numpy as np

    one, other = (np.asarray(scores, dtype=np.float64) for scores in (one, other))
    allowed = 2 * budget_a(case)
    difference = _planted(one - other, np.minimum(allowed, PLAN_MAX_DIFF), other)
    return float(np.abs(difference).max()), _largest(difference, allowed)


def matmul_ratio(got: Any, a: Any, b: Any) -> float:
    """Largest error of a bf16 product ``[M, N]`` of float64 ``[M, K]`` and ``[K, N]`` over its budget; at most 1.

    Each output is one bf16 rounding, 2^-8 relative, of a sum whose fp32 accumulation adds K x 2^-24 of its terms.
    """
    import numpy as np

    got, a, b = (np.asarray(x, dtype=np.float64) for x in (got, a, b))
    exact, terms = a @ b, np.abs(a) @ np.abs(b)
    return over(got - exact, np.abs(exact) * 2.0**-8 + terms * a.shape[1] * UNIT, exact)


def _planted(error: np.ndarray, allowed: np.ndarray, result: np.ndarray | None) -> np.ndarray:
    """``error``, with one more in an element where a run plants one."""
    return perturb.judged(error, perturb.element(error, allowed, result), lambda judged: _largest(judged, allowed))


def _largest(error: np.ndarray, allowed: np.ndarray) -> float:
    import numpy as np

    return float(np.max(_ratio(np.abs(error), allowed)))


def _ratio(error: np.ndarray, budget: np.ndarray) -> np.ndarray:
    """error / budget, where nothing over nothing is 0: a score of no terms has to be exactly 0."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where((error == 0) & (budget == 0), 0.0, error / budget)


#: Largest difference of float32 log-probabilities between two attention implementations over the same cache. Each
#: layer sums the same terms in another order: about 2^-24 sqrt(terms) relative, 1e-6 after some hundred terms, which
#: thirty layers and a softmax over logits of size 20 turn into some 1e-4 at worst.
ATTENTION_LOG_PROB = 1e-3


#: Two engines' selection scores in float32, z-scores of a few units averaged over layers. Their keys differ as their
#: log-probabilities do: 2^-24 sqrt(terms) relative, some 7e-7 a layer, 2e-5 after thirty of them; a z-score, its mean
#: and its deviation are each off by that, which makes about four times as much. Below this either keep set is right.
KEEP_SET_TIE = 1e-4


#: Largest error of calibrated means, relative to E|q| of the same frequency. They are float64 sums of the queries that
#: the model computed, rounded once to float32, which is 2^-24 = 6e-8; the rest is room for a second forward pass that
#: a GPU may compute with other kernels.
CALIBRATION = 1e-6


def trig_entry_ratio(table: Any, exact: np.ndarray, angle: np.ndarray) -> float:
    """Largest error of table entries (cos or sin values) over what each may be off by; at most 1 is allowed.

    An entry rounded once from float64 is within half a unit of 2^-24, and one more is left for the libm; a phase x that
    was formed in fp32 adds 2 |x| units, entry by entry.
    """
    import numpy as np

    return over(np.asarray(table, dtype=np.float64) - exact, UNIT * (1.5 + 2 * np.abs(angle)), exact)
