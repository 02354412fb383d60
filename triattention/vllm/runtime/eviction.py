"""The scheduler's half: which requests are due, and which of their blocks are freed, decided from lengths alone.

A block table is indexed by logical block, and an evicted block is replaced by vLLM's null block, as in vLLM's own
sliding windows; so allocation, preemption, abort and free need no change. The decisions are sent to the worker with the
scheduler's output and carried out before that step's forward, so nothing is returned and nothing waits.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import Any

from triattention.selection import protection_exceeds
from triattention.vllm.runtime.metrics import Counters

_log = logging.getLogger("vllm.triattention")

#: More full blocks than a request can have, so vLLM considers all of them hashed, and hashes no later one.
_NEVER_HASH_AGAIN = 1 << 30


def _ceil(tokens: Any, block_size: int) -> Any:
    return -(-tokens // block_size)


@dataclass(frozen=True)
class Rule:
    """When a request is due, and how many whole blocks it gives up; all counts are tokens."""

    kv_budget: int
    divide_length: int
    window: int
    block_size: int
    protect_prefill: bool = False
    include_prefill_in_budget: bool = True

    def limit(self, prompt: Any) -> Any:
        """The tokens that a request with ``prompt`` prompt tokens may hold after a round."""
        return self.kv_budget + (0 if self.include_prefill_in_budget else prompt)

    def floor(self, prompt: Any) -> Any:
        """The tokens in blocks that a round cannot evict: the newest, those of the window and of a protected prompt."""
        protected = _ceil(self.window, self.block_size) + (
            _ceil(prompt, self.block_size) if self.protect_prefill else 0
        )
        return (1 + protected) * self.block_size

    def is_due(self, length: Any, prompt: Any) -> Any:
        """Whether a request of this physical length is due for a round; also for NumPy arrays, request by request."""
        due = length >= self.limit(prompt) + self.divide_length
        # if the floor is above the limit, the next round comes divide_length tokens above the floor, not at every step
        return due & (length >= self.floor(prompt) + self.divide_length)

    def blocks_to_evict(self, length: int, prompt: int) -> int:
        """Whole blocks to evict from a request of ``length`` that is due; never the newest one."""
        wanted = _ceil(length - self.limit(prompt), self.block_size)
        movable = _ceil(length, self.block_size) - self.floor(prompt) // self.block_size
        return max(0, min(wanted, movable))


@dataclass(frozen=True)
class Eviction:
    """One request's round: the tokens in the blocks ``sources`` are compacted into the blocks ``kept``.

    ``seen`` is the position of the next token, ``length`` the physical length before the round, ``prompt`` the number
    of prompt tokens. ``sources`` are the request's blocks in physical order except the ``newest``, which may be partly
    filled and is not changed.
    """

    request_id: str
    seen: int
    length: int
    prompt: int
    sources: list[int]
    kept: list[int]
    newest: int


@dataclass(frozen=True)
class Rounds:
    """The decisions of a scheduler step, sent to the worker; the rounds of requests in ``put_off`` are postponed."""

    evictions: list[Eviction] = field(default_factory=list)
    put_off: list[str] = field(default_factory=list)


class Evictor:
    """Evicts blocks of the running requests of one scheduler, by ``rule``."""

    def __init__(self, rule: Rule, counters: Counters) -> None:
        self.rule = rule
        self._counters = counters
        # together with the row: a preempted request comes back with a new row, and with nothing evicted
        self._offsets: dict[str, tuple[list[Any], int]] = {}
        self._warned = False

    def plan(self, scheduler: Any) -> Rounds:
        """Evict blocks of every running request that is due; called at the start of a step, before allocation."""
        manager = scheduler.kv_cache_manager.coordinator.single_type_managers[0]
        rounds, offsets = Rounds(), {}
        for request in scheduler.running:
            name = request.request_id
            row = manager.req_to_blocks.get(name)
            known = self._offsets.get(name)
            offset = known[1] if known is not None and known[0] is row else 0
            due = self.rule.is_due(request.num_computed_tokens - offset, request.num_prompt_tokens)
            if due and getattr(request, "resumable", False):
                rounds.put_off.append(name)  # a session: vLLM sends its whole row again with every part of its input
            elif due:
                offset += self._evict(request, row, offset, manager, rounds)
            if offset:
                offsets[name] = (row, offset)
        self._offsets = offsets
        return rounds

    def drop_absent(self, rounds: Rounds, running: list[Any]) -> Rounds:
        """Drop the rounds of requests that this step has preempted, which have no blocks left, and count the others."""
        if not rounds.evictions:
            return rounds
        alive = {request.request_id for request in running}
        left = [one for one in rounds.evictions if one.request_id in alive]
        blocks = sum(len(one.sources) - len(one.kept) for one in left)
        self._counters.add("rounds", len(left))
        self._counters.add("evicted_tokens", blocks * self.rule.block_size)
        self._counters.add("blocks_freed", blocks)
        return Rounds(left, rounds.put_off)

    def _evict(self, request: Any, row: list[Any], offset: int, manager: Any, rounds: Rounds) -> int:
        """Evict blocks of one request that is due; returns the number of evicted tokens, 0 if postponed."""
        name, seen, prompt = request.request_id, request.num_computed_tokens, request.num_prompt_tokens
        size, null, pool = manager.block_size, manager._null_block, manager.block_pool
        length = seen - offset
        n_evict = self.rule.blocks_to_evict(length, prompt)
        live = [block for block in row if block is not null]
        if len(live) != _ceil(length, size):
            raise RuntimeError(
                f"request {name} holds {len(live)} blocks of {size} for {length} tokens, which is a bug in this "
                "plugin; report it, and set ENABLE_TRIATTENTION=0"
            )
        self._warn_of_protection(length, prompt)
        *sources, newest = live
        n_keep = len(sources) - n_evict
        # write only to private blocks: not shared with another request and not in the prefix cache
        kept = [block for block in sources if block.ref_cnt == 1 and block.block_hash is None][:n_keep]
        missing = n_keep - len(kept)
        mine = {id(block) for block in kept}
        released = [block for block in sources if id(block) not in mine]
        if missing > pool.get_num_free_blocks() + sum(block.ref_cnt == 1 for block in released):
            rounds.put_off.append(name)
            self._counters.add("rounds_put_off")
            return 0
        pool.free_blocks(reversed(released))
        # blocks just released may be reused here: the worker reads all sources of a layer before it writes
        kept += pool.get_new_blocks(missing) if missing else []
        row[:] = [*kept, *[null] * (len(row) - 1 - n_keep), newest]
        manager.num_cached_block[name] = _NEVER_HASH_AGAIN
        ids = [[block.block_id for block in blocks] for blocks in (sources, kept)]
        rounds.evictions.append(Eviction(name, seen, length, prompt, *ids, newest.block_id))
        return n_evict * size

    def _warn_of_protection(self, length: int, prompt: int) -> None:
        protected = self.rule.window + (min(prompt, length) if self.rule.protect_prefill else 0)
        if protected > self.rule.limit(prompt) and not self._warned:
            self._warned = True
            _log.warning("[TriAttention] %s", protection_exceeds(protected, self.rule.limit(prompt)))
