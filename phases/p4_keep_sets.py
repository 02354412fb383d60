"""Phase 4, the published compressor: what it keeps, of keys and of values, and what its options do."""

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
    """The oracle's keep set of every row; ``where`` has t, prompt and window."""
    evictable = _evictable(length, where.get("prompt", 0), where.get("window", 0))
    for row in range(kept.indices.shape[0]):
        selection = caches.selection(layer, row, slice(0, length), where.get("t", length), evictable, options)
        held = kept.mask(row, length)
        assert held[:, ~evictable].all(), f"row {row}: a protected token was evicted"
        if len(selection.scores) == 1:
            assert (held == held[:1]).all(), "the KV heads of a layer keep other tokens, and the mode is per_layer"
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
    claim="The compressor keeps everything below budget + divide_length and the budget from there on, and moves keys "
    "and values together, bit for bit.",
    reason="A budget without effect costs no error, and values of other tokens than their keys stay fluent a while.",
    tolerance="Exact counts; bitwise equality with the tokens that the indices name.",
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
    measure("tokens kept off the expected number", abs(kept.keys.shape[2] - expected), 0, unit="tokens")
    for head in kept.indices.flatten(0, 1).tolist():
        assert len(set(head) & set(range(length))) == expected, f"the indices are not those of {expected} tokens"
    where = kept.indices[..., None].expand(-1, -1, -1, keys.shape[-1])
    for what, given, held in (("keys", keys, kept.keys), ("values", values, kept.values)):
        measure(f"{what} that are not those of the indices", int((given.gather(2, where) != held).sum()), 0)


#: Options that leave the keep set as it is, and options that change it.
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
    claim="The compressor keeps what the oracle keeps, with each option that it accepts.",
    reason="An option that is accepted and ignored makes an ablation that measures nothing.",
    tolerance="The oracle's set, except inside score gaps below twice the class B error (verify/judge/keep_set.py).",
    remedy="Honour the option, or refuse it when the configuration is made.",
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
    claim="The window and the prompt, where they are protected, are kept whatever they score, and the rest is ranked "
    "as the oracle ranks it, with z-scores over what can be evicted.",
    reason="A newest token that is gone before it was ever read, or a lost question, is the costliest eviction.",
    tolerance="Exact for the protected; the oracle's set for the others (verify/judge/keep_set.py).",
    remedy="Rank protected tokens first, and leave them out of the mean and deviation of the z-scores.",
)  # fmt: skip
def test_compressor_protects(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    prompt = _PROMPT if case.get("protect_prefill") else 0
    window = case.get("window_size", 0)
    budget = _BUDGET + (0 if case.get("include_prefill_in_budget", True) else prompt)
    length = budget + _DIVIDE
    caches = make_caches(tmp_path, seed, device, tokens=length)
    for keys in caches.keys:  # far from the others, so that it matters whether they are counted in
        keys[:, :, :_PROMPT] *= 30.0
        keys[:, :, length - _WINDOW :] *= -30.0
    compressor = caches.compressor(subject, **case)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        compress(compressor, keys[:, :, :_PROMPT], values[:, :, :_PROMPT], layer_idx=layer)
        kept = compress(compressor, keys, values, layer_idx=layer)
        measure("tokens kept off the budget", abs(kept.keys.shape[2] - budget), 0, unit="tokens")
        _judge(caches, kept, layer, length, case, measure, prompt=prompt, window=window)


@check(
    "p4.compressor_order", gate="soft", cases={"ascending": False, "ties": True}, **_FAMILY,
    claim="The kept indices ascend, and among keys that score the same the lowest index is kept.",
    reason="Without an order and a rule for ties, two runs of one text keep different tokens. The published "
    "compressor promises neither, so this is SOFT.",
    tolerance="Exact; tied keys are the same key, to the bit.",
    remedy="Sort by score with a stable sort, then the indices.",
)  # fmt: skip
def test_compressor_order(
    case: bool, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    length = 96
    caches = make_caches(tmp_path, seed, device, tokens=length)
    keys = caches.keys[0]
    if case:  # every second key is the same one, and so many that the last place kept is always among them
        keys[:, :, ::2] = keys[:, :, :1]
        keys[:, :, 1::4] = 0.01 * keys[:, :, :1]
        keys[:, :, 3::4] = 3.0 * keys[:, :, :1]
    kept = compress(caches.compressor(subject), keys, caches.values[0])
    falling = (kept.indices.diff(dim=-1) <= 0).sum()
    measure("indices that do not ascend", int(falling), 0)
    if case:
        for head in kept.mask(0, length):
            tied = head[::2]
            assert 0 < tied.sum() < len(tied), f"{tied.sum()} of {len(tied)} equal keys are kept; that tests nothing"
            measure("equal keys kept after an evicted one", int(tied[tied.argmin() :].sum()), 0)


def _grow(caches: Caches, compressor: Any, layers: tuple[int, ...], steps: int) -> dict[int, list[Kept]]:
    """Fill each layer's cache to the trigger ``steps`` times, layers in turn, from what was kept before."""
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
    claim="What a layer keeps depends on its own cache alone: not on other layers' rounds, on the sequence before a "
    "reset, or on calls below the trigger.",
    reason="State that is shared or survives moves the position of the next round, and so what it keeps.",
    tolerance="The same bits.",
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
    claim="A later round stands at the position of the next token: tokens seen since the reset, or the newest of the "
    "cache_positions that are given, plus one.",
    reason="After a round the length of a cache is no position any more; a round that takes it for one ranks by other "
    "distances.",
    tolerance="The oracle's set, except inside score gaps below twice the class B error (verify/judge/keep_set.py).",
    remedy="Add what was evicted to the length, or take the largest given position plus one.",
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
    claim="A layer or head without statistics is an error, and nothing else's statistics take their place.",
    reason="A substitute ranks every key by what another head asks for, and no number looks wrong.",
    remedy="Raise before any work is done, naming the layer and head that the file lacks.",
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
    raise AssertionError(f"layer {layer} was compressed, for which there are no statistics")
