"""Phase 4, properties: relations that must hold between the scores of related problems of any shape.

hypothesis draws the shapes from the check's seed. The scores of two problems are compared, each with its class B
budget, so only an error that is the same in both goes unnoticed.
"""

from __future__ import annotations

from dataclasses import replace
from operator import itemgetter
from typing import TYPE_CHECKING, Any

from verify import Measure, check
from verify.judge import oracle
from verify.judge.problems import Problem, Shape, make
from verify.judge.scoring import PATHS, Scorer, draws
from verify.judge.tolerance import accuracy, budget_b, key_rounding, worst
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

_CASES = dict(zip(PATHS, PATHS, strict=True))
_EXAMPLES = 8

#: A score that ignores phases must be off by more than this multiple of the allowed error. The best of several random
#: rotations is used, because a single one may hardly change the score when there is only one key.
_NOT_LITTLE, _TURNS = 10, 4

_EPSILON = "statistics that are zero give scores that are not, as with an epsilon under a square root"

_BOTH = "The sum of the class B budgets of the scores compared"
_FAMILY: dict[str, Any] = {"gate": "hard", "needs": ("p1.identity", "p1.triton"), "timeout_s": 180}


def _draw(seed: int) -> np.random.Generator:
    import numpy as np

    return np.random.default_rng(seed)


def _turned(problem: Problem, random: np.random.Generator) -> tuple[float, Problem, np.ndarray, np.ndarray]:
    """Rotate the phases of the keys at random. Returns the largest ratio of score change to allowed error, the problem
    with the rotated keys, the change of its scores, and the allowed error.
    """
    import numpy as np

    case = problem.case
    turn = np.exp(1j * random.uniform(0.5, 2.5, case.k0.shape))
    turned = _rekeyed(problem, oracle.rotated(case.k0 * turn, case.positions, case.omega, problem.shape.style))
    change = oracle.scores(turned.case) - oracle.scores(case)
    allowed = budget_b(case) + budget_b(turned.case)
    return (abs(change) / allowed).max(), turned, change, allowed


def _rekeyed(problem: Problem, keys: np.ndarray, **parts: Any) -> Problem:
    """The problem with other keys ``[B, H, N, D]``, rounded to float32."""
    import torch

    moved = torch.from_numpy(keys).to(problem.keys.device, torch.float32)
    return problem.changed(keys=moved, shape=replace(problem.shape, dtype="float32"), **parts)


@check(
    "p4.drawn", cases=_CASES, **_FAMILY,
    claim="Scores agree with the oracle for random sizes, head dims, dtypes, layouts, strides and positions.",
    reason="Hand-picked cases miss the combinations that nobody thought of.",
    tolerance="Class B, as in p4.triton_oracle.",
    remedy="Repeat with the shape in the message; change one field at a time towards the default.",
)  # fmt: skip
def test_drawn_shapes(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, 3 * _EXAMPLES):
        with attempt as shape:
            problem = make(shape, seed, device)
            found = accuracy(scorer(problem), problem.case)
            measure("error", *found.class_b, where=f"{scorer.where(shape)}, {found.where}")


@check(
    "p4.shift", cases=_CASES, **_FAMILY,
    claim="Scores stay the same when t and the position of every key move by the same amount.",
    reason="Scores depend only on distances; a dependence on absolute positions ranks long contexts wrongly.",
    tolerance=f"{_BOTH}, plus 2^-24 T, because the moved keys are rounded to float32 once.",
    remedy="Look at how t enters the phases: a table row, a modulus, an integer type.",
)  # fmt: skip
def test_shift(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    by = 2 * (seed % 4096) + 1
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, dtype=("float32",)):
        with attempt as shape:
            here = make(shape, seed, device)
            moved = here.case.shifted(by)
            keys = oracle.rotated(moved.k0, moved.positions, moved.omega, shape.style)
            there = _rekeyed(here, keys, positions=moved.positions).changed(shape=replace(shape, t=moved.t))
            difference = scorer(there) - scorer(here)
            allowed = budget_b(here.case) + budget_b(there.case) + key_rounding(here.case)
            measure("difference", *worst(difference, allowed), where=f"{scorer.where(shape)} + {by}")


@check(
    "p4.key_phase", cases=_CASES, **_FAMILY,
    claim="Rotating the phases of the keys changes the scores noticeably, by the amount that the oracle predicts.",
    reason="Scores from norms alone look plausible, but are a different method.",
    tolerance=f"{_BOTH}, for the change; for some key the predicted change is over 10 times that.",
    remedy="Check the pairing of dims (rope_style) and the sign of the phase.",
)  # fmt: skip
def test_key_phase(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, dtype=("float32",)):
        with attempt as shape:
            here, random = make(shape, seed, device), _draw(seed)
            times, there, predicted, allowed = max((_turned(here, random) for _ in range(_TURNS)), key=itemgetter(0))
            assert times > _NOT_LITTLE, f"no rotation of the keys of {shape.told()} changes a score enough; draw more"
            before = scorer.judged_first(here, measure)
            change = scorer(there) - before
            measure("error of the change", *worst(change - predicted, allowed), where=scorer.where(shape))


@check(
    "p4.linear", cases=_CASES, **_FAMILY,
    claim="The trigonometric term, averaged over the offsets, is linear in the key.",
    reason="Only because of this is folding the offsets into one weight exact.",
    tolerance="The class B budgets of the three scores, weighted alike, plus 2^-24 T for rounding the combined key.",
    remedy="Look for a clamp, an absolute value or an epsilon in the trigonometric term.",
)  # fmt: skip
def test_linear(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, dtype=("float32",), aggregation=("mean",)):
        with attempt as shape:
            one = make(shape, seed, device)
            # the real or the imaginary part of each mean is 0, so |m| is exact, and a = |m| cancels the norm term
            real = torch.arange(shape.d // 2, device=device) % 2 == 0
            parts = {"q_mean_real": one.q_mean_real * real, "q_mean_imag": one.q_mean_imag * ~real}
            one = one.changed(**parts, q_abs_mean=sum(abs(part) for part in parts.values()))
            other = one.changed(keys=make(shape, seed + 1, device).keys)
            both = one.changed(keys=2.0 * one.keys - 0.75 * other.keys)
            a, b, c = (scorer(problem) for problem in (one, other, both))
            allowed = 2.0 * budget_b(one.case) + 0.75 * budget_b(other.case) + budget_b(both.case)
            found = worst(c - (2.0 * a - 0.75 * b), allowed + key_rounding(both.case))
            measure("difference", *found, where=scorer.where(shape))


_AXES = {"rows": 0, "heads": 1, "keys": 2}


@check(
    "p4.permute", **_FAMILY,
    cases={f"{path}-{axis}": (path, number) for path in PATHS for axis, number in _AXES.items()},
    claim="Permuting keys, heads (with their statistics) or batch rows permutes the scores in the same way.",
    reason="A key's score must not depend on its neighbours or on its index along any axis.",
    tolerance=f"{_BOTH}.",
    remedy="Look for a mask, a block or a stride that treats the first or last row, head or key differently.",
)  # fmt: skip
def test_permute(case: tuple[str, int], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    path, axis = case
    several: dict[int, dict[str, tuple[int, ...]]]
    several = {0: {"b": (3, 2), "h": (1, 2, 3)}, 1: {"h": (3, 2)}, 2: {"n": (33, 31, 64, 65, 129, 200)}}
    for attempt, scorer in draws(subject, path, device, seed, _EXAMPLES, **several[axis]):
        with attempt as shape:
            here = make(shape, seed, device)
            size = here.keys.shape[axis]
            order = torch.arange(size, device=device).roll(1 + seed % (size - 1))  # every index moves
            names = ("q_mean_real", "q_mean_imag", "q_abs_mean", "freq_weight") if axis == 1 else ()
            parts = {name: getattr(here, name)[order] for name in names}
            positions = here.case.positions[order.cpu().numpy()] if axis == 2 else here.case.positions
            there = here.changed(keys=here.keys.index_select(axis, order), positions=positions, **parts)
            want = scorer(here).take(order.cpu().numpy(), axis)
            difference = scorer(there) - want
            allowed = budget_b(there.case) + budget_b(here.case).take(order.cpu().numpy(), axis)
            measure("difference", *worst(difference, allowed), where=scorer.where(shape))


@check(
    "p4.zero", cases=_CASES, **_FAMILY,
    claim="Statistics that are zero give scores that are exactly zero.",
    reason="An epsilon under a square root turns zeros into small scores, and keys are then ranked by them.",
    tolerance="0: the class B budget when all terms are 0.",
    remedy="Remove epsilons from the norms; nothing is divided by them.",
)  # fmt: skip
def test_zero(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES):
        with attempt as shape:
            here = make(shape, seed, device)
            zero = {name: getattr(here, name) * 0 for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
            scores = scorer(here.changed(**zero))
            measure("largest score", abs(scores).max(), 0.0, where=scorer.where(shape), cause=_EPSILON)


@check(
    "p4.scale", **_FAMILY,
    cases={
        f"{path}-{what}": (path, names)
        for path in PATHS
        for what, names in {
            "weights": ("freq_weight",), "statistics": ("q_mean_real", "q_mean_imag", "q_abs_mean"), "keys": ("keys",)
        }.items()
    },
    claim="Scores are proportional to the weights, to the statistics and to the keys.",
    reason="Most tests use weights of 1, so a squared or dropped weight shows only in models with scaled RoPE.",
    tolerance=f"{_BOTH}; the factor is a power of two, so nothing else is rounded.",
    remedy="freq_scale_sq is the weight, used as given; look for its square, its root, or a clamp.",
)  # fmt: skip
def test_scale(case: tuple[str, tuple[str, ...]], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    path, names = case
    tested = {"weights": ("drawn",)} if names == ("freq_weight",) else {}
    for attempt, scorer in draws(subject, path, device, seed, _EXAMPLES, **tested):
        with attempt as shape:
            here = make(shape, seed, device)
            there = here.changed(**{name: 4.0 * getattr(here, name) for name in names})
            difference = scorer(there) - 4.0 * scorer(here)
            allowed = budget_b(there.case) + 4.0 * budget_b(here.case)
            measure("difference", *worst(difference, allowed), where=scorer.where(shape))


def _mean_and_max(scorer: Scorer, shape: Shape, seed: int, device: str) -> tuple[np.ndarray, np.ndarray]:
    """max - mean of the scores of a shape, and the allowed error of this difference."""
    both = [make(replace(shape, aggregation=aggregation), seed, device) for aggregation in ("max", "mean")]
    largest, mean = (scorer(problem) for problem in both)
    of_largest, of_mean = (budget_b(problem.case) for problem in both)
    return largest - mean, of_largest + of_mean


@check(
    "p4.one_offset", cases=_CASES, **_FAMILY,
    claim="With one offset, mean and max aggregation give the same score.",
    reason="The two are often separate kernels, which must agree when there is only one offset.",
    tolerance=f"{_BOTH}.",
    remedy="Look at the divisor of the mean and at the initial value of the maximum.",
)  # fmt: skip
def test_one_offset(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, offsets=((1.0,), (3.0,), (65536.0,))):
        with attempt as shape:
            difference, allowed = _mean_and_max(scorer, shape, seed, device)
            measure("difference", *worst(difference, allowed), where=scorer.where(shape))


@check(
    "p4.max_mean", cases=_CASES, **_FAMILY,
    claim="The maximum over the offsets is never below the mean, and above it for some key.",
    reason="A maximum that misses an offset or is taken per frequency can look like a mean.",
    tolerance=f"{_BOTH}.",
    remedy="Take the maximum of whole scores over every offset.",
)  # fmt: skip
def test_max_is_not_below_mean(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import numpy as np

    for attempt, scorer in draws(
        subject, case, device, seed, _EXAMPLES, offsets=((1.0, 2.0, 4.0), tuple(float(1 << i) for i in range(17)))
    ):
        with attempt as shape:
            above, allowed = _mean_and_max(scorer, shape, seed, device)
            found = worst(np.minimum(above, 0.0), allowed)
            measure("mean above the maximum", *found, where=scorer.where(shape))
            assert (above > allowed).any(), f"the maximum equals the mean: {scorer.where(shape)}"


@check(
    "p4.layout", cases=_CASES, **_FAMILY,
    claim="Keys in the half layout get the same scores as the same keys in the interleaved layout.",
    reason="The wrong layout pairs the wrong dims, and the resulting scores look plausible: they correlate by half.",
    tolerance=f"{_BOTH}.",
    remedy="half pairs (f, f + D/2), interleaved (2f, 2f + 1); check which of the two a call received.",
)  # fmt: skip
def test_layout(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, style=("half",)):
        with attempt as shape:
            half = make(shape, seed, device)
            keys = half.keys.unflatten(-1, (2, -1)).transpose(-1, -2).flatten(-2)
            pairs = half.changed(keys=keys, shape=replace(shape, style="interleaved"))
            difference = scorer(pairs) - scorer(half)
            allowed = budget_b(half.case) + budget_b(pairs.case)
            measure("difference", *worst(difference, allowed), where=scorer.where(shape))


@check(
    "p4.chunked", cases=_CASES, **_FAMILY,
    claim="Keys get the same scores in several calls as in one call.",
    reason="A keep set must not depend on how scoring is tiled; engines score pages, chunks and whole caches.",
    tolerance=f"{_BOTH}.",
    remedy="Look for values derived from the length of the call: a round start, a normalisation, a block's tail.",
)  # fmt: skip
def test_chunked(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import numpy as np

    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES, n=(65, 33, 64, 129, 200)):
        with attempt as shape:
            whole = make(shape, seed, device)
            cuts = np.sort(_draw(seed).choice(np.arange(1, shape.n), 2, replace=False))
            pieces = [
                whole.changed(
                    keys=whole.keys[:, :, part], positions=whole.case.positions[part],
                    shape=replace(shape, n=part.stop - part.start),
                )
                for part in (slice(0, cuts[0]), slice(cuts[0], cuts[1]), slice(cuts[1], shape.n))
            ]  # fmt: skip
            joined = np.concatenate([scorer(piece) for piece in pieces], -1)
            difference = joined - scorer(whole)
            found = worst(difference, 2 * budget_b(whole.case))
            measure("difference", *found, where=f"{scorer.where(shape)}, cut at {cuts.tolist()}")


@check(
    "p4.reused", cases=_CASES, **_FAMILY,
    claim="If the tensors hold new numbers at the second call, the scores are those of the new numbers.",
    reason="A serving engine reuses its buffers; anything cached by address or object identity becomes stale.",
    tolerance="Class B, against the oracle of the new numbers.",
    remedy="Cache nothing by a tensor's identity or address, or compare its contents.",
)  # fmt: skip
def test_reused_buffers(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in draws(subject, case, device, seed, _EXAMPLES):
        with attempt as shape:
            held = make(shape, seed, device)
            scorer.judged_first(held, measure)
            # at the same t, which may be a cache key too, and at another
            for later in (0, 3):
                new = make(replace(shape, t=shape.t + later, theta=5e5), seed + 1 + later, device)
                fresh = new.tensors()
                for name, tensor in held.tensors().items():
                    tensor.copy_(fresh[name])
                found = accuracy(scorer(replace(held, shape=new.shape, case=new.case)), new.case)
                measure("error", *found.class_b, where=f"{scorer.where(shape)}, {found.where}")


@check(
    "p4.not_finite", **_FAMILY,
    cases={f"{path}-{name}": (path, float(name)) for path in PATHS for name in ("nan", "inf")},
    claim="A key that contains NaN or Inf gets a score that is not finite, and does not affect other scores.",
    reason="The plan's HARD gate 3.1 asks for finite scores; a path that turns NaN into a number defeats it.",
    tolerance="Not finite for the bad keys; class B for the others.",
    remedy="Remove nan_to_num, clamps, and maxima that drop NaN; mask tails before the sum.",
)  # fmt: skip
def test_not_finite(case: tuple[str, float], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    path, value = case
    for attempt, scorer in draws(subject, path, device, seed, _EXAMPLES, n=(33, 31, 64, 65, 129, 200)):
        with attempt as shape:
            good = make(shape, seed, device)
            scorer.judged_first(good, measure)
            bad = _draw(seed).choice(shape.n, 3, replace=False)
            keys = good.keys.clone()
            keys[:, :, bad.tolist(), seed % shape.d] = value
            scores = scorer(replace(good, keys=keys))
            finite = abs(scores[:, :, bad]) < float("inf")
            assert not finite.any(), (
                f"{int(finite.sum())} keys with a {value} got a finite score: {scorer.where(shape)}"
            )
            scores[:, :, bad] = oracle.scores(good.case)[:, :, bad]
            found = accuracy(scores, good.case)
            measure("error of the others", *found.class_b, where=f"{scorer.where(shape)}, {found.where}")
