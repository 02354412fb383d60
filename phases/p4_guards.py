"""Phase 4, integrity: a path writes what it should and nothing else, by the kernel it names, with the same bits again.

Every other check of phases 3 to 5 calls a subject in the same guarded way (``verify/judge/guarded.py``) and judges
numbers.
"""

from __future__ import annotations

from dataclasses import replace

from verify import Measure, check
from verify.judge import guarded
from verify.judge.guarded import PATHS
from verify.judge.problems import Shape, drawn, make
from verify.subject.subject import Subject

_CASES = dict(zip(PATHS, PATHS, strict=True))
_NEEDS = ("p1.identity", "p1.triton")
_BASE = Shape(t=64, offsets=(1.0, 2.0, 4.0))

#: Shapes whose tails a kernel can run over, and drawn ones.
_TAILS = tuple(replace(_BASE, n=n, b=2, aggregation=a) for n in (1, 33, 65, 255) for a in ("mean", "max"))


def _shapes(seed: int) -> tuple[Shape, ...]:
    return (*_TAILS, replace(_BASE, b=2, strides="sliced"), replace(_BASE, d=96, strides="spread"), *drawn(seed, 6))


@check(
    "p4.inputs", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Scoring leaves every tensor it is given untouched, to the bit.",
    reason="A kernel that edits its inputs agrees with any reference computed afterwards.",
    tolerance="Bitwise equality with copies taken before the call.",
    remedy="Find the in-place operation on the argument that the message names.",
)  # fmt: skip
def test_inputs_untouched(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for shape in _shapes(seed):
        problem = make(shape, seed, device)
        changed = list(guarded.engine(subject, case, problem).changed)
        if case == "triton":
            changed += guarded.kernel(subject, problem).changed
        where = f"the {PATHS[case]} path wrote to {', '.join(changed)} ({shape.told()})" if changed else shape.told()
        measure("inputs that changed", len(changed), 0, where=where)


@check(
    "p4.guards", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Scoring writes nothing beside the tensors it allocates.",
    reason="A store without its mask destroys whatever lies beside the scores, and the scores themselves are right.",
    tolerance="4096 guard bytes on each side of every allocation, compared bitwise; the payload starts as NaN.",
    remedy="Mask the store of the last block; the message says on which side of which tensor it went.",
)  # fmt: skip
def test_nothing_is_written_beside_the_output(
    case: str, subject: Subject, device: str, seed: int, measure: Measure
) -> None:
    for shape in _shapes(seed):
        overruns = guarded.engine(subject, case, make(shape, seed, device)).overruns
        where = f"the {PATHS[case]} path {'; '.join(overruns)} ({shape.told()})" if overruns else shape.told()
        measure("allocations written beside", len(overruns), 0, where=where)


@check(
    "p4.launches", gate="hard", needs=_NEEDS,
    cases={
        **{path: (path, None) for path in PATHS},
        **{f"dispatch_{path}": (path, "compute_scores") for path in PATHS},
    },
    claim="The Triton path launches a kernel and the PyTorch path none, also where use_triton_scoring chooses.",
    reason="A path that quietly takes the other one makes their comparison one of a thing with itself.",
    remedy="Let each entry point run its own path, or raise; there is no fallback in between.",
)  # fmt: skip
def test_each_path_is_the_one_it_says(case: tuple[str, str | None], subject: Subject, device: str, seed: int) -> None:
    path, through = case
    found = guarded.engine(subject, path, make(_BASE, seed, device), through=through)
    told = f"{through or 'the call'} on the {PATHS[path]} path launched {', '.join(found.launched) or 'no kernel'}"
    assert bool(found.launched) == (path == "triton"), told


@check(
    "p4.ghost", gate="hard", needs=_NEEDS,
    cases={"mean": _BASE, "max": replace(_BASE, aggregation="max"), "interleaved": replace(_BASE, style="interleaved")},
    claim="With every kernel replaced by nothing, no score is right.",
    reason="A score that is there without the kernel was made by something else, or left over from another call.",
    tolerance="No score within its class B budget of the oracle.",
    remedy="Find what computes the score beside the kernel.",
)  # fmt: skip
def test_without_its_kernel_nothing_is_right(
    case: Shape, subject: Subject, device: str, seed: int, measure: Measure
) -> None:
    from verify.judge import oracle, tolerance
    from verify.subject.launches import skipped

    problem = make(case, seed, device)
    guarded.engine(subject, "triton", problem)  # whatever a first call leaves behind
    with skipped():
        found = guarded.engine(subject, "triton", problem)
    right = abs(found.scores - oracle.scores(problem.case)) <= tolerance.budget_b(problem.case)
    measure("right scores without a kernel", int(right.sum()), 0, where=f"{right.size} scores")


@check(
    "p4.repeat", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="The same call gives the same bits, every time.",
    reason="Keep sets are decided by comparisons; a score that varies makes a run that cannot be reproduced.",
    tolerance="Bitwise equality over repeated calls (20 on a GPU, 3 in the interpreter).",
    remedy="Look for atomics, races or uninitialised memory.",
)  # fmt: skip
def test_repeatable(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    problem = make(replace(_BASE, b=2, n=129), seed, device)
    first = guarded.engine(subject, case, problem).result.clone()
    repeats = 20 if device == "cuda" else 3
    differ = sum(not torch.equal(first, guarded.engine(subject, case, problem).result) for _ in range(repeats))
    measure("calls that differ from the first", differ, 0, where=f"{case} path, {repeats} repeats")
