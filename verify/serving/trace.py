"""What vLLM's scheduler really did: a vLLM plugin of the suite that records it step by step, and its reader.

vLLM loads ``register`` in each of its processes. In the process that asks for a scheduler, the scheduler's base class
is made to record. So recording happens inside whatever a subclass does before and after, and sees the block tables as
the engine is about to use them.
"""

from __future__ import annotations

import json
import logging
import os
import re
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property, wraps
from pathlib import Path
from typing import Any

#: The variable that names the trace file; without it nothing is recorded.
VARIABLE = "TRIATTENTION_TRACE"

#: The variable that names a package whose log is shown. vLLM shows its own only, so a plugin with a logger of its own
#: would activate without a word.
LOGGED = "TRIATTENTION_LOGGED"


def _show(package: str | None) -> None:
    """Let what ``package`` logs appear in the output of this process, unless something shows it already."""
    logger = logging.getLogger(package)
    if package and not logger.hasHandlers():
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("(%(processName)s) %(levelname)s %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)


# at import, because vLLM imports every plugin before it calls the first one
_show(os.environ.get(LOGGED))


@dataclass(frozen=True)
class Step:
    """One step of one request.

    ``start`` tokens were computed before it and ``tokens`` are computed in it; ``evicted`` tokens are missing from its
    block table, which holds ``blocks`` others. ``free`` is the fewest free blocks of the pool around the step's start.
    ``preempted`` if the request lost its blocks since its last step, though the prefix cache may have kept all of them.
    """

    number: int
    start: int
    tokens: int
    evicted: int
    blocks: int
    free: int
    preempted: bool = False

    @property
    def end(self) -> int:
        return self.start + self.tokens


@dataclass(frozen=True)
class Record:
    """One call of the scheduler: a line of the trace.

    ``scheduled`` has the start, tokens, evicted and blocks of each request that computes in this step; ``held`` the
    number of blocks that each request holds; ``preempted`` the unfinished requests that lost theirs since the previous
    record. ``free`` of the ``pool`` blocks are free after it. ``time_s`` is from the machine's monotonic clock.
    """

    number: int
    scheduled: Mapping[str, tuple[int, int, int, int]]
    held: Mapping[str, int]
    preempted: tuple[str, ...]
    free: int
    pool: int
    time_s: float


@dataclass(frozen=True)
class Trace:
    """All records of one engine, in order."""

    records: tuple[Record, ...]

    @cached_property
    def requests(self) -> dict[str, tuple[Step, ...]]:
        """The steps of each request, by the engine's own ids."""
        found: dict[str, list[Step]] = {}
        free, lost = self.pool, set()
        for record in self.records:
            lost.update(record.preempted)
            for request, scheduled in record.scheduled.items():
                step = Step(record.number, *scheduled, min(free, record.free), request in lost)
                found.setdefault(request, []).append(step)
            free, lost = record.free, lost - record.scheduled.keys()
        return {request: tuple(steps) for request, steps in found.items()}

    def steps(self, response_id: str, prompt: int = 0) -> tuple[Step, ...]:
        """The steps of the request that an API response named ``response_id``, of its ``prompt``-th prompt.

        The engine appends the number of the prompt (completions only) and eight random characters to the API's id.
        Raises AssertionError unless exactly one request of the trace matches.
        """
        numbered = f"-{prompt}" if response_id.startswith("cmpl-") else ""
        meant = re.compile(re.escape(response_id + numbered) + r"(-[0-9a-f]{8})?")
        found = [request for request in self.requests if meant.fullmatch(request)]
        assert len(found) == 1, f"the trace has {len(found)} requests for {response_id}, prompt {prompt}"
        return self.requests[found[0]]

    @property
    def pool(self) -> int:
        """The number of blocks that the pool hands out."""
        return self.records[0].pool

    @property
    def held(self) -> list[int]:
        """Blocks held by all requests together after each record; a block shared by two requests counts twice."""
        return [sum(record.held.values()) for record in self.records]

    @property
    def preemptions(self) -> int:
        return sum(len(record.preempted) for record in self.records)

    @property
    def free_at_end(self) -> int:
        """Free blocks after the last record; the engine makes one more after its last request has finished."""
        return self.records[-1].free


def read_trace(path: Path) -> Trace:
    """The trace in ``path``. Raises AssertionError if no scheduler wrote one there."""
    lines = path.read_text("utf-8").splitlines() if path.exists() else []
    assert lines, (
        f"no scheduler wrote to {path.name}; check that verify's entry point is installed where the server ran"
    )
    records = []
    for line in lines:
        read = json.loads(line)
        scheduled = {request: tuple(step) for request, step in read.pop("scheduled").items()}
        records.append(Record(scheduled=scheduled, preempted=tuple(read.pop("preempted")), **read))
    return Trace(tuple(records))


def register() -> None:
    """The vLLM plugin: it returns at once unless a trace is requested."""
    path = os.environ.get(VARIABLE)
    if not path:
        return
    from vllm.config.scheduler import SchedulerConfig

    asked = SchedulerConfig.get_scheduler_cls

    @wraps(asked)
    def get_scheduler_cls(config: Any) -> Any:
        _record_to(Path(path))
        return asked(config)

    SchedulerConfig.get_scheduler_cls = get_scheduler_cls


@cache
def _record_to(path: Path) -> None:
    """Make every scheduler of this process record. Only the engine's process calls it; no other imports a scheduler."""
    from vllm.v1.core.sched.scheduler import Scheduler

    schedule, recorder = Scheduler.schedule, Recorder(path)

    @wraps(schedule)
    def recorded(scheduler: Any, *args: Any, **kwargs: Any) -> Any:
        output = schedule(scheduler, *args, **kwargs)
        recorder.note(scheduler, output)
        return output

    Scheduler.schedule = recorded


class Recorder:
    """Appends the decisions of each scheduler call to ``path``."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._number = 0
        self._held: Mapping[str, int] = {}

    def note(self, scheduler: Any, output: Any) -> None:
        """Write one line about ``output``, a SchedulerOutput that ``scheduler`` is about to return."""
        manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        pool = scheduler.kv_cache_manager.block_pool
        nulls = {request: sum(block.is_null for block in row) for request, row in manager.req_to_blocks.items()}
        held = {request: len(row) - nulls[request] for request, row in manager.req_to_blocks.items() if row}
        record = Record(
            number=self._number,
            scheduled={
                request: (
                    start,
                    output.num_scheduled_tokens[request],
                    manager.block_size * nulls[request],
                    held[request],
                )
                for request, start in _starts(output).items()
            },
            held=held,
            preempted=tuple(request for request in self._held if request not in held and request in scheduler.requests),
            free=pool.get_num_free_blocks(),
            pool=pool.num_gpu_blocks - 1,  # one is the null block
            time_s=time.monotonic(),
        )
        self._number, self._held = self._number + 1, held
        with self._path.open("a", encoding="utf-8") as trace:
            trace.write(json.dumps(vars(record)) + "\n")


def _starts(output: Any) -> dict[str, int]:
    """The computed tokens of each scheduled request before the step; the requests' own counts are already ahead."""
    cached = output.scheduled_cached_reqs
    new = {request.req_id: request.num_computed_tokens for request in output.scheduled_new_reqs}
    return {**new, **dict(zip(cached.req_ids, cached.num_computed_tokens, strict=True))}
