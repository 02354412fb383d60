"""The Hugging Face path on tiny models: rounds, padding, chunks, resets and what it refuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache, GenerationConfig

from triattention import statistics
from triattention.errors import TriAttentionError
from triattention.methods.triattention import (
    TriAttention,
    TriAttentionConfig,
    apply_triattention_patch,
    remove_triattention_patch,
)
from triattention.selection import MODES
from triattention.tests import tiny

_MODELS = [
    ("llama", "sdpa"),
    ("qwen2", "eager"),
    ("qwen3", "sdpa"),
    ("phi3", "sdpa"),
    ("glm", "eager"),
    ("glm_full", "sdpa"),
]


@pytest.fixture(scope="module", params=_MODELS, ids="-".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    kind, attention = request.param
    model = tiny.make(kind, attention=attention)
    return model, tiny.calibrated(model, tmp_path_factory.mktemp("stats") / "stats.pt")


@pytest.fixture
def model(made: tuple[Any, Path]) -> Iterator[Any]:
    yield made[0]
    remove_triattention_patch(made[0])


@pytest.fixture
def stats(made: tuple[Any, Path]) -> Path:
    return made[1]


def _patch(model: Any, stats: Path, **options: Any) -> TriAttention:
    apply_triattention_patch(model, stats_path=stats, model_path=None, **{**tiny.RECOMMENDED, **options})
    return model.triattention


def _padded(*rows: torch.Tensor) -> dict[str, torch.Tensor]:
    width = max(row.shape[1] for row in rows)
    ids = torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0)) for row in rows])
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def _stepwise_logits(model: Any, ids: torch.Tensor) -> torch.Tensor:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        return torch.cat(
            [model(input_ids=part, past_key_values=cache).logits for part in ids.split([25, *[1] * 15], 1)], 1
        )


def test_a_budget_never_reached_changes_nothing(model: Any, stats: Path) -> None:
    ids = tiny.tokens(40)
    want, logits = tiny.generate(model, ids), _stepwise_logits(model, ids)
    _patch(model, stats, kv_budget=1000)
    assert torch.equal(tiny.generate(model, ids), want)
    assert torch.equal(_stepwise_logits(model, ids), logits)  # to the bit, not only the same tokens


def test_removing_the_patch_restores_the_model(model: Any, stats: Path) -> None:
    ids = tiny.tokens(40)
    want = tiny.generate(model, ids)
    method = _patch(model, stats)
    assert not torch.equal(tiny.generate(model, ids), want)
    assert method.rounds > 0
    remove_triattention_patch(model)
    assert torch.equal(tiny.generate(model, ids), want)
    assert "forward" not in vars(model)


@pytest.mark.parametrize(
    "options",
    [{"per_head_pruning": False, "pruning_mode": mode} for mode in MODES] + [{"use_slack_trigger": False}],
    ids=[*MODES, "interval"],
)
def test_padded_rows_equal_their_single_runs(model: Any, stats: Path, options: dict) -> None:
    a, b = tiny.tokens(40), tiny.tokens(25, seed=2)
    _patch(model, stats, **options)
    together = model.generate(**_padded(a, b), max_new_tokens=100, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert torch.equal(together[0], tiny.generate(model, a)[0])
    assert torch.equal(together[1, 15:], tiny.generate(model, b)[0])


def test_the_cache_stays_below_the_bound_and_frees_memory(model: Any, stats: Path) -> None:
    _patch(model, stats)
    cache, ids, lengths = DynamicCache(config=model.config), tiny.tokens(40), []
    for _ in range(100):
        out = model(input_ids=ids, past_key_values=cache)
        lengths.append(cache.layers[0].keys.shape[-2])
        assert cache.layers[0].keys.untyped_storage().nbytes() == cache.layers[0].keys.nbytes
        ids = out.logits[:, -1:].argmax(-1)
    assert max(lengths) == 48 + 16 - 1
    assert cache.get_seq_length() == 40 + 99
    assert model.triattention.peak_length == max(lengths)


def test_kept_rows_are_the_scored_ones_bit_for_bit(model: Any, stats: Path) -> None:
    _patch(model, stats)
    plain, held = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ids = tiny.tokens(64)
    method = model.triattention
    remove_triattention_patch(model)
    model(input_ids=ids, past_key_values=plain)
    _patch(model, stats)
    model(input_ids=ids, past_key_values=held)
    pairs = [(layer.keys, layer.values) for layer in plain.layers]
    kept = method.compute_keep_indices(pairs)
    assert kept.shape == (2, 48)
    for (keys, values), layer in zip(pairs, held.layers, strict=True):
        gather = kept[None, :, :, None].expand(1, 2, 48, 16)
        assert torch.equal(layer.keys, keys.gather(2, gather))
        assert torch.equal(layer.values, values.gather(2, gather))
    assert torch.equal(kept, kept.sort(-1).values)
    assert {*range(56, 64)} <= set(kept[0].tolist())


def test_chunked_prefill_of_a_long_prompt_is_bounded(model: Any, stats: Path) -> None:
    method = _patch(model, stats)
    tiny.generate(model, tiny.tokens(200), new=40, prefill_chunk_size=23)
    assert method.peak_length < 48 + 16
    assert method.rounds > 5


def test_a_protected_prompt_is_never_evicted_and_said_once(model: Any, stats: Path) -> None:
    method = _patch(model, stats, allow_prefill_compression=False)
    cache, ids = DynamicCache(config=model.config), tiny.tokens(60)

    def run() -> None:
        nonlocal ids
        for _ in range(60):
            ids = model(input_ids=ids, past_key_values=cache).logits[:, -1:].argmax(-1)

    with pytest.warns(UserWarning, match="68 protected tokens .* exceed the budget of 48") as caught:
        run()
    assert len([w for w in caught if "protected" in str(w.message)]) == 1
    remove_triattention_patch(model)
    plain = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(60), past_key_values=plain)
    torch.testing.assert_close(cache.layers[0].keys[:, :, :60], plain.layers[0].keys, rtol=0, atol=0)
    assert method.rounds == 3  # due at 84, 100 and 116 tokens seen: divide_length apart, not at every step


def test_generations_do_not_share_state(model: Any, stats: Path) -> None:
    _patch(model, stats)
    first = tiny.generate(model, tiny.tokens(40))
    tiny.generate(model, tiny.tokens(30, seed=3))
    assert torch.equal(tiny.generate(model, tiny.tokens(40)), first)


def test_two_caches_can_alternate(model: Any, stats: Path) -> None:
    _patch(model, stats)
    caches = [DynamicCache(config=model.config) for _ in range(2)]
    feeds = [tiny.tokens(40), tiny.tokens(30, seed=3)]
    alone = [tiny.generate(model, ids, new=60) for ids in feeds]
    outputs: list[list[int]] = [[], []]
    for _ in range(60):
        for i in (0, 1):
            feeds[i] = model(input_ids=feeds[i], past_key_values=caches[i]).logits[:, -1:].argmax(-1)
            outputs[i].append(int(feeds[i]))
    assert outputs[0] == alone[0][0, 40:].tolist()
    assert outputs[1] == alone[1][0, 30:].tolist()


def test_a_conversation_goes_on_with_a_compressed_cache(model: Any, stats: Path) -> None:
    _patch(model, stats)
    cache, ids = DynamicCache(config=model.config), tiny.tokens(40)
    first = tiny.generate(model, ids, new=60, past_key_values=cache)
    whole = torch.cat([first, tiny.tokens(10, seed=5)], 1)
    second = tiny.generate(model, whole, new=20, past_key_values=cache, attention_mask=torch.ones_like(whole))
    assert second.shape[1] == 40 + 60 + 10 + 20
    assert cache.get_seq_length() == second.shape[1] - 1


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kv_budget": 0}, "KV budget is 0"),
        ({"window_size": 48}, "window is 48 and the KV budget 48"),
        ({"divide_length": 0}, "divide_length is 0"),
        ({"per_layer_perhead_pruning": True}, "exclude each other"),
        ({"pruning_mode": "union"}, "pruning_mode is 'union', but the flag of per_head"),
        ({"pruning_mode": "global"}, "the pruning mode is 'global'; use one of per_head, union"),
        ({"layer_perhead_aggregation": "mean"}, "'mean' is for per_layer_per_head only"),
        ({"score_aggregation": "median"}, "'median'"),
        ({"stats_path": "nowhere.pt"}, "no statistics file nowhere.pt"),
        ({"metadata_expectations": {"rope_style": "spiral"}}, "rope_style = '(half|interleaved)', but 'spiral'"),
    ],
)
def test_bad_options_are_refused_before_the_model_is_touched(
    model: Any, stats: Path, options: dict, words: str
) -> None:
    with pytest.raises(TriAttentionError, match=words):
        _patch(model, **{"stats": stats, **{"stats" if k == "stats_path" else k: v for k, v in options.items()}})
    assert not hasattr(model, "triattention")


def test_nan_keys_end_the_generation_with_one_sentence(model: Any, stats: Path) -> None:
    _patch(model, stats)
    attention = model.model.layers[1].self_attn
    # the last row of a fused projection is one of the values', so take the first of the keys'
    weight, row = (
        (attention.qkv_proj.weight, 4 * 16) if hasattr(attention, "qkv_proj") else (attention.k_proj.weight, 0)
    )
    kept = weight[row, 0].item()
    try:
        weight.data[row, 0] = torch.nan
        with pytest.raises(TriAttentionError, match="NaN or Inf"):
            tiny.generate(model, tiny.tokens(80), new=2)
    finally:
        weight.data[row, 0] = kept


def test_beam_search_is_refused(model: Any, stats: Path) -> None:
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match="num_beams=1"):
        tiny.generate(model, tiny.tokens(40), new=5, num_beams=2)


def test_speculative_decoding_is_refused(model: Any, stats: Path) -> None:
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match="speculative decoding is not supported"):
        tiny.generate(model, tiny.tokens(40), new=20, prompt_lookup_num_tokens=4)


def test_multi_token_decode_steps_do_not_make_the_prompt_grow(model: Any, stats: Path) -> None:
    method = _patch(model, stats, allow_prefill_compression=False)
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(20), past_key_values=cache)
    for seed in range(40):
        model(input_ids=tiny.tokens(4, seed), past_key_values=cache)
        assert cache.layers[0].keys.shape[-2] < 48 + 16
    assert method.rounds > 3


@pytest.mark.parametrize("options", [{}, {"use_slack_trigger": False}, {"count_prompt_tokens": False}])
def test_a_decode_step_waits_for_the_device_only_when_a_row_can_be_due(
    model: Any, stats: Path, options: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = _patch(model, stats, **options)
    looks = 0
    original = torch.Tensor.tolist

    def counted(tensor: torch.Tensor) -> list:
        nonlocal looks
        looks += tensor.shape[:1] == (3,) and tensor.ndim == 2
        return original(tensor)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    tiny.generate(model, tiny.tokens(40), new=100)
    assert method.rounds > 2
    assert looks <= method.rounds + 2


def test_somebody_elses_forward_comes_back(model: Any, stats: Path) -> None:
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return type(model).forward(model, *args, **kwargs)

    model.forward = theirs
    _patch(model, stats)
    remove_triattention_patch(model)
    assert model.forward is theirs
    del model.forward


def test_token_ids_of_the_configuration_do_not_make_another_model(stats: Path, model: Any) -> None:
    before = model.config.pad_token_id
    model.config.pad_token_id = 2
    _patch(model, stats)
    model.config.pad_token_id = before


def test_a_static_cache_is_refused(model: Any, stats: Path) -> None:
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match="leave cache_implementation unset"):
        tiny.generate(model, tiny.tokens(40), new=5, cache_implementation="static")


def test_a_cache_filled_without_the_patch_is_refused(model: Any, stats: Path) -> None:
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(40), past_key_values=cache)
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match="40 tokens from before the patch"):
        model(input_ids=tiny.tokens(1), past_key_values=cache)


def test_wrong_position_ids_are_refused(model: Any, stats: Path) -> None:
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match=r"position_ids\[0, 0\] is 7"):
        model(input_ids=tiny.tokens(4), position_ids=torch.arange(7, 11)[None])


def test_another_models_statistics_are_refused(stats: Path) -> None:
    deeper = tiny.make(num_hidden_layers=2)
    with pytest.raises(TriAttentionError, match=r"\(3, 4, [48], [08]\), but the model llama has \(2, 4, 8, 0\)"):
        _patch(deeper, stats)


def test_statistics_of_another_rope_base_are_refused(tmp_path: Path) -> None:
    stats = tiny.calibrated(tiny.make(), tmp_path / "stats.pt")
    other = tiny.make(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    with pytest.raises(TriAttentionError, match=r"omega\[1\] = "):
        _patch(other, stats)


@pytest.fixture(params=["dynamic", "longrope"])
def growing(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Any, Path]:
    """A model whose omega changes after 128 tokens, and its statistics."""
    parameters = {"rope_type": request.param, "rope_theta": 1e4, "factor": 2.0}
    if request.param == "longrope":
        parameters |= {"short_factor": [1.1] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 128}
    model = tiny.make(rope_parameters=parameters, max_position_embeddings=256 if request.param == "longrope" else 128)
    return model, tiny.calibrated(model, tmp_path / "stats.pt")


def test_a_rope_that_changes_with_length_is_served_up_to_that_length(growing: tuple[Any, Path]) -> None:
    model, stats = growing
    before = model.model.rotary_emb.original_inv_freq.clone()
    model(tiny.tokens(200))  # leaves the frequencies of a long sequence behind
    assert not torch.equal(model.model.rotary_emb.inv_freq, before)
    method = _patch(model, stats)
    assert torch.equal(method.omega, before)
    tiny.generate(model, tiny.tokens(40), new=88)
    assert method.rounds > 2
    assert torch.equal(model.model.rotary_emb.inv_freq, before)


def test_a_run_past_that_length_is_refused_at_its_start_with_both_lengths(
    growing: tuple[Any, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, stats = growing
    _patch(model, stats)
    monkeypatch.setattr(model, "forward", lambda *args, **kwargs: pytest.fail("a step was run"))
    config = GenerationConfig(max_new_tokens=90)
    asked = ({"max_new_tokens": 90}, {"max_length": 130}, {"generation_config": config})
    for options in asked:
        with pytest.raises(TriAttentionError, match=r"would have 129 tokens, .* change after 128"):
            model.generate(tiny.tokens(40), **options)
    with pytest.raises(TriAttentionError, match="129 tokens"):
        model.generate(tiny.tokens(40), config)


def test_padding_does_not_count_towards_that_length(growing: tuple[Any, Path]) -> None:
    model, stats = growing
    _patch(model, stats)
    ids = torch.nn.functional.pad(tiny.tokens(10), (60, 0))
    made = tiny.generate(model, ids, new=100, attention_mask=(ids != 0).long())
    assert torch.equal(made[:, 60:], tiny.generate(model, tiny.tokens(10), new=100))


def test_a_cache_that_was_lost_on_the_way_is_noticed(growing: tuple[Any, Path]) -> None:
    model, stats = growing
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match=r"position_ids\[0, 0\] is 100"):
        model(input_ids=tiny.tokens(1), position_ids=torch.tensor([[100]]))


def test_a_refused_step_leaves_the_cache_as_it_was(model: Any, stats: Path) -> None:
    _patch(model, stats)
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(20), past_key_values=cache)
    with pytest.raises(TriAttentionError, match="leave position_ids out"):
        model(input_ids=tiny.tokens(3), past_key_values=cache, position_ids=torch.tensor([[0, 1, 2]]))
    model(input_ids=tiny.tokens(3), past_key_values=cache)
    assert cache.get_seq_length() == 23


def test_a_step_that_failed_after_it_was_cached_is_noticed(
    model: Any, stats: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _patch(model, stats)
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(20), past_key_values=cache)

    def fail(*args: Any) -> None:
        raise MemoryError

    with monkeypatch.context() as patched:
        patched.setattr(model.lm_head, "forward", fail)
        with pytest.raises(MemoryError):
            model(input_ids=tiny.tokens(3), past_key_values=cache)
    with pytest.raises(TriAttentionError, match="holds 23 columns, but the patched model expects 20"):
        model(input_ids=tiny.tokens(1), past_key_values=cache)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ({"past_key_values": ((torch.zeros(1), torch.zeros(1)),)}, "the cache is a tuple; leave past_key_values out"),
        ({"attention_mask": torch.ones(2, 4)}, r"shape \(2, 4\); expected \[1, 4\]"),
        ({"attention_mask": {"full_attention": None}}, "attention_mask is a dict of masks"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, "the step has no tokens"),
    ],
)
def test_what_cannot_be_fed_is_one_sentence(model: Any, stats: Path, call: dict, words: str) -> None:
    _patch(model, stats)
    with pytest.raises(TriAttentionError, match=words):
        model(**{"input_ids": tiny.tokens(4), "use_cache": True, **call})


def test_a_hand_written_loop_is_stopped_at_that_length(growing: tuple[Any, Path]) -> None:
    model, stats = growing
    _patch(model, stats)
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(128), past_key_values=cache)
    with pytest.raises(TriAttentionError, match="129 tokens"):
        model(input_ids=tiny.tokens(1), past_key_values=cache)


def test_an_unknown_rope_is_refused_by_name() -> None:
    model = tiny.make()
    model.model.rotary_emb.rope_type = "spiral"
    with pytest.raises(TriAttentionError, match="RoPE type 'spiral' is not supported; supported: default, linear"):
        tiny.calibrated(model, Path("never_written.pt"))


def test_a_sliding_window_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TriAttentionError, match="sliding attention"):
        tiny.calibrated(tiny.make("phi3", sliding_window=512), tmp_path / "stats.pt")
    assert tiny.calibrated(tiny.make("phi3", sliding_window=4096), tmp_path / "stats.pt").exists()


@pytest.mark.parametrize("rope", ["linear", "yarn", "llama3"])
@pytest.mark.parametrize("kind", ["llama", "glm"])
def test_omega_and_scaling_are_the_live_modules(kind: str, rope: str, tmp_path: Path) -> None:
    parameters = {"rope_type": rope, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    if rope == "llama3":
        parameters |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    if kind != "llama":
        parameters["partial_rotary_factor"] = 0.5
    model = tiny.make(kind, rope_parameters=parameters)
    method = _patch(model, tiny.calibrated(model, tmp_path / "stats.pt"))
    rotary = model.model.rotary_emb
    assert torch.equal(method.omega, rotary.inv_freq)
    assert method.attention_scaling == rotary.attention_scaling
    cos, _ = rotary(torch.zeros(1), torch.tensor([[0]]))
    assert cos.flatten()[0] == pytest.approx(method.attention_scaling)


def test_yarn_carries_its_scaling_into_the_weights(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 1024}
    model = tiny.make(rope_parameters=yarn)
    method = _patch(model, tiny.calibrated(model, tmp_path / "stats.pt"))
    assert method.attention_scaling == pytest.approx(1.1386, abs=1e-4)
    assert torch.equal(method.freq_weight, torch.full_like(method.freq_weight, method.attention_scaling))


def test_compute_keep_indices_of_the_published_class(model: Any, stats: Path) -> None:
    config = TriAttentionConfig(stats, None, "cpu", torch.float32, 32)
    method = TriAttention(config)
    cache = DynamicCache(config=model.config)
    model(input_ids=tiny.tokens(60), past_key_values=cache)
    pairs = tuple((layer.keys, layer.values) for layer in cache.layers)
    kept = method.compute_keep_indices(pairs, prefix_length=10)
    assert kept.tolist() == sorted(kept.tolist())
    assert kept[:10].tolist() == list(range(10))
    assert len(kept) == 10 + 32  # published defaults: union, prompt protected and on top of the budget
    assert method.compute_keep_indices(tuple((k[:, :, :20], v[:, :, :20]) for k, v in pairs), prefix_length=10) is None


def test_published_statistics_serve_a_live_model(model: Any, stats: Path, tmp_path: Path) -> None:
    from triattention.methods.pruning_utils import load_head_frequency_stats, save_head_frequency_stats

    _, by_head = load_head_frequency_stats(stats, "cpu")
    save_head_frequency_stats(tmp_path / "published.pt", list(by_head), by_head, {"head_dim": 16})
    if model.config.model_type in ("phi3", "glm") and statistics.load(stats).q_pass_mean.shape[-1]:
        with pytest.raises(TriAttentionError, match=r"\(3, 4, 4, 0\), but the model \w+ has \(3, 4, 4, 8\)"):
            _patch(model, tmp_path / "published.pt")  # that layout has no place for the unrotated dims
        return
    ids = tiny.tokens(40)
    with pytest.raises(TriAttentionError, match="does not contain omega"):
        TriAttention(TriAttentionConfig(tmp_path / "published.pt", None, "cpu", torch.float32, 32))
    assert statistics.load(tmp_path / "published.pt").architecture is None
    _patch(model, stats)
    want = tiny.generate(model, ids)
    remove_triattention_patch(model)
    _patch(model, tmp_path / "published.pt")  # omega then comes from the live model
    assert torch.equal(tiny.generate(model, ids), want)
