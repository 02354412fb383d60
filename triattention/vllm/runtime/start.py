"""Startup of the plugin: checks of vLLM's configuration, each failing with one sentence, and construction."""

from __future__ import annotations

import copy
import json
import logging
import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from triattention.errors import TriAttentionError
from triattention.vllm.runtime import hook_targets
from triattention.vllm.runtime.eviction import Evictor, Rule
from triattention.vllm.runtime.metrics import counters
from triattention.vllm.runtime.settings import PREFIX, SWITCH, RuntimeSettings

if TYPE_CHECKING:
    from triattention.architecture import Architecture
    from triattention.statistics import Statistics
    from triattention.vllm.runtime.compaction import Compactor

_log = logging.getLogger("vllm.triattention")

#: KV cache dtypes that are not quantised.
_PLAIN_DTYPES = ("auto", "bfloat16", "float16", "half", "float32", "float")
#: bfloat16 represents cos of a few radians to 2^-9; a wrong omega, pair layout or scale is off by far more.
_ROTARY_ERROR, _ROTARY_POSITION = 2.0**-7, 5


def refuse(config: Any, settings: RuntimeSettings) -> None:
    """Raise TriAttentionError, naming the cause and the next step, for an unsupported vLLM configuration."""
    model, cache, parallel = config.model_config, config.cache_config, config.parallel_config
    if getattr(config, "use_v2_model_runner", False):
        hook_targets.require_supported(v2=True)
        _log.warning(
            "[TriAttention] the V2 model runner is used, with which this plugin has run on a CPU only; it is UNTESTED "
            "on a GPU (VLLM_USE_V2_MODEL_RUNNER=0 selects the V1 runner)"
        )
    if parallel.distributed_executor_backend == "ray":
        _cannot("Ray workers, which do not receive these settings", "use --distributed-executor-backend mp")
    worker = str(parallel.worker_cls)
    if worker != "auto" and not worker.startswith("vllm.v1.worker."):
        _cannot(f"the worker class {worker}", "leave out --worker-cls")
    if model.runner_type == "pooling":
        _cannot("pooling models, whose prompts must stay whole", "serve a generating model")
    if getattr(model, "enable_sleep_mode", False):
        _cannot("sleep mode, which frees the memory that a round needs", "leave out --enable-sleep-mode")
    if model.use_mla:
        _cannot("MLA, whose cache holds no keys that could be scored", "serve another model")
    if config.speculative_config is not None:
        _cannot("speculative decoding, which rolls back cached tokens", "leave out --speculative-config")
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector is not None:
        _cannot(f"the KV connector {transfer.kv_connector}", "leave out --kv-transfer-config and --kv-offloading-size")
    for name in ("decode_context_parallel_size", "prefill_context_parallel_size", "pipeline_parallel_size"):
        size = getattr(parallel, name, 1)
        if size > 1:
            _cannot(f"{name} {size}, which splits the data that a round needs", f"use --{name.replace('_', '-')} 1")
    if cache.cache_dtype not in _PLAIN_DTYPES:
        _cannot(f"a KV cache quantised to {cache.cache_dtype}, which cannot be scored", "use --kv-cache-dtype auto")
    check_budget_of_blocks(settings, cache.block_size)
    live = described(config)
    rank_rows(live.num_kv_heads, live.num_query_heads, 0, parallel.tensor_parallel_size)
    if live.max_positions is not None and model.max_model_len > live.max_positions:
        raise TriAttentionError(
            f"the RoPE of {live.model_id} changes its frequencies beyond {live.max_positions} tokens, but "
            f"--max-model-len is {model.max_model_len}; use --max-model-len {live.max_positions}"
        )
    statistics_of(live, model, settings)


def _cannot(what: str, next_step: str) -> None:
    raise TriAttentionError(f"TriAttention cannot serve {what}; {next_step}, or set {SWITCH}=0")


def check_budget_of_blocks(settings: RuntimeSettings, block_size: int | None) -> None:
    """Raise TriAttentionError for a budget below one block; ``block_size`` is None if vLLM has not chosen it yet."""
    if block_size is not None and settings.kv_budget < block_size:
        raise TriAttentionError(
            f"{PREFIX}KV_BUDGET is {settings.kv_budget}, less than a block of {block_size} tokens; give a larger "
            "budget, or a smaller --block-size"
        )


def check_groups(config: Any) -> None:
    """Raise TriAttentionError unless the KV cache configuration has exactly one group, with full attention."""
    groups = config.kv_cache_groups
    kinds = sorted({type(group.kv_cache_spec).__name__ for group in groups})
    if len(groups) != 1:
        _cannot(f"a model with {len(groups)} KV cache groups ({', '.join(kinds)})", "serve a full-attention model")
    spec = groups[0].kv_cache_spec
    window = getattr(spec, "sliding_window", None) or getattr(spec, "attention_chunk_size", None)
    if kinds != ["FullAttentionSpec"] or window is not None:
        _cannot(f"layers of {kinds[0]} with window {window}", "serve a full-attention model")


def described(config: Any) -> Architecture:
    """The description of the model that vLLM serves. Raises TriAttentionError if it cannot be compressed."""
    from triattention.architecture import describe_config

    try:
        return describe_config(copy.deepcopy(config.model_config.hf_config))
    except TriAttentionError as error:
        raise TriAttentionError(f"{error}, or set {SWITCH}=0") from error


def statistics_of(live: Architecture, model: Any, settings: RuntimeSettings) -> Statistics:
    """The statistics of a model. Raises TriAttentionError if there are none, or only those of another model."""
    from triattention import statistics

    loaded = statistics.load(_statistics_path(live, model, settings))
    loaded.check_architecture(live)
    return loaded


def _statistics_path(live: Architecture, model: Any, settings: RuntimeSettings) -> str:
    if settings.sparse_stats_path != "auto":
        return settings.sparse_stats_path
    from triattention import models
    from triattention.embedded import cache_root

    source = models.find_source(model.model, revision=model.revision, config_path=model.hf_config_path)
    mark = f"{models.fingerprint(source)}-{live.identity}"
    folder = cache_root() / "statistics"
    found = sorted(folder.glob(f"*-{mark}-*.pt"))
    if not found:
        raise TriAttentionError(
            f"there are no statistics of {model.model}, as it is configured here, in {folder}; make them with "
            f"{_calibrating(model)}, or set {PREFIX}SPARSE_STATS_PATH to a file"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    return str(next((path for path in found if f"-{mark}-{dtype}-" in path.name), found[0]))


def _calibrating(model: Any) -> str:
    """The command that calibrates a model with the configuration that vLLM was given."""
    words = ["python", "-m", "triattention", "calibrate", "--model", model.model]
    if model.hf_config_path:
        words += ["--hf-config-path", model.hf_config_path]
    if model.revision:
        words += ["--revision", model.revision]
    if callable(model.hf_overrides):
        return f"{shlex.join(words)} --hf-overrides JSON (with the entries that the function hf_overrides changes)"
    return shlex.join([*words, *(["--hf-overrides", json.dumps(model.hf_overrides)] if model.hf_overrides else [])])


def rule_of(settings: RuntimeSettings, block_size: int) -> Rule:
    """The eviction rule for blocks of this size."""
    check_budget_of_blocks(settings, block_size)
    return Rule(
        kv_budget=settings.kv_budget,
        divide_length=settings.divide_length,
        window=settings.window,
        block_size=block_size,
        protect_prefill=settings.protect_prefill,
        include_prefill_in_budget=settings.include_prefill_in_budget,
    )


def build_evictor(scheduler: Any, settings: RuntimeSettings) -> Evictor:
    """The evictor of a newly created scheduler. Raises TriAttentionError if its KV cache is not supported."""
    check_groups(scheduler.kv_cache_config)
    rule = rule_of(settings, scheduler.kv_cache_manager.coordinator.single_type_managers[0].block_size)
    _log.info(
        "[TriAttention] a request with %d tokens in the KV cache is compressed to %d, in blocks of %d (%s)",
        rule.kv_budget + rule.divide_length, rule.kv_budget, rule.block_size, settings.pruning_mode,
    )  # fmt: skip
    return Evictor(rule, counters())


def build_compactor(runner: Any, settings: RuntimeSettings) -> Compactor:
    """The compactor of a model runner whose KV cache has just been created.

    Raises TriAttentionError if the cache or the model does not match the statistics or is not supported.
    """
    from vllm.distributed import get_tensor_model_parallel_rank

    from triattention.methods.triattention import TriAttention, TriAttentionConfig
    from triattention.vllm.runtime.compaction import Compactor

    config = runner.kv_cache_config
    check_groups(config)
    live = described(runner.vllm_config)
    calibrated = statistics_of(live, runner.model_config, settings)
    check_rotary(runner.model, live)
    group = config.kv_cache_groups[0]
    layers = layers_in_order(runner.compilation_config.static_forward_context, group.layer_names)
    if len(layers) != live.num_layers:
        raise TriAttentionError(
            f"this worker has {len(layers)} of the {live.num_layers} layers, but keep sets need all of them; "
            "use --pipeline-parallel-size 1"
        )
    cache, most = layers[0].kv_cache, 2 * layers[0].num_kv_heads * layers[0].head_size * runner.max_model_len
    if most >= 2**31:
        _cannot(f"{runner.max_model_len} tokens with {most} cached elements per layer", "lower --max-model-len")
    options = TriAttentionConfig(
        None, None, cache.device, cache.dtype, settings.kv_budget, divide_length=settings.divide_length,
        score_aggregation=settings.sparse_score_aggregation, normalize_scores=settings.sparse_normalize_scores,
        pruning_mode=settings.pruning_mode, layer_perhead_aggregation=settings.layer_perhead_aggregation,
        disable_mlr=settings.disable_mlr, disable_trig=settings.disable_trig, window_size=settings.window,
    )  # fmt: skip
    scorer = TriAttention(options, live=live, calibrated=calibrated)
    ranks = runner.parallel_config.tensor_parallel_size
    scorer.score_only(rank_rows(live.num_kv_heads, live.num_query_heads, get_tensor_model_parallel_rank(), ranks))
    rule = rule_of(settings, group.kv_cache_spec.block_size)
    _log.info("[TriAttention] keys are scored with the statistics in %s", calibrated.source)
    return Compactor(layers, config.num_blocks, scorer, rule, counters(), log_decisions=settings.log_decisions)


def rank_rows(n_kv_heads: int, n_query_heads: int, rank: int, n_ranks: int) -> slice:
    """The query heads that read the KV heads of one tensor-parallel rank.

    With more ranks than KV heads, several ranks hold the same KV head; each scores it with all of its query heads, so
    that they agree. Raises TriAttentionError if neither of the two numbers is a multiple of the other.
    """
    if n_kv_heads % n_ranks and n_ranks % n_kv_heads:
        raise TriAttentionError(
            f"--tensor-parallel-size {n_ranks} cannot split statistics of {n_kv_heads} KV heads; use a size that "
            f"divides {n_kv_heads}"
        )
    first, count = rank * n_kv_heads // n_ranks, max(1, n_kv_heads // n_ranks)
    size = n_query_heads // n_kv_heads
    return slice(first * size, (first + count) * size)


def layers_in_order(context: Any, names: Iterable[str]) -> list[Any]:
    """The attention layers with these names, in layer order. Raises TriAttentionError for two with the same number."""
    numbered: dict[int, Any] = {}
    for name in names:
        number = int(re.search(r"\.(\d+)\.", name)[1])
        if number in numbered:
            _cannot(f"layer {number} with two KV caches", "serve another model")
        numbered[number] = context[name]
    return [numbered[number] for number in sorted(numbered)]


def check_rotary(model: Any, live: Architecture) -> None:
    """Raise TriAttentionError unless vLLM's rotary tables match the omega of the statistics."""
    import torch

    tables = [
        (name, module, getattr(module, kept))
        for name, module in model.named_modules()
        # longrope's second table starts with that of short sequences; longer sequences are refused
        for kept in ("cos_sin_cache", "long_short_cos_sin_cache")
        if getattr(module, kept, None) is not None
    ]
    if not tables:
        _cannot("a model without rotary tables to compare with the statistics", "serve another model")
    for name, module, table in tables:
        angle = live.omega.double() * _ROTARY_POSITION
        expected = torch.cat([angle.cos(), angle.sin()]) * live.attention_scaling
        found = table[_ROTARY_POSITION].double().cpu()
        style = "half" if getattr(module, "is_neox_style", True) else "interleaved"
        off = float((found - expected).abs().max()) if found.shape == expected.shape else float("inf")
        if off > _ROTARY_ERROR * max(1.0, live.attention_scaling) or style != live.rope_style:
            raise TriAttentionError(
                f"{name} of vLLM rotates differently ({style}, off by {off:.3g} at position {_ROTARY_POSITION}) from "
                f"the statistics ({live.rope_style}); calibrate this model, or set {SWITCH}=0"
            )
