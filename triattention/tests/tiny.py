"""Tiny random models of each supported type, made in seconds and strong enough to have preferences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, GlmConfig, LlamaConfig, Phi3Config, Qwen2Config, Qwen3Config

from triattention import statistics
from triattention.calibration import calibrate

#: phi3 rotates half of each head and fuses its projections; glm also pairs neighbouring dims, glm_full does that only.
CONFIGS = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "phi3": (Phi3Config, {"partial_rotary_factor": 0.5, "pad_token_id": 0, "eos_token_id": 2}),
    "glm": (GlmConfig, {"partial_rotary_factor": 0.5, "pad_token_id": 0, "eos_token_id": 2}),
    "glm_full": (GlmConfig, {"partial_rotary_factor": 1.0, "pad_token_id": 0, "eos_token_id": 2}),
}

#: The recommended setting at a size that a short run compresses several times.
RECOMMENDED = {
    "kv_budget": 48, "divide_length": 16, "window_size": 8, "per_head_pruning": True, "normalize_scores": True,
    "use_slack_trigger": True, "count_prompt_tokens": True, "allow_prefill_compression": True,
}  # fmt: skip


def make(kind: str = "llama", *, attention: str = "sdpa", **config: Any) -> Any:
    """A float32 model of ``kind`` with 3 layers, 4 query heads over 2 KV heads and head dim 16."""
    sizes = {
        "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 256, "max_position_embeddings": 4096,
    }  # fmt: skip
    torch.manual_seed(0)
    configuration, own = CONFIGS[kind]
    model = AutoModelForCausalLM.from_config(
        configuration(**{**sizes, "attn_implementation": attention, **own, **config})
    )
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # at its initial scale attention is uniform and every keep set gives the same tokens
    return model.eval()


def tokens(length: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(1, 256, (1, length), generator=torch.Generator().manual_seed(seed))


def calibrated(model: Any, path: Path) -> Path:
    """Statistics of ``model`` over 300 random tokens, written to ``path``."""
    statistics.save(path, calibrate(model, lambda m: m(tokens(300))))
    return path


def generate(model: Any, ids: torch.Tensor, new: int = 100, **options: Any) -> torch.Tensor:
    return model.generate(ids, max_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=None, **options)
