"""The worker's half: scores the keys of a request that is due, and compacts the kept tokens into its blocks.

It runs inside the step, before the forward: on a GPU in stream order, so nothing waits for the device. Positions stay
logical; only the storage of a request's tokens moves, and with it the sequence length and slots used by attention.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from triattention.compression import View
from triattention.methods.triattention import TriAttention
from triattention.selection import keep_indices, keep_mask, layer_indices, to_device
from triattention.vllm.runtime.eviction import Eviction, Rounds, Rule
from triattention.vllm.runtime.layout import BlockLayout, learn
from triattention.vllm.runtime.metrics import Counters

_log = logging.getLogger("vllm.triattention")


class _Keys(Sequence[torch.Tensor]):
    """The rotated keys ``[1, H, N, D]`` of one request by layer; each layer is read only when it is accessed."""

    def __init__(self, caches: Sequence[torch.Tensor], layouts: Sequence[BlockLayout], blocks: torch.Tensor) -> None:
        self._caches, self._layouts, self._blocks = caches, layouts, blocks

    def __len__(self) -> int:
        return len(self._caches)

    def __getitem__(self, layer: Any) -> Any:
        return self._layouts[layer].keys(self._caches[layer], self._blocks)[None]


class Runner(Protocol):
    """What the compactor asks of a runner."""

    def blocks(self, name: str) -> list[int]:
        """The blocks of a request, in the order of its tokens, before the new ones of this step."""

    def set_blocks(self, name: str, blocks: list[int]) -> None:
        """Replace the blocks of a request."""


@dataclass(frozen=True)
class Rows:
    """The requests of a step in the order of the batch; arrays of tokens, int ``[n]``."""

    names: list[str]
    scheduled: np.ndarray
    computed: np.ndarray
    prompts: np.ndarray

    def shifts(self, offsets: np.ndarray, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """``offsets`` of the rows, and of each token of the step, on the device."""
        return to_device(offsets, device), to_device(np.repeat(offsets, self.scheduled), device)


class Compactor:
    """Carries out the rounds of one model runner, and tracks how many tokens each request has lost.

    ``layers`` are the runner's attention layers in order. Raises TriAttentionError for a KV cache that cannot be read
    (``layout.learn``).
    """

    def __init__(
        self, layers: Sequence[Any], num_blocks: int, scorer: TriAttention, rule: Rule, counters: Counters,
        *, log_decisions: bool = True,
    ) -> None:  # fmt: skip
        self.rule, self._scorer, self._counters, self._log_decisions = rule, scorer, counters, log_decisions
        self._caches = [layer.kv_cache for layer in layers]
        known: dict[Any, BlockLayout] = {}
        self._layouts = []
        for layer in layers:
            kind = (layer.kv_cache.shape, layer.kv_cache.stride(), layer.kv_cache.dtype, type(layer.impl))
            if kind not in known:
                known[kind] = learn(layer, num_blocks, rule.block_size, layer.num_kv_heads, layer.head_size)
            self._layouts.append(known[kind])
        self._rehearse()
        self._offsets: dict[str, int] = {}
        self._reported: set[str] = set()
        self._no_round_yet: set[str] = set()
        self._pending: list[tuple[Any, Any]] = []

    @torch.inference_mode()
    def before_step(self, runner: Runner, output: Any) -> None:
        """Carry out the rounds in a scheduler's output, and drop the state of finished and readmitted requests."""
        admitted = {request.req_id for request in output.scheduled_new_reqs}
        admitted |= set(output.scheduled_cached_reqs.resumed_req_ids)
        for name in (*output.finished_req_ids, *admitted):
            self._offsets.pop(name, None)
            self._reported.discard(name)
        rounds: Rounds = getattr(output, "triattention", None) or Rounds()
        # the prefix cache may admit a request at any length; its round can come at the next step at the earliest
        self._no_round_yet = admitted.union(rounds.put_off)
        if rounds.evictions:
            with self._timed(len(rounds.evictions)):
                for eviction in rounds.evictions:
                    self._carry_out(runner, eviction)

    def offsets(self, rows: Rows) -> np.ndarray:
        """The tokens that each row has lost, int64 ``[n]``; reports rows that are due but got no round."""
        found = np.fromiter((self._offsets.get(name, 0) for name in rows.names), np.int64, len(rows.names))
        self._report_missed(rows, rows.computed - found)
        return found

    def _carry_out(self, runner: Runner, eviction: Eviction) -> None:
        if runner.blocks(eviction.request_id) != [*eviction.sources, eviction.newest]:
            raise RuntimeError(
                f"request {eviction.request_id} has different blocks here and in the scheduler, which is a bug in "
                "this plugin; report it, and set ENABLE_TRIATTENTION=0"
            )
        if eviction.kept:  # with a budget below two blocks and no window, only the newest block may be kept
            self._compact(eviction)
        runner.set_blocks(eviction.request_id, [*eviction.kept, eviction.newest])
        evicted = (len(eviction.sources) - len(eviction.kept)) * self.rule.block_size
        self._offsets[eviction.request_id] = eviction.seen - eviction.length + evicted
        if self._log_decisions:
            _log.debug(
                "[TriAttention] request %s: %d of %d tokens evicted at position %d",
                eviction.request_id, evicted, eviction.length, eviction.seen,
            )  # fmt: skip

    def _compact(self, eviction: Eviction) -> None:
        """Keep the best tokens of every head and layer, in order, with unchanged keys and values."""
        size, device = self.rule.block_size, self._caches[0].device
        sources, kept = (to_device(ids, device) for ids in (eviction.sources, eviction.kept))
        n_tokens, n_keep = len(sources) * size, len(kept) * size
        valid = torch.ones(1, n_tokens, dtype=torch.bool, device=device)
        protected = torch.zeros_like(valid)
        protected[:, max(0, eviction.length - self.rule.window) :] = True
        protected[:, : eviction.prompt if self.rule.protect_prefill else 0] = True
        keys = _Keys(self._caches, self._layouts, sources)
        # a NaN score is not an error here: it comes from a NaN key, so the request's logits are NaN already
        scores = self._scorer.selection_scores(View(keys, keys, eviction.seen, valid, ~protected))
        indices = keep_indices(keep_mask(scores, valid, protected, [n_tokens - n_keep]), n_keep)
        mode, picks, of = self._scorer.mode, None, None
        for number, (cache, layout) in enumerate(zip(self._caches, self._layouts, strict=True)):
            if layout is not of or mode == "per_layer_per_head":  # otherwise every layer keeps the same tokens
                heads = layout.places.shape[1]
                picks, of = layout.picks(layer_indices(indices, mode, number, heads)[0]), layout
            layout.thin(cache, sources, kept, picks)

    @torch.inference_mode()
    def _rehearse(self) -> None:
        """Run a whole round on the null block, so that kernels are compiled, and errors raised, at startup."""
        size = self.rule.block_size
        n_sources = -(-(self.rule.kv_budget + self.rule.divide_length) // size)
        n_keep = max(1, self.rule.kv_budget // size - 1)
        length = (n_sources + 1) * size
        self._compact(Eviction("", length, length, 0, [0] * n_sources, [0] * n_keep, 0))

    def _report_missed(self, rows: Rows, lengths: np.ndarray) -> None:
        """Log and count requests that are due at this step but got no round."""
        for row in np.flatnonzero(self.rule.is_due(lengths, rows.prompts)):
            name = rows.names[row]
            if name not in self._reported and name not in self._no_round_yet and self.rule.blocks_to_evict(
                int(lengths[row]), int(rows.prompts[row])
            ):  # fmt: skip
                self._reported.add(name)
                self._counters.add("rounds_missed")
                _log.error(
                    "[TriAttention] request %s has %d tokens in the KV cache, which is over its budget, but got no "
                    "round: the scheduler is not the one that this plugin patched",
                    name, lengths[row],
                )  # fmt: skip

    def _timed(self, rounds: int) -> _Timer:
        return _Timer(self._counters, rounds, self._caches[0].device, self._pending)


class _Timer:
    """Adds the duration of a ``with`` block to ``round_seconds``; on a GPU with events, read in a later round."""

    def __init__(self, counters: Counters, rounds: int, device: torch.device, pending: list[tuple[Any, Any]]) -> None:
        self._counters, self._rounds, self._pending = counters, rounds, pending
        self._events = [torch.cuda.Event(enable_timing=True) for _ in range(2)] if device.type == "cuda" else None

    def __enter__(self) -> None:
        if self._events:
            self._events[0].record()
        self._start = time.perf_counter()

    def __exit__(self, *error: Any) -> None:
        self._counters.add("compactions", self._rounds)
        if self._events is None:
            self._counters.add("round_seconds", time.perf_counter() - self._start)
            return
        self._events[1].record()
        self._pending.append((self._events[0], self._events[1]))
        while self._pending and self._pending[0][1].query():
            start, end = self._pending.pop(0)
            self._counters.add("round_seconds", start.elapsed_time(end) / 1000)
