"""Serves the same requests with vLLM's V1 and V2 model runners, in one process without a GPU, and prints the replies.

vLLM takes the V2 runner only where Triton has a driver, because its block tables and inputs are prepared by Triton
kernels. Here Triton's interpreter runs them, so the runner is the real one, and slow.

``python -m triattention.tests.vllm_runners MODEL`` with the plugin's settings in the environment prints one JSON line.
"""

from __future__ import annotations

import importlib
import json
import os
import random
import sys
from typing import Any

#: Prompts, in chunks of 64; a negative one begins with two blocks of the one before. There are too few blocks for them.
_PROMPTS, _NEW_TOKENS, _BLOCKS = (110, 120, 125, -80), 80, 17


def _pretend_driver() -> None:
    os.environ.update(TRITON_INTERPRET="1", VLLM_ENABLE_V1_MULTIPROCESSING="0")
    from types import SimpleNamespace

    from triton.backends import backends

    backends["cpu"] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)
    importlib.import_module("vllm.triton_utils")  # which looks for a driver only once

    del backends["cpu"]


def _counted(name: str) -> float:
    from prometheus_client import REGISTRY

    return REGISTRY.get_sample_value(f"triattention:{name}_total") or 0.0


def _prompts() -> list[dict[str, list[int]]]:
    draw = random.Random(1)
    prompts: list[list[int]] = []
    for length in _PROMPTS:
        shared = prompts[-1][:64] if length < 0 else []
        prompts.append(shared + [draw.randrange(5, 99) for _ in range(abs(length) - len(shared))])
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def _served(model: str, *, v2: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, envs

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    envs.disable_envs_cache()
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=512, max_num_batched_tokens=64,
        max_num_seqs=4, distributed_executor_backend="uni", disable_log_stats=False, async_scheduling=True,
        num_gpu_blocks_override=_BLOCKS,
    )  # fmt: skip
    before = {name: _counted(name) for name in ("rounds", "compactions", "rounds_missed")}
    sampling = SamplingParams(max_tokens=_NEW_TOKENS, temperature=0, ignore_eos=True, logprobs=1)
    replies = engine.generate(_prompts(), sampling, use_tqdm=False)
    runner = engine.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    counted = {metric.name: metric.value for metric in engine.get_metrics() if hasattr(metric, "value")}
    engine.llm_engine.engine_core.shutdown()
    outputs = [reply.outputs[0] for reply in replies]
    return {
        "runner": type(runner).__mro__[1].__module__,
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [step[token].logprob for step, token in zip(one.logprobs, one.token_ids, strict=True)] for one in outputs
        ],
        **{name: _counted(name) - value for name, value in before.items()},
        "preemptions": counted["vllm:num_preemptions"],
        "prefix_hits": counted["vllm:prefix_cache_hits"],
    }


def main() -> None:
    _pretend_driver()
    print(f"\n{json.dumps([_served(sys.argv[1], v2=v2) for v2 in (False, True)])}")


if __name__ == "__main__":
    main()
