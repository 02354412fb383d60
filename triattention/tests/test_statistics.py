"""Statistics: calibration against a direct computation, both file layouts, and every way a file can be wrong."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from triattention import statistics
from triattention.calibration import calibrate
from triattention.errors import TriAttentionError
from triattention.methods.pruning_utils import (
    HeadFrequencyStats,
    load_head_frequency_stats,
    save_head_frequency_stats,
)
from triattention.tests import tiny


def _rotated_queries(model: Any, run: Callable[[Any], None], monkeypatch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What the model's own code hands to its rotation, per layer ``[B, heads, T, D]`` of each step, in float64."""
    module = sys.modules[type(model.model.layers[0].self_attn).__module__]
    rotate, caught = module.apply_rotary_pos_emb, []

    def noting(q: torch.Tensor, k: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        caught.append(q.double())
        return rotate(q, k, *args, **kwargs)

    with monkeypatch.context() as patched, torch.no_grad():
        patched.setattr(module, "apply_rotary_pos_emb", noting)
        run(model)
    layers = model.config.num_hidden_layers
    return [torch.cat(caught[layer::layers], dim=2) for layer in range(layers)]


@pytest.mark.parametrize("kind", sorted(tiny.CONFIGS))
def test_calibration_agrees_with_a_direct_computation(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.make(kind)
    if kind == "qwen3":  # an extreme q_norm: statistics of the projection alone would be far off
        for layer in model.model.layers:
            layer.self_attn.q_norm.weight.data.mul_(torch.linspace(0.1, 9, 16))
    ids = tiny.tokens(200)

    def two_batches(m: Any) -> None:
        m(ids[:, :70])
        m(ids[:, 70:])

    got = calibrate(model, two_batches)
    assert got.token_count == 200
    style, rotary_dim = got.architecture.rope_style, got.architecture.rotary_dim
    for layer, queries in enumerate(_rotated_queries(model, two_batches, monkeypatch)):
        rotated = queries[0, ..., :rotary_dim]
        half = rotary_dim // 2
        re, im = (
            (rotated[..., :half], rotated[..., half:]) if style == "half" else (rotated[..., ::2], rotated[..., 1::2])
        )
        for name, want in (
            ("q_mean_real", re.mean(1)),
            ("q_mean_imag", im.mean(1)),
            ("q_abs_mean", torch.complex(re, im).abs().mean(1)),
            ("q_pass_mean", queries[0, ..., rotary_dim:].mean(1)),
        ):
            torch.testing.assert_close(getattr(got, name)[layer].double(), want, rtol=1e-6, atol=0)
    assert ((got.concentration() > 0) & (got.concentration() <= 1)).all()


def test_padding_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows = tiny.make("qwen3"), (tiny.tokens(50), tiny.tokens(30, seed=2))
    ids = torch.cat([rows[0], torch.nn.functional.pad(rows[1], (20, 0))])
    together = calibrate(model, lambda m: m(ids, attention_mask=(ids != 0).long()))
    apart = calibrate(model, lambda m: [m(row) for row in rows])
    assert together.token_count == apart.token_count == 80
    for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
        torch.testing.assert_close(getattr(together, name), getattr(apart, name), rtol=1e-4, atol=1e-5)
    with pytest.raises(TriAttentionError, match="does not identify padding"):
        calibrate(model, lambda m: m(ids, attention_mask=torch.zeros(2, 1, 50, 50)))


def test_calibration_restores_the_model_also_on_error() -> None:
    model = tiny.make()

    def broken(m: Any) -> None:
        m(tiny.tokens(5))
        raise KeyError("text")

    with pytest.raises(KeyError):
        calibrate(model, broken)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    with pytest.raises(TriAttentionError, match="ran no tokens"):
        calibrate(model, lambda m: None)


def test_our_layout_round_trips(tmp_path: Path) -> None:
    model = tiny.make()
    made = calibrate(model, lambda m: m(tiny.tokens(100)))
    statistics.save(tmp_path / "a" / "stats.pt", made)
    loaded = statistics.load(tmp_path / "a" / "stats.pt")
    assert torch.equal(loaded.q_mean_imag, made.q_mean_imag)
    assert torch.equal(loaded.architecture.omega, made.architecture.omega)
    loaded.check_model(model)
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["stats.pt"]


def test_the_published_layout_of_a_large_model_loads_as_fast_as_its_file_is_read(tmp_path: Path) -> None:
    m = torch.randn(64, dtype=torch.complex64)
    by_head = {(layer, head): HeadFrequencyStats(m, m.abs() + 1) for layer in range(36) for head in range(32)}
    path = tmp_path / "published.pt"
    save_head_frequency_stats(path, list(by_head), by_head, {"head_dim": 128, "rope_style": "half"})
    began = time.perf_counter()
    torch.load(path, weights_only=True)
    bare_s = time.perf_counter() - began
    began = time.perf_counter()
    metadata, loaded = load_head_frequency_stats(path, "cpu")
    assert time.perf_counter() - began < 4 * bare_s, "loading waits for something"
    assert metadata["head_dim"] == 128
    assert torch.equal(loaded[35, 31].q_mean_complex, m)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return tiny.calibrated(tiny.make(), tmp_path / "stats.pt")


def _rewrite(path: Path, change: Any) -> None:
    payload = torch.load(path, weights_only=True)
    change(payload)
    torch.save(payload, path)


def test_a_truncated_file_is_refused_with_its_size(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes()[:500])
    with pytest.raises(TriAttentionError, match=r"stats.pt \(500 bytes\) cannot be read"):
        statistics.load(saved)


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04"])
def test_something_else_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(TriAttentionError, match="cannot be read"):
        statistics.load(tmp_path / "x.pt")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda p: p.update(format_version=9), "format_version 9, but this release reads 2"),
        (lambda p: p.update(capture_point="after RoPE"), "capture_point 'after RoPE'"),
        (lambda p: p.update(token_count="many"), "not a statistics file"),
        (lambda p: p["architecture"].update(omega=[1.0]), "not a statistics file"),
        (lambda p: p["architecture"]["omega"].mul_(float("nan")), "not a statistics file"),
        (lambda p: p.pop("q_abs_mean"), "q_abs_mean"),
        (lambda p: p["q_mean_real"].__setitem__((1, 2, 3), float("nan")), "q_mean_real holds NaN"),
        (lambda p: p["q_abs_mean"].mul_(0.1), r"exceeds E\|q\| at layer 0, head 0"),
        (lambda p: p.pop("format"), "not a statistics file"),
        (lambda p: p["architecture"].pop("omega"), "not a statistics file"),
    ],
)
def test_a_damaged_file_is_refused(saved: Path, change: Any, words: str) -> None:
    _rewrite(saved, change)
    with pytest.raises(TriAttentionError, match=words):
        statistics.load(saved)


def test_a_gap_in_a_published_file_is_an_error(tmp_path: Path) -> None:
    m = torch.randn(8, dtype=torch.complex64)
    by_head = {(layer, head): HeadFrequencyStats(m, m.abs()) for layer in range(2) for head in range(4)}
    save_head_frequency_stats(tmp_path / "p.pt", list(by_head), by_head, {})
    _rewrite(tmp_path / "p.pt", lambda p: p["stats"].pop("layer01_head02"))
    with pytest.raises(TriAttentionError, match="lacks layer 1, head 2"):
        statistics.load(tmp_path / "p.pt")
    with pytest.raises(TriAttentionError, match="layer 5, head 0 is sampled but has no statistics"):
        save_head_frequency_stats(tmp_path / "q.pt", [(5, 0)], by_head, {})
    assert not (tmp_path / "q.pt").exists()


def test_some_published_heads_load_as_they_are_but_cannot_serve_a_model(tmp_path: Path) -> None:
    m = torch.randn(8, dtype=torch.complex64)
    by_head = {key: HeadFrequencyStats(m, m.abs()) for key in ((0, 0), (2, 3))}
    save_head_frequency_stats(tmp_path / "p.pt", list(by_head), by_head, {})
    _, loaded = load_head_frequency_stats(tmp_path / "p.pt", "cpu")
    assert sorted(loaded) == [(0, 0), (2, 3)]
    with pytest.raises(TriAttentionError, match="lacks layer 0, head 1"):
        statistics.load(tmp_path / "p.pt")


@pytest.mark.parametrize("heads", [[["a", "b"]], [[0, 0, 0]], [[-1, -1]], "all"])
def test_malformed_published_files_are_refused(tmp_path: Path, heads: Any) -> None:
    m = torch.randn(8, dtype=torch.complex64)
    by_head = {(layer, head): HeadFrequencyStats(m, m.abs()) for layer in range(2) for head in range(4)}
    save_head_frequency_stats(tmp_path / "p.pt", list(by_head), by_head, {})
    _rewrite(tmp_path / "p.pt", lambda p: p["metadata"].update(sampled_heads=heads))
    with pytest.raises(TriAttentionError, match=r"not a statistics file|lacks layer"):
        statistics.load(tmp_path / "p.pt")


def test_declared_metadata_is_compared_with_the_model(tmp_path: Path) -> None:
    m = torch.randn(8, dtype=torch.complex64)
    by_head = {(layer, head): HeadFrequencyStats(m, m.abs()) for layer in range(3) for head in range(4)}
    save_head_frequency_stats(tmp_path / "p.pt", list(by_head), by_head, {"rope_style": "interleaved"})
    with pytest.raises(TriAttentionError, match=r"declares rope_style 'interleaved', but the model .* has 'half'"):
        statistics.load(tmp_path / "p.pt").check_model(tiny.make())


def test_a_finetuned_configuration_is_refused(saved: Path) -> None:
    with pytest.raises(
        TriAttentionError, match=r"is of llama \(configuration .* and the model is llama \(configuration"
    ):
        statistics.load(saved).check_model(tiny.make(vocab_size=300))
