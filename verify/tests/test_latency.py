"""Phase 8 with times that are made up: what it calls, and what it takes for too slow and for too fast."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest

from phases.p8_latency import test_latency as latency
from verify.judge.problems import Shape
from verify.subject.find import find_subject

_BUNDLED = find_subject("bundled", Path(__file__).parents[2])


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, tuple[float, float]]]:
    def timed(kernel_ms: float, pytorch_ms: float, gbps: float, *, cached: bool = False) -> dict:
        times, found = iter((kernel_ms, pytorch_ms)), {}

        def do_bench(call: Callable, quantiles: tuple[float, ...]) -> list[float]:
            assert call().shape == (1, 8, 4096)
            return [next(times)] * len(quantiles)

        def measure(name: str, measured: float, allowed: float, *, unit: str = "", where: str = "") -> None:
            found[name] = (measured, allowed)

        monkeypatch.setattr("triton.testing.do_bench", do_bench)
        monkeypatch.setattr("triton.testing.get_dram_gbps", lambda: gbps)
        latency(Shape(n=4096, h=8, cached=cached), _BUNDLED, "cpu", 0, measure)
        return found

    return timed


@pytest.mark.parametrize("cached", [False, True])
def test_a_call_is_compared_with_the_other_path_and_with_the_memory(timed: Callable, cached: bool) -> None:
    found = timed(0.25, 1.0, 2000.0, cached=cached)
    assert found["time per call"] == (250.0, math.inf)
    assert found["time over the PyTorch path's"] == (0.25, 1.0)
    read = 8 * 4096 * 128 * 2
    assert found["keys read per second"] == (pytest.approx(read / 0.25e-3 / 1e9), 2000.0)


def test_a_memory_clock_that_is_kept_back_is_no_bound(timed: Callable) -> None:
    assert timed(0.25, 1.0, 0.0)["keys read per second"][1] == math.inf
