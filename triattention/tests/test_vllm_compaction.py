"""The worker's half without an engine: the keep sets of the Hugging Face path, shifts, and what it says."""

from __future__ import annotations

import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from triattention import statistics
from triattention.architecture import describe
from triattention.methods.triattention import TriAttention, TriAttentionConfig
from triattention.tests import tiny
from triattention.vllm.runtime.compaction import Compactor
from triattention.vllm.runtime.eviction import Eviction, Rounds, Rule
from triattention.vllm.runtime.metrics import Counters
from triattention.vllm.runtime.runners import V1Runner

BLOCKS, SLOTS, HEADS, DIM = 12, 8, 2, 16
#: Physical tokens of the request, the last 5 of which are in its newest block.
LENGTH = 61


class _Layer(SimpleNamespace):
    """An attention layer whose cache is ``[2, blocks, slots, heads, dim]``."""

    def __init__(self) -> None:
        def update(layer: Any, keys: torch.Tensor, values: torch.Tensor, cache: torch.Tensor, slots: torch.Tensor):
            cache.view(2, BLOCKS * SLOTS, HEADS, DIM)[:, slots] = torch.stack([keys, values])

        super().__init__(
            kv_cache=torch.zeros(2, BLOCKS, SLOTS, HEADS, DIM), num_kv_heads=HEADS, head_size=DIM,
            impl=SimpleNamespace(do_kv_cache_update=update),
        )  # fmt: skip

    def write(self, blocks: list[int], keys: torch.Tensor, values: torch.Tensor) -> None:
        slots = torch.tensor([block * SLOTS + slot for block in blocks for slot in range(SLOTS)])[: keys.shape[1]]
        self.impl.do_kv_cache_update(self, keys.transpose(0, 1), values.transpose(0, 1), self.kv_cache, slots)

    def read(self, blocks: list[int], length: int) -> torch.Tensor:
        """Keys and values ``[2, H, length, D]``."""
        return self.kv_cache[:, blocks].flatten(1, 2)[:, :length].transpose(1, 2)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.make()


@pytest.fixture(scope="module")
def calibrated(model: Any, tmp_path_factory: pytest.TempPathFactory) -> statistics.Statistics:
    path: Path = tmp_path_factory.mktemp("statistics") / "tiny.pt"
    return statistics.load(tiny.calibrated(model, path))


@pytest.fixture(scope="module")
def cached(model: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values ``[1, H, LENGTH, D]`` of each layer, as the model caches them."""
    with torch.inference_mode():
        cache = model(tiny.tokens(LENGTH)).past_key_values
    return [(layer.keys, layer.values) for layer in cache.layers]


def _config(budget: int, **options: Any) -> TriAttentionConfig:
    recommended = {
        "normalize_scores": True, "use_slack_trigger": True, "count_prompt_tokens": True,
        "allow_prefill_compression": True, "pruning_mode": "per_head",
    }  # fmt: skip
    return TriAttentionConfig(None, None, "cpu", torch.float32, budget, divide_length=8, **recommended | options)


def _compactor(
    model: Any, calibrated: statistics.Statistics, rule: Rule, **options: Any
) -> tuple[Compactor, list[_Layer]]:
    layers = [_Layer() for _ in range(3)]
    scorer = TriAttention(_config(rule.kv_budget, **options), live=describe(model), calibrated=calibrated)
    return Compactor(layers, BLOCKS, scorer, rule, Counters()), layers


def _output(*evictions: Eviction, **fields: Any) -> SimpleNamespace:
    usual = {"finished_req_ids": set(), "scheduled_new_reqs": [], "triattention": Rounds(list(evictions))}
    cached = SimpleNamespace(resumed_req_ids=fields.pop("resumed", set()))
    return SimpleNamespace(scheduled_cached_reqs=cached, **usual | fields)


def _runner(blocks: list[int], *, computed: int = LENGTH, prompt: int = 20) -> SimpleNamespace:
    """What the compactor touches of a model runner that serves the request ``r`` in row 0."""
    rows: dict[int, list[int]] = {}
    table = SimpleNamespace(
        add_row=lambda ids, row: rows.__setitem__(row, list(ids[0])),
        compute_slot_mapping=lambda n, starts, positions: rows.__setitem__(-1, positions.tolist()),
    )
    batch = SimpleNamespace(
        req_ids=["r"], num_reqs=1, req_id_to_index={"r": 0}, block_table=table,
        num_computed_tokens_cpu=np.array([computed]), num_prompt_tokens=np.array([prompt]),
    )  # fmt: skip
    return SimpleNamespace(
        requests={"r": SimpleNamespace(block_ids=(list(blocks),))}, input_batch=batch, rows=rows,
        seq_lens=torch.tensor([computed + 1], dtype=torch.int32), positions=torch.tensor([computed, 0]),
        optimistic_seq_lens_cpu=torch.tensor([computed + 1], dtype=torch.int32),
        query_start_loc=SimpleNamespace(gpu=torch.tensor([0, 1])),
    )  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"pruning_mode": "per_layer_per_head"},
        {"pruning_mode": "per_layer_per_head", "layer_perhead_aggregation": "mean"},
        {"score_aggregation": "max"},
        {"normalize_scores": False},
        {"disable_mlr": True},
        {"disable_trig": True},
        {"allow_prefill_compression": False},
    ],
    ids=str,
)
def test_a_round_keeps_what_the_hugging_face_path_keeps(
    options: dict[str, Any], model: Any, calibrated: statistics.Statistics, cached: list[Any]
) -> None:
    protect, prompt = not options.get("allow_prefill_compression", True), 11
    window, newest = 9, LENGTH - 7 * SLOTS
    rule = Rule(40, 8, window, SLOTS, protect_prefill=protect)
    compactor, layers = _compactor(model, calibrated, rule, window_size=window, **options)
    blocks = [3, 1, 7, 5, 10, 2, 8, 6]
    for layer, (keys, values) in zip(layers, cached, strict=True):
        layer.write(blocks, keys[0], values[0])
    n_evict = rule.blocks_to_evict(LENGTH, prompt)
    assert n_evict == 3
    kept = [1, 9, 4, 3]  # two of the sources, in another order, and two blocks of its own
    runner = _runner(blocks)
    V1Runner(runner, compactor).before_step(
        _output(Eviction("r", LENGTH, LENGTH, prompt, blocks[:-1], kept, blocks[-1]))
    )

    n_left = LENGTH - n_evict * SLOTS
    # the newest block holds less than the window here, so the window decides what is protected on both paths
    assert newest < window
    reference = TriAttention(
        _config(n_left, window_size=window, **options), live=describe(model), calibrated=calibrated
    )
    want = reference.compute_keep_indices(cached, prefix_length=prompt)
    for number, (layer, pair) in enumerate(zip(layers, cached, strict=True)):
        indices = want if want.ndim == 2 else want[number]
        for held, given in zip(layer.read([*kept, blocks[-1]], n_left), pair, strict=True):
            assert torch.equal(held, given[0].gather(1, indices[:, :, None].expand(-1, -1, DIM)))
    assert runner.requests["r"].block_ids[0] == runner.rows[0] == [*kept, blocks[-1]]


def test_attention_sees_shifted_lengths_and_slots_until_the_request_ends(
    model: Any, calibrated: statistics.Statistics
) -> None:
    compactor, _ = _compactor(model, calibrated, Rule(40, 8, 9, SLOTS))
    blocks = [3, 1, 7, 5, 10, 2, 8, 6]
    runner = _runner(blocks)
    V1Runner(runner, compactor).before_step(
        _output(Eviction("r", LENGTH, LENGTH, 20, blocks[:-1], blocks[:4], blocks[-1]))
    )
    V1Runner(runner, compactor).after_inputs(np.array([1]))
    gone = 3 * SLOTS
    assert runner.seq_lens.tolist() == runner.optimistic_seq_lens_cpu.tolist() == [LENGTH + 1 - gone]
    assert runner.rows[-1] == [LENGTH - gone]
    assert runner.positions.tolist() == [LENGTH, 0], "positions stay logical"
    for ended in (
        {"finished_req_ids": {"r"}},
        {"resumed": {"r"}},
        {"scheduled_new_reqs": [SimpleNamespace(req_id="r")]},
    ):
        runner = _runner(blocks)
        V1Runner(runner, compactor).before_step(
            _output(Eviction("r", LENGTH, LENGTH, 20, blocks[:-1], blocks[:4], blocks[-1]))
        )
        V1Runner(runner, compactor).before_step(_output(**ended))
        V1Runner(runner, compactor).after_inputs(np.array([1]))
        assert runner.seq_lens.tolist() == [LENGTH + 1]
        assert -1 not in runner.rows, "slots were computed again for requests without an eviction"


def test_a_worker_that_holds_other_blocks_than_the_scheduler_stops(
    model: Any, calibrated: statistics.Statistics
) -> None:
    compactor, _ = _compactor(model, calibrated, Rule(40, 8, 9, SLOTS))
    with pytest.raises(RuntimeError, match="request r has different blocks here and in the scheduler"):
        V1Runner(_runner([1, 2, 3]), compactor).before_step(_output(Eviction("r", 20, 20, 20, [1, 4], [1], 3)))


def test_a_request_over_its_budget_that_nobody_thinned_is_an_error_and_counted_once(
    model: Any, calibrated: statistics.Statistics, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    compactor, _ = _compactor(model, calibrated, Rule(40, 8, 9, SLOTS))
    for computed, put_off in ((47, []), (48, ["r"]), (48, []), (49, [])):
        runner = _runner([1, 2, 3, 4, 5, 6, 7], computed=computed)
        V1Runner(runner, compactor).before_step(_output(triattention=Rounds(put_off=put_off)))
        V1Runner(runner, compactor).after_inputs(np.array([1]))
    (record,) = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert "request r has 48 tokens in the KV cache, which is over its budget, but got no round" in record.getMessage()
    assert compactor._counters.get("rounds_missed") == 1
