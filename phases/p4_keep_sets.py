"""Phase 4, the published compressor: which keys and values it keeps, and what its options do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from verify import Measure, check
from verify.errors import Wrong
from verify.judge.compressed import (
    LATER,
    PER_LAYER,
    REGION,
    TOLERANCE,
    UNSORTED,
    Judge,
    Reading,
    lowest_first,
    unsorted,
)
from verify.judge.compressing import Compressor, Kept
from verify.judge.compressor import BUDGET, DIVIDE, HEAD_ABSENT, Caches, make_caches, tied, write_statistics
from verify.subject.refusal import must_refuse
from verify.subject.subject import Subject

_PROMPT, _WINDOW = 20, 8
_DUE = BUDGET + DIVIDE
_FAMILY: dict[str, Any] = {"needs": ("p1.identity", "p1.triton"), "timeout_s": 180, "capability": "compressor"}


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

    length, expected = case["length"], case.get("kept", BUDGET)
    caches = make_caches(tmp_path, seed, device, tokens=length, rows=case.get("rows", 1))
    dtype = getattr(torch, case.get("dtype", "float32"))
    keys, values = caches.keys[1].to(dtype), caches.values[1].to(dtype)
    kept = Compressor.of(subject, caches).compress(keys, values, layer_idx=1)
    assert not kept.call.changed, f"it wrote to {', '.join(kept.call.changed)}"
    assert not kept.call.overruns, f"it {'; '.join(kept.call.overruns)}"
    kept.must_count(expected, f"a cache of {length} tokens", "layer 1")
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
    tolerance=TOLERANCE,
    remedy="Honour the option, or refuse it when the configuration is created.",
)  # fmt: skip
def test_compressor_keep_set(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure,
    choose: Callable[[str], None],
) -> None:  # fmt: skip
    caches = make_caches(tmp_path, seed, device, tokens=97)
    judge = Judge(caches, case, measure, PER_LAYER if case.get("pruning_mode") == "per_layer" else (Reading(),))
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        kept = Compressor.of(subject, caches, **case).compress(keys, values, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=97)
    judge.tell(choose)


@check(
    "p4.compressor_protects", gate="hard", **_FAMILY,
    cases={
        "window": {"window_size": _WINDOW},
        "prompt": {"protect_prefill": True},
        "both": {"window_size": _WINDOW, "protect_prefill": True},
        "prompt_on_top": {"protect_prefill": True, "include_prefill_in_budget": False},
    },
    claim="A protected window (the newest tokens of the cache) or prompt is always kept, and the other tokens are "
    "ranked as by the oracle, with z-scores over the evictable tokens or over all cached ones.",
    reason="Evicting a new token before it was ever read, or the question, costs the most.",
    tolerance="Exact for protected tokens; the oracle's set for the others (verify/judge/keep_set.py).",
    remedy="Rank protected tokens first, count the prompt alike in trigger and budget, and z-score over one region.",
)  # fmt: skip
def test_compressor_protects(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure,
    choose: Callable[[str], None],
) -> None:  # fmt: skip
    prompt = _PROMPT if case.get("protect_prefill") else 0
    window = case.get("window_size", 0)
    budget = BUDGET + (0 if case.get("include_prefill_in_budget", True) else prompt)
    length = budget + DIVIDE
    caches = make_caches(tmp_path, seed, device, tokens=length)
    for keys in caches.keys:  # far from the others, so that z-scores which include them differ
        keys[:, :, :_PROMPT] *= 30.0
        keys[:, :, length - _WINDOW :] *= -30.0
    judge = Judge(caches, case, measure, REGION)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        compressor = Compressor.of(subject, caches, **case)
        compressor.compress(*caches.first(layer, _PROMPT), layer_idx=layer).must_count(
            _PROMPT, "the call of the prompt"
        )
        kept = compressor.compress(keys, values, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=length, expected=budget, prompt=prompt, window=window)
    judge.tell(choose)


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
    caches = make_caches(tmp_path, seed, device, tokens=96)
    if case:
        tied(caches)
    kept = Compressor.of(subject, caches).compress(caches.keys[0], caches.values[0])
    kept.must_count(BUDGET, "round 1", "layer 0")
    measure("indices that do not ascend", unsorted(kept), 0, cause=UNSORTED)
    if case:
        lowest_first(kept, measure)


def _grow(caches: Caches, compressor: Compressor, layers: tuple[int, ...], rounds: int) -> Iterator[dict[int, Kept]]:
    """Fill each layer's cache up to the trigger ``rounds`` times, layer by layer, starting from what was kept."""
    import torch

    held = {layer: caches.first(layer, BUDGET) for layer in layers}
    for number in range(rounds):
        new = slice(BUDGET + number * DIVIDE, BUDGET + (number + 1) * DIVIDE)
        kept = {}
        for layer in layers:
            keys, values = (
                torch.cat([old, x[layer][:, :, new]], 2)
                for old, x in zip(held[layer], (caches.keys, caches.values), strict=True)
            )
            kept[layer] = compressor.compress(keys, values, layer_idx=layer)
            held[layer] = (kept[layer].keys, kept[layer].values)
        yield kept


_MEANWHILE = {
    "layers": "with rounds of layer 0 in between", "reset": "after two rounds and reset()",
    "small_steps": "after calls below the trigger",
}  # fmt: skip


@check(
    "p4.compressor_state", gate="hard", **_FAMILY, cases={name: name for name in _MEANWHILE},
    claim="A layer's keep set depends only on its own cache, not on other layers' rounds, a sequence before reset(), "
    "or calls below the trigger.",
    reason="Shared or surviving state shifts the position of the next round, and with it the keep set.",
    tolerance="Exact counts, bitwise equality.",
    remedy="Keep state per layer, and clear all of it in reset().",
)  # fmt: skip
def test_compressor_state(
    case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    caches = make_caches(tmp_path, seed, device, tokens=BUDGET + 3 * DIVIDE)
    alone = _grow(caches, Compressor.of(subject, caches), (1,), 3)
    compressor = Compressor.of(subject, caches)
    if case == "reset":
        list(_grow(caches, compressor, (0, 1), 2))
        compressor.reset()
    if case == "small_steps":
        for length in range(BUDGET - 9, _DUE, 8):
            compressor.compress(*caches.first(1, length), layer_idx=1).must_count(length, f"{length} tokens", "layer 1")
    together = _grow(caches, compressor, (0, 1) if case == "layers" else (1,), 3)
    for number, (one, other) in enumerate(zip(alone, together, strict=True), start=1):
        one[1].must_count(BUDGET, f"round {number}", "layer 1", LATER)
        if other[1].count != BUDGET:
            told = f"layer 1 kept {other[1].count} tokens in round {number}; alone it kept {BUDGET}"
            raise Wrong(f"{_MEANWHILE[case]}, {told}", LATER if other[1].untouched else "")
        differ = int((one[1].indices != other[1].indices).sum())
        measure("kept indices that differ", differ, 0, where=f"round {number}, layer 1, {_MEANWHILE[case]}")
        measure("kept keys that differ", int((one[1].keys != other[1].keys).sum()), 0, where=f"round {number}")


@check(
    "p4.compressor_rounds", gate="hard", **_FAMILY, cases={"counted": None, "given": 500},
    claim="A later round scores from the position of the next token: the number of tokens seen since the reset, or, if "
    "cache_positions are used, the largest of them plus one.",
    reason="After a round the cache length is no longer the position; using it ranks keys by wrong distances.",
    tolerance=TOLERANCE,
    remedy="Add the number of evicted tokens to the length. cache_positions may be ignored, as published.",
)  # fmt: skip
def test_compressor_rounds(
    case: int | None, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure,
    choose: Callable[[str], None],
) -> None:  # fmt: skip
    import torch

    caches = make_caches(tmp_path, seed, device, tokens=BUDGET + 3 * DIVIDE, group=1)
    if case is None:
        judge, keys, seen = Judge(caches, {}, measure), caches.first(0, BUDGET)[0], BUDGET
        rounds = [kept[0] for kept in _grow(caches, Compressor.of(subject, caches), (0,), 3)]
        for number, kept in enumerate(rounds, start=1):
            kept.must_count(BUDGET, f"round {number}", "layer 0", LATER)
        for number, kept in enumerate(rounds, start=1):
            keys = torch.cat([keys, caches.keys[0][:, :, seen : seen + DIVIDE]], 2)
            seen += DIVIDE
            judge.round(kept, 0, keys=keys, t=seen, number=number)
            keys = kept.keys
        return
    positions = torch.arange(case, case + 3 * _DUE, 3, device=device)
    readings = (
        Reading("cache_positions are used"),
        Reading("cache_positions are ignored: the position is the number of tokens seen", {"t": _DUE}),
    )
    judge = Judge(caches, {}, measure, readings)
    for layer in range(len(caches.keys)):
        keys, values = caches.first(layer, _DUE)
        kept = Compressor.of(subject, caches).compress(keys, values, cache_positions=positions, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=int(positions[-1]) + 1)
    judge.tell(choose)


@check(
    "p4.compressor_statistics", gate="hard", **_FAMILY,
    cases={name: name for name in ("layer_absent", "head_absent", "layer_beyond", "no_file")},
    claim="A layer or head without statistics is an error; no other statistics are substituted.",
    reason="A substitute ranks every key by another head's statistics, and no number looks wrong.",
    remedy="Raise ValueError before any work is done, and name the layer and head missing from the file.",
)  # fmt: skip
def test_compressor_statistics(case: str, subject: Subject, device: str, seed: int, tmp_path: Path) -> None:
    caches = make_caches(tmp_path, seed, device, tokens=_DUE)
    options = {"num_layers": None}  # so that the file alone can say that a layer is absent
    keys, values = caches.keys[1], caches.values[1]
    whole = Compressor.of(subject, caches, **options).compress(keys, values, layer_idx=1)
    whole.must_count(BUDGET, "with the complete file, round 1", "layer 1")
    heads = range(caches.m.shape[1])
    absent = {"layer_absent": {(1, head) for head in heads}, "head_absent": {(1, 2)}}.get(case, set())
    write_statistics(tmp_path / "statistics.pt", caches.m, caches.a, absent)
    if case == "no_file":
        caches = replace(caches, statistics=None)
    layer = 2 if case == "layer_beyond" else 1
    must_refuse(
        subject,
        f"compression of layer {layer} without its statistics ({case})",
        lambda: Compressor.of(subject, caches, **options).compress(keys, values, layer_idx=layer),
        cause="" if case == "no_file" else HEAD_ABSENT,
    )
