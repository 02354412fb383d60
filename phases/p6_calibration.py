"""Phase 6, calibration: the query statistics used for scoring, collected from a real model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from verify import Measure, check
from verify.judge.tolerance import CALIBRATION
from verify.model.live_model import LiveModel
from verify.model.observed import rotary_of
from verify.model.settings import PROMPTS
from verify.model.tiny import tiny, tokens
from verify.subject.offered import optional
from verify.subject.subject import Subject

#: Token ids ``[B, T]`` and their mask, None without padding.
Text = tuple[Any, Any]

_CALIBRATION = {
    "reason": "Statistics of queries other than those used in attention make every score wrong without any error.",
    "tolerance": "1e-6 of E|q|: float64 sums of the same queries, rounded once to float32.",
    "remedy": "Take q at the input of RoPE: after q_norm, before the rotation.",
    "timeout_s": 300,
}


def _calibration_error(calibrate: Callable[..., Any], model: LiveModel, texts: Sequence[Text]) -> float:
    """Largest difference between calibrated and directly computed means over ``texts``, relative to E|q|."""
    import numpy as np
    import torch

    from verify.judge.oracle import pairs

    def loop(m: Any) -> None:
        with torch.inference_mode():
            for ids, mask in texts:
                m(input_ids=ids, attention_mask=mask, use_cache=False)

    got = calibrate(model.model, loop)
    with model.rotated_queries() as taken:
        loop(model.model)
    config, rotated_dims = model.model.config, 2 * rotary_of(model.model).inv_freq.numel()
    want = (config.num_hidden_layers, config.num_attention_heads, rotated_dims // 2)
    for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
        found = tuple(getattr(got, name).shape)
        assert found == want, f"{name} has shape {found}; the model has (layers, query heads, frequencies) {want}"
    layers, _, n_freq = want
    errors = []
    for layer in range(layers):
        # [H*G, real tokens, D], every row of every step
        real = [(torch.ones_like(ids) if mask is None else mask).bool().cpu() for ids, mask in texts]
        steps = zip(taken[layer::layers], real, strict=True)
        q = np.concatenate([queries.double().cpu().transpose(0, 1)[:, some] for queries, some in steps], axis=1)
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
    "p6.calibration", gate="soft", needs=("p1.identity",), capability="calibration",
    cases={name: name for name in ("model", "extreme_q_norm", "padded", "long_step")},
    claim="Calibration averages exactly the queries of real tokens that enter RoPE, for any split into batches.",
    **_CALIBRATION,
)  # fmt: skip
def test_calibration_agrees_with_a_direct_computation(
    case: str, model: LiveModel, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    import torch

    calibrate = optional(subject, "calibration", "calibrate")
    ids = model.tokens(" ".join(PROMPTS * 8))["input_ids"]
    texts: list[Text] = [(part, None) for part in ids.split(150, dim=1)]
    if case == "extreme_q_norm":
        model = replace(model, model=_extreme_qwen3(seed).to(model.model.device))
        texts = [(part % model.model.config.vocab_size, None) for part, _ in texts]
    elif case == "padded":
        model = tiny(tmp_path, subject, device, seed)
        texts = []
        for sizes in ((40, 17), (9, 33), (25, 25)):
            width = max(sizes)
            mask = torch.tensor([[0] * (width - size) + [1] * size for size in sizes], device=device)
            texts.append((tokens(model, 2 * width, seed + width).view(2, width), mask))
    elif case == "long_step":
        model = tiny(tmp_path, subject, device, seed, num_hidden_layers=1)
        texts = [(tokens(model, 16 * 600, seed).view(16, 600), None)]
    measure("error of the means over E|q|", _calibration_error(calibrate, model, texts), CALIBRATION)


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
    "p6.calibration_restores", gate="soft", needs=("p1.identity",), capability="calibration",
    cases={"after_success": False, "after_error": True},
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
