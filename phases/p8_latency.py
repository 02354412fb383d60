"""Phase 8: the latency of scoring (plan 6.1)."""

from __future__ import annotations

import math

from verify import Measure, check
from verify.judge.problems import Shape, make
from verify.judge.scoring import engine_call, scorers
from verify.judge.variants import scoring_call
from verify.subject.subject import Subject

#: The plan's sizes: 8 MiB of keys, which are read once.
_SHAPES = {"latency": Shape(n=4096, h=8), "cached": Shape(n=4096, h=8, cached=True)}

#: ``do_bench`` clears the L2 cache before each call and measures times on the GPU.
_QUANTILES = (0.5, 0.2, 0.8)


@check(
    "p8.kernel", gate="soft", cases=_SHAPES, plan="6.1", needs_gpu=True,
    needs=("p1.identity", "p3.plan"), timeout_s=180,
    claim="For 4,096 keys, 8 heads and 17 offsets, the kernel is at least as fast as the PyTorch path.",
    reason="A correct but slow kernel deserves a bug report, not a blocked release.",
    tolerance="Medians of one run, cold L2: at most the PyTorch path's time, keys read at most at memory bandwidth.",
    remedy="Compare with the same measurement on another GPU, on an otherwise idle machine.",
)  # fmt: skip
def test_latency(case: Shape, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    from triton.testing import do_bench, get_dram_gbps

    for attempt in scorers(subject, "triton", device)[-1].offers.fitted(case, case):
        with attempt as taken:
            problem = make(taken, seed, device)
            ms, fast, slow = do_bench(scoring_call(subject, problem, device), quantiles=_QUANTILES)
            spread = f"20 to 80 % of the calls: {1e3 * fast:.1f} to {1e3 * slow:.1f} us"
            measure("time per call", 1e3 * ms, math.inf, unit="us", where=spread)
            plainly, *_ = do_bench(engine_call(subject, "pytorch", problem), quantiles=_QUANTILES)
            measure("time over the PyTorch path's", ms / plainly, 1.0, where=f"{1e3 * plainly:.1f} us")
            # above memory bandwidth, keys were not read or the time is wrong; get_dram_gbps is 0 without a known clock
            measure("keys read per second", problem.keys.nbytes / ms / 1e6, get_dram_gbps() or math.inf, unit="GB/s")
