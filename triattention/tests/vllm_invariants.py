"""What must hold at every step between the plugin's evictor, vLLM's scheduler and block pool, and a worker."""

from __future__ import annotations

from typing import Any

from triattention.tests.vllm_worker import Worker, Writes
from triattention.vllm.runtime.eviction import Rule


class Invariants:
    """Asserts about one scheduler and the worker that executes its outputs."""

    def __init__(self, scheduler: Any, worker: Worker, rule: Rule) -> None:
        self._scheduler, self._worker, self._rule = scheduler, worker, rule
        self._manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        self._pool = self._manager.block_pool
        self._size = len(self._pool.blocks) - 1  # without the null block
        self._newest: dict[str, tuple[list[Any], Any]] = {}

    def hashes(self) -> list[Any]:
        """What the prefix cache knows each block by, to compare with later."""
        return [block.block_hash for block in self._pool.blocks]

    def plan(self, output: Any) -> None:
        """Rounds come for requests that run; none is above its length, or holds more blocks than that; none hashes."""
        self.pool()
        running = {request.request_id for request in self._scheduler.running}
        for eviction in output.triattention.evictions:
            assert eviction.request_id in running, f"a round came for {eviction.request_id}, which does not run"
        cached, size = output.scheduled_cached_reqs, self._rule.block_size
        carried_on = set(cached.req_ids) - set(cached.resumed_req_ids) - set(output.triattention.put_off)
        for name, computed in zip(cached.req_ids, cached.num_computed_tokens, strict=True):
            row = self._manager.req_to_blocks[name]
            live = [block for block in row if not block.is_null]
            length, prompt = computed - self._offset(row), self._worker.requests[name].text.prompt
            most = max(self._rule.limit(prompt), self._rule.floor(prompt)) + self._rule.divide_length
            if name in carried_on:
                assert length < most, f"{name} goes on with {length} tokens; below {most} are allowed"
                assert len(live) <= -(-(most + output.num_scheduled_tokens[name]) // size) + 1, (
                    f"{name} holds {len(live)} blocks"
                )
        self._hashes(output.triattention.evictions)

    def _hashes(self, evictions: list[Any]) -> None:
        """After a round no block of the request is in the prefix cache, but the newest that was left where it is."""
        for eviction in evictions:
            row = self._manager.req_to_blocks[eviction.request_id]
            newest = self._pool.blocks[eviction.newest]
            self._newest[eviction.request_id] = (row, newest if newest.block_hash is not None else None)
        for name, row in self._manager.req_to_blocks.items():
            if self._offset(row):
                of, newest = self._newest[name]
                assert of is row, f"{name} was shifted before it ran again"
                hashed = [block.block_id for block in row if block.block_hash is not None and block is not newest]
                assert not hashed, f"{name} was thinned and its blocks {hashed} are in the prefix cache"

    def _offset(self, row: list[Any]) -> int:
        return self._rule.block_size * sum(block.is_null for block in row)

    def pool(self) -> None:
        """Held and free blocks make up the pool, and whoever shares a block came to it through the prefix cache."""
        owners: dict[int, int] = {}
        for row in self._manager.req_to_blocks.values():
            for block in row:
                if not block.is_null:
                    owners[block.block_id] = owners.get(block.block_id, 0) + 1
        free = self._pool.get_num_free_blocks()
        assert len(owners) + free == self._size, f"{len(owners)} held, {free} free of {self._size}"
        for number, count in owners.items():
            block = self._pool.blocks[number]
            assert block.ref_cnt == count, f"block {number} has {count} owners and counts {block.ref_cnt}"
            assert count == 1 or block.block_hash is not None, f"block {number} has {count} owners and no hash"

    def writes(self, writes: Writes, hashes: list[Any]) -> None:
        """Tokens go to blocks that were not in the prefix cache, kept keys to blocks that nobody else has either."""
        for name, number in writes.tokens:
            # by identity: a block that left the cache in this step may have come back to it under an equal hash
            cached = hashes[number] is not None and self._pool.blocks[number].block_hash is hashes[number]
            assert not cached, f"{name} wrote to block {number} of the prefix cache"
        for name, number in writes.kept:
            assert number in self._worker.requests[name].table, f"{name} was thinned into block {number}, not its own"
            others = self._pool.blocks[number].ref_cnt - 1, self._pool.blocks[number].block_hash
            assert others == (0, None), f"{name} was thinned into block {number}, which others may read: {others}"

    def tables(self, output: Any) -> None:
        for name in output.num_scheduled_tokens:
            row, held = self._manager.req_to_blocks[name], self._worker.requests[name]
            assert held.table == [block.block_id for block in row if not block.is_null], f"{name} has two tables"
            assert held.offset == self._offset(row), f"{name} is shifted by {held.offset} and {self._offset(row)}"

    def nothing_left(self) -> None:
        """Every request is gone from the scheduler, the evictor and the worker, and every block is back."""
        self._scheduler._triattention.plan(self._scheduler)
        assert not self._scheduler._triattention._offsets, "the evictor remembers a request that is gone"
        for remembered in (self._manager.req_to_blocks, self._manager.num_cached_block, self._worker.requests):
            assert not remembered, f"{sorted(remembered)} are gone and remembered"
        assert self._pool.get_num_free_blocks() == self._size, "blocks are lost"
        assert self._scheduler.reset_prefix_cache(), "the prefix cache cannot be reset: a block is still in use"
