"""What vLLM's scheduler really did, step by step, written by a plugin of the suite's own inside a server under test.

It looks at the block tables themselves, so that nothing about evictions is taken from the subject. Without the variable
``TRIATTENTION_TRACE`` it does nothing at all.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

#: Names the file that the engine's process writes, a JSON line for each step of the scheduler.
TRACE = "TRIATTENTION_TRACE"


def register() -> None:
    """The entry point (group ``vllm.general_plugins``): trace this process's scheduler, if it gets one, where asked."""
    path = os.environ.get(TRACE)
    if path:
        from vllm.config.scheduler import SchedulerConfig

        # asked for the scheduler's class in the engine's process only, so no other one imports it for this
        original = SchedulerConfig.get_scheduler_cls

        @functools.wraps(original)
        def get_scheduler_cls(self: Any) -> type:
            _trace(Path(path))
            return original(self)

        SchedulerConfig.get_scheduler_cls = get_scheduler_cls


def _trace(path: Path) -> None:
    """Wrap the base class: a plugin that subclasses it has evicted by then, and the tables show it."""
    from vllm.v1.core.sched.scheduler import Scheduler

    if hasattr(Scheduler.schedule, "__wrapped__"):
        return
    original: Callable[..., Any] = Scheduler.schedule

    @functools.wraps(original)
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        output = original(self, *args, **kwargs)
        stream.write(json.dumps(_seen(self, output)) + "\n")
        return output

    stream = path.open("a", buffering=1, encoding="utf-8")
    Scheduler.schedule = schedule


def _seen(scheduler: Any, output: Any) -> dict[str, Any]:
    """One step: ``[computed tokens before it, tokens in it, evicted tokens, blocks]`` of each request scheduled."""
    manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
    null, pool = manager._null_block, manager.block_pool
    requests = {}
    for name, tokens in output.num_scheduled_tokens.items():
        row = manager.req_to_blocks[name]
        nulls = sum(block is null for block in row)
        start = scheduler.requests[name].num_computed_tokens - tokens
        requests[name] = [start, tokens, nulls * manager.block_size, len(row) - nulls]
    return {"requests": requests, "free": pool.get_num_free_blocks(), "pool": pool.num_gpu_blocks - 1}


@dataclass(frozen=True, slots=True)
class Step:
    """One request in one step: ``tokens`` computed from position ``start``, when ``evicted`` tokens were gone.

    ``blocks`` are those that it then held, and ``free`` how many the pool had left.
    """

    start: int
    tokens: int
    evicted: int
    blocks: int
    free: int


@dataclass(frozen=True)
class Trace:
    """What a server did: the steps of each request, by the engine's name for it, and blocks in use after each step."""

    steps: Mapping[str, list[Step]]
    in_use: list[int]
    pool: int

    def of(self, answer_id: str) -> list[Step]:
        """The steps of the request that was answered with ``answer_id``. Raises AssertionError unless there is one."""
        # the engine appends to the server's id which choice it is, and something random
        found = [steps for name, steps in self.steps.items() if name.startswith(answer_id)]
        assert len(found) == 1, f"{len(found)} requests of the engine belong to the answer {answer_id}"
        return found[0]


def preemptions(steps: list[Step]) -> int:
    """How often a request was computed anew."""
    return sum(later.start < earlier.start + earlier.tokens for earlier, later in pairwise(steps))


def read_trace(path: Path) -> Trace:
    """Read what a server has written so far; a line that is not finished yet is left for the next time."""
    steps: dict[str, list[Step]] = {}
    in_use, pool = [], 0
    text = path.read_text("utf-8") if path.exists() else ""
    for line in text[: text.rfind("\n") + 1].splitlines():
        seen = json.loads(line)
        pool = seen["pool"]
        in_use.append(pool - seen["free"])
        for name, numbers in seen["requests"].items():
            steps.setdefault(name, []).append(Step(*numbers, free=seen["free"]))
    return Trace(steps, in_use, pool)
