"""The published helpers and the compressor; and the plan's own code blocks, run as they are written."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from triattention.errors import TriAttentionError
from triattention.methods.pruning_utils import (
    build_geometric_offsets,
    build_rotary,
    compute_frequency_scaling,
    compute_frequency_statistics_from_means,
    invert_rope,
    rotate_half,
    score_keys_for_round,
)
from triattention.scoring import score_torch
from triattention.tests import tiny
from triattention.trig import fold, phases
from triattention.vllm.core.compressor import TriAttentionCompressor
from triattention.vllm.core.config import TriAttentionConfig

_BLOCKS = Path(__file__).parent / "plan_blocks"


@pytest.mark.parametrize("block", sorted(path.stem for path in _BLOCKS.glob("*.py")))
def test_plan_block_runs(block: str, tmp_path: Path) -> None:
    """On a CUDA machine to the letter; elsewhere "cuda" reads "cpu", without the synchronisation and the
    repetitions of 6.1.
    """
    text = (_BLOCKS / f"{block}.py").read_text("utf-8")
    environment = dict(os.environ)
    if not torch.cuda.is_available():
        text = text.replace('"cuda"', '"cpu"').replace("torch.cuda.synchronize()", "").replace("range(3)", "range(0)")
        text = re.sub(r"range\(100\)", "range(1)", text)
        environment["TRITON_INTERPRET"] = "1"
    program = tmp_path / "block.py"  # a file and not -c, because Triton reads a kernel's source from its file
    program.write_text(text, "utf-8")
    child = subprocess.run(
        [sys.executable, str(program)],
        capture_output=True, text=True, timeout=300, env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert child.returncode == 0, child.stderr[-2000:]
    assert re.search("PASSED|ms/call", child.stdout), child.stdout


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_the_pre_rope_form_gives_the_cached_scores(style: str, aggregation: str) -> None:
    """score_keys_for_round takes unrotated keys and positions, and s^2; the cached form takes rotated keys and s."""
    torch.manual_seed(0)
    freq, n, t, s = 8, 30, 500, 1.3
    omega, offsets = torch.rand(freq, dtype=torch.float64), build_geometric_offsets(64, "cpu")
    angle = torch.arange(n)[:, None] * omega
    layout = (lambda x: torch.cat([x, x], -1)) if style == "half" else (lambda x: x.repeat_interleave(2, -1))
    cos, sin = s * layout(angle.cos()), s * layout(angle.sin())
    k0 = torch.randn(n, 2 * freq, dtype=torch.float64)
    rotated = k0 * cos + rotate_half(k0, style=style) * sin
    torch.testing.assert_close(invert_rope(rotated, cos, sin, s, style=style), k0)
    m = torch.randn(freq, dtype=torch.complex128)
    a = m.abs() + 0.5
    amp, phi, extra = compute_frequency_statistics_from_means(m, a, k0, style=style)
    got = score_keys_for_round(
        torch.arange(n),
        t,
        amp,
        phi,
        omega,
        extra,
        offsets,
        aggregation,
        torch.full((freq,), s * s, dtype=torch.float64),
    )
    weight = torch.full((1, freq), s)
    weights = fold(m.real[None], m.imag[None], a[None], weight, *phases(t, offsets, omega), aggregation=aggregation)
    want = score_torch(rotated[None, None].float(), weights, style)[0, 0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    only_extra = score_keys_for_round(
        torch.arange(n), t, amp, phi, omega, extra, offsets, aggregation, torch.ones(freq), disable_trig=True
    )
    torch.testing.assert_close(only_extra, extra.sum(-1).float())


def test_build_rotary_is_the_models_own(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    model = tiny.make("qwen3", rope_parameters=yarn)
    model.config.save_pretrained(tmp_path)
    rotary = build_rotary("cpu", tmp_path, torch.bfloat16)
    assert torch.equal(rotary.inv_freq, model.model.rotary_emb.inv_freq)
    scaling = compute_frequency_scaling(rotary, 16, torch.float32, "cpu")
    torch.testing.assert_close(scaling, torch.full((8,), model.model.rotary_emb.attention_scaling**2))
    with pytest.raises(TriAttentionError, match="has no model configuration"):
        build_rotary("cpu", tmp_path / "nothing", torch.float32)


@pytest.fixture
def compressor(tmp_path: Path) -> TriAttentionCompressor:
    stats = tiny.calibrated(tiny.make(), tmp_path / "stats.pt")
    return TriAttentionCompressor(
        TriAttentionConfig(kv_budget=32, divide_length=16, window_size=4, stats_path=stats, use_triton_scoring=False)
    )


def test_the_compressor_waits_for_its_trigger_and_keeps_the_budget(compressor: TriAttentionCompressor) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 1, 2, 48, 16).unbind(0)
    same, _, everything = compressor.compress(keys[:, :, :47], values[:, :, :47], prefill_length=10)
    assert same.shape[2] == 47
    assert everything[0, 0].tolist() == list(range(47))
    kept_keys, kept_values, indices = compressor.compress(keys, values)
    assert kept_keys.shape == kept_values.shape == (1, 2, 32, 16)
    for head in range(2):
        row = indices[0, head].tolist()
        assert row == sorted(row)
        assert {*range(10), *range(44, 48)} <= set(row)
        assert torch.equal(kept_keys[0, head], keys[0, head, row])
        assert torch.equal(kept_values[0, head], values[0, head, row])
    assert compressor.get_state() == {0: {"evicted": 16, "rounds": 1, "prefill_length": 10}}
    compressor.reset()
    assert compressor.get_state() == {}


def test_compressor_state_is_per_layer(compressor: TriAttentionCompressor) -> None:
    keys, values = torch.randn(2, 1, 2, 48, 16).unbind(0)
    compressor.compress(keys, values, layer_idx=2, prefill_length=0)
    compressor.compress(keys[:, :, :20], values[:, :, :20], layer_idx=0)
    assert {layer: state["rounds"] for layer, state in compressor.get_state().items()} == {0: 0, 2: 1}
    with pytest.raises(TriAttentionError, match="has 3 layers, but layer 7"):
        compressor.compress(keys, values, layer_idx=7, prefill_length=0)


def test_nan_keys_are_refused_by_the_compressor(compressor: TriAttentionCompressor) -> None:
    keys, values = torch.randn(2, 1, 2, 48, 16).unbind(0)
    keys[0, 1, 5, 5] = torch.nan
    with pytest.raises(TriAttentionError, match="layer 1 has a NaN or Inf score"):
        compressor.compress(keys, values, layer_idx=1, prefill_length=0)
    assert compressor.get_state()[1]["rounds"] == 0


def test_the_first_call_is_the_prompt_and_a_due_one_must_say_how_long_it_was(
    compressor: TriAttentionCompressor,
) -> None:
    keys, values = torch.randn(2, 1, 2, 60, 16).unbind(0)
    with pytest.raises(TriAttentionError, match=r"first call has 60 tokens.*pass prefill_length"):
        compressor.compress(keys, values)
    compressor.reset()
    compressor.compress(keys[:, :, :40], values[:, :, :40])
    with pytest.warns(UserWarning, match="44 protected tokens .* exceed the budget of 32"):
        _, _, kept = compressor.compress(keys, values)
    assert kept[0, 1].tolist() == [*range(40), *range(56, 60)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 64}, "head_dim is 64, but 16 here"),
        ({"num_kv_heads": 7}, "num_kv_heads is 7, but 2 here"),
        ({"num_layers": 99}, "num_layers is 99, but 3 here"),
        ({"rope_style": "interleaved"}, "rope_style is 'interleaved', but that of .* is 'half'"),
    ],
)
def test_options_that_contradict_the_cache_are_refused(
    compressor: TriAttentionCompressor, options: dict, words: str
) -> None:
    config = TriAttentionConfig(**{**vars(compressor.config), **options})
    keys, values = torch.randn(2, 1, 2, 60, 16).unbind(0)
    with pytest.raises(TriAttentionError, match=words):
        TriAttentionCompressor(config).compress(keys, values, prefill_length=0)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": 0}, "KV budget is 0"),
        ({"kv_budget": 64, "window_size": 64}, "window is 64 and the KV budget 64"),
        ({"pruning_mode": "all"}, "pruning_mode is 'all'"),
        ({"disable_top_n_high_freq": 2}, "disable_top_n_high_freq is 2"),
        ({"rope_style": "neox"}, "rope_style is 'neox'"),
    ],
)
def test_config_refuses_what_it_cannot_honour(options: dict, words: str) -> None:
    with pytest.raises(TriAttentionError, match=words):
        TriAttentionConfig(**options)


def test_an_unset_window_follows_the_budget() -> None:
    assert [TriAttentionConfig(kv_budget=b).window_size for b in (1, 128, 2048)] == [0, 64, 128]


def test_to_dict_is_plain() -> None:
    import json

    assert json.loads(json.dumps(TriAttentionConfig().to_dict()))["topk_dtype"] == "torch.float32"
