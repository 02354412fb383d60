from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class HeadFrequencyStats:
    q_mean_complex: torch.Tensor
    q_abs_mean: torch.Tensor


def build_rotary(cache_device, model_path, dtype, config=None):
    from transformers import AutoConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config or AutoConfig.from_pretrained(model_path)).to(cache_device)


def build_geometric_offsets(max_length, device):
    return torch.tensor([float(1 << i) for i in range(max_length.bit_length())], device=device)


def compute_frequency_scaling(rotary, head_dim, dtype, device):
    return torch.full((head_dim // 2,), float(rotary.attention_scaling) ** 2, dtype=dtype, device=device)


def compute_frequency_statistics_from_means(q_mean_complex, q_abs_mean, k_unrot, style="half", disable_mlr=False):
    first, second = (k_unrot[..., ::2], k_unrot[..., 1::2]) if style == "interleaved" else k_unrot.chunk(2, -1)
    k = torch.complex(first.float(), second.float())
    m_abs = q_mean_complex.abs()
    extra = q_abs_mean if disable_mlr else q_abs_mean - m_abs
    return m_abs * k.abs(), (q_mean_complex * k.conj()).angle(), extra * k.abs()


def score_keys_for_round(
    key_indices, round_start, amp, phi, omega, extra, offsets, aggregation, freq_scale_sq, disable_trig=False
):
    total = (extra * freq_scale_sq).sum(-1)
    if disable_trig:
        return total
    distance = (round_start - key_indices)[:, None] + offsets
    trig = (amp[:, None] * freq_scale_sq * torch.cos(distance[..., None] * omega + phi[:, None])).sum(-1)
    return total + (trig.amax(1) if aggregation == "max" else trig.mean(1))


def load_head_frequency_stats(stats_path, device):
    payload = torch.load(stats_path, map_location=device, weights_only=True)
    heads = {}
    for layer, head in payload["metadata"]["sampled_heads"]:
        entry = payload["stats"][f"layer{layer:02d}_head{head:02d}"]
        mean = torch.complex(entry["q_mean_real"], entry["q_mean_imag"])
        heads[layer, head] = HeadFrequencyStats(mean, entry["q_abs_mean"])
    return payload["metadata"], heads


def save_head_frequency_stats(output_path, sampled_heads, stats_map, metadata):
    stats = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": stats_map[layer, head].q_mean_complex.real,
            "q_mean_imag": stats_map[layer, head].q_mean_complex.imag,
            "q_abs_mean": stats_map[layer, head].q_abs_mean,
        }
        for layer, head in sampled_heads
    }
    torch.save({"metadata": {**metadata, "sampled_heads": list(sampled_heads)}, "stats": stats}, output_path)
