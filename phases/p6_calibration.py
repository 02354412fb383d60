"""Phase 6, calibration: the query statistics used for scoring, collected from a real model."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest

from verify import Measure, check
from verify.judge.tolerance import CALIBRATION
from verify.model.live_model import LiveModel
from verify.model.settings import PROMPTS
from verify.subject.offered import optional

_CALIBRATION = {
    "reason": "Statistics of queries other than those used in attention make every score wrong without any error.",
    "tolerance": "1e-6 of E|q|: float64 sums of the same queries, rounded once to float32.",
    "remedy": "Take q at the input of RoPE: after q_norm, before the rotation.",
    "timeout_s": 300,
}


def _calibration_error(model: LiveModel, loop: Any) -> float:
    """Largest difference between calibrated and directly computed means over ``loop``, relative to E|q|."""
    import numpy as np

    from verify.judge.oracle import pairs

    got = optional(model.subject, "calibration", "calibrate")(model.model, loop)
    with model.rotated_queries() as taken:
        loop(model.model)
    layers, heads, n_freq = got.q_abs_mean.shape
    errors = []
    for layer in range(layers):
        q = np.concatenate([queries[0].double().cpu().numpy() for queries in taken[layer::layers]], axis=1)
        assert q.shape[0] == heads, f"{heads} query heads were calibrated, but the model has {q.shape[0]}"
        rotated = pairs(q[..., : 2 * n_freq], getattr(got.architecture, "rope_style", "half"))
        size = np.abs(rotated).mean(1)
        mean = got.q_mean_real[layer].double().numpy() + 1j * got.q_mean_imag[layer].double().numpy()
        errors += [np.abs(mean - rotated.mean(1)) / size]
        errors += [np.abs(got.q_abs_mean[layer].double().numpy() - size) / size]
        if (unrotated := q[..., 2 * n_freq :]).size:
            passed = got.q_pass_mean[layer].double().numpy()
            errors += [np.abs(passed - unrotated.mean(1)) / np.abs(unrotated).mean(1)]
    return float(max(np.max(error) for error in errors)) if np.isfinite(np.concatenate(errors, -1)).all() else math.nan


@check(
    "p6.calibration", gate="soft", needs=("p1.identity",), cases={"model": False, "extreme_q_norm": True},
    claim="Calibration averages exactly the queries that enter RoPE, for any split into batches.", **_CALIBRATION,
)  # fmt: skip
def test_calibration_agrees_with_a_direct_computation(
    case: bool, model: LiveModel, seed: int, measure: Measure
) -> None:
    import torch

    ids = model.tokens(" ".join(PROMPTS * 8))["input_ids"]
    if case:
        model = replace(model, model=_extreme_qwen3(seed).to(model.model.device))
        ids = ids % model.model.config.vocab_size

    def loop(m: Any) -> None:
        with torch.inference_mode():
            for part in ids.split(150, dim=1):
                m(input_ids=part, use_cache=False)

    measure("error of the means over E|q|", _calibration_error(model, loop), CALIBRATION)


def _extreme_qwen3(seed: int) -> Any:
    """A tiny model with extreme q_norm weights: statistics taken before q_norm would be far off."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=256, max_position_embeddings=4096,
    )  # fmt: skip
    made = AutoModelForCausalLM.from_config(config).eval()
    for layer in made.model.layers:
        layer.self_attn.q_norm.weight.data.mul_(torch.linspace(0.02, 50, 16))
    return made


@check(
    "p6.calibration_restores", gate="soft", needs=("p1.identity",), cases={"after_success": False, "after_error": True},
    claim="Calibration leaves the model unchanged, also when the text loop raises.", **_CALIBRATION,
)  # fmt: skip
def test_calibration_restores_the_model(case: bool, model: LiveModel, measure: Measure) -> None:
    import torch

    calibrate, ids = optional(model.subject, "calibration", "calibrate"), model.tokens(PROMPTS[0])["input_ids"]

    def state() -> tuple[Any, int]:
        with torch.inference_mode():
            logits = model.model(input_ids=ids).logits
        return logits, sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in model.model.modules())

    def loop(m: Any) -> None:
        m(input_ids=ids)
        if case:
            raise _TextError

    before, hooks_before = state()
    with pytest.raises(_TextError) if case else nullcontext():
        calibrate(model.model, loop)
    after, hooks_after = state()
    measure("hooks left behind", hooks_after - hooks_before, 0)
    measure("logits that differ", int((before != after).sum()), 0)


class _TextError(Exception):
    """The error raised by the text loop."""
