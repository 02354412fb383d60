"""Phase 4, the published compressor: which keys and values it keeps, and what its options do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify import Measure, check
from verify.errors import CRASHES
from verify.judge.compressor import Caches, Kept, compress, make_caches, write_statistics
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

_BUDGET, _DIVIDE = 48, 16
_PROMPT, _WINDOW = 20, 8
_FAMILY: dict[str, Any] = {"needs": ("p1.identity", "p1.triton"), "timeout_s": 180}


def _evictable(length: int, prompt: int = 0, window: int = 0) -> np.ndarray:
    import numpy as np

    return (np.arange(length) >= prompt) & (np.arange(length) < length - window)


def _judge(caches: Caches, kept: Kept, layer: int, length: int, options: dict, measure: Measure, **where: int) -> None:
    """Compare every row's keep set with the oracle's; ``where`` has t, prompt and window."""
    evictable = _evictable(length, where.get("prompt", 0), where.get("window", 0))
    for row in range(kept.indices.shape[0]):
        selection = caches.selection(layer, row, slice(0, length), where.get("t", length), evictable, options)
        held = kept.mask(row, length)
        assert held[:, ~evictable].all(), f"row {row}: a protected token was evicted"
        if len(selection.scores) == 1:
            assert (held == held[:1]).all(), "the KV heads of a layer keep different tokens in mode per_layer"
            held = held[:1]
        measure(
            "best evicted over worst kept score", selection.inversion(held, evictable), selection.allowed,
            where=f"layer {layer}, row {row}",
        )  # fmt: skip


@check(
    "p4.compressor", gate="hard", **_FAMILY,
    cases={
        "below": {"length": 63, "kept": 63}, "due": {"length": 64}, "beyond": {"length": 97},
        "bfloat16": {"length": 97, "dtype": "bfloat16"}, "two_rows": {"length": 80, "rows": 2},
    },
    claim="Below budget + divide_length tokens the compressor keeps all of them, from there on exactly the budget, and "
    "kept keys and values are bitwise those of the returned indices.",
    reason="A budget without effect raises no error, and text stays fluent for a while when values do not match keys.",
    tolerance="Exact counts; bitwise equality with the tokens at the returned indices.",
    remedy="Gather keys and values with the same indices, and compare lengths with >=.",
)  # fmt: skip
def test_compressor(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    import torch

    length, expected = case["length"], case.get("kept", _BUDGET)
    caches = make_caches(tmp_path, seed, device, tokens=length, rows=case.get("rows", 1))
    dtype = getattr(torch, case.get("dtype", "float32"))
    keys, values = caches.keys[1].to(dtype), caches.values[1].to(dtype)
    kept = compress(caches.compressor(subject), keys, values, layer_idx=1)
    assert not kept.call.changed, f"it wrote to {', '.join(kept.call.changed)}"
    assert not kept.call.overruns, f"it {'; '.join(kept.call.overruns)}"
    measure("kept tokens, off by", abs(kept.keys.shape[2] - expected), 0, unit="tokens")
    for head in kept.indices.flatten(0, 1).tolist():
        assert len(set(head) & set(range(length))) == expected, f"the indices are not those of {expected} tokens"
    where = kept.indices[..., None].expand(-1, -1, -1, keys.shape[-1])
    for what, given, held in (("keys", keys, kept.keys), ("values", values, kept.values)):
        measure(f"{what} that do not match the indices", int((given.gather(2, where) != held).sum()), 0)


#: Options that do not change the keep set, and options that do.
_NEUTRAL: dict[str, dict[str, Any]] = {
    "default": {},
    "pytorch": {"use_triton_scoring": False},
    "no_table": {"use_trig_cache": False},
    "per_layer_per_head": {"pruning_mode": "per_layer_per_head"},
}
_CHANGING: dict[str, dict[str, Any]] = {
    "per_layer": {"pruning_mode": "per_layer"},
    "max": {"score_aggregation": "max"},
    "raw": {"sparse_normalize_scores": False},
    "no_mlr": {"disable_mlr": True},
    "no_trig": {"disable_trig": True},
    "one_offset": {"offset_max_length": 1},
    "far_offsets": {"offset_max_length": 65536},
}


@check(
    "p4.compressor_keep_set", gate="hard", **_FAMILY, cases=_NEUTRAL | _CHANGING,
    claim="With each option, the compressor's keep set matches the oracle's.",
    reason="If an option is accepted but ignored, an ablation with it measures nothing.",
    tolerance="The oracle's set; scores closer than twice the class B error may swap (verify/judge/keep_set.py).",
    remedy="Honour the option, or refuse it when the configuration is created.",
)  # fmt: skip
def test_compressor_keep_set(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    length = 97
    caches = make_caches(tmp_path, seed, device, tokens=length, rows=2)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        kept = compress(caches.compressor(subject, **case), keys, values, layer_idx=layer)
        _judge(caches, kept, layer, length, case, measure)


@check(
    "p4.compressor_protects", gate="hard", **_FAMILY,
    cases={
        "window": {"window_size": _WINDOW},
        "prompt": {"protect_prefill": True},
        "both": {"window_size": _WINDOW, "protect_prefill": True},
        "prompt_on_top": {"protect_prefill": True, "include_prefill_in_budget": False},
    },
    claim="A protected window or prompt is always kept, and the other tokens are ranked as by the oracle, with "
    "z-scores over the evictable tokens only.",
    reason="Evicting a new token before it was ever read, or the question, costs the most.",
    tolerance="Exact for protected tokens; the oracle's set for the others (verify/judge/keep_set.py).",
    remedy="Rank protected tokens first, and exclude them from the mean and deviation of the z-scores.",
)  # fmt: skip
def test_compressor_protects(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    prompt = _PROMPT if case.get("protect_prefill") else 0
    window = case.get("window_size", 0)
    budget = _BUDGET + (0 if case.get("include_prefill_in_budget", True) else prompt)
    length = budget + _DIVIDE
    caches = make_caches(tmp_path, seed, device, tokens=length)
    for keys in caches.keys:  # far from the others, so that z-scores which include them differ
        keys[:, :, :_PROMPT] *= 30.0
        keys[:, :, length - _WINDOW :] *= -30.0
    compressor = caches.compressor(subject, **case)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        compress(compressor, keys[:, :, :_PROMPT], values[:, :, :_PROMPT], layer_idx=layer)
        kept = compress(compressor, keys, values, layer_idx=layer)
        measure("kept tokens, off the budget by", abs(kept.keys.shape[2] - budget), 0, unit="tokens")
        _judge(caches, kept, layer, length, case, measure, prompt=prompt, window=window)


@check(
    "p4.compressor_order", gate="soft", cases={"ascending": False, "ties": True}, **_FAMILY,
    claim="The kept indices ascend, and among keys with equal scores the lowest indices are kept.",
    reason="Without an order and a rule for ties, two runs of one text can keep different tokens. The published "
    "compressor promises neither, so this is SOFT.",
    tolerance="Exact; tied keys are bitwise identical.",
    remedy="Sort by score with a stable sort, then sort the kept indices.",
)  # fmt: skip
def test_compressor_order(
    case: bool, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    length = 96
    caches = make_caches(tmp_path, seed, device, tokens=length)
    keys = caches.keys[0]
    if case:  # every second key is identical: so many that the budget always cuts through them
        keys[:, :, ::2] = keys[:, :, :1]
        keys[:, :, 1::4] = 0.01 * keys[:, :, :1]
        keys[:, :, 3::4] = 3.0 * keys[:, :, :1]
    kept = compress(caches.compressor(subject), keys, caches.values[0])
    falling = (kept.indices.diff(dim=-1) <= 0).sum()
    measure("indices that do not ascend", int(falling), 0)
    if case:
        for head in kept.mask(0, length):
            tied = head[::2]
            assert 0 < tied.sum() < len(tied), f"{tied.sum()} of {len(tied)} equal keys are kept; this tests nothing"
            measure("equal keys kept after an evicted one", int(tied[tied.argmin() :].sum()), 0)


def _grow(caches: Caches, compressor: Any, layers: tuple[int, ...], steps: int) -> dict[int, list[Kept]]:
    """Fill each layer's cache up to the trigger ``steps`` times, layer by layer, starting from what was kept."""
    import torch

    held = {layer: (caches.keys[layer][:, :, :_BUDGET], caches.values[layer][:, :, :_BUDGET]) for layer in layers}
    rounds: dict[int, list[Kept]] = {layer: [] for layer in layers}
    for number in range(steps):
        new = slice(_BUDGET + number * _DIVIDE, _BUDGET + (number + 1) * _DIVIDE)
        for layer in layers:
            keys, values = (
                torch.cat([old, x[layer][:, :, new]], 2)
                for old, x in zip(held[layer], (caches.keys, caches.values), strict=True)
            )
            kept = compress(compressor, keys, values, layer_idx=layer)
            held[layer] = (kept.keys, kept.values)
            rounds[layer].append(kept)
    return rounds


@check(
    "p4.compressor_state", gate="hard", **_FAMILY,
    cases={"layers": "layers", "reset": "reset", "small_steps": "small_steps"},
    claim="A layer's keep set depends only on its own cache, not on other layers' rounds, a sequence before reset(), "
    "or calls below the trigger.",
    reason="Shared or surviving state shifts the position of the next round, and with it the keep set.",
    tolerance="Bitwise equality.",
    remedy="Keep state per layer, and clear all of it in reset().",
)  # fmt: skip
def test_compressor_state(
    case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    caches = make_caches(tmp_path, seed, device, tokens=_BUDGET + 3 * _DIVIDE)
    alone = _grow(caches, caches.compressor(subject), (1,), 3)[1]
    compressor = caches.compressor(subject)
    if case == "reset":
        _grow(caches, compressor, (0, 1), 2)
        compressor.reset()
    if case == "small_steps":
        for length in range(_BUDGET - 9, _BUDGET + _DIVIDE, 8):
            compress(compressor, caches.keys[1][:, :, :length], caches.values[1][:, :, :length], layer_idx=1)
    together = _grow(caches, compressor, (0, 1) if case == "layers" else (1,), 3)[1]
    for number, (one, other) in enumerate(zip(alone, together, strict=True), start=1):
        measure("kept indices that differ", int((one.indices != other.indices).sum()), 0, where=f"round {number}")
        measure("kept keys that differ", int((one.keys != other.keys).sum()), 0, where=f"round {number}")


@check(
    "p4.compressor_rounds", gate="hard", **_FAMILY, cases={"counted": None, "given": 500},
    claim="A later round scores from the position of the next token: the number of tokens seen since the reset, or the "
    "largest given cache_positions plus one.",
    reason="After a round the cache length is no longer the position; using it ranks keys by wrong distances.",
    tolerance="The oracle's set; scores closer than twice the class B error may swap (verify/judge/keep_set.py).",
    remedy="Add the number of evicted tokens to the length, or take the largest given position plus one.",
)  # fmt: skip
def test_compressor_rounds(
    case: int | None, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    import torch

    caches = make_caches(tmp_path, seed, device, tokens=_BUDGET + 3 * _DIVIDE)
    compressor = caches.compressor(subject)
    if case is None:
        rounds = _grow(caches, compressor, (0,), 2)[0]
        first, length = rounds[0], _BUDGET + _DIVIDE
        joined = [torch.cat([first.keys, caches.keys[0][:, :, length : length + _DIVIDE]], 2), caches.keys[1]]
        _judge(replace(caches, keys=joined), rounds[1], 0, length, {}, measure, t=length + _DIVIDE)
        return
    length = _BUDGET + _DIVIDE
    keys, values = caches.keys[0][:, :, :length], caches.values[0][:, :, :length]
    positions = torch.arange(case, case + 3 * length, 3, device=device)
    kept = compress(compressor, keys, values, cache_positions=positions)
    _judge(caches, kept, 0, length, {}, measure, t=int(positions[-1]) + 1)


@check(
    "p4.compressor_statistics", gate="hard", **_FAMILY,
    cases={name: name for name in ("layer_absent", "head_absent", "layer_beyond", "no_file")},
    claim="A layer or head without statistics is an error; no other statistics are substituted.",
    reason="A substitute ranks every key by another head's statistics, and no number looks wrong.",
    remedy="Raise before any work is done, and name the layer and head missing from the file.",
)  # fmt: skip
def test_compressor_statistics(case: str, subject: Subject, device: str, seed: int, tmp_path: Path) -> None:
    caches = make_caches(tmp_path, seed, device, tokens=64)
    heads = range(caches.m.shape[1])
    absent = {"layer_absent": {(1, head) for head in heads}, "head_absent": {(1, 2)}}.get(case, set())
    write_statistics(caches.statistics, caches.m, caches.a, absent)
    options = {"num_layers": None} | ({"stats_path": None} if case == "no_file" else {})
    layer = 2 if case == "layer_beyond" else 1
    try:
        compressor = caches.compressor(subject, **options)
        compress(compressor, caches.keys[1], caches.values[1], layer_idx=layer)
    except CRASHES:
        raise
    except Exception:  # any other error is a refusal: a subject has errors of its own
        return
    raise AssertionError(f"layer {layer} was compressed without statistics")
