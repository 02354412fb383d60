"""Phase 3: whether the scoring kernel compiles for this device, loads and launches (plan 3.1).

On a GPU each variant is also built ahead of time for that GPU, as ``python -m verify compile`` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from verify import Measure, check, skip
from verify.build import resources
from verify.checks import SKIP_CODES
from verify.judge.guarded import call
from verify.judge.problems import Shape, make
from verify.judge.scoring import Scorer, grouped, kernel, of_shape, scorers
from verify.judge.variants import GROUPED, PLAN, SCORING, USUAL, table
from verify.record.builds import REFUSED, Build, Compilation
from verify.subject.refusal import REFUSALS, refusal
from verify.subject.subject import Subject

if TYPE_CHECKING:
    from verify.record.schema import Measurement


@check(
    "p3.scoring", gate="hard", cases=SCORING, needs=("p1.identity", "p1.triton",),
    claim="The scoring kernel compiles and launches for every key dtype, pair layout, aggregation and corner case.",
    reason="Triton compiles each variant separately for each GPU; a compile error should show here, not in production.",
    remedy="Read the compiler's message; python -m verify doctor says whether this triton supports the GPU.",
    timeout_s=180,
)  # fmt: skip
def test_kernel_launches(case: Shape, subject: Subject, device: str, seed: int, builds: list[Build]) -> None:
    _launches(case, subject, device, seed, builds)


@check(
    "p3.grouped", gate="soft", cases=GROUPED, needs=("p1.identity", "p1.triton",),
    claim="The scoring kernel compiles and launches for four query heads per KV head in one call.",
    reason="Engines call it this way. Nothing in the published API promises it, so this is SOFT.",
    remedy="As for p3.scoring; p4.gqa tests whether the scores are correct.",
    timeout_s=180,
)  # fmt: skip
def test_grouped_kernel_launches(case: Shape, subject: Subject, device: str, seed: int, builds: list[Build]) -> None:
    with grouped(subject):
        _launches(case, subject, device, seed, builds)


@check(
    "p3.plan", gate="hard", cases=PLAN, plan="3.1", needs=("p1.identity", "p1.triton",),
    claim="The plan's call of the scoring kernel returns finite scores of the expected shape.",
    reason="It is the plan's HARD gate 3.1, with the plan's sizes and its unusual statistics (E|q| below |E[q]|).",
    remedy="See p3.scoring for the variant bfloat16-half-mean.",
    timeout_s=180,
)  # fmt: skip
def test_plan_as_written(case: Shape, subject: Subject, device: str, seed: int, builds: list[Build]) -> None:
    import torch

    _all_built(builds)
    scorer = scorers(subject, "triton", device)[-1]
    scoring = subject.attribute("vllm.core.kernels.triton_scoring", "triattention_scoring")
    draw = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw).to(device)

    freq_count = case.d // 2
    tensors = {
        "K_rot": randn(case.b, case.h, case.n, case.d).to(torch.bfloat16),
        "q_mean_real": randn(case.h, freq_count),
        "q_mean_imag": randn(case.h, freq_count),
        "q_abs_mean": randn(case.h, freq_count).abs(),
        "freq_scale_sq": torch.ones(case.h, freq_count, device=device),
        "omega": randn(freq_count),
        "offsets": torch.tensor(case.offsets, device=device),
    }
    called = replace(case, low_norm=True, weights="ones")
    scorer.offers.require(called)
    options = {"round_start": case.t, "aggregation": case.aggregation, "rope_style": case.style}
    try:
        found = call(lambda: scoring(position_indices=None, **tensors, **options), tensors)
    except REFUSALS as error:
        if at := refusal(error, subject):
            scorer.offers.judge(error, at, called)
        raise
    _shape_and_finite(found.result, case)


@check(
    "p3.resources", gate="soft", needs_gpu=True, ahead_of_time=True,
    cases={"stack": resources.stack, "registers": resources.registers, "instructions": resources.instructions},
    claim=(
        "No kernel uses stack memory, and registers and instructions per key are at most 10 % above the last record "
        "of the GPU."
    ),
    reason="Spilled registers go to memory, and a memory-bound kernel has no bandwidth to spare.",
    remedy=(
        "python -m verify compile shows every kernel's resources; smaller blocks or more warps need fewer registers. "
        "If the growth is intended, publish the new record."
    ),
    tolerance="0 bytes of stack; 1.1 times the value of the same kernel and variant in the last record.",
    timeout_s=180,
)  # fmt: skip
def test_resources(
    case: Callable[[Compilation, Compilation | None], list[Measurement]],
    compilation: Compilation, last_compilation: Compilation | None, measure: Measure,
) -> None:  # fmt: skip
    told = compilation.gap or next((build.message for build in compilation.builds), "no kernel is launched")
    assert any(build.resources for build in compilation.builds), f"no kernel was built, so none is measured: {told}"
    found = case(compilation, last_compilation)
    if not found:
        skip("NO_BASELINE", SKIP_CODES["NO_BASELINE"])
    for one in found:
        measure(one.name, one.measured, one.allowed, unit=one.unit, where=one.where)


def _launches(case: Shape, subject: Subject, device: str, seed: int, builds: list[Build]) -> None:
    _all_built(builds)
    scorer = scorers(subject, "triton", device)[-1]
    for attempt in scorer.offers.fitted(case, USUAL):
        with attempt as taken:
            _launched(scorer, taken, seed, device)


def _launched(scorer: Scorer, shape: Shape, seed: int, device: str) -> None:
    problem = make(shape, seed, device)
    tables = {"trig_cache": table(scorer.subject, problem, device)} if shape.cached else {}
    found = kernel(scorer.subject, problem, **tables)
    assert found.launched, f"{scorer.name} launched no Triton kernel, so something else computed these scores"
    _shape_and_finite(found.result, shape)


def _all_built(builds: list[Build]) -> None:
    """Fail if the compiler refuses a kernel. A build that hung, was killed or was not found is left to the launch."""
    for build in builds:
        refused = build.verdict in REFUSED
        assert not refused, f"{build.kernel} built ahead of time: {build.verdict}: {build.message}"


def _shape_and_finite(scores, shape: Shape) -> None:
    of_shape(scores, shape)
    assert scores.isfinite().all(), f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are NaN or Inf"
