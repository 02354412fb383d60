"""Quality: the controls evict what they say, margins are what they say, and what is recorded gates."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from verify.model import controls, quality
from verify.model.controls import CONTROLS, Setting
from verify.model.quality import NAMES, SEEDS, Margin, Measured

_SETTING = Setting(budget=16, divide_length=8, window=4, step=8)


def _cache(layers: int = 3, tokens: int = 24) -> SimpleNamespace:
    torch.manual_seed(0)
    made = [
        SimpleNamespace(keys=torch.randn(1, 2, tokens, 8), values=torch.randn(1, 2, tokens, 8)) for _ in range(layers)
    ]
    return SimpleNamespace(layers=made)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_keeps_the_budget_and_the_window_and_moves_values_with_keys(control: str) -> None:
    cache, before = _cache(), _cache()
    controls.evict(cache, _SETTING, control, [random.Random(1)])
    kept = []
    for layer, was in zip(cache.layers, before.layers, strict=True):
        assert layer.keys.shape == layer.values.shape == (1, 2, 16, 8)
        for head in range(2):
            rows = (layer.keys[0, head][:, None] == was.keys[0, head][None]).all(-1).int().argmax(-1)
            assert torch.equal(layer.values[0, head], was.values[0, head][rows])
            assert rows.tolist() == sorted(rows.tolist())
            assert rows[-4:].tolist() == [20, 21, 22, 23]
            kept.append(rows.tolist())
    if control == "recent":
        assert kept == [[*range(4), *range(12, 24)]] * 6
    elif control == "random":
        assert kept == [kept[0]] * 6
        assert kept[0] != [*range(8, 24)]
    else:
        norms = before.layers[1].keys[0, 1, :20].norm(dim=-1)
        assert kept[3][:12] == norms.argsort()[:12].sort().values.tolist()


@pytest.mark.parametrize("control", [None, *CONTROLS])
def test_a_text_has_in_a_batch_what_it_has_alone(control: str | None) -> None:
    live = _tiny()
    texts = [
        controls.Asked(torch.randint(0, 96, (length,), generator=torch.Generator().manual_seed(length)), first, seed)
        for seed, (length, first) in enumerate([(61, 24), (40, 30), (33, 0), (61, 59)])
    ]
    together = controls.feed(live, texts, _SETTING, control)
    for text, (log_probs, hits) in zip(texts, together, strict=True):
        ((alone, alone_hits),) = controls.feed(live, [text], _SETTING, control)
        assert len(log_probs) == len(hits) == len(text.ids) - 1 - text.first
        torch.testing.assert_close(log_probs, alone, rtol=1e-4, atol=1e-4)
        assert torch.equal(hits, alone_hits)


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_that_goes_on_with_a_cache_has_what_it_has_from_the_start(control: str) -> None:
    live, ids = _tiny(), torch.randint(0, 96, (70,), generator=torch.Generator().manual_seed(1))
    texts = [controls.Asked(ids, _SETTING.budget + _SETTING.divide_length, seed=4)]
    ((whole, _),) = controls.feed(live, texts, _SETTING, control)
    ((resumed, _),) = controls.feed(live, texts, _SETTING, control, controls.begin(live, texts, _SETTING))
    assert len(resumed) == 70 - 1 - 24
    torch.testing.assert_close(resumed, whole, rtol=1e-4, atol=1e-4)


def _tiny() -> Any:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    subject = SimpleNamespace(content_sha256=lambda: "0" * 64)
    return SimpleNamespace(model=model, location="tiny", subject=subject, new_cache=lambda: DynamicCache(config=config))


def test_what_was_measured_of_a_control_is_kept_and_of_the_subject_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))
    ids = torch.arange(70) % 96
    texts = [controls.Asked(ids, 24, seed) for seed in SEEDS]
    monkeypatch.setattr(quality, "Setting", lambda: _SETTING)
    monkeypatch.setitem(quality.MEASURES, "perplexity", replace(quality.MEASURES["perplexity"], texts=lambda *_: texts))
    live, fed = _tiny(), []
    real = controls.feed
    monkeypatch.setattr(quality, "feed", lambda *given: fed.append(given[3]) or real(*given))
    values = []
    for _ in range(2):
        measured = Measured(keep=True)
        measured.take(live, "perplexity", "knorm")
        measured.take(live, "perplexity", "subject")
        values.append(measured.values["perplexity"])
    assert fed == ["knorm", None, None]
    assert values[0] == values[1]
    (kept,) = tmp_path.glob("quality/*.json")
    kept.write_text("[1.0, 2")
    Measured(keep=True).take(live, "perplexity", "knorm")
    Measured().take(live, "perplexity", "knorm")
    assert fed[3:] == ["knorm", "knorm"]


def test_a_margin_is_students() -> None:
    margin = Margin((1.0, 2.0, 3.0, 4.0, 5.0), "nats")
    assert margin.mean == 3
    assert margin.half_width == pytest.approx(2.776 * (2.5 / 5) ** 0.5)  # standard deviation sqrt(2.5), five values
    assert margin.proven
    assert not Margin((-1.0, 2.0, 3.0, -2.0, 1.0), "nats").proven


def test_less_loss_and_more_recall_are_better() -> None:
    measured = Measured(
        {
            "perplexity": {"subject": [1.0] * 5, "recent": [1.5] * 5},
            "needle": {"subject": [0.8] * 5, "recent": [0.5] * 5},
        }
    )
    assert measured.of("perplexity_recent").mean == pytest.approx(0.5)
    assert measured.of("needle_recent").mean == pytest.approx(0.3)


def test_what_is_recorded_is_complete_and_gates_what_is_proven() -> None:
    content = json.loads(quality.recorded().read_text("utf-8"))
    for values in content["values"].values():
        assert values.keys() == {"full", "subject", *CONTROLS}
        assert all(len(by_seed) == len(SEEDS) for by_seed in values.values())
    assert content["setting"] == vars(Setting())
    margins = quality.recorded_margins()
    assert tuple(margins) == NAMES
    gated = quality.gated()
    assert gated == [name for name in NAMES if margins[name].mean > margins[name].half_width]
    assert {"perplexity_random", "needle_recent"} <= set(gated)


def test_a_needle_is_told_once_at_its_depth_and_asked_for_at_the_end() -> None:
    text, code = quality.needle(3, 0.4, sentences=50)
    assert quality.needle(3, 0.4, sentences=50) == (text, code)
    assert text.count(code.strip()) == 1
    assert 0.3 < text.index(code) / len(text) < 0.5
    assert text.endswith("is")
    assert not any(character.isdigit() for character in text.replace(code.strip(), ""))
