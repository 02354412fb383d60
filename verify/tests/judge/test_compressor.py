"""The caches for the compressor's checks tell its options apart, whatever the seed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from phases.p4_keep_sets import _CHANGING, _NEUTRAL
from verify.judge.compressor import make_caches
from verify.judge.keep_set import Selection

_LENGTH, _BUDGET = 97, 48


@pytest.mark.parametrize("name", [*_CHANGING, *_NEUTRAL])
def test_an_option_changes_the_oracles_keep_set_or_is_known_not_to(name: str, tmp_path: Path) -> None:
    everything = np.ones(_LENGTH, dtype=bool)
    for seed in range(5):
        caches = make_caches(tmp_path, seed, "cpu", tokens=_LENGTH)
        usual, other = (
            caches.selection(0, 0, slice(0, _LENGTH), _LENGTH, everything, options)
            for options in ({}, (_CHANGING | _NEUTRAL)[name])
        )
        # what the first KV head keeps by the usual options, judged by the first set of the others
        kept = np.isin(np.arange(_LENGTH), np.argsort(-usual.scores[0])[:_BUDGET])[None]
        wrong = Selection(other.scores[:1], other.error).inversion(kept, everything)
        assert (wrong > 2 * other.allowed) == (name in _CHANGING), f"seed {seed}: {wrong} over {other.allowed}"
