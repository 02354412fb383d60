"""The replay of an engine made here, which scores by the other form of the formula: right runs pass, faults do not."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from verify.judge.problems import OFFSETS_17
from verify.serving.replay import Replay, Rule, replay
from verify.serving.trace import Step

_LAYERS, _HEADS, _GROUP, _DIM = 3, 2, 2, 16
_RULE = Rule(kv_budget=32, divide_length=8, window=6, block_size=8)
_NEW = 60
_PLENTY = 100


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    """A random model whose next token depends on what it attends to, by more than rounding."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=_HEADS * _GROUP * _DIM, intermediate_size=96, num_hidden_layers=_LAYERS, vocab_size=128,
        num_attention_heads=_HEADS * _GROUP, num_key_value_heads=_HEADS, max_position_embeddings=512,
        attn_implementation="sdpa", initializer_range=0.15,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def statistics(model: LlamaForCausalLM) -> dict[str, Any]:
    shape = (_LAYERS, _HEADS * _GROUP, _DIM // 2)
    real, imag = torch.randn(2, *shape, generator=torch.Generator().manual_seed(1))
    return {
        "architecture": {
            "omega": model.model.rotary_emb.inv_freq, "attention_scaling": 1.0, "rotary_dim": _DIM,
            "rope_style": "half", "num_query_heads": _HEADS * _GROUP, "num_kv_heads": _HEADS,
        },
        "q_mean_real": real, "q_mean_imag": imag, "q_abs_mean": torch.hypot(real, imag) * 1.3,
        "q_pass_mean": torch.zeros(*shape[:2], 0),
    }  # fmt: skip


class _Engine:
    """Greedy decoding with rounds by ``rule``, one token a step, and the steps as an observer would record them."""

    def __init__(self, model: LlamaForCausalLM, statistics: dict[str, Any], rule: Rule, fault: str = "") -> None:
        self.model, self.statistics, self.rule, self.fault = model, statistics, rule, fault
        self.steps: list[Step] = []
        self.log_probs: list[float] = []
        self.begin()

    def begin(self) -> None:
        self.cache, self.seen, self.evicted = DynamicCache(config=self.model.config), 0, 0

    def step(self, ids: list[int], prompt: int, free: int = _PLENTY, cached: int = 0) -> int:
        """Compute ``ids`` from ``cached`` (a prefix that is there already) on; the token after them."""
        if self.seen and (blocks := self.rule.due(self.seen - self.evicted, prompt)) and self.fault != "never":
            self._round(blocks + (self.fault == "one more"), prompt)
        start = max(self.seen, cached)
        fed = ids[self.seen :]
        first = self.seen - (self.evicted if self.fault == "positions" else 0)
        with torch.inference_mode():
            logits = self.model(
                input_ids=torch.tensor([fed]), past_key_values=self.cache,
                position_ids=torch.arange(first, first + len(fed))[None],
            ).logits[0, -1]  # fmt: skip
        self.seen = len(ids)
        held = self.rule.blocks(len(ids) - self.evicted) - (self.fault == "lost block")
        self.steps.append(Step(len(self.steps), start, len(ids) - start, self.evicted, held, free))
        said = int(logits.argmax()) if self.fault != "repeats" else 5
        self.log_probs.append(float(logits.log_softmax(-1)[said]))
        return said

    def _round(self, blocks: int, prompt: int) -> None:
        length = self.seen - self.evicted
        sources = (self.rule.blocks(length) - 1) * self.rule.block_size
        count = sources - blocks * self.rule.block_size
        first = prompt if self.rule.protect_prefill else 0
        last = min(sources, length - self.rule.window)
        scores = torch.stack([self._scores(n, slice(first, last)) for n in range(_LAYERS)])
        if self.rule.mode == "per_head":
            scores = scores.mean(0, keepdim=True).expand_as(scores)
        if self.fault == "random":
            scores = torch.rand(scores.shape, generator=torch.Generator().manual_seed(self.seen))
        best = scores.topk(count - first - (sources - last), dim=-1).indices.sort(-1).values + first
        if self.fault == "next best" and not self.evicted:
            ranked = scores[:, 0].topk(best.shape[-1] + 1, dim=-1).indices
            best[:, 0] = torch.cat([ranked[:, :-2], ranked[:, -1:]], dim=-1).sort(-1).values + first
        ends = [torch.arange(*span).expand(_LAYERS, _HEADS, -1) for span in ((0, first), (last, length))]
        kept = torch.cat([ends[0], best, ends[1]], dim=-1)
        for layer, rows in zip(self.cache.layers, kept, strict=True):
            index = rows[None, :, :, None].expand(-1, -1, -1, _DIM)
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        self.evicted += blocks * self.rule.block_size

    def _scores(self, layer: int, region: slice) -> torch.Tensor:
        """``[H, N]``: rotated keys against the mean query rotated to the mean of the offsets, in float32."""
        k = torch.complex(*self.cache.layers[layer].keys[0, :, region].split(_DIM // 2, dim=-1))
        here, omega = self.statistics, self.statistics["architecture"]["omega"].double()
        q = torch.complex(here["q_mean_real"][layer], here["q_mean_imag"][layer])
        ahead = torch.exp(1j * omega * (self.seen + torch.tensor(OFFSETS_17))[:, None]).mean(0)
        target = (q * ahead).to(torch.complex64).view(_HEADS, _GROUP, -1)
        extra = (here["q_abs_mean"][layer] - q.abs()).view(_HEADS, _GROUP, -1)
        raw = torch.einsum("hnf,hgf->hgn", k.conj(), target).real + torch.einsum("hnf,hgf->hgn", k.abs(), extra)
        return ((raw - raw.mean(-1, keepdim=True)) / raw.std(-1, keepdim=True, correction=0)).max(1).values


def _prompt(tokens: int = 21) -> list[int]:
    return random.Random(3).choices(range(128), k=tokens)


def _served(engine: _Engine, prompt: list[int], new: int = _NEW) -> list[int]:
    ids = list(prompt)
    for _ in range(new):
        ids.append(engine.step(ids, len(prompt)))
    return ids[len(prompt) :]


def _replayed(engine: _Engine, prompt: list[int], served: list[int], rule: Rule | None = None) -> Replay:
    return replay(engine.model, engine.statistics, rule or engine.rule, prompt, served, engine.steps, engine.log_probs)


def _clean(found: Replay) -> bool:
    return not found.wrong and not found.violations


def test_without_rounds_it_is_plain_generation(model, statistics) -> None:
    prompt = _prompt()
    out = model.generate(
        torch.tensor([prompt]), max_new_tokens=_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    served = out[0, len(prompt) :].tolist()
    assert len(set(served)) > 10
    rule = replace(_RULE, kv_budget=1000)
    steps = [Step(0, 0, 16, 0, 2, 9), Step(1, 16, 5, 0, 3, 9)]
    steps += [Step(n, n + 19, 1, 0, rule.blocks(n + 20), 9) for n in range(2, _NEW + 1)]
    found = replay(model, statistics, rule, prompt, served, steps)
    assert (found.tokens, found.near_ties, found.rounds, found.preemptions, found.longest) == (60, 0, 0, 0, 80)
    assert _clean(found)
    served[7] = (served[7] + 1) % 128
    assert replay(model, statistics, rule, prompt, served, steps).wrong[0].position == 28


@pytest.mark.parametrize(
    "rule",
    [
        _RULE,
        replace(_RULE, mode="per_layer_per_head"),
        replace(_RULE, protect_prefill=True, kv_budget=48),
        replace(_RULE, count_prompt=False, kv_budget=16),
        replace(_RULE, window=0, kv_budget=16, divide_length=1),
    ],
    ids=["per_head", "per_layer_per_head", "prompt_protected", "prompt_on_top", "each_step"],
)
def test_an_engine_that_keeps_the_rule_has_no_wrong_token(model, statistics, rule: Rule) -> None:
    engine, prompt = _Engine(model, statistics, rule), _prompt()
    served = _served(engine, prompt)
    found = _replayed(engine, prompt, served)
    assert _clean(found)
    assert found.rounds >= 3
    assert found.tokens == _NEW
    assert found.narrowest > 1e-5
    assert 0 < found.drift < 1e-4
    other = "per_head" if rule.mode == "per_layer_per_head" else "per_layer_per_head"
    assert _replayed(engine, prompt, served, replace(rule, mode=other)).wrong


def test_log_probabilities_tell_what_tokens_do_not(model, statistics) -> None:
    """The engine says one token all the time, whatever the model prefers: every keep set leads to the same text."""
    engine, prompt = _Engine(model, statistics, _RULE, "repeats"), _prompt()
    served = _served(engine, prompt)
    right, other = (
        _replayed(engine, prompt, served, replace(_RULE, mode=m)) for m in ("per_head", "per_layer_per_head")
    )
    assert right.drift < 1e-4
    assert other.drift > 0.1
    assert right.violations == other.violations == []


def test_of_two_scores_that_rounding_cannot_part_either_may_stay(model, statistics, monkeypatch) -> None:
    engine, prompt = _Engine(model, statistics, _RULE, "next best"), _prompt()
    served = _served(engine, prompt)
    strict = _replayed(engine, prompt, served)
    assert (strict.agrees, strict.ties) == (False, 0)
    gap = strict.narrowest
    monkeypatch.setattr("verify.serving.replay.KEEP_SET_TIE", 1.0)
    monkeypatch.setattr("verify.serving.replay._MOST_TIES", 99)
    lenient = _replayed(engine, prompt, served)
    assert (lenient.agrees, lenient.ties, lenient.narrowest <= gap) == (True, 1, True)


@pytest.mark.parametrize("fault", ["positions", "random"])
def test_a_fault_that_only_the_tokens_show_is_found(model, statistics, fault: str) -> None:
    engine, prompt = _Engine(model, statistics, _RULE, fault), _prompt()
    found = _replayed(engine, prompt, _served(engine, prompt))
    assert found.violations == []
    assert len(found.wrong) > 5
    assert found.drift > 0.1
    first = next(step.end for step in engine.steps if step.evicted)
    assert min(wrong.position for wrong in found.wrong) >= first


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("one more", "step 20, token 40: 16 of 40 tokens were evicted, the rule says 8"),
        ("never", "step 20, token 40: 0 of 40 tokens were evicted, the rule says 8"),
        ("lost block", "step 0, token 0: 2 blocks hold 21 tokens, not 3"),
    ],
)  # fmt: skip
def test_what_the_rule_does_not_say_is_a_violation(model, statistics, fault: str, told: str) -> None:
    engine, prompt = _Engine(model, statistics, _RULE, fault), _prompt()
    assert _replayed(engine, prompt, _served(engine, prompt)).violations[0] == told


def test_a_round_may_be_late_only_where_blocks_were_short(model, statistics) -> None:
    engine, prompt = _Engine(model, statistics, _RULE), _prompt()
    ids = list(prompt)
    for number in range(30):
        engine.fault = "never" if 20 <= number < 23 else ""
        ids.append(engine.step(ids, len(prompt), free=2 if engine.fault else _PLENTY))
    found = _replayed(engine, prompt, ids[len(prompt) :])
    assert (found.late, found.rounds, _clean(found)) == (3, 1, True)
    engine.steps = [replace(step, free=3) for step in engine.steps]
    found = _replayed(engine, prompt, ids[len(prompt) :])
    assert (found.late, len(found.violations), found.wrong) == (0, 3, [])


def test_a_preempted_request_begins_anew_and_may_find_its_prefix(model, statistics) -> None:
    engine, prompt = _Engine(model, statistics, _RULE), _prompt()
    ids = [*prompt, *_served(engine, prompt, 30)]
    engine.begin()
    for _ in range(30):  # all that was said is computed again, the first 16 tokens of it by nobody
        ids.append(engine.step(ids, len(prompt), cached=0 if engine.seen else 16))
    found = _replayed(engine, prompt, ids[len(prompt) :])
    assert (found.tokens, found.preemptions, _clean(found)) == (60, 1, True)
    assert found.rounds > _replayed(engine, prompt, ids[len(prompt) : len(prompt) + 20]).rounds


def test_a_request_that_gets_all_its_blocks_back_was_preempted_all_the_same(model, statistics) -> None:
    engine, prompt = _Engine(model, statistics, _RULE, "never"), _prompt()
    served = _served(engine, prompt, 21)
    assert engine.steps[-1].start == 40  # where a round is due, which only a request that was running can have
    engine.steps[-1] = replace(engine.steps[-1], preempted=True)
    found = _replayed(engine, prompt, served)
    assert (found.preemptions, found.late, _clean(found)) == (1, 0, True)


def test_a_trace_that_does_not_tell_of_every_token_is_a_violation(model, statistics) -> None:
    engine, prompt = _Engine(model, statistics, _RULE), _prompt()
    served = _served(engine, prompt)
    engine.steps = engine.steps[:40]
    assert _replayed(engine, prompt, served).violations == ["60 tokens were served, but the trace samples 40"]
    engine.steps[30] = replace(engine.steps[30], evicted=0)
    assert _replayed(engine, prompt, served).violations == [
        "step 30, token 50: -16 of 34 tokens were evicted, the rule says 0"
    ]
    del engine.steps[30]
    assert _replayed(engine, prompt, served).violations == [
        "step 31, token 51: the tokens from 50 on were never computed"
    ]
