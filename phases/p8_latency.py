"""Phase 8: how long scoring takes (plan 6.1)."""

from __future__ import annotations

import math

from verify import Measure, check
from verify.judge.guarded import engine_call
from verify.judge.problems import Shape, make
from verify.judge.variants import scoring_call
from verify.subject.subject import Subject

#: The plan's sizes: 8 MiB of keys, which are read once.
_SHAPES = {"latency": Shape(n=4096, h=8), "cached": Shape(n=4096, h=8, cached=True)}

#: ``do_bench`` empties the L2 cache before each of its calls and takes their times from the GPU.
_QUANTILES = (0.5, 0.2, 0.8)


@check(
    "p8.kernel", gate="soft", cases=_SHAPES, plan="6.1", needs_gpu=True,
    needs=("p1.identity", "p3.plan"), timeout_s=180,
    claim="Scoring 4,096 keys of 8 heads with 17 offsets is at least as fast by the kernel as by the PyTorch path.",
    reason="A correct kernel that falls back to something slow is a bug report, not a blocker.",
    tolerance="Medians of one run, cold L2: time at most the PyTorch path's, keys read at most at memory bandwidth.",
    remedy="Compare with the same measurement on another GPU, on a machine that does nothing else.",
)  # fmt: skip
def test_latency(case: Shape, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    from triton.testing import do_bench, get_dram_gbps

    problem = make(case, seed, device)
    ms, fast, slow = do_bench(scoring_call(subject, problem, device), quantiles=_QUANTILES)
    spread = f"20 to 80 % of the calls: {1e3 * fast:.1f} to {1e3 * slow:.1f} us"
    measure("time per call", 1e3 * ms, math.inf, unit="us", where=spread)
    plainly, *_ = do_bench(engine_call(subject, "pytorch", problem), quantiles=_QUANTILES)
    measure("time over the PyTorch path's", ms / plainly, 1.0, where=f"{1e3 * plainly:.1f} us")
    # faster than memory is not fast: it did not read its keys, or the time is wrong; 0 is a clock the driver keeps back
    measure("keys read per second", problem.keys.nbytes / ms / 1e6, get_dram_gbps() or math.inf, unit="GB/s")
