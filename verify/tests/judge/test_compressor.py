"""The caches for the compressor's checks tell its options and known mistakes apart, whatever the seed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from phases.p4_compressor import FAR_LENGTH
from phases.p4_keep_sets import _CHANGING, _NEUTRAL
from verify.judge.compressed import PER_LAYER, ROUNDED, Judge, Reading
from verify.judge.compressing import Kept
from verify.judge.compressor import BUDGET, Caches, as_bfloat16, frequencies, make_caches
from verify.judge.keep_set import Selection

_LENGTH = 97


def _selection(caches: Caches, options: dict[str, Any], layer: int = 0, **departs: Any) -> Selection:
    """The scores of everything that is cached."""
    keys = caches.keys[layer]
    usual = {"t": keys.shape[2], "evictable": np.ones(keys.shape[2], dtype=bool), "options": options}
    return caches.selection(layer, 0, keys, **usual | departs)


def _best(selection: Selection) -> np.ndarray:
    kept = np.zeros(selection.scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-selection.scores, axis=-1)[:, :BUDGET], True, axis=-1)
    return kept


@pytest.mark.parametrize("name", [*_CHANGING, *_NEUTRAL])
def test_an_option_changes_the_oracles_keep_set_or_is_known_not_to(name: str, tmp_path: Path) -> None:
    for seed in range(5):
        caches = make_caches(tmp_path, seed, "cpu", tokens=_LENGTH)
        usual, other = (_selection(caches, options) for options in ({}, (_CHANGING | _NEUTRAL)[name]))
        # what the first KV head keeps by the usual options, judged by the first set of the others
        kept = _best(usual)[:1]
        wrong = Selection(other.scores[:1], other.error).inversion(kept, np.ones(_LENGTH, dtype=bool))
        assert (wrong > 2 * other.allowed) == (name in _CHANGING), f"seed {seed}: {wrong} over {other.allowed}"


def _kept(caches: Caches, by_head: np.ndarray, layer: int = 0) -> Kept:
    import torch

    indices = torch.from_numpy(np.stack([np.flatnonzero(head) for head in by_head]))[None]
    keys = caches.keys[layer]
    held = keys.gather(2, indices[..., None].expand(-1, -1, -1, keys.shape[3]))
    return Kept(held, held, indices, keys.shape[2], SimpleNamespace())  # type: ignore[arg-type]


def _measure(name: str, measured: float, allowed: float, *, unit: str = "", where: str = "", cause: str = "") -> None:
    assert measured <= allowed, where


_BFLOAT16 = {"omega": as_bfloat16(frequencies(1e6)), "rounded": True}
_MISTAKES: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "base": ({}, {"omega": frequencies(1e4)}, "RoPE base 10000 is used, not the model's own"),
    "bfloat16": ({"offset_max_length": 16384}, _BFLOAT16, r"omega is rounded to bf16 \(relative error 0.4%\)"),
    "bfloat16_far": ({"offset_max_length": 65536}, _BFLOAT16, "omega is rounded to bf16"),
    "averaged": ({}, {"averaged": True}, "statistics of a group's query heads are averaged"),
    "position": ({}, {"t": 0}, "the position of the next token is 0 instead of 97"),
    "ignored": ({"disable_mlr": True}, {"options": {}}, "disable_mlr=True is ignored"),
    "both": ({"disable_mlr": True}, {"options": {}, "averaged": True}, "averaged .* and disable_mlr=True is ignored"),
}


@pytest.mark.parametrize("name", _MISTAKES)
def test_a_mistake_is_judged_wrong_and_named(name: str, tmp_path: Path) -> None:
    options, departs, told = _MISTAKES[name]
    far = name.startswith("bfloat16")
    length, group, readings = (FAR_LENGTH, 1, ROUNDED) if far else (_LENGTH, 2, (Reading(),))
    for seed in range(6):
        caches = make_caches(tmp_path, seed, "cpu", tokens=length, group=group)
        judge = Judge(caches, options, _measure, readings)

        def check(caches: Caches = caches, judge: Judge = judge) -> None:
            for layer, keys in enumerate(caches.keys):
                wrong = _best(_selection(caches, **{"options": options, "layer": layer} | departs))
                judge.round(_kept(caches, wrong, layer), layer, keys=keys, t=length)

        with pytest.raises(AssertionError, match=f"cause: .*{told}"):
            check()


def test_one_reading_must_hold_for_every_round(tmp_path: Path) -> None:
    caches, options = make_caches(tmp_path, 3, "cpu", tokens=_LENGTH), {"pruning_mode": "per_layer"}
    by_max, by_mean = (
        _kept(caches, np.repeat(_best(_selection(caches, options, mean_heads=mean)), 2, 0)) for mean in (False, True)
    )
    chosen: list[str] = []
    judge = Judge(caches, options, _measure, PER_LAYER)
    judge.round(by_mean, 0, keys=caches.keys[0], t=_LENGTH)
    judge.round(by_mean, 0, keys=caches.keys[0], t=_LENGTH)
    judge.tell(chosen.append)
    assert chosen == ["per_layer takes the mean of the KV heads' scores"]
    with pytest.raises(AssertionError, match="round 1, layer 0, row 0, set 0: token"):
        judge.round(by_max, 0, keys=caches.keys[0], t=_LENGTH)


def test_a_round_that_does_not_happen_and_a_lost_protected_token_are_told(tmp_path: Path) -> None:
    caches = make_caches(tmp_path, 0, "cpu", tokens=_LENGTH)
    judge = Judge(caches, {}, _measure, (Reading(),))
    everything = np.ones((2, _LENGTH), dtype=bool)
    with pytest.raises(AssertionError, match="round 2 kept 97 tokens, expected 48, layer 0: no round happened"):
        judge.round(_kept(caches, everything), 0, keys=caches.keys[0], t=_LENGTH, number=2)
    newest = np.repeat(np.arange(_LENGTH)[None] >= _LENGTH - BUDGET, 2, 0)
    with pytest.raises(AssertionError, match=r"4 of 4 protected tokens were evicted .* KV head 0: \[0, 1, 2, 3\]"):
        judge.round(_kept(caches, newest), 0, keys=caches.keys[0], t=_LENGTH, prompt=4)
