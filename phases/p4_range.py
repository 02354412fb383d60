"""Phase 4, range: keys far apart in memory, and scores near the smallest numbers of float32."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from verify import Measure, check, skip
from verify.judge.problems import Shape, make
from verify.judge.scoring import PATHS, scorers
from verify.judge.tolerance import accuracy
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import torch

_AXES = {"rows": 0, "heads": 1, "keys": 2}

#: Two strides exceed 2^31 elements, one does not, so only the product of index and stride overflows.
_FAR = 2**30 + 64

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
        found = accuracy(scorer(replace(problem, keys=far)), problem.case)
        measure("error", *found.class_b, where=f"{scorer.where(shape)}, {found.where}")


def _untouched(device: str) -> torch.UntypedStorage:
    """Memory for ``_ELEMENTS`` in bfloat16, which a CPU fills with pages only where they are used. Skips without it."""
    import torch

    needed = 2 * _ELEMENTS
    told = f"the keys span {needed / 2**30:.1f} GiB"
    if device != "cpu" and (free := torch.cuda.mem_get_info()[0]) < needed + 2**30:
        skip("VRAM", f"{told}, and {free / 2**30:.1f} GiB are free")
    try:
        return torch.empty(_ELEMENTS, dtype=torch.bfloat16, device=device).untyped_storage()
    except RuntimeError as error:
        skip("VRAM", f"{told}, and the system does not reserve them: {str(error).splitlines()[0]}")


#: Weights that make most scores about 2^-112, and many of the products that they consist of smaller than 2^-126.
_TINY = 2.0**-118


@check(
    "p4.tiny", gate="soft", needs=("p1.identity", "p1.triton"), timeout_s=180, cases={path: path for path in PATHS},
    claim="Scores that are made of subnormal numbers are as accurate as others: nothing is flushed to zero.",
    reason="A kernel that flushes, as fast-math options make it, computes otherwise than its source says.",
    tolerance=(
        "Class B. Rounding subnormal numbers adds at most 2^-150 for each of some 200 operations, times a key of at "
        "most 2^4: less than 2^-138, a thirtieth of the 2^-133 that class B allows a score made of terms of 2^-112."
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
                measure("error", *found.class_b, where=f"{scorer.where(taken)}, weights x 2^-118, {found.where}")
