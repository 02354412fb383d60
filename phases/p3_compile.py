"""Phase 3: does the scoring kernel compile for this device, load and launch (plan 3.1)."""

from __future__ import annotations

from itertools import product

from verify import check
from verify.problems import Shape, make
from verify.subject import Subject

_VARIANTS = {
    f"{dtype}-{style}-{aggregation}": Shape(
        n=65, dtype=dtype, style=style, aggregation=aggregation, offsets=(1.0, 2.0, 4.0)
    )
    for dtype, style, aggregation in product(
        ("bfloat16", "float16", "float32"), ("half", "interleaved"), ("mean", "max")
    )
}


@check(
    "p3.scoring", gate="hard", cases=_VARIANTS, needs=("p1.identity", "p1.triton",),
    claim="The scoring kernel compiles and launches for a key dtype, a pair layout and an aggregation.",
    reason=(
        "Triton compiles each variant anew for each GPU; one that does not compile is found here and "
        "not in a service."
    ),
    remedy="Read the compiler's message; python -m verify doctor says whether this triton knows the GPU.",
    timeout_s=180,
)  # fmt: skip
def test_kernel_launches(case: Shape, subject: Subject, device: str, seed: int) -> None:
    from verify.launches import counted

    scoring = subject.attribute("vllm.core.kernels.triton_scoring", "triattention_scoring")
    with counted() as launched:
        scores = scoring(**make(case, seed, device).scoring_arguments())
    assert launched, "the call launched no Triton kernel, so something else made these scores"
    _shape_and_finite(scores, (case.b, case.h * case.g, case.n))


@check(
    "p3.plan", gate="hard", cases="as_written", plan="3.1", needs=("p1.identity", "p1.triton",),
    claim="The plan's call of the scoring kernel returns finite scores of the right shape.",
    reason="It is the plan's HARD gate 3.1, with its own sizes and its unusual statistics (a below |m|).",
    remedy="See p3.scoring for the variant bfloat16-half-mean.",
    timeout_s=180,
)  # fmt: skip
def test_plan_as_written(case: str, subject: Subject, device: str, seed: int) -> None:
    import torch

    scoring = subject.attribute("vllm.core.kernels.triton_scoring", "triattention_scoring")
    draw = torch.Generator().manual_seed(seed)

    def randn(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw).to(device)

    batch, heads, seq_len, head_dim = 1, 8, 512, 128
    freq_count = head_dim // 2
    scores = scoring(
        K_rot=randn(batch, heads, seq_len, head_dim).to(torch.bfloat16),
        position_indices=None,
        q_mean_real=randn(heads, freq_count),
        q_mean_imag=randn(heads, freq_count),
        q_abs_mean=randn(heads, freq_count).abs(),
        freq_scale_sq=torch.ones(heads, freq_count, device=device),
        omega=randn(freq_count),
        offsets=torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device=device),
        round_start=512,
        aggregation="mean",
        rope_style="half",
    )
    _shape_and_finite(scores, (batch, heads, seq_len))


def _shape_and_finite(scores, shape: tuple[int, ...]) -> None:
    assert tuple(scores.shape) == shape, f"the scores have shape {tuple(scores.shape)}, expected {shape}"
    assert scores.isfinite().all(), f"{int((~scores.isfinite()).sum())} of {scores.numel()} scores are NaN or Inf"
