"""The other methods: each against its definition or an independent implementation, over the same cache."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from triattention.architecture import Architecture, describe
from triattention.compression import Budget, View
from triattention.errors import TriAttentionError
from triattention.methods.attention import window_attention
from triattention.methods.baselines import BASELINES, apply_baseline_patch
from triattention.methods.controls import Random
from triattention.methods.rkv import RKV
from triattention.methods.snapkv import SnapKV
from triattention.methods.triattention import remove_triattention_patch
from triattention.queries import queries_read
from triattention.selection import MODES
from triattention.tests import tiny

_SMALL = {"kv_budget": 48, "divide_length": 16, "window_size": 8}


def _compressed(model: Any, method: str, ids: torch.Tensor, **options: Any) -> DynamicCache:
    apply_baseline_patch(model, method, **{**_SMALL, **options})
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    remove_triattention_patch(model)
    return cache


def _plain(model: Any, ids: torch.Tensor) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids, past_key_values=cache)
    return cache


def _kept(plain: DynamicCache, held: DynamicCache, layer: int, head: int) -> list[int]:
    same = (held.layers[layer].keys[0, head][:, None] == plain.layers[layer].keys[0, head][None]).all(-1)
    assert same.any(-1).all()
    return same.to(int).argmax(-1).tolist()


def _view(cache: DynamicCache, live: Architecture, queries: torch.Tensor, valid: torch.Tensor) -> View:
    keys, values = [layer.keys for layer in cache.layers], [layer.values for layer in cache.layers]
    return View(keys, values, valid.sum(-1), valid, valid, queries)


@pytest.mark.parametrize("method", BASELINES)
@pytest.mark.parametrize("kind", ["llama", "phi3", "glm"])
def test_padded_rows_equal_their_single_runs(method: str, kind: str) -> None:
    # a batch of another size rounds otherwise, and a hundred steps of so small a model may meet a tie of float32
    model = tiny.make(kind).double()
    a, b = tiny.tokens(40), tiny.tokens(25, seed=2)
    ids = torch.cat([a, torch.nn.functional.pad(b, (15, 0))])
    options = {"max_new_tokens": 100, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    apply_baseline_patch(model, method, **_SMALL)
    together = model.generate(input_ids=ids, attention_mask=(ids != 0).long(), **options)
    assert model.triattention.rounds > 3
    assert model.triattention.peak_length < 48 + 16
    assert torch.equal(together[0], tiny.generate(model, a)[0])
    assert torch.equal(together[1, 15:], tiny.generate(model, b)[0])


@pytest.mark.parametrize("method", BASELINES)
def test_a_budget_never_reached_changes_nothing(method: str) -> None:
    model, ids = tiny.make("qwen3"), tiny.tokens(40)
    want = tiny.generate(model, ids)
    apply_baseline_patch(model, method, kv_budget=1000)
    assert torch.equal(tiny.generate(model, ids), want)
    remove_triattention_patch(model)
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("method", BASELINES)
def test_every_method_serves_every_mode(method: str, mode: str) -> None:
    model, ids = tiny.make(), tiny.tokens(64)
    held, plain = _compressed(model, method, ids, pruning_mode=mode), _plain(model, ids)
    sets = {tuple(_kept(plain, held, layer, head)) for layer in range(3) for head in range(2)}
    assert all(len(kept) == 48 and list(kept[-8:]) == list(range(56, 64)) for kept in sets)
    assert len(sets) <= {"per_head": 2, "union": 1, "per_layer": 3, "per_layer_per_head": 6}[mode]


def test_snapkv_scores_are_those_of_kvpress() -> None:
    # kvpress 0.5.5, SnapKVPress(window_size=8, kernel_size=5), on the same keys and queries: waves, so that they are
    # the same everywhere
    golden = torch.tensor(json.loads(Path(__file__).with_name("kvpress_snapkv.json").read_text("utf-8")))

    def wave(*shape: int, step: float) -> torch.Tensor:
        return 2 * torch.sin(torch.arange(np.prod(shape), dtype=torch.float64) * step).view(shape).float()

    model = tiny.make(num_hidden_layers=1)
    live = describe(model)
    queries = wave(1, 32, 64, step=0.37).view(1, 32, 4, 16)[:, -8:]
    unrotated = wave(1, 2, 32, 16, step=0.23)
    cos, sin = model.model.rotary_emb(unrotated, torch.arange(32)[None])
    turned = torch.cat([-unrotated[..., 8:], unrotated[..., :8]], -1)
    keys = unrotated * cos[:, None] + turned * sin[:, None]
    valid = torch.ones(1, 32, dtype=torch.bool)
    view = View([keys], [keys], 32, valid, valid, queries[None])
    (scores,) = SnapKV(Budget(16, window_size=8), "per_layer_per_head", live).scores(view)
    torch.testing.assert_close(scores[0, :, :24], golden, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3", "glm", "yarn"])
def test_the_attention_of_the_window_is_the_models_own(kind: str) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    options = {"rope_parameters": yarn} if kind == "yarn" else {}
    model = tiny.make("llama" if kind == "yarn" else kind, attention="eager", **options)
    live, window = describe(model), 6
    rows = torch.cat([tiny.tokens(40), torch.nn.functional.pad(tiny.tokens(30, seed=2), (10, 0))])
    mask, steps, cache = rows != 0, [], DynamicCache(config=model.config)
    with queries_read(model, live, lambda layer, q: steps.append(q[:, -window:])), torch.no_grad():
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        out = model(
            input_ids=rows, attention_mask=mask.long(), position_ids=positions, past_key_values=cache,
            output_attentions=True,
        )  # fmt: skip
    view = _view(cache, live, torch.stack(steps), mask)
    for layer, weights in enumerate(out.attentions):
        want = weights[:, :, -window:, :-window].mean(2)
        got = window_attention(view, layer, live, outside_only=False)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


def test_rkv_is_its_definition() -> None:
    model = tiny.make()
    live, window, n = describe(model), 4, 30
    generator = torch.Generator().manual_seed(0)
    # a common direction, so that many keys are alike
    keys = torch.randn(1, 2, n, 16, generator=generator) + 2 * torch.randn(1, 2, 1, 16, generator=generator)
    queries = torch.randn(1, 1, window, 4, 16, generator=generator)
    valid = torch.ones(1, n, dtype=torch.bool)
    view = View([keys], [keys], n, valid, valid, queries)
    method = RKV(Budget(16, window_size=window), "per_layer_per_head", live)
    (scores,) = method.scores(view)
    attention = window_attention(view, 0, live, outside_only=True)[0].numpy()
    assert np.allclose(attention.sum(-1), 1, atol=1e-6)
    unit = (keys[0] / keys[0].norm(dim=-1, keepdim=True)).double().numpy()
    for head in range(2):
        padded = np.pad(attention[2 * head : 2 * head + 2], ((0, 0), (3, 3)), constant_values=-np.inf)
        pooled = np.stack([padded[:, i : i + 7].max(-1) for i in range(n - window)], -1).mean(0)
        total = np.zeros(n)
        spared = 0
        for i in range(n):
            newest = [j for j in reversed(range(n)) if j != i and unit[head, i] @ unit[head, j] > 0.5][: n // 10]
            spared += len(newest)
            total += [unit[head, i] @ unit[head, j] if j not in (i, *newest) else 0 for j in range(n)]
        assert spared > n
        redundancy = np.exp(total / n) / np.exp(total / n).sum()
        want = 0.1 * np.pad(pooled, (0, window)) - 0.9 * redundancy
        np.testing.assert_allclose(scores[0, head].numpy(), want, rtol=1e-5, atol=1e-7)


def test_recent_keeps_the_sinks_and_the_newest() -> None:
    model, ids = tiny.make(), tiny.tokens(64)
    kept = _kept(_plain(model, ids), _compressed(model, "recent", ids), 1, 0)
    assert kept == [*range(4), *range(20, 64)]


def test_knorm_keeps_the_shortest_keys_of_each_layer_and_head() -> None:
    model, ids = tiny.make(), tiny.tokens(64)
    plain, held = _plain(model, ids), _compressed(model, "knorm", ids)
    for layer in range(3):
        shortest = plain.layers[layer].keys[0, 1, :56].norm(dim=-1).argsort()[:40].sort().values.tolist()
        assert _kept(plain, held, layer, 1) == [*shortest, *range(56, 64)]


def test_random_is_the_seeds_choice_and_an_even_one() -> None:
    model = tiny.make()
    live = describe(model)
    valid = torch.ones(1, 40, dtype=torch.bool)
    keys = [torch.zeros(1, 2, 40, 16)] * 3

    def drawn(seed: int, seen: int) -> torch.Tensor:
        method = Random(Budget(16), "per_head", live, seed=seed)
        return torch.stack(list(method.scores(View(keys, keys, seen, valid, valid))))

    assert torch.equal(drawn(1, 50), drawn(1, 50))
    assert not torch.equal(drawn(1, 50), drawn(2, 50))
    assert not torch.equal(drawn(1, 50), drawn(1, 51))
    mean = torch.stack([drawn(0, seen) for seen in range(200)]).mean((0, 1, 2, 3))
    assert ((mean - 0.5).abs() < 0.06).all()  # 1,200 draws each: five standard deviations are 0.042


def test_the_prompt_can_be_protected() -> None:
    model = tiny.make()
    apply_baseline_patch(model, "snapkv", **_SMALL, allow_prefill_compression=False, count_prompt_tokens=False)
    cache, ids = DynamicCache(config=model.config), tiny.tokens(20)
    for _ in range(80):
        ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)
    assert model.triattention.rounds > 0
    plain = _plain(tiny.make(), tiny.tokens(20))
    torch.testing.assert_close(cache.layers[2].keys[:, :, :20], plain.layers[2].keys, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("method", "options", "words"),
    [
        ("h2o", {}, "method 'h2o' is not known; known: snapkv, rkv, recent, random, knorm"),
        ("rkv", {"window_size": 0}, "rkv uses the newest queries, but the window is 0"),
        ("recent", {"kv_budget": 0}, "KV budget is 0"),
        ("knorm", {"pruning_mode": "global"}, "the pruning mode is 'global'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_touched(method: str, options: dict, words: str) -> None:
    model = tiny.make()
    with pytest.raises(TriAttentionError, match=words):
        apply_baseline_patch(model, method, **{"kv_budget": 48, **options})
    assert not hasattr(model, "triattention")
