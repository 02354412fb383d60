"""Phase 4, the published compressor: frequencies, groups of heads, batches, when a round is due, prompts and ties."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from verify import Measure, check
from verify.judge.compressed import PER_LAYER, ROUNDED, TOLERANCE, UNEVEN, Judge, Reading, cut, lowest_first
from verify.judge.compressing import Compressor
from verify.judge.compressor import BUDGET, DIVIDE, make_caches, tied
from verify.judge.problems import restride
from verify.subject.subject import Subject

_PROMPT, _WINDOW, _LENGTH = 20, 8, 97
#: So many tokens that a keep set shows frequencies rounded to bfloat16, whatever the seed.
FAR_LENGTH = 385
_FAMILY: dict[str, Any] = {"needs": ("p1.identity", "p1.triton"), "timeout_s": 180, "capability": "compressor"}


@check(
    "p4.compressor_frequencies", gate="hard", **_FAMILY,
    cases={
        "base_10000": {"theta": 1e4}, "base_500000": {"theta": 5e5}, "base_1000000": {"theta": 1e6},
        "bfloat16": {"compute_dtype": "bfloat16", "offset_max_length": 16384},
        "bfloat16_far": {"compute_dtype": "bfloat16", "offset_max_length": 65536},
    },
    claim="The compressor scores with the frequencies of the model at model_path, in float32, also if compute_dtype is "
    "bfloat16, as it is by default.",
    reason="With other frequencies every distance is wrong, and no number looks wrong. A frequency rounded to bfloat16 "
    "is off by up to 0.4 %, which is several turns at a distance of 10000 tokens.",
    tolerance=TOLERANCE + " With compute_dtype bfloat16, statistics that are rounded to it are right too.",
    remedy="Read the RoPE base from the model's configuration, do not catch errors of its rotary module, and keep "
    "inv_freq in float32.",
)  # fmt: skip
def test_frequencies(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure,
    choose: Callable[[str], None],
) -> None:  # fmt: skip
    import torch

    options = {name: value for name, value in case.items() if name != "theta"}
    if rounded := "compute_dtype" in options:
        options["compute_dtype"] = getattr(torch, options["compute_dtype"])
    length = FAR_LENGTH if rounded else _LENGTH
    caches = make_caches(tmp_path, seed, device, tokens=length, group=1, theta=case.get("theta", 1e6))
    judge = Judge(caches, options, measure, ROUNDED if rounded else (Reading(),))
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        kept = Compressor.of(subject, caches, **options).compress(keys, values, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=length)
    judge.tell(choose)


@check(
    "p4.compressor_groups", gate="hard", **_FAMILY, cases={"one": 1, "two": 2, "four": 4},
    claim="A KV head keeps a token by the best z-score that any query head of its group gives it.",
    reason="Averaged statistics describe a query that no head asks, and evict what one head alone needs.",
    tolerance=TOLERANCE,
    remedy="Score with the statistics of every query head, standardise each, and take the maximum over the group.",
)  # fmt: skip
def test_groups(case: int, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure) -> None:
    caches = make_caches(tmp_path, seed, device, tokens=_LENGTH, group=case)
    judge = Judge(caches, {}, measure)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        kept = Compressor.of(subject, caches).compress(keys, values, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=_LENGTH)


@check(
    "p4.compressor_rows", gate="hard", **_FAMILY,
    cases={"default": {}, "per_layer": {"pruning_mode": "per_layer"}, "raw": {"sparse_normalize_scores": False}},
    claim="Each row of a batch keeps the oracle's tokens of that row.",
    reason="Rows that share a keep set, or z-scores, evict by another text's scores.",
    tolerance=TOLERANCE,
    remedy="Rank every row by itself, or refuse a batch with ValueError.",
)  # fmt: skip
def test_rows(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure,
    choose: Callable[[str], None],
) -> None:  # fmt: skip
    caches = make_caches(tmp_path, seed, device, tokens=_LENGTH, rows=2)
    judge = Judge(caches, case, measure, PER_LAYER if case.get("pruning_mode") == "per_layer" else (Reading(),))
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        kept = Compressor.of(subject, caches, **case).compress(keys, values, layer_idx=layer)
        judge.round(kept, layer, keys=keys, t=_LENGTH)
    judge.tell(choose)


@check(
    "p4.compressor_views", gate="hard", **_FAMILY,
    cases={
        "transposed": {"strides": "transposed"}, "sliced": {"strides": "sliced"},
        "bfloat16": {"dtype": "bfloat16"}, "float16": {"dtype": "float16"},
    },
    claim="The keep set is the oracle's, and kept keys and values are bitwise those given, for caches that are views "
    "of a larger buffer and for 16-bit caches.",
    reason="Engines hand out views of preallocated 16-bit buffers, not contiguous float32 tensors.",
    tolerance=TOLERANCE,
    remedy="Pass the strides of the cache on to the kernel, and score 16-bit keys in float32.",
)  # fmt: skip
def test_views(
    case: dict[str, str], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    import torch

    caches = make_caches(tmp_path, seed, device, tokens=_LENGTH, group=1)
    dtype, strides = getattr(torch, case.get("dtype", "float32")), case.get("strides", "contiguous")
    judge = Judge(caches, {}, measure)
    for layer in range(len(caches.keys)):
        keys, values = (restride(x[layer].to(dtype), strides) for x in (caches.keys, caches.values))
        kept = Compressor.of(subject, caches).compress(keys, values, layer_idx=layer)
        assert not kept.call.changed, f"it wrote to {', '.join(kept.call.changed)}"
        judge.round(kept, layer, keys=keys, t=_LENGTH)
        where = kept.indices[..., None].expand(-1, -1, -1, keys.shape[-1])
        for what, given, held in (("keys", keys, kept.keys), ("values", values, kept.values)):
            measure(f"{what} that do not match the indices", int((given.gather(2, where) != held).sum()), 0)


@check(
    "p4.compressor_trigger", gate="hard", **_FAMILY,
    cases={
        "plain": {}, "window": {"window_size": _WINDOW}, "prompt": {"protect_prefill": True},
        "prompt_on_top": {"protect_prefill": True, "include_prefill_in_budget": False},
    },
    claim="In a cache that grows by single tokens, the first round comes when it is divide_length tokens longer than "
    "what the round keeps.",
    reason="A trigger that leaves out the prompt while the budget counts it lets the cache outgrow its bound, and then "
    "evicts more at once than was asked for.",
    tolerance="Exact counts.",
    remedy="Use one length in the trigger and in the budget: with the prompt if include_prefill_in_budget is set.",
)  # fmt: skip
def test_trigger(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    on_top = _PROMPT if not case.get("include_prefill_in_budget", True) else 0
    keeps, last = BUDGET + on_top, _PROMPT + BUDGET + 2 * DIVIDE
    due = keeps + DIVIDE
    caches = make_caches(tmp_path, seed, device, tokens=last)
    compressor = Compressor.of(subject, caches, **case)
    for length in range(_PROMPT, last + 1):
        kept = compressor.compress(*caches.first(1, length), layer_idx=1)
        if kept.count != length:
            break
    else:
        raise AssertionError(f"no round happened in a cache of up to {last} tokens, expected one at {due}")
    late = length == due + _PROMPT and "protect_prefill" in case
    cause = f": the trigger leaves out the prompt of {_PROMPT}" if late else ""
    cause += ", the budget counts it" if late and kept.count == BUDGET else ""
    measure(
        "tokens by which the first round is early or late", abs(length - due), 0, where=f"{length} tokens{cause}",
        cause=UNEVEN if late else "",
    )  # fmt: skip
    kept.must_count(keeps, "the first round", "layer 1", UNEVEN if "protect_prefill" in case else "")


@check(
    "p4.compressor_prompt", gate="hard", **_FAMILY,
    cases={
        "shorter": {"prompt": _PROMPT, "protect_prefill": True},
        "longer": {"prompt": 60, "protect_prefill": True, "window_size": _WINDOW},
        "longer_unprotected": {"prompt": 100, "protect_prefill": False},
    },
    claim="At a length that is due by any count, a protected prompt is kept whole, alone if it exceeds the budget, and "
    "an unprotected one that exceeds the budget is compressed to the budget.",
    reason="A question that loses tokens cannot be answered; a prompt that is never compressed has no budget.",
    tolerance="Exact for protected tokens; the oracle's set for the others (verify/judge/keep_set.py).",
    remedy="Rank protected tokens first, and evict down to the larger of the budget and the protected tokens.",
)  # fmt: skip
def test_prompt(
    case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure
) -> None:
    options = {name: value for name, value in case.items() if name != "prompt"}
    prompt, window = case["prompt"], case.get("window_size", 0)
    protected = prompt if case["protect_prefill"] else 0
    length = prompt + BUDGET + DIVIDE if protected else prompt
    caches = make_caches(tmp_path, seed, device, tokens=length, group=1)
    judge = Judge(caches, options, measure)
    for layer, (keys, values) in enumerate(zip(caches.keys, caches.values, strict=True)):
        compressor = Compressor.of(subject, caches, **options)
        if protected:
            compressor.compress(*caches.first(layer, prompt), layer_idx=layer).must_count(prompt, "the prompt's call")
        kept = compressor.compress(keys, values, layer_idx=layer)
        expected = max(BUDGET, protected + window)
        judge.round(kept, layer, keys=keys, t=length, expected=expected, prompt=protected, window=window)


@check(
    "p4.compressor_ties", gate="hard", **_FAMILY,
    cases={
        "repeated": {}, "doubled": {"scale": 2.0}, "sliced": {"strides": "sliced"},
        "pytorch": {"options": {"use_triton_scoring": False}}, "no_table": {"options": {"use_trig_cache": False}},
    },
    claim="Which of many equal keys are kept does not depend on the call, on the scale of all keys, on strides, "
    "or on the path that scores them.",
    reason="Otherwise the same text keeps other tokens on another page, and nothing can be replayed.",
    tolerance="Exact; tied keys are bitwise identical.",
    remedy="Break ties by the index of the token, in one place, after scoring.",
)  # fmt: skip
def test_ties(case: dict[str, Any], subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure) -> None:
    caches = tied(make_caches(tmp_path, seed, device, tokens=96))
    keys, values = caches.keys[0], caches.values[0]
    usual = Compressor.of(subject, caches).compress(keys, values)
    usual.must_count(BUDGET, "round 1", "layer 0")
    again = restride(case.get("scale", 1.0) * keys, case.get("strides", "contiguous"))
    other = Compressor.of(subject, caches, **case.get("options", {})).compress(again, values)
    other.must_count(BUDGET, "round 1 of the second call", "layer 0")
    for head, (one, two) in enumerate(zip(usual.mask(0), other.mask(0), strict=True)):
        cut(one, head)
        differ = one != two
        where = f"KV head {head}" + (f", tokens {differ.nonzero()[0][:8].tolist()}" if differ.any() else "")
        measure("tokens that one of the two calls keeps", int(differ.sum()), 0, where=where)


@check(
    "p4.compressor_tie_rule", gate="soft", **_FAMILY, cases="lowest_first",
    claim="Of equal keys the compressor keeps those with the lowest indices.",
    reason="It is a rule that any implementation can follow. The published compressor promises none, so this is SOFT.",
    tolerance="Exact; tied keys are bitwise identical.",
    remedy="Sort by score with a stable sort.",
)  # fmt: skip
def test_tie_rule(case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure) -> None:
    caches = tied(make_caches(tmp_path, seed, device, tokens=96))
    kept = Compressor.of(subject, caches).compress(caches.keys[0], caches.values[0])
    kept.must_count(BUDGET, "round 1", "layer 0")
    lowest_first(kept, measure)
