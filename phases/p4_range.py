"""Phase 4, range: keys far apart in memory, and scores near the smallest numbers of float32."""

from __future__ import annotations

import mmap
from dataclasses import replace
from typing import TYPE_CHECKING

from verify import Measure, check, skip
from verify.judge import oracle
from verify.judge.problems import Problem, Shape, make
from verify.judge.scoring import PATHS, scorers
from verify.judge.tolerance import accuracy, budget_b
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import torch

_AXES = {"rows": 0, "heads": 1, "keys": 2}

#: Two strides exceed 2^31 elements, one does not, so only the product of index and stride overflows.
_FAR = 2**30 + 64

#: Of Linux: addresses without a promise of memory for them. The module mmap has it from Python 3.13 on.
_MAP_NORESERVE = 0x4000

#: The cause, if only the keys beyond 2^31 elements are scored wrongly.
_WRAPS = "addresses are computed in 32 bits, so keys more than 2^31 elements away are not those that are read"

#: An index that wraps reads 2^31 elements before the first key, which is still inside a buffer of this many elements.
_ELEMENTS = 2**31 + 2 * _FAR + 2**16


@check(
    "p4.large", gate="hard", needs=("p1.identity", "p1.triton"), timeout_s=180,
    cases={f"{path}-{axis}": (path, number) for path in PATHS for axis, number in _AXES.items()},
    claim="Keys more than 2^31 elements after the first are scored correctly, along each axis.",
    reason="The cache of a long context or a large batch is that large; a 32-bit index wraps and reads other keys.",
    tolerance="Class B.",
    remedy="Compute addresses in int64: cast the index before multiplying it by a stride.",
)  # fmt: skip
def test_large_indices(case: tuple[str, int], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    path, axis = case
    shape = Shape(b=3, h=3, n=3, t=64, d=64, offsets=(1.0, 2.0, 4.0))
    strides = [9 * 64, 3 * 64, 64, 1]
    strides[axis] = _FAR
    problem = make(shape, seed, device)
    buffer = _untouched(device)
    # not a view of a tensor, which the comparison would copy: there is no memory for a second one
    far = torch.empty(0, dtype=torch.bfloat16, device=device).set_(buffer, 2**31, problem.keys.shape, strides)
    far.copy_(problem.keys)
    assert torch.equal(far, problem.keys), "torch itself cannot index that far on this device"
    for scorer in scorers(subject, path, device):
        scorer.judged_first(problem, measure)
        scores = scorer(replace(problem, keys=far))
        found = accuracy(scores, problem.case)
        cause = _WRAPS if _wrong_along(scores, problem, axis) == [False, False, True] else ""
        measure("error", *found.class_b, where=f"{scorer.where(shape)}, {found.where}", cause=cause)


def _wrong_along(scores: np.ndarray, problem: Problem, axis: int) -> list[bool]:
    """For each index along an axis of the keys, whether a score is outside class B; scores are ``[B, H*G, N]``."""
    import numpy as np

    within = np.abs(scores - oracle.scores(problem.case)) <= budget_b(problem.case)
    return [not part.all() for part in np.split(within, problem.keys.shape[axis], axis)]


def _untouched(device: str) -> torch.UntypedStorage:
    """Memory for ``_ELEMENTS`` in bfloat16, of which a CPU fills only the pages that are used. Skips without it."""
    import torch

    needed = 2 * _ELEMENTS
    told = f"the keys span {needed / 2**30:.1f} GiB"
    if device == "cpu":
        try:
            memory = mmap.mmap(-1, needed, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except OSError as error:
            skip("VRAM", f"{told} of addresses, which the system does not give ({error.strerror})")
        return torch.frombuffer(memory, dtype=torch.bfloat16).untyped_storage()
    if (free := torch.cuda.mem_get_info()[0]) < needed + 2**30:
        skip("VRAM", f"{told}, and {free / 2**30:.1f} GiB are free")
    return torch.empty(_ELEMENTS, dtype=torch.bfloat16, device=device).untyped_storage()


#: Weights that make the products of small numbers of a key smaller than 2^-126, which float32 holds as subnormals.
_TINY = 2.0**-118

#: What rounding subnormal numbers adds to the error of a score: 2^-150 for each of fewer than 1,000 roundings, of which
#: most are then multiplied by a number of a key, below 2^5.
_UNDERFLOW = 1000 * 2.0**-145


@check(
    "p4.tiny", gate="soft", needs=("p1.identity", "p1.triton"), timeout_s=180, cases={path: path for path in PATHS},
    claim="Products and sums below 2^-126, the least normal float32, are not flushed to zero.",
    reason="A kernel that flushes, as fast-math options make it, computes otherwise than its source says.",
    tolerance=(
        "Class B, plus 2^-135 for subnormal numbers: 2^-150 for each of fewer than 1,000 roundings, times a key below "
        "2^5. Flushed products are off by up to 2^-126 each."
    ),
    remedy="Compile without flush-to-zero, and look for sums of squares of small numbers.",
)  # fmt: skip
def test_tiny_weights(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    usual = Shape(n=65, t=64, dtype="float32", offsets=(1.0, 2.0, 4.0))
    for scorer in scorers(subject, case, device):
        for attempt in scorer.offers.fitted(usual, replace(usual, weights="ones")):
            with attempt as taken:
                here = make(taken, seed, device)
                scorer.judged_first(here, measure)
                problem = here.changed(freq_weight=here.freq_weight * _TINY)
                found = accuracy(scorer(problem), problem.case)
                error, allowed = found.class_b
                where = f"{scorer.where(taken)}, weights x 2^-118, {found.where}"
                measure("error", error, allowed + _UNDERFLOW, where=where)
