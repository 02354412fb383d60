"""Which tokens a round keeps, in every mode and kind of model, by the published pre-RoPE form and plain NumPy."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import DynamicCache

from triattention import statistics
from triattention.methods.pruning_utils import (
    compute_frequency_statistics_from_means,
    invert_rope,
    score_keys_for_round,
)
from triattention.methods.triattention import apply_triattention_patch, remove_triattention_patch
from triattention.selection import MODES
from triattention.tests import tiny

_SEEN, _BUDGET = 64, 48
_YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
_MODELS = {
    "llama": {},
    "qwen3": {},
    "phi3": {},
    "glm": {},
    "glm_full": {},
    "yarn": {"kind": "llama", "rope_parameters": _YARN},
}


@pytest.fixture(scope="module", params=_MODELS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    model = tiny.make(**{"kind": request.param, **_MODELS[request.param]})
    return model, tiny.calibrated(model, tmp_path_factory.mktemp("stats") / "stats.pt")


@pytest.fixture
def model(made: tuple[Any, Path]) -> Iterator[Any]:
    yield made[0]
    remove_triattention_patch(made[0])


def _published_scores(model: Any, path: Path, keys: list[torch.Tensor]) -> np.ndarray:
    """Scores ``[L, H*G, N]`` of rotated keys ``[H, N, D]`` per layer, un-rotated by the model's own cos and sin."""
    loaded = statistics.load(path)
    here = loaded.architecture
    rotary = model.model.rotary_emb
    positions = torch.arange(_SEEN)
    cos, sin = (x[0].double() for x in rotary(torch.zeros(1, dtype=torch.float64), positions[None]))
    if here.rope_style == "interleaved":
        cos, sin = (x[:, : here.rotary_dim // 2].repeat_interleave(2, -1) for x in (cos, sin))
    offsets, weight = 2.0 ** torch.arange(17), torch.full((here.rotary_dim // 2,), here.attention_scaling**2)
    scores = np.empty((here.num_layers, here.num_query_heads, _SEEN))
    for layer, layer_keys in enumerate(keys):
        for head in range(here.num_query_heads):
            rotated = layer_keys[head // (here.num_query_heads // here.num_kv_heads)].double()
            plain = invert_rope(rotated[:, : here.rotary_dim], cos, sin, here.attention_scaling, style=here.rope_style)
            m = torch.complex(loaded.q_mean_real[layer, head].double(), loaded.q_mean_imag[layer, head].double())
            amp, phi, extra = compute_frequency_statistics_from_means(
                m, loaded.q_abs_mean[layer, head].double(), plain, style=here.rope_style
            )
            score = score_keys_for_round(positions, _SEEN, amp, phi, here.omega, extra, offsets, "mean", weight)
            content = rotated[:, here.rotary_dim :] @ loaded.q_pass_mean[layer, head].double()
            scores[layer, head] = (score + content).numpy()
    return scores


def _expected(scores: np.ndarray, mode: str, window: int) -> np.ndarray:
    """Kept tokens, bool ``[L, H, N]``, by the rules: z-score, group maximum, mode, window, highest first."""
    inside = scores[..., : _SEEN - window]
    z = (scores - inside.mean(-1, keepdims=True)) / inside.std(-1, keepdims=True)
    heads = z.reshape(len(z), 2, 2, _SEEN).max(2)
    best = {
        "per_head": heads.mean(0, keepdims=True),
        "union": heads.max((0, 1), keepdims=True),
        "per_layer": heads.max(1, keepdims=True),
        "per_layer_per_head": heads,
    }[mode]
    best = np.broadcast_to(best, heads.shape).copy()
    best[..., _SEEN - window :] = np.inf
    kept = np.zeros(best.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-best, axis=-1, kind="stable")[..., :_BUDGET], True, axis=-1)
    return kept


@pytest.mark.parametrize("mode", MODES)
def test_a_round_keeps_what_the_rules_keep(made: tuple[Any, Path], model: Any, mode: str) -> None:
    ids, stats = tiny.tokens(_SEEN), made[1]
    plain, held = (DynamicCache(config=model.config) for _ in range(2))
    model(input_ids=ids, past_key_values=plain)
    keys = [layer.keys[0].detach() for layer in plain.layers]
    options = {**tiny.RECOMMENDED, "per_head_pruning": False, "pruning_mode": mode}
    apply_triattention_patch(model, stats_path=stats, model_path=None, **options)
    model(input_ids=ids, past_key_values=held)
    want = _expected(_published_scores(model, stats, keys), mode, options["window_size"])
    for layer, (was, now) in enumerate(zip(plain.layers, held.layers, strict=True)):
        for head in range(2):
            kept = torch.from_numpy(want[layer, head])
            assert torch.equal(now.keys[0, head], was.keys[0, head][kept]), (layer, head)
            assert torch.equal(now.values[0, head], was.values[0, head][kept])
    pairs = [(layer.keys, layer.values) for layer in plain.layers]
    indices = model.triattention.compute_keep_indices(pairs)
    shape = {"per_head": (2, 48), "union": (48,), "per_layer": (3, 48), "per_layer_per_head": (3, 2, 48)}[mode]
    assert indices.shape == shape


def test_the_group_mean_is_another_choice_than_the_maximum(made: tuple[Any, Path], model: Any) -> None:
    held = []
    for join in ("max", "mean"):
        options = {**tiny.RECOMMENDED, "per_head_pruning": False, "per_layer_perhead_pruning": True}
        apply_triattention_patch(model, stats_path=made[1], model_path=None, layer_perhead_aggregation=join, **options)
        held.append(model(input_ids=tiny.tokens(_SEEN)).past_key_values.layers[2].keys)
        remove_triattention_patch(model)
    assert held[0].shape == held[1].shape
    assert not torch.equal(*held)
