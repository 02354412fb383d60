"""The Model-Optimizer-shaped calls do what the patch does with a statistics file."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from triattention.errors import TriAttentionError
from triattention.methods.triattention import apply_triattention_patch, remove_triattention_patch
from triattention.sparsity import TriAttentionConfig, calibrate, sparsify
from triattention.tests import tiny


def test_sparsify_is_the_patch_with_the_recommended_setting(tmp_path: Path) -> None:
    model, ids = tiny.make("qwen3"), tiny.tokens(40)
    stats = tiny.calibrated(model, tmp_path / "stats.pt")
    apply_triattention_patch(model, stats_path=stats, model_path=None, **tiny.RECOMMENDED)
    want = tiny.generate(model, ids)
    remove_triattention_patch(model)
    assert calibrate(model, lambda m: m(tiny.tokens(300))) is model
    assert sparsify(model, TriAttentionConfig(budget=48, prune_interval=16, window_size=8)) is model
    assert torch.equal(tiny.generate(model, ids), want)
    assert model.triattention.rounds > 3
    remove_triattention_patch(model)


def test_a_model_has_to_be_calibrated_first() -> None:
    with pytest.raises(TriAttentionError, match="not calibrated; call calibrate"):
        sparsify(tiny.make(), TriAttentionConfig())


def test_a_compressing_model_cannot_be_calibrated() -> None:
    model = calibrate(tiny.make(), lambda m: m(tiny.tokens(100)))
    sparsify(model, TriAttentionConfig(budget=48))
    with pytest.raises(TriAttentionError, match="call remove_triattention_patch"):
        calibrate(model, lambda m: m(tiny.tokens(100)))
