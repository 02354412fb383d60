"""What the vLLM plugin cannot serve is refused when the server is started, in one sentence, and the server ends."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from triattention.errors import TriAttentionError
from triattention.models import find_source, load
from triattention.tests.command_line import write_statistics
from triattention.tests.model_directory import write_tiny_model
from triattention.tests.vllm_starts import End, Start, ends_of
from triattention.text_calibration import cached_statistics
from triattention.vllm.runtime.settings import RuntimeSettings
from triattention.vllm.runtime.start import check_groups, layers_in_order, rank_rows, refuse

pytest_plugins = ("triattention.tests.fixtures",)
needs_vllm = pytest.mark.skipif(find_spec("vllm") is None, reason="PKG_MISSING: vllm")

#: What each start must say, and with which next step.
SENTENCES = {
    "no_statistics": "there are no statistics of {model}, as it is configured here, in {cache}/statistics; make them "
    "with python -m triattention calibrate --model {model}, or set TRIATTN_RUNTIME_SPARSE_STATS_PATH to a file",
    "overridden": "make them with python -m triattention calibrate --model {model} --hf-overrides '{overrides}', or",
    "overridden_and_calibrated": "found {overridden}",
    "other_configuration": "make them with python -m triattention calibrate --model {model} --hf-config-path "
    "{growing}, or set",
    "overridden_file": "attention_scaling 1.0 and the model ",
    "overridden_wrongly": "rope_parameters {{'rope_type': 'default', 'rope_theta': 'wide'}} cannot be used (TypeError",
    "no_such_file": "there is no statistics file {cache}/absent.pt; make one with python -m triattention build-stats",
    "other_model": "holds statistics of (layers, query heads, frequencies, unrotated dims) (3, 4, 8, 0), but the model",
    "mla": "TriAttention cannot serve MLA, whose cache holds no keys that could be scored; serve another model, or set "
    "ENABLE_TRIATTENTION=0",
    "sliding_window": "the model has sliding_attention layers, which cannot be compressed; use a full-attention model",
    "speculative": "TriAttention cannot serve speculative decoding, which rolls back cached tokens; leave out "
    "--speculative-config, or set ENABLE_TRIATTENTION=0",
    "kv_connector": "TriAttention cannot serve the KV connector ExampleConnector; leave out --kv-transfer-config",
    "decode_context_parallel": "TriAttention cannot serve decode_context_parallel_size 2, which splits the data that "
    "a round needs; use --decode-context-parallel-size 1, or set ENABLE_TRIATTENTION=0",
    "pipeline_parallel": "TriAttention cannot serve pipeline_parallel_size 2, which splits the data that a round "
    "needs; use --pipeline-parallel-size 1, or set ENABLE_TRIATTENTION=0",
    "quantised": "TriAttention cannot serve a KV cache quantised to fp8, which cannot be scored; use --kv-cache-dtype",
    "small_budget": "TRIATTN_RUNTIME_KV_BUDGET is 20, less than a block of 32 tokens; give a larger budget, or a "
    "smaller --block-size",
    "tensor_parallel": "--tensor-parallel-size 2 cannot split statistics of 3 KV heads; use a size that divides 3",
    "growing_rope": "changes its frequencies beyond 512 tokens, but --max-model-len is 1024; use --max-model-len 512",
    "unknown_setting": "TRIATTN_RUNTIME_KV_BUGDET is not a setting of this plugin; the most similar one is TRIATTN",
    "bad_value": "TRIATTN_RUNTIME_DIVIDE_LENGTH is 'often': Input should be a valid integer",
    "window": "the window is 64 and the KV budget 64; give a window from 0 to 63, or leave it out",
    "one_half": "patch_scheduler=True and patch_worker=False would evict nothing, or lose tokens; patch both, or set "
    "ENABLE_TRIATTENTION=0",
    "hook_targets": "vllm.v1.core.sched.scheduler:Scheduler.schedule is (self, throttle_prefills), not "
    "(self, other); install vLLM",
    "python_api": "VLLM_PLUGINS is 'other', so vLLM's other processes would not load this plugin; add triattention",
    "pooling": "TriAttention cannot serve pooling models, whose prompts must stay whole; serve a generating model",
    "worker_class": "TriAttention cannot serve the worker class other.Worker; leave out --worker-cls, or set",
    "switch": "ENABLE_TRIATTENTION is 'maybe'; set it to 1 or 0",
}


#: As if the plugin had been made for a vLLM whose scheduler takes other arguments than the installed one's.
OTHER_SCHEDULE = """
from triattention.vllm.runtime import hook_targets
hook_targets.entry(hook_targets.check().entry)["vllm.v1.core.sched.scheduler:Scheduler.schedule"] = ["self", "other"]
"""


#: Ends a start whose statistics were accepted.
FOUND = """
from triattention.errors import TriAttentionError
from triattention.vllm.runtime import start
checked = start.statistics_of
def found(*given):
    raise TriAttentionError(f"found {checked(*given).source}")
start.statistics_of = found
"""


CALLED = """
from triattention.vllm.runtime.integration_monkeypatch import install_vllm_integration_monkeypatches
install_vllm_integration_monkeypatches(patch_scheduler=True, patch_worker=True)
"""

_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}


def _configured(directory: Path, tiny: str, **changes: object) -> str:
    """A copy of the tiny model's directory with another configuration, which is all that is read before a refusal."""
    directory.mkdir()
    for file in Path(tiny).iterdir():
        (directory / file.name).write_bytes(file.read_bytes())
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    return str(directory)


@pytest.fixture(scope="session")
def places(tiny_model: str, tiny_statistics: str, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Models and statistics of the starts."""
    folder = tmp_path_factory.mktemp("starts")
    deeper = str(write_tiny_model(folder / "deeper", layers=3))
    mla = {
        "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
        "first_k_dense_replace": 9, "moe_intermediate_size": 32,
    }  # fmt: skip
    sliding = {
        "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": True, "sliding_window": 64,
        "max_window_layers": 1, "layer_types": ["sliding_attention", "full_attention"],
    }  # fmt: skip
    three = _configured(
        folder / "three", tiny_model, hidden_size=192, num_attention_heads=12, num_key_value_heads=3, head_dim=16
    )
    growing = _configured(
        folder / "growing", tiny_model,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0},
    )  # fmt: skip
    overrides = json.dumps({"rope_parameters": _YARN})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIATTENTION_CACHE", str(folder / "calibrated"))
        overridden = cached_statistics(load(find_source(tiny_model, overrides=json.loads(overrides)), device="cpu"))
    return SimpleNamespace(
        overrides=overrides, overridden=overridden, calibrated=str(folder / "calibrated"),
        model=tiny_model, cache=str(folder / "cache"), statistics=tiny_statistics,
        deeper=write_statistics(deeper, folder / "deeper"),
        mla=_configured(folder / "mla", tiny_model, **mla),
        sliding=_configured(folder / "sliding", tiny_model, **sliding), three=three, growing=growing,
    )  # fmt: skip


@pytest.fixture(scope="session")
def ends(places: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, End]:
    def start(*arguments: str, model: str = places.model, before: str = "", **environment: str) -> Start:
        usual = ["--model", model, "--host", "127.0.0.1", "--port", "1", "--block-size", "32", "--max-model-len", "256"]
        named = {"TRIATTENTION_CACHE": places.cache, "TRIATTN_RUNTIME_SPARSE_STATS_PATH": places.statistics}
        return Start([*usual, *arguments], named | environment, before)

    def setting(name: str, value: str) -> dict[str, str]:
        return {f"TRIATTN_RUNTIME_{name}": value}

    def found_in(cache: str) -> dict[str, str]:
        return {"TRIATTENTION_CACHE": cache, **setting("SPARSE_STATS_PATH", "auto")}

    dotted = [part for name, value in _YARN.items() for part in (f"--hf-overrides.rope_parameters.{name}", str(value))]
    connector = json.dumps({"kv_connector": "ExampleConnector", "kv_role": "kv_both"})
    ngram = json.dumps({"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2})
    starts = {
        "no_statistics": start(**setting("SPARSE_STATS_PATH", "auto")),
        "overridden": start("--hf-overrides", places.overrides, **setting("SPARSE_STATS_PATH", "auto")),
        "overridden_and_calibrated": start(*dotted, before=FOUND, **found_in(places.calibrated)),
        "other_configuration": start("--hf-config-path", places.growing, **found_in(places.calibrated)),
        "overridden_file": start("--hf-overrides", places.overrides),
        "overridden_wrongly": start("--hf-overrides.rope_parameters", '{"rope_type": "default", "rope_theta": "wide"}'),
        "no_such_file": start(**setting("SPARSE_STATS_PATH", f"{places.cache}/absent.pt")),
        "other_model": start(**setting("SPARSE_STATS_PATH", places.deeper)),
        "mla": start(model=places.mla),
        "sliding_window": start(model=places.sliding),
        "speculative": start("--speculative-config", ngram),
        "kv_connector": start("--kv-transfer-config", connector),
        "decode_context_parallel": start("-tp", "4", "-dcp", "2", "--distributed-executor-backend", "mp"),
        "pipeline_parallel": start("-pp", "2", "--distributed-executor-backend", "mp"),
        "quantised": start("--kv-cache-dtype", "fp8"),
        "small_budget": start(**setting("KV_BUDGET", "20")),
        "tensor_parallel": start("-tp", "2", "--distributed-executor-backend", "mp", model=places.three),
        "growing_rope": start("--max-model-len", "1024", model=places.growing),
        "unknown_setting": start(**setting("KV_BUGDET", "64")),
        "bad_value": start(**setting("DIVIDE_LENGTH", "often")),
        "window": start(**setting("KV_BUDGET", "64"), **setting("WINDOW_SIZE", "64")),
        "one_half": start(**setting("PATCH_WORKER", "false")),
        "hook_targets": start(before=OTHER_SCHEDULE),
        "python_api": start(before=CALLED, VLLM_PLUGINS="other"),
        "pooling": start("--runner", "pooling"),
        "worker_class": start("--worker-cls", "other.Worker"),
        "switch": start(ENABLE_TRIATTENTION="maybe"),
    }
    return ends_of(starts, tmp_path_factory.mktemp("logs"))


@needs_vllm
@pytest.mark.parametrize("name", SENTENCES)
def test_a_server_that_cannot_be_served_says_why_and_ends(
    name: str, ends: dict[str, End], places: SimpleNamespace
) -> None:
    end = ends[name]
    said = [line for line in end.output.splitlines() if "TriAttentionError: " in line]
    assert said, f"no sentence in: {end.output[-2000:]}"
    assert SENTENCES[name].format(**vars(places)) in said[-1]
    assert end.code not in (0, None)


def _groups(*specs: object) -> SimpleNamespace:
    return SimpleNamespace(kv_cache_groups=[SimpleNamespace(kv_cache_spec=spec) for spec in specs])


def test_a_kv_cache_of_several_groups_or_another_kind_is_refused() -> None:
    full = type("FullAttentionSpec", (), {"sliding_window": None, "attention_chunk_size": None})
    windowed = type("FullAttentionSpec", (), {"sliding_window": 64, "attention_chunk_size": None})
    mamba = type("MambaSpec", (), {})
    check_groups(_groups(full()))
    with pytest.raises(TriAttentionError, match=r"a model with 2 KV cache groups \(FullAttentionSpec, MambaSpec\)"):
        check_groups(_groups(full(), mamba()))
    with pytest.raises(TriAttentionError, match="layers of FullAttentionSpec with window 64"):
        check_groups(_groups(windowed()))
    with pytest.raises(TriAttentionError, match="layers of MambaSpec"):
        check_groups(_groups(mamba()))


def test_ray_workers_which_would_not_get_the_settings_are_refused() -> None:
    config = SimpleNamespace(
        model_config=None, cache_config=None, parallel_config=SimpleNamespace(distributed_executor_backend="ray")
    )
    with pytest.raises(TriAttentionError, match=r"Ray workers, .*; use --distributed-executor-backend mp"):
        refuse(config, RuntimeSettings())


def test_a_rank_scores_for_the_query_heads_of_its_kv_heads() -> None:
    assert [rank_rows(4, 16, rank, 2) for rank in range(2)] == [slice(0, 8), slice(8, 16)]
    assert [rank_rows(2, 8, rank, 4) for rank in range(4)] == [slice(0, 4), slice(0, 4), slice(4, 8), slice(4, 8)]


def test_layers_come_in_the_order_of_their_numbers() -> None:
    names = [f"model.layers.{number}.self_attn.attn" for number in (10, 9, 0)]
    assert layers_in_order({name: name for name in names}, names) == [names[2], names[1], names[0]]
    with pytest.raises(TriAttentionError, match="layer 0 with two KV caches"):
        layers_in_order({}, []) or layers_in_order({"a.0.self": 1, "a.0.cross": 2}, ["a.0.self", "a.0.cross"])
