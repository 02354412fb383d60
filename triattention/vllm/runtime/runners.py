"""vLLM's two model runners, V1 and V2, as far as a round needs them.

Both are told the logical length of a request and compute positions, slots and sequence lengths from it. After a round
the storage is shorter. So before attention reads them, lengths and slots are moved back by what was evicted; positions,
from which RoPE is computed, stay.

V1 has the blocks of a request on the host. V2 has them on the device only, so a copy is kept here. V2 also decides from
the sequence lengths whether a prompt is complete, so they are restored before it samples.

The V2 runner has run with this plugin on a CPU. It is UNTESTED on a GPU.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from triattention.vllm.runtime.compaction import Compactor, Rows


class V1Runner:
    """The V1 runner, of GPUs and CPUs."""

    def __init__(self, runner: Any, compactor: Compactor) -> None:
        self._runner, self._compactor = runner, compactor

    def blocks(self, name: str) -> list[int]:
        return self._runner.requests[name].block_ids[0]

    def set_blocks(self, name: str, blocks: list[int]) -> None:
        held, batch = self._runner.requests[name].block_ids[0], self._runner.input_batch
        held[:] = blocks
        row = batch.req_id_to_index.get(name)
        if row is not None:
            batch.block_table.add_row((held,), row)

    def before_step(self, output: Any) -> None:
        """Carry out the rounds of a step, before the runner reads the scheduler's ``output``."""
        self._compactor.before_step(self, output)

    def after_inputs(self, scheduled: np.ndarray) -> None:
        """Replace the logical lengths and slots, which the runner has just written to its buffers, by physical ones."""
        runner, batch = self._runner, self._runner.input_batch
        n = batch.num_reqs
        rows = Rows(batch.req_ids[:n], scheduled, batch.num_computed_tokens_cpu[:n], batch.num_prompt_tokens[:n])
        offsets = self._compactor.offsets(rows)
        if not offsets.any():
            return
        total = int(scheduled.sum())
        by_row, by_token = rows.shifts(offsets, runner.seq_lens.device)
        runner.seq_lens[:n] -= by_row.to(runner.seq_lens.dtype)
        runner.optimistic_seq_lens_cpu[:n] -= torch.from_numpy(offsets).to(runner.optimistic_seq_lens_cpu.dtype)
        batch.block_table.compute_slot_mapping(
            n, runner.query_start_loc.gpu[: n + 1], runner.positions[:total] - by_token
        )


class V2Runner:
    """The V2 runner, which vLLM chooses for most models since 0.25."""

    def __init__(self, runner: Any, compactor: Compactor) -> None:
        self._runner, self._compactor = runner, compactor
        self._held: dict[str, list[int]] = {}
        #: What was taken from the lengths of the batch that runs: the rows on the device, and their bounds before.
        self._taken: tuple[torch.Tensor, torch.Tensor] | None = None

    def blocks(self, name: str) -> list[int]:
        return self._held[name]

    def set_blocks(self, name: str, blocks: list[int]) -> None:
        self._held[name] = blocks
        self._runner.block_tables.append_block_ids(
            self._runner.req_states.req_id_to_index[name], (blocks,), overwrite=True
        )

    def before_step(self, output: Any) -> None:
        """Carry out the rounds of a step, after new requests were added and before running ones get new blocks."""
        for name in (*output.finished_req_ids, *(output.preempted_req_ids or ())):
            self._held.pop(name, None)
        for new in output.scheduled_new_reqs:
            self._held[new.req_id] = list(new.block_ids[0])
        self._compactor.before_step(self, output)
        cached = output.scheduled_cached_reqs
        for name, blocks in zip(cached.req_ids, cached.new_block_ids, strict=True):
            if blocks is not None:
                self._held[name] += blocks[0]

    def shorten(self, batch: Any, prepared: tuple[Any, torch.Tensor]) -> tuple[Any, torch.Tensor]:
        """Replace the logical lengths of a batch, and the slots of ``prepared``, by physical ones.

        ``prepared`` are the block tables and the slots. The lengths are changed in place, because a CUDA graph reads
        that buffer.
        """
        states = self._runner.req_states
        computed, prompts = states.num_computed_tokens_np, states.prompt_len.np
        at = batch.idx_mapping_np
        rows = Rows(batch.req_ids, batch.num_scheduled_tokens, computed[at], prompts[at])
        offsets = self._compactor.offsets(rows)
        self._taken = None
        if not offsets.any():
            return prepared
        by_row, by_token = rows.shifts(offsets, batch.seq_lens.device)
        by_row = by_row.to(batch.seq_lens.dtype)
        self._taken = by_row, batch.seq_lens_cpu_upper_bound
        batch.seq_lens[: batch.num_reqs] -= by_row
        bound = batch.seq_lens_cpu_upper_bound.clone()
        bound[: batch.num_reqs] -= torch.from_numpy(offsets).to(bound.dtype)
        batch.seq_lens_cpu_upper_bound = bound
        slots = self._runner.block_tables.compute_slot_mappings(
            batch.idx_mapping, batch.query_start_loc, batch.positions[: batch.num_tokens] - by_token,
            num_tokens_padded=batch.num_tokens_after_padding,
        )  # fmt: skip
        return prepared[0], slots

    def lengthen(self, batch: Any) -> None:
        """Restore the logical lengths, after attention and before the runner samples."""
        if self._taken is not None:
            by_row, batch.seq_lens_cpu_upper_bound = self._taken
            batch.seq_lens[: batch.num_reqs] += by_row
            self._taken = None
