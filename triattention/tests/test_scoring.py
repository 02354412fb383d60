"""Both scoring paths against the definition, evaluated the long way round."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from triattention import kernels
from triattention.errors import TriAttentionError
from triattention.scoring import score, score_torch
from triattention.trig import TrigTableCache, fold, geometric_offsets, phases
from triattention.vllm.core.config import TriAttentionConfig
from triattention.vllm.core.kernels.triton_scoring import create_trig_cache, triattention_scoring
from triattention.vllm.core.scoring import compute_scores, compute_scores_pytorch, compute_scores_triton

F, H, G, N, T = 8, 2, 3, 21, 777

#: The kernel runs on the GPU where there is one, and in the interpreter elsewhere.
DEVICE = "cuda" if torch.cuda.is_available() and not kernels.INTERPRETED else "cpu"


@pytest.fixture(autouse=True)
def _on_device() -> Iterator[None]:
    with torch.device(DEVICE):
        yield


def _statistics(heads: int = H * G, freq: int = F) -> dict[str, torch.Tensor]:
    return {
        "q_mean_real": torch.randn(heads, freq),
        "q_mean_imag": torch.randn(heads, freq),
        "q_abs_mean": torch.rand(heads, freq) + 2,
        "freq_scale_sq": torch.rand(heads, freq) + 0.5,
    }


def _by_definition(keys, q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, omega, offsets, t, aggregation):
    """S(k; t) head by head and offset by offset, complex float64."""
    k = torch.complex(keys[..., : keys.shape[-1] // 2].double(), keys[..., keys.shape[-1] // 2 :].double())
    m = torch.complex(q_mean_real.double(), q_mean_imag.double())
    out = []
    for head in range(m.shape[0]):
        kh = k[:, head // (m.shape[0] // k.shape[1])]
        c = m[head] * kh.conj()
        per_offset = []
        for o in offsets.tolist():
            turn = torch.polar(torch.ones(len(omega), dtype=torch.float64), (t + o) * omega.double())
            per_offset.append((freq_scale_sq[head].double() * (c * turn).real).sum(-1))
        stacked = torch.stack(per_offset)
        trig = stacked.mean(0) if aggregation == "mean" else stacked.amax(0)
        out.append(trig + (freq_scale_sq[head] * (q_abs_mean[head] - m[head].abs()) * kh.abs()).sum(-1))
    return torch.stack(out, 1)


@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("path", ["triton", "pytorch"])
def test_path_equals_the_definition(aggregation: str, path: str) -> None:
    torch.manual_seed(0)
    keys, stats, omega, offsets = torch.randn(2, H, N, 2 * F), _statistics(), torch.rand(F), geometric_offsets(64)
    cos, sin = phases(T, offsets, omega)
    weights = fold(*stats.values(), cos, sin, aggregation=aggregation)
    got = score(keys, weights, "half", use_triton=path == "triton")
    want = _by_definition(keys, *stats.values(), omega, offsets, T, aggregation)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=2e-5)


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("aggregation", ["mean", "max"])
@pytest.mark.parametrize("unrotated", [1, 5, 16])
def test_the_unrotated_dims_add_their_product(style: str, aggregation: str, unrotated: int) -> None:
    torch.manual_seed(0)
    whole, stats, omega, offsets = (
        torch.randn(2, H, N, 2 * F + unrotated),
        _statistics(),
        torch.rand(F),
        geometric_offsets(64),
    )
    keys = torch.cat([torch.randn(2, H, N, 3), whole], -1)[..., 3:]  # strided as a slice of something larger
    q_pass = torch.randn(H * G, unrotated)
    content = torch.einsum("bhnp,hgp->bhgn", whole[..., 2 * F :].double(), q_pass.view(H, G, -1).double()).flatten(1, 2)
    rotated = (whole[..., : 2 * F].contiguous(), None, *stats.values(), omega, offsets, T, aggregation)
    want = triattention_scoring(*rotated, rope_style=style).double() + content
    got = triattention_scoring(keys, *rotated[1:], rope_style=style, q_pass=q_pass)
    torch.testing.assert_close(got.double(), want, rtol=0, atol=5e-5)
    m = torch.stack([stats["q_mean_real"], stats["q_mean_imag"]], -1)
    head_stats = {"q_mean_complex": m, "q_abs_mean": stats["q_abs_mean"], "q_pass_mean": q_pass}
    config = TriAttentionConfig(kv_budget=64, use_triton_scoring=False, rope_style=style, score_aggregation=aggregation)
    engine = compute_scores(keys, None, head_stats, omega, offsets, stats["freq_scale_sq"], config, T)
    torch.testing.assert_close(engine.double(), want, rtol=0, atol=5e-5)


def test_without_the_trig_term_there_is_no_content_term_either() -> None:
    torch.manual_seed(0)
    keys, stats, omega, offsets = torch.randn(1, H, N, 2 * F + 4), _statistics(), torch.rand(F), geometric_offsets(64)
    common = {"rope_style": "half", "disable_trig": True}
    rest = (None, *stats.values(), omega, offsets, T, "mean")
    got = triattention_scoring(keys, *rest, **common, q_pass=torch.randn(H * G, 4))
    assert torch.equal(got, triattention_scoring(keys[..., : 2 * F].contiguous(), *rest, **common))


def test_zero_statistics_score_exactly_zero() -> None:
    zeros = torch.zeros(H, F)
    weights = fold(zeros, zeros, zeros, zeros + 1, *phases(T, geometric_offsets(64), torch.rand(F)), aggregation="mean")
    keys = torch.randn(1, H, N, 2 * F)
    assert not score_torch(keys, weights, "half").any()
    assert not kernels.score_triton(keys, weights, "half").any()


def test_a_nan_key_gets_a_nan_score_and_touches_no_other() -> None:
    torch.manual_seed(0)
    keys, stats, omega, offsets = torch.randn(1, H, N, 2 * F), _statistics(H), torch.rand(F), geometric_offsets(64)
    clean = triattention_scoring(keys, None, *stats.values(), omega, offsets, T, "mean", rope_style="half")
    for aggregation in ("mean", "max"):
        keys[0, 0, 3, 5] = torch.nan
        scores = triattention_scoring(keys, None, *stats.values(), omega, offsets, T, aggregation, rope_style="half")
        assert scores.isnan().nonzero().tolist() == [[0, 0, 3]]
    keys[0, 0, 3, 5] = 0
    again = triattention_scoring(keys, None, *stats.values(), omega, offsets, T, "mean", rope_style="half")
    untouched = torch.arange(N) != 3
    assert torch.equal(clean[0, 0, untouched], again[0, 0, untouched])


@pytest.mark.parametrize("tokens", [0, 1])
def test_few_tokens(tokens: int) -> None:
    keys, stats = torch.randn(1, H, tokens, 2 * F), _statistics(H)
    scores = triattention_scoring(
        keys, None, *stats.values(), torch.rand(F), geometric_offsets(4), 5, rope_style="half"
    )
    assert scores.shape == (1, H, tokens)


def test_trig_values_win_over_the_table() -> None:
    torch.manual_seed(0)
    keys, stats, omega, offsets = torch.randn(1, H, N, 2 * F), _statistics(H), torch.rand(F), geometric_offsets(64)
    table = create_trig_cache(1024, 128, offsets, omega, DEVICE)
    explicit = phases(300, offsets, omega)
    args = (keys, None, *stats.values(), omega, offsets, 256, "mean")
    want = triattention_scoring(keys, None, *stats.values(), omega, offsets, 300, "mean", rope_style="half")
    got = triattention_scoring(*args, trig_cache=table, trig_values=explicit, rope_style="half")
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)


def test_the_engine_path_passes_the_end_of_its_table() -> None:
    torch.manual_seed(0)
    keys, omega, offsets = torch.randn(1, H, N, 2 * F), torch.rand(F), geometric_offsets(64)
    stats = {"q_mean_complex": torch.randn(H, F, 2), "q_abs_mean": torch.rand(H, F) + 2}
    table = TrigTableCache(256, 128, offsets, omega, DEVICE)
    config = TriAttentionConfig(kv_budget=64, use_triton_scoring=False)
    args = (keys, None, stats, omega, offsets, torch.ones(H, F), config)
    torch.testing.assert_close(compute_scores(*args, 999, table), compute_scores(*args, 999), rtol=0, atol=0)


def test_a_table_of_another_omega_is_refused() -> None:
    keys, omega, offsets = torch.randn(1, H, N, 2 * F), torch.rand(F), geometric_offsets(64)
    other = TrigTableCache(1024, 128, offsets, omega * 7, DEVICE)
    with pytest.raises(TriAttentionError, match="different offsets or omega"):
        triattention_scoring(keys, None, *_statistics(H).values(), omega, offsets, 128, trig_cache=other)
    fewer = TrigTableCache(1024, 128, offsets[:3], omega, DEVICE)
    with pytest.raises(TriAttentionError, match="3 offsets and 8 frequencies, the call 7 and 8"):
        triattention_scoring(keys, None, *_statistics(H).values(), omega, offsets, 128, trig_cache=fewer)


def test_transposed_statistics_score_alike() -> None:
    torch.manual_seed(0)
    keys, stats = torch.randn(1, H, N, 2 * F), _statistics()
    rest = (torch.rand(F), geometric_offsets(64), T, "max")
    strided = [x.T.contiguous().T for x in stats.values()]
    cos_sin = phases(T, rest[1], rest[0])
    want = score_torch(keys, fold(*stats.values(), *cos_sin, aggregation="max"), "half")
    got = score_torch(keys, fold(*strided, *cos_sin, aggregation="max"), "half")
    assert torch.equal(got, want)


def test_round_start_defaults() -> None:
    torch.manual_seed(0)
    keys, omega, offsets = torch.randn(1, H, N, 2 * F), torch.rand(F), geometric_offsets(64)
    stats = {"q_mean_complex": torch.randn(H, F, 2)}
    config = TriAttentionConfig(kv_budget=64, use_triton_scoring=False)
    rest = (stats, omega, offsets, torch.ones(H, F), config)
    assert torch.equal(compute_scores_pytorch(keys, None, *rest), compute_scores_pytorch(keys, None, *rest, N - 1))
    positions = torch.arange(100, 100 + N)
    assert torch.equal(compute_scores_pytorch(keys, positions, *rest), compute_scores_pytorch(keys, None, *rest, 120))


def test_per_layer_is_the_mean_over_heads_in_topk_dtype() -> None:
    torch.manual_seed(0)
    keys, omega, offsets = torch.randn(2, H, N, 2 * F), torch.rand(F), geometric_offsets(64)
    stats = {"q_mean_complex": torch.randn(H, F, 2)}
    rest = (stats, omega, offsets, torch.ones(H, F))
    per_head = compute_scores_triton(keys, None, *rest, TriAttentionConfig(kv_budget=64), 9)
    config = TriAttentionConfig(kv_budget=64, pruning_mode="per_layer", topk_dtype=torch.float64)
    per_layer = compute_scores_triton(keys, None, *rest, config, 9)
    assert per_layer.dtype == torch.float64
    torch.testing.assert_close(per_layer, per_head.mean(1).double())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"q_pass": torch.zeros(2, 3)}, "head dim 16, omega 8 frequencies and q_pass 3 unrotated dims"),
        ({"K_rot": torch.zeros(1, 2, 4, 6)}, "head dim 6, omega 8 frequencies and q_pass 0"),
        ({"K_rot": torch.zeros(1, 2, 4, 16, dtype=torch.float64)}, "float64"),
        ({"K_rot": torch.zeros(2, 4, 16)}, r"shape \(2, 4, 16\)"),
        ({"q_abs_mean": torch.zeros(2, 7)}, r"q_abs_mean has shape \(2, 7\)"),
        ({"rope_style": "neox"}, "rope_style is 'neox'"),
        ({"aggregation": "sum"}, "aggregation is 'sum'"),
        ({"round_start": -1}, "round_start is -1"),
        ({"trig_values": (torch.zeros(2, 8), torch.zeros(2, 8))}, r"trig_values has shape \(2, 8\)"),
    ],
)
def test_bad_arguments_are_named(change: dict, words: str) -> None:
    arguments = {
        "K_rot": torch.zeros(1, H, 4, 2 * F), "position_indices": None, **_statistics(H), "omega": torch.rand(F),
        "offsets": geometric_offsets(64), "round_start": 5, "rope_style": "half",
    }  # fmt: skip
    with pytest.raises(TriAttentionError, match=words):
        triattention_scoring(**{**arguments, **change})


def test_statistics_that_do_not_divide_among_the_heads_are_refused() -> None:
    with pytest.raises(TriAttentionError, match="3 query heads are not a multiple of 2 KV heads"):
        triattention_scoring(
            torch.zeros(1, 2, 4, 16),
            None,
            *_statistics(3).values(),
            torch.rand(F),
            geometric_offsets(4),
            5,
            rope_style="half",
        )
