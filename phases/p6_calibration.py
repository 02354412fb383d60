"""Phase 6, calibration: the query statistics used for scoring, collected from a real model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from verify import Measure, check
from verify.judge.tolerance import CALIBRATION, CALIBRATION_BF16
from verify.model.calibrated import Text, directly, judge, of_file, of_object, programs, saved
from verify.model.live_model import LiveModel
from verify.model.settings import PROMPTS
from verify.model.tiny import tiny, tokens
from verify.subject.offered import optional
from verify.subject.subject import Subject

#: With a factor of 40 the attention scaling is 1.37, so a mistake with it is far outside every bound.
_YARN: dict[str, Any] = {
    "rope": {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 1024},
    "max_position_embeddings": 40 * 1024,
}

_CALIBRATION = {
    "reason": "Statistics of queries other than those used in attention make every score wrong without any error.",
    "tolerance": "1e-6 of E|q|: float64 sums of the same queries, rounded once to float32.",
    "remedy": "Take q at the input of RoPE: after q_norm, before the rotation.",
    "timeout_s": 300,
}


@check(
    "p6.calibration", gate="soft", needs=("p1.identity",), capability="calibration",
    cases={name: name for name in ("model", "extreme_q_norm", "yarn", "padded", "long_step")},
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
        model = tiny(tmp_path, subject, device, seed, kind="qwen3")
        _extreme_q_norm(model.model)
        texts = [(part, None) for part in tokens(model, 300, seed).split(150, dim=1)]
    elif case == "yarn":
        model = tiny(tmp_path, subject, device, seed, **_YARN)
        texts = [(part, None) for part in tokens(model, 300, seed).split(150, dim=1)]
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
    loop = _fed(texts)
    got = calibrate(model.model, loop)
    direct = directly(model, loop, texts, getattr(getattr(got, "architecture", None), "rope_style", "half"))
    judge(of_object(got, direct[""]), direct, CALIBRATION, measure)


def _fed(texts: Sequence[Text]) -> Callable[[Any], None]:
    """The loop that runs ``texts`` through a model, one by one."""
    import torch

    def loop(model: Any) -> None:
        with torch.inference_mode():
            for ids, mask in texts:
                model(input_ids=ids, attention_mask=mask, use_cache=False)

    return loop


def _extreme_q_norm(model: Any) -> None:
    """Give q_norm weights so extreme that statistics taken before it are far off."""
    import torch

    for layer in model.model.layers:
        weight = layer.self_attn.q_norm.weight.data
        weight.mul_(torch.linspace(0.02, 50, len(weight)).to(weight))


#: What a tiny model is, and what is done to its weights.
_SAVED: dict[str, tuple[dict[str, Any], Callable[[Any], None] | None]] = {
    "plain": ({}, None), "qk_norm": ({"kind": "qwen3"}, _extreme_q_norm), "yarn": (_YARN, None),
}  # fmt: skip


@check(
    "p6.calibration_script", gate="soft", needs=("p1.identity",), capability="calibration", cases=_SAVED,
    **{
        **_CALIBRATION,
        "claim": "A statistics file that scripts/calibrate.py or the command line's calibrate writes has the means of "
        "the queries that enter RoPE.",
        "tolerance": "2^-5 of E|q|: a program may load the model in bfloat16, where a query goes through up to 16 "
        "roundings of 2^-9 from the embedding on, and the mean of the errors is at most their largest.",
    },
)  # fmt: skip
def test_a_program_calibrates(
    case: tuple[dict[str, Any], Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    shape, prepare = case
    ways = programs(subject)
    live, text, ids = saved(tmp_path / "model", subject, device, seed, prepare, **shape)
    for number, way in enumerate(ways):
        output = tmp_path / f"statistics-{number}.pt"
        way.calibrate(live.location, text, device, output)
        texts: list[Text] = [(ids[:, : way.used], None)]
        direct = directly(live, _fed(texts), texts, "half")
        judge(of_file(output, subject, direct[""]), direct, CALIBRATION_BF16, measure, way.called)


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
