"""Phase 4, integrity: each path writes only its output, runs the kernel it names, and is bitwise repeatable.

The other checks of phases 3 to 5 call the subject through the same guards (``verify/judge/guarded.py``) and compare
numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from verify import Measure, check
from verify.judge import scoring
from verify.judge.offers import Attempt
from verify.judge.problems import Shape, drawn, make
from verify.judge.scoring import PATHS
from verify.subject.subject import Subject

_CASES = dict(zip(PATHS, PATHS, strict=True))
_NEEDS = ("p1.identity", "p1.triton")
_BASE = Shape(t=64, offsets=(1.0, 2.0, 4.0))

#: Shapes with partial blocks at the end, where a kernel may write out of bounds.
_TAILS = tuple(replace(_BASE, n=n, b=2, aggregation=a) for n in (1, 33, 65, 255) for a in ("mean", "max"))


#: Strides, and a head dim that is no power of two.
_VIEWS = (replace(_BASE, b=2, strides="sliced"), replace(_BASE, d=96, strides="spread"))


def _tried(subject: Subject, path: str, seed: int, device: str) -> Iterator[tuple[Attempt, scoring.Scorer]]:
    """Every function of a path with its share of these problems: tails, views and random ones."""
    shapes = (*_TAILS, *_VIEWS, *drawn(seed, 6))
    return scoring.spread(subject, path, device, lambda offers, part: offers.several(shapes[part]))


@check(
    "p4.inputs", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Scoring leaves every input tensor bitwise unchanged.",
    reason="A kernel that edits its inputs agrees with any reference computed afterwards.",
    tolerance="Bitwise equality with copies taken before the call.",
    remedy="Find the in-place operation on the argument named in the message.",
)  # fmt: skip
def test_inputs_untouched(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    for attempt, scorer in _tried(subject, case, seed, device):
        with attempt as shape:
            changed = scorer.call(make(shape, seed, device)).changed
            told = f" wrote to {', '.join(changed)}" if changed else ""
            measure("inputs that changed", len(changed), 0, where=f"{scorer.where(shape)}{told}")


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
    for attempt, scorer in _tried(subject, case, seed, device):
        with attempt as shape:
            overruns = scorer.call(make(shape, seed, device)).overruns
            told = f" {'; '.join(overruns)}" if overruns else ""
            measure("out-of-bounds writes", len(overruns), 0, where=f"{scorer.where(shape)}{told}")


@check(
    "p4.launches", gate="hard", needs=_NEEDS,
    capability={**_CASES, **{f"dispatch_{path}": "api" for path in PATHS}},
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
    scoring.entries(subject, path)  # which says if the subject has none
    named = [scoring.Scorer(subject, path, through, device)] if through else scoring.scorers(subject, path, device)
    for scorer in named:
        for attempt in scorer.offers.fitted(_BASE, _BASE):
            with attempt as shape:
                launched = scorer.call(make(shape, seed, device)).launched
                told = f"{scorer.name} on the {PATHS[path]} path launched {', '.join(launched) or 'no kernel'}"
                assert bool(launched) == (path == "triton"), told


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

    for scorer in scoring.scorers(subject, "triton", device):
        for attempt in scorer.offers.fitted(case, _BASE):
            with attempt as shape:
                problem = make(shape, seed, device)
                scorer(problem)  # a first call may leave its scores behind
                with skipped():
                    scores = scorer.call(problem).result.double().cpu().numpy()
                right = abs(scores - oracle.scores(problem.case)) <= tolerance.budget_b(problem.case)
                told = f"{scorer.name}, {right.size} scores"
                measure("right scores without a kernel", int(right.sum()), 0, where=told)


@check(
    "p4.repeat", gate="hard", cases=_CASES, needs=_NEEDS,
    claim="Repeated identical calls return bitwise identical scores.",
    reason="Keep sets depend on comparisons of scores; a score that varies makes a run irreproducible.",
    tolerance="Bitwise equality over repeated calls (20 on a GPU, 3 in the interpreter).",
    remedy="Look for atomics, races or uninitialised memory.",
)  # fmt: skip
def test_repeatable(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    repeats = 20 if device == "cuda" else 3
    for scorer in scoring.scorers(subject, case, device):
        for attempt in scorer.offers.fitted(replace(_BASE, n=129), replace(_BASE, n=129)):
            with attempt as shape:
                problem = make(shape, seed, device)
                first = scorer.call(problem).result.clone()
                differ = sum(not torch.equal(first, scorer.call(problem).result) for _ in range(repeats))
                told = f"{scorer.where(shape)}, {repeats} repeats"
                measure("calls that differ from the first", differ, 0, where=told)
