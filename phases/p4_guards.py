"""Phase 4, integrity: each path writes only its output, runs the kernel it names, and is bitwise repeatable.

The other checks of phases 3 to 5 call the subject through the same guards (``verify/judge/guarded.py``) and compare
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

#: Shapes with partial blocks at the end, where a kernel may write out of bounds.
_TAILS = tuple(replace(_BASE, n=n, b=2, aggregation=a) for n in (1, 33, 65, 255) for a in ("mean", "max"))


def _shapes(seed: int) -> tuple[Shape, ...]:
    return (*_TAILS, replace(_BASE, b=2, strides="sliced"), replace(_BASE, d=96, strides="spread"), *drawn(seed, 6))


@check(
    "p4.inputs", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Scoring leaves every input tensor bitwise unchanged.",
    reason="A kernel that edits its inputs agrees with any reference computed afterwards.",
    tolerance="Bitwise equality with copies taken before the call.",
    remedy="Find the in-place operation on the argument named in the message.",
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
    claim="Scoring writes nothing outside the tensors it allocates.",
    reason="An unmasked store corrupts the memory next to the scores, while the scores themselves are correct.",
    tolerance="4096 guard bytes on each side of every allocation, compared bitwise; the payload starts as NaN.",
    remedy="Mask the store of the last block; the message names the tensor and the side.",
)  # fmt: skip
def test_nothing_is_written_beside_the_output(
    case: str, subject: Subject, device: str, seed: int, measure: Measure
) -> None:
    for shape in _shapes(seed):
        overruns = guarded.engine(subject, case, make(shape, seed, device)).overruns
        where = f"the {PATHS[case]} path {'; '.join(overruns)} ({shape.told()})" if overruns else shape.told()
        measure("out-of-bounds writes", len(overruns), 0, where=where)


@check(
    "p4.launches", gate="hard", needs=_NEEDS,
    cases={
        **{path: (path, None) for path in PATHS},
        **{f"dispatch_{path}": (path, "compute_scores") for path in PATHS},
    },
    claim="The Triton path launches a kernel and the PyTorch path does not, also when use_triton_scoring selects it.",
    reason="If one path silently runs the other, comparing the two compares a path with itself.",
    remedy="Let each entry point run its own path or raise, without a fallback.",
)  # fmt: skip
def test_each_path_is_the_one_it_says(case: tuple[str, str | None], subject: Subject, device: str, seed: int) -> None:
    path, through = case
    found = guarded.engine(subject, path, make(_BASE, seed, device), through=through)
    told = f"{through or 'the call'} on the {PATHS[path]} path launched {', '.join(found.launched) or 'no kernel'}"
    assert bool(found.launched) == (path == "triton"), told


@check(
    "p4.ghost", gate="hard", needs=_NEEDS,
    cases={"mean": _BASE, "max": replace(_BASE, aggregation="max"), "interleaved": replace(_BASE, style="interleaved")},
    claim="With every kernel launch skipped, no score is correct.",
    reason="A correct score without the kernel was computed by something else, or left over from another call.",
    tolerance="No score within its class B budget of the oracle.",
    remedy="Find what computes the scores apart from the kernel.",
)  # fmt: skip
def test_without_its_kernel_nothing_is_right(
    case: Shape, subject: Subject, device: str, seed: int, measure: Measure
) -> None:
    from verify.judge import oracle, tolerance
    from verify.subject.launches import skipped

    problem = make(case, seed, device)
    guarded.engine(subject, "triton", problem)  # a first call may leave its scores behind
    with skipped():
        found = guarded.engine(subject, "triton", problem)
    right = abs(found.scores - oracle.scores(problem.case)) <= tolerance.budget_b(problem.case)
    measure("right scores without a kernel", int(right.sum()), 0, where=f"{right.size} scores")


@check(
    "p4.repeat", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Repeated identical calls return bitwise identical scores.",
    reason="Keep sets depend on comparisons of scores; a score that varies makes a run irreproducible.",
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
