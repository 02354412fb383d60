"""vLLM's own scheduler, patched as the plugin patches it, without an engine around it: for vLLM 0.19 and later."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from triattention.vllm.runtime.eviction import Rule

#: A token that ends a request, so that an output comes back shorter than the scheduler could know.
STOP = 7
VOCABULARY = 1000

_MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 32, "intermediate_size": 32,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": VOCABULARY,
    "max_position_embeddings": 65536, "torch_dtype": "float32",
}  # fmt: skip


def _call(function: Callable[..., Any], *, like: Callable[..., Any] | None = None, **wanted: Any) -> Any:
    """Call with those keyword arguments that this vLLM's function has (or ``like``, which it passes them on to)."""
    names = inspect.signature(like or function).parameters
    return function(**{name: value for name, value in wanted.items() if name in names})


def make_scheduler(
    rule: Rule, folder: Path, *, num_blocks: int, asynchronous: bool, caching: bool, policy: str = "fcfs",
    max_model_len: int = 256, max_num_batched_tokens: int = 48, max_num_seqs: int = 8,
) -> Any:  # fmt: skip
    """A scheduler of vLLM's, sync or async, as ``SchedulerConfig.get_scheduler_cls`` returns it with the plugin."""
    import torch
    from vllm.config import CacheConfig, ModelConfig, SchedulerConfig, VllmConfig
    from vllm.v1.core.kv_cache_utils import init_none_hash
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.structured_output import StructuredOutputManager

    from triattention.vllm.runtime.integration_monkeypatch import _patch_scheduler
    from triattention.vllm.runtime.settings import RuntimeSettings

    (folder / "config.json").write_text(json.dumps(_MODEL))
    model = ModelConfig(
        model=str(folder), tokenizer=str(folder), skip_tokenizer_init=True, dtype="float32", max_model_len=max_model_len
    )
    scheduling = _call(
        SchedulerConfig, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len, enable_chunked_prefill=True, is_encoder_decoder=False, policy=policy,
    )  # fmt: skip
    cache = CacheConfig(block_size=rule.block_size, enable_prefix_caching=caching)
    config = VllmConfig(model_config=model, scheduler_config=scheduling, cache_config=cache)
    config.scheduler_config.async_scheduling = asynchronous  # a CPU's platform turns it off
    config.cache_config.num_gpu_blocks = num_blocks
    init_none_hash(_hash())

    class Configuration(SchedulerConfig):
        """Patched in vLLM's stead, so that this process stays as it is."""

    settings = RuntimeSettings(
        kv_budget=rule.kv_budget, divide_length=rule.divide_length, window_size=rule.window,
        protect_prefill=rule.protect_prefill, include_prefill_in_budget=rule.include_prefill_in_budget,
    )  # fmt: skip
    _patch_scheduler(SimpleNamespace(SchedulerConfig=Configuration), settings)
    spec = FullAttentionSpec(block_size=rule.block_size, num_kv_heads=1, head_size=16, dtype=torch.float32)
    groups = [KVCacheGroupSpec(["model.layers.0.self_attn.attn"], spec)]
    return _call(
        Configuration.get_scheduler_cls(config.scheduler_config), like=Scheduler, vllm_config=config,
        kv_cache_config=KVCacheConfig(num_blocks=num_blocks, kv_cache_tensors=[], kv_cache_groups=groups),
        structured_output_manager=StructuredOutputManager(config), block_size=rule.block_size,
        hash_block_size=rule.block_size, log_stats=False,
    )  # fmt: skip


def make_request(name: str, prompt: list[int], max_tokens: int, block_size: int, priority: int, arrival: float) -> Any:
    """A request of vLLM's, which hashes its blocks as the engine's requests do."""
    from vllm import SamplingParams
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher
    from vllm.v1.request import Request

    return _call(
        Request, request_id=name, prompt_token_ids=prompt, pooling_params=None, arrival_time=arrival,
        sampling_params=SamplingParams(max_tokens=max_tokens, ignore_eos=True, stop_token_ids=[STOP]),
        priority=priority, block_hasher=get_request_block_hasher(block_size, _hash()),
    )  # fmt: skip


def runner_output(sampled: Mapping[str, list[int]]) -> Any:
    """What a model runner gives back: the sampled tokens by request, none where the prefill goes on."""
    from vllm.v1.outputs import ModelRunnerOutput

    return ModelRunnerOutput(
        req_ids=list(sampled), req_id_to_index={name: number for number, name in enumerate(sampled)},
        sampled_token_ids=list(sampled.values()), logprobs=None, prompt_logprobs_dict={}, pooler_output=[],
    )  # fmt: skip


def abort(scheduler: Any, name: str) -> None:
    from vllm.v1.request import RequestStatus

    scheduler.finish_requests(name, RequestStatus.FINISHED_ABORTED)


def _hash() -> Callable[[Any], bytes]:
    from vllm.utils.hashing import sha256

    return sha256
