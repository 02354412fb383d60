"""Phase 4, ranking: the order of keys, for an implementation that tells no raw scores.

The published API has no such function, so only a subject that offers one is judged by it; docs/contract.md defines it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from verify import Measure, check
from verify.judge.keep_set import Selection, select
from verify.judge.offers import Attempt
from verify.judge.problems import Problem, Shape, make
from verify.judge.scoring import Scorer, scorers
from verify.record.causes import ONE_FOR_ALL
from verify.subject.subject import Subject

#: Near offsets: with far ones, fp32 phases blur the gaps between scores.
_BASE = Shape(n=65, t=128, dtype="float32", offsets=(1.0, 2.0, 4.0))


@check(
    "p4.ranking", gate="hard", capability="ranking",
    cases={
        "plain": _BASE, "grouped": replace(_BASE, g=3), "rows": replace(_BASE, b=2), "one_key": replace(_BASE, n=1),
        "bfloat16": replace(_BASE, dtype="bfloat16"), "far": replace(_BASE, t=32768), "d64": replace(_BASE, d=64),
        "sliced": replace(_BASE, strides="sliced"),
    },
    claim="rank_keys returns every key of a KV head once, in the oracle's order: largest z-score first, of a group of "
    "query heads the largest.",
    reason="What is evicted follows from this order alone; a wrong one looks as plausible as the right one.",
    tolerance="Keys whose scores differ by less than twice the class B error may swap (verify/judge/keep_set.py).",
    remedy="Check the pairing of dims, the distance t + o - p, and that z-scores are joined by their maximum.",
)  # fmt: skip
def test_ranking(case: Shape, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, ranker in _rankers(subject, device, case):
        with attempt as shape:
            problem = make(shape, seed, device)
            order = _order(ranker, problem)
            if shape.n == 1:
                measure("places that differ", int((order != 0).sum()), 0, where=shape.told())
                continue  # a single key has only one order
            for row in range(shape.b):
                selection = _selection(problem, row)
                inversion = _inversion(selection, order[row])
                cause = ONE_FOR_ALL if shape.h > 1 and (order[row] == order[row][0]).all() else ""
                where = f"{shape.told()}, row {row}"
                measure("better key ranked later", inversion, selection.allowed, where=where, cause=cause)


@check(
    "p4.ranking_repeats", gate="hard", cases="calls", capability="ranking",
    claim="Ranking the same keys twice gives the same order, and leaves the inputs unchanged.",
    reason="An order that varies makes a run irreproducible.",
    tolerance="Exact.",
    remedy="Look for an unstable sort, atomics, or uninitialised memory.",
)  # fmt: skip
def test_ranking_repeats(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, ranker in _rankers(subject, device, _BASE):
        with attempt as shape:
            problem = make(shape, seed, device)
            first = _order(ranker, problem)
            found = ranker.call(problem)
            measure("places that differ", int((found.result.cpu().numpy() != first).sum()), 0, where=shape.told())
            measure("inputs that changed", len(found.changed), 0, where=", ".join(found.changed))


def _rankers(subject: Subject, device: str, case: Shape) -> Iterator[tuple[Attempt, Scorer]]:
    """Attempts to judge ``case`` with every ranking function of the subject. Raises SubjectLacks if there is none."""
    for ranker in scorers(subject, "ranking", device):
        for attempt in ranker.offers.fitted(case, _BASE):
            yield attempt, ranker


def _order(ranker: Scorer, problem: Problem):
    """The order of the keys, int64 ``[B, H, N]``. Raises AssertionError if it is not one of every head's keys."""
    import numpy as np

    shape = problem.shape
    found, wanted = ranker.call(problem).result, (shape.b, shape.h, shape.n)
    assert tuple(found.shape) == wanted, f"the order has shape {tuple(found.shape)}, expected {wanted}"
    assert not found.dtype.is_floating_point, f"the order has dtype {found.dtype}, expected indices"
    order = found.cpu().numpy()
    wrong = np.argwhere((np.sort(order, -1) != np.arange(shape.n)).any(-1))
    assert not len(wrong), f"row {wrong[0][0]}, KV head {wrong[0][1]} does not have every key once"
    return order


def _selection(problem: Problem, row: int) -> Selection:
    import numpy as np

    case = replace(problem.case, k0=problem.case.k0[row : row + 1])
    return select([case], np.ones(problem.shape.n, dtype=bool), mode="per_layer_per_head", normalize=True)


def _inversion(selection: Selection, order) -> float:
    """By how much a key at most beats one that is ranked before it, over every place at which the order can be cut."""
    import numpy as np

    everything = np.ones(order.shape[-1], dtype=bool)
    places = np.argsort(order, -1)
    return max(selection.inversion(places < kept, everything) for kept in range(1, order.shape[-1]))
