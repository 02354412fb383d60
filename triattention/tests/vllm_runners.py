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

#: Each scenario: options of the engine, the lengths of its prompts, and the tokens to generate.
SCENARIOS: dict[str, tuple[dict[str, Any], tuple[int, ...], int]] = {
    # prompts in chunks of 64, the last of which shares a prefix of two blocks with the one before
    "chunks and a shared prefix": ({"num_gpu_blocks_override": 64}, (140, 20, 150, -66), 32),
    # 3 requests need up to 8 blocks each, and there are 16
    "preemption": ({"num_gpu_blocks_override": 17, "async_scheduling": True}, (110, 120, 125, 20), 80),
}


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


def _prompts(lengths: tuple[int, ...]) -> list[dict[str, list[int]]]:
    draw = random.Random(1)
    prompts: list[list[int]] = []
    for length in lengths:
        shared = prompts[-1][:64] if length < 0 else []
        prompts.append(shared + [draw.randrange(5, 99) for _ in range(abs(length) - len(shared))])
    return [{"prompt_token_ids": prompt} for prompt in prompts]


def _served(model: str, scenario: str, *, v2: bool) -> dict[str, Any]:
    from vllm import LLM, SamplingParams, envs

    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = str(int(v2))
    envs.disable_envs_cache()
    options, lengths, new_tokens = SCENARIOS[scenario]
    engine = LLM(
        model=model, dtype="float32", enforce_eager=True, block_size=32, max_model_len=512, max_num_batched_tokens=64,
        max_num_seqs=4, distributed_executor_backend="uni", disable_log_stats=False, **options,
    )  # fmt: skip
    before = {name: _counted(name) for name in ("rounds", "compactions", "rounds_missed")}
    sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True, logprobs=1)
    replies = engine.generate(_prompts(lengths), sampling, use_tqdm=False)
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
    found = {scenario: [_served(sys.argv[1], scenario, v2=v2) for v2 in (False, True)] for scenario in SCENARIOS}
    print(f"\n{json.dumps(found)}")


if __name__ == "__main__":
    main()
