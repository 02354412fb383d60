"""The scheduler's half on a stand-in: what is counted, and which requests wait."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from triattention.vllm.runtime.eviction import Evictor, Rounds, Rule
from triattention.vllm.runtime.metrics import Counters

SLOTS = 8


class _Pool:
    """Blocks by number, the free ones in a list."""

    def __init__(self, count: int) -> None:
        self.free = [SimpleNamespace(block_id=n, ref_cnt=0, block_hash=None) for n in range(1, count + 1)]

    def get_num_free_blocks(self) -> int:
        return len(self.free)

    def get_new_blocks(self, count: int) -> list[Any]:
        taken = [self.free.pop() for _ in range(count)]
        for block in taken:
            block.ref_cnt = 1
        return taken

    def free_blocks(self, blocks: Any) -> None:
        for block in blocks:
            block.ref_cnt -= 1
            self.free.append(block)


def _scheduler(**request: Any) -> tuple[Any, _Pool]:
    """One running request of 61 tokens in 8 blocks."""
    pool = _Pool(12)
    manager = SimpleNamespace(
        block_size=SLOTS, _null_block=SimpleNamespace(block_id=0), block_pool=pool, num_cached_block={},
        req_to_blocks={"r": pool.get_new_blocks(8)},
    )  # fmt: skip
    coordinator = SimpleNamespace(single_type_managers=[manager])
    usual = {"request_id": "r", "num_computed_tokens": 61, "num_prompt_tokens": 20}
    running = [SimpleNamespace(**usual | request)]
    return SimpleNamespace(running=running, kv_cache_manager=SimpleNamespace(coordinator=coordinator)), pool


def test_a_round_is_counted_when_its_request_outlives_the_step() -> None:
    for outlives in (True, False):
        counters = Counters()
        evictor, (scheduler, pool) = Evictor(Rule(40, 8, 9, SLOTS), counters), _scheduler()
        planned = evictor.plan(scheduler)
        (eviction,) = planned.evictions
        assert (len(eviction.sources), len(eviction.kept)) == (7, 4)
        assert pool.get_num_free_blocks() == 12 - 5
        left = evictor.drop_absent(planned, scheduler.running if outlives else [])
        assert left.evictions == ([eviction] if outlives else [])
        counted = [counters.get(name) for name in ("rounds", "evicted_tokens", "blocks_freed")]
        assert counted == ([1, 24, 3] if outlives else [0, 0, 0])


def test_a_session_that_takes_more_input_later_is_left_whole_and_said_to_wait() -> None:
    evictor, (scheduler, pool) = Evictor(Rule(40, 8, 9, SLOTS), Counters()), _scheduler(resumable=True)
    assert evictor.plan(scheduler) == Rounds([], ["r"])
    assert pool.get_num_free_blocks() == 12 - 8
