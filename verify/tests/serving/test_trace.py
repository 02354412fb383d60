"""The observer: what it writes of a scheduler, where it gets into vLLM, and what its reader makes of the lines."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from verify.serving.trace import VARIABLE, Step, Trace, read_trace, register

_NULL = SimpleNamespace(is_null=True)
_BLOCK = SimpleNamespace(is_null=False)
_POOL = 20


class _Scheduler:
    """The parts of vLLM's that the observer looks at; ``rows`` are its block tables by request."""

    def __init__(self) -> None:
        self.rows: dict[str, list[Any]] = {}
        self.requests = {"cmpl-a-0-0123abcd": 1, "cmpl-a-1-0123abce": 1, "chatcmpl-b-0123abcf": 1}
        manager = SimpleNamespace(block_size=16, req_to_blocks=self.rows)
        pool = SimpleNamespace(num_gpu_blocks=_POOL + 1, get_num_free_blocks=self._free)
        coordinator = SimpleNamespace(single_type_managers=[manager])
        self.kv_cache_manager = SimpleNamespace(coordinator=coordinator, block_pool=pool)

    def _free(self) -> int:
        return _POOL - sum(row.count(_BLOCK) for row in self.rows.values())

    def schedule(self, output: Any, *, throttle_prefills: bool = False) -> Any:
        return output


def _output(new: dict[str, tuple[int, int]], cached: dict[str, tuple[int, int]]) -> Any:
    return SimpleNamespace(
        scheduled_new_reqs=[SimpleNamespace(req_id=i, num_computed_tokens=start) for i, (start, _) in new.items()],
        scheduled_cached_reqs=SimpleNamespace(
            req_ids=list(cached), num_computed_tokens=[start for start, _ in cached.values()]
        ),
        num_scheduled_tokens={i: tokens for i, (_, tokens) in (new | cached).items()},
    )


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[], Any]:
    """Registers the plugin in a stand-in for vLLM; called, it gives what an engine gets that asks for a scheduler."""
    scheduler = ModuleType("vllm.v1.core.sched.scheduler")
    scheduler.Scheduler = type("Scheduler", (_Scheduler,), {"schedule": _Scheduler.schedule})
    config = ModuleType("vllm.config.scheduler")
    config.SchedulerConfig = type("SchedulerConfig", (), {"get_scheduler_cls": lambda self: scheduler.Scheduler})
    for name in ("vllm", "vllm.config", "vllm.v1", "vllm.v1.core", "vllm.v1.core.sched"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, config.__name__, config)
    monkeypatch.setitem(sys.modules, scheduler.__name__, scheduler)
    monkeypatch.setenv(VARIABLE, str(tmp_path / "trace.jsonl"))
    register()
    assert scheduler.Scheduler.schedule is _Scheduler.schedule
    return config.SchedulerConfig().get_scheduler_cls


@pytest.fixture
def trace(installed: Callable[[], Any], tmp_path: Path) -> Trace:
    """Four steps: two prompts begin, the first is evicted from and the second preempted and resumed, all have finished.

    The second finds everything that it lost in the prefix cache.
    """
    installed()  # an engine that asks twice is not recorded twice
    base = installed()

    class Evicting(base):
        def schedule(self, *args: Any, **kwargs: Any) -> Any:
            if len(self.rows) == 1:
                self.rows[first][:2] = [_NULL, _NULL]
            return super().schedule(*args, **kwargs)

    scheduler = Evicting()
    first, second = list(scheduler.requests)[:2]
    scheduler.rows |= {first: [_BLOCK] * 4, second: [_BLOCK] * 2}
    output = _output({first: (0, 60), second: (16, 10)}, {})
    assert scheduler.schedule(output) is output
    del scheduler.rows[second]
    scheduler.schedule(_output({}, {first: (60, 1)}), throttle_prefills=True)
    scheduler.rows[second] = [_BLOCK] * 2
    scheduler.schedule(_output({}, {second: (26, 1)}))
    scheduler.rows.clear()
    scheduler.requests.clear()
    scheduler.schedule(_output({}, {}))
    return read_trace(tmp_path / "trace.jsonl")


def test_a_trace_tells_each_request_its_steps(trace: Trace) -> None:
    assert trace.steps("cmpl-a") == (Step(0, 0, 60, 0, 4, 14), Step(1, 60, 1, 32, 2, 14))
    assert trace.steps("cmpl-a", prompt=1) == (Step(0, 16, 10, 0, 2, 14), Step(2, 26, 1, 0, 2, 16, preempted=True))
    assert trace.steps("cmpl-a")[1].end == 61


def test_a_trace_tells_of_the_pool(trace: Trace) -> None:
    assert trace.held == [6, 2, 4, 0]
    assert (trace.pool, trace.free_at_end, trace.preemptions) == (20, 20, 1)
    assert trace.records[1].preempted == ("cmpl-a-1-0123abce",)
    assert trace.records[0].time_s <= trace.records[1].time_s


def test_a_request_that_is_not_there_once_is_refused(trace: Trace) -> None:
    with pytest.raises(AssertionError, match="the trace has 0 requests for chatcmpl-b, prompt 0"):
        trace.steps("chatcmpl-b")


def test_nothing_is_touched_unless_a_trace_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setitem(sys.modules, "vllm", None)  # importing it would raise
    register()


def test_a_missing_trace_is_an_error_with_the_next_step(tmp_path: Path) -> None:
    with pytest.raises(
        AssertionError, match=r"no scheduler wrote to trace\.jsonl; check that verify's entry point is installed"
    ):
        read_trace(tmp_path / "trace.jsonl")
