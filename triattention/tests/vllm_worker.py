"""A worker without a model: its KV cache remembers which token of which text lies in a slot, and who may read it.

It does what vLLM's V1 runner does with a scheduler's output, and asserts that attention sees what it must. All that it
knows came with the outputs; it never asks the scheduler.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from triattention.vllm.runtime.eviction import Eviction, Rule


@dataclass(frozen=True)
class Text:
    """A request's tokens, with those that it will sample, and a hash of every prefix of them: both int64 ``[n]``."""

    prompt: int
    tokens: np.ndarray
    prefixes: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        prefixes = np.empty_like(self.tokens)
        prefix = 0
        for position, token in enumerate(self.tokens.tolist()):
            prefix = prefixes[position] = hash((prefix, token))
        object.__setattr__(self, "prefixes", prefixes)


@dataclass
class Held:
    """One request as the worker knows it: its blocks in physical order, and how far its tokens are shifted.

    ``life`` numbers its admissions: what was computed from a thinned cache may be read in the same life only.
    """

    text: Text
    life: int
    table: list[int]
    offset: int = 0
    seen: int = 0


@dataclass
class Writes:
    """The blocks that one step writes, each with the request that does."""

    tokens: list[tuple[str, int]] = field(default_factory=list)
    kept: list[tuple[str, int]] = field(default_factory=list)


class Worker:
    """Executes scheduler outputs on ``num_blocks`` blocks; ``texts`` are the requests' by name."""

    def __init__(self, rule: Rule, num_blocks: int, texts: dict[str, Text]) -> None:
        self.rule, self._texts = rule, texts
        self.requests: dict[str, Held] = {}
        self.longest = 0
        self._lives = 0
        shape = (num_blocks, rule.block_size)
        self._position, self._prefix = np.full(shape, -1), np.zeros(shape, np.int64)
        self._reader = np.zeros(shape, np.int64)  # 0 is anyone, else a life

    def execute(self, output: Any) -> tuple[dict[str, list[int]], Writes]:
        """The tokens that a step samples, by request in the order of the output, and the blocks that it wrote."""
        for name in (*output.finished_req_ids, *output.scheduled_cached_reqs.resumed_req_ids):
            if name in self.requests:
                self.requests[name].offset = 0
            if name in output.finished_req_ids:
                self.requests.pop(name, None)
        writes, rounds = Writes(), output.triattention
        for eviction in rounds.evictions:
            self._carry_out(eviction, writes)
        computed, known = self._update(output)
        steps = output.num_scheduled_tokens
        for name, count in steps.items():
            self._write(name, computed[name], count, writes)
        sampled = {}
        for name, count in steps.items():
            self._attend(name)
            complete = computed[name] + count >= known[name]
            sampled[name] = [int(self._texts[name].tokens[known[name]])] if complete else []
        return sampled, writes

    def _carry_out(self, eviction: Eviction, writes: Writes) -> None:
        name, size = eviction.request_id, self.rule.block_size
        assert name in self.requests, f"a round came for {name}, which the worker does not hold"
        held = self.requests[name]
        assert held.table == [*eviction.sources, eviction.newest], (
            f"a round of {name} takes blocks {eviction.sources} and {eviction.newest}; the worker holds {held.table}"
        )
        assert (eviction.seen, eviction.length) == (held.seen, held.seen - held.offset), (
            f"a round of {name} is at {eviction.seen} with {eviction.length} tokens; the worker saw {held.seen} and is "
            f"shifted by {held.offset}"
        )
        n_keep = len(eviction.kept) * size
        assert n_keep < len(eviction.sources) * size, f"a round of {name} keeps {n_keep} tokens"
        keep = self._keep_set(eviction, n_keep)
        sources, kept = np.array(eviction.sources), np.array(eviction.kept, np.int64)
        for slots in (self._position, self._prefix, self._reader):
            slots[kept] = slots[sources].flatten()[keep].reshape(-1, size)
        self._reader[kept] = held.life
        held.table = [*eviction.kept, eviction.newest]
        held.offset += (len(eviction.sources) - len(eviction.kept)) * size
        writes.kept += [(name, block) for block in eviction.kept]

    def _keep_set(self, eviction: Eviction, n_keep: int) -> np.ndarray:
        """Slots of the sources, ascending: the protected ones, and others drawn by the request and its position."""
        n_tokens = len(eviction.sources) * self.rule.block_size
        index = np.arange(n_tokens)
        protected = index >= eviction.length - self.rule.window
        if self.rule.protect_prefill:
            protected |= index < eviction.prompt
        others = n_keep - int(protected.sum())
        assert others >= 0, f"a round of {eviction.request_id} keeps {n_keep} tokens, fewer than are protected"
        draw = np.random.default_rng(zlib.crc32(f"{eviction.request_id} {eviction.seen}".encode()))
        return np.sort(np.concatenate([index[protected], draw.choice(index[~protected], others, replace=False)]))

    def _update(self, output: Any) -> tuple[dict[str, int], dict[str, int]]:
        """Take over the blocks of a step; of each request, what is computed and how many tokens are known."""
        computed, known = {}, {}
        for new in output.scheduled_new_reqs:
            self._lives += 1
            self.requests[new.req_id] = Held(self._texts[new.req_id], self._lives, list(new.block_ids[0]))
            computed[new.req_id], known[new.req_id] = new.num_computed_tokens, len(new.prompt_token_ids)
        cached = output.scheduled_cached_reqs
        for number, name in enumerate(cached.req_ids):
            held, blocks = self.requests[name], cached.new_block_ids[number]
            if name in cached.resumed_req_ids:
                self._lives += 1
                held.life, held.table, held.offset = self._lives, list(blocks[0]), 0
            elif blocks is not None:
                held.table += blocks[0]
            computed[name] = cached.num_computed_tokens[number]
            known[name] = held.text.prompt + cached.num_output_tokens[number]
        return computed, known

    def _slots(self, held: Held, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        slots, size = np.arange(start, stop), self.rule.block_size
        return np.array(held.table)[slots // size], slots % size

    def _write(self, name: str, computed: int, count: int, writes: Writes) -> None:
        held = self.requests[name]
        held.seen = computed + count
        length, size = held.seen - held.offset, self.rule.block_size
        assert len(held.table) == -(-length // size), f"{name} has {len(held.table)} blocks for {length} tokens"
        at = self._slots(held, computed - held.offset, length)
        positions = np.arange(computed, held.seen)
        self._position[at], self._prefix[at] = positions, held.text.prefixes[positions]
        self._reader[at] = held.life if held.offset else 0
        writes.tokens += [(name, int(block)) for block in np.unique(at[0])]

    def _attend(self, name: str) -> None:
        held = self.requests[name]
        length = held.seen - held.offset
        at = self._slots(held, 0, length)
        positions = self._position[at]
        assert positions[-1] == held.seen - 1, f"{name} ends at {positions[-1]} and has seen {held.seen} tokens"
        assert (np.diff(positions, prepend=-1) > 0).all(), f"{name} attends to positions {positions.tolist()}"
        own = self._prefix[at] == held.text.prefixes[positions]
        assert own.all(), f"{name} attends to slots of another text at {positions[~own].tolist()}"
        reader = self._reader[at]
        foreign = (reader != 0) & (reader != held.life)
        assert not foreign.any(), f"{name} attends to keys of a thinned cache at {positions[foreign].tolist()}"
        newest = min(self.rule.window, held.seen)
        assert (positions[length - newest :] == np.arange(held.seen - newest, held.seen)).all(), (
            f"{name} lost one of its newest {newest} tokens: {positions.tolist()}"
        )
        if self.rule.protect_prefill:
            prompt = min(held.text.prompt, held.seen)
            assert (positions[:prompt] == np.arange(prompt)).all(), f"{name} lost a token of its prompt of {prompt}"
        self.longest = max(self.longest, length)
