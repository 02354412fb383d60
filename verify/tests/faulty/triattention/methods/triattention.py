from __future__ import annotations

from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch

from .pruning_utils import (
    build_geometric_offsets,
    build_rotary,
    compute_frequency_scaling,
    compute_frequency_statistics_from_means,
    load_head_frequency_stats,
    score_keys_for_round,
)


@dataclass
class TriAttentionConfig:
    stats_path: Any
    model_path: Any
    device: Any
    dtype: torch.dtype
    budget: int
    offset_max_length: int = 65536
    score_aggregation: str = "mean"
    pruning_seed: int = 0
    metadata_expectations: Any = None
    normalize_scores: bool = False
    count_prompt_tokens: bool = False
    allow_prefill_compression: bool = False
    divide_length: int = 128
    use_slack_trigger: bool = False
    per_head_pruning: bool = False
    per_layer_perhead_pruning: bool = False
    layer_perhead_aggregation: str = "max"
    disable_mlr: bool = False
    disable_trig: bool = False


class TriAttention:
    def __init__(self, config):
        self.config = config
        _, self.heads = load_head_frequency_stats(config.stats_path, config.device)
        self.rotary = build_rotary(config.device, config.model_path, config.dtype)
        self.offsets = build_geometric_offsets(config.offset_max_length, config.device)
        self.noise = torch.Generator(device=config.device).manual_seed(config.pruning_seed)
        self.reset_compression_state()

    def reset_compression_state(self):
        self.seen, self.positions = 0, None

    def due(self, length):
        config = self.config
        if config.use_slack_trigger:
            # fault trigger: tested for equality, so a step of several tokens goes past it
            return length == config.budget + config.divide_length
        return length >= config.budget and self.seen % config.divide_length == 0

    def compute_keep_indices(self, pkv_tuple, prefix_length=0):
        """``[L, H, K]``, prompt first."""
        config = self.config
        scores = torch.stack([self._scores(keys, layer) for layer, (keys, _) in enumerate(pkv_tuple)])
        if config.normalize_scores:
            # fault z-region: over the protected prompt as well, with ddof 1
            scores = (scores - scores.mean(-1, keepdim=True)) / scores.std(-1, keepdim=True).clamp_min(1e-6)
        grouped = scores.mean(2) if config.layer_perhead_aggregation == "mean" else scores.amax(2)
        if config.per_head_pruning:
            grouped = grouped.mean(0, keepdim=True).expand_as(grouped)
        elif not config.per_layer_perhead_pruning:
            grouped = grouped.amax((0, 1), keepdim=True).expand_as(grouped)
        # ties are broken by noise, the same for all
        grouped = grouped + 1e-6 * torch.rand(grouped.shape[-1], generator=self.noise, device=grouped.device)
        prompt = 0 if config.allow_prefill_compression else prefix_length
        room = config.budget - prompt if config.count_prompt_tokens else config.budget
        chosen = grouped[..., prompt:].topk(room, dim=-1).indices + prompt
        first = torch.arange(prompt, device=chosen.device).expand(*chosen.shape[:2], -1)
        return torch.cat([first, chosen], -1)

    def _scores(self, keys, layer):
        """``[H, G, N]``; fault row-0: of the first row of the batch, whatever the others hold."""
        config, positions = self.config, self.positions[layer].to(keys.device)
        heads, n, d = keys.shape[1:]
        group = len([head for at, head in self.heads if at == layer]) // heads
        scale = float(self.rotary.attention_scaling)
        weight = compute_frequency_scaling(self.rotary, d, torch.float32, keys.device)
        found = []
        for head in range(heads):
            # un-rotate by the angles of each key's own position
            angle = positions[head][:, None] * self.rotary.inv_freq
            first, second = keys[0, head].float().chunk(2, -1)
            k = torch.complex(first, second) * torch.polar(torch.ones_like(angle), -angle) / scale
            plain = torch.cat([k.real, k.imag], -1)
            for query in range(head * group, (head + 1) * group):
                stats = self.heads[layer, query]
                amp, phi, extra = compute_frequency_statistics_from_means(
                    stats.q_mean_complex, stats.q_abs_mean, plain, disable_mlr=config.disable_mlr
                )
                found.append(
                    score_keys_for_round(
                        positions[head], self.seen, amp, phi, self.rotary.inv_freq, extra, self.offsets,
                        config.score_aggregation, weight, config.disable_trig,
                    )
                )  # fmt: skip
        return torch.stack(found).view(heads, group, n)

    @torch.no_grad()
    def compress(self, cache, prompt):
        kept = self.compute_keep_indices([(layer.keys, layer.values) for layer in cache.layers], prompt)
        for layer, index in zip(cache.layers, kept, strict=True):
            gather = index[None, ..., None].expand(layer.keys.shape[0], -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, gather), layer.values.gather(2, gather)
        self.positions = self.positions.gather(2, kept.cpu())


def apply_triattention_patch(
    model, stats_path, model_path, kv_budget, offset_max_length=65536, score_aggregation="mean", pruning_seed=0,
    metadata_expectations=None, normalize_scores=False, count_prompt_tokens=False, allow_prefill_compression=False,
    divide_length=128, use_slack_trigger=False, per_head_pruning=False, per_layer_perhead_pruning=False,
    layer_perhead_aggregation="max", disable_mlr=False, disable_trig=False,
):  # fmt: skip
    options = {name: value for name, value in locals().items() if name not in ("model", "kv_budget")}
    method = TriAttention(TriAttentionConfig(device=model.device, dtype=model.dtype, budget=kv_budget, **options))
    unpatched = getattr(model, "_unpatched", model.forward)
    model._unpatched, prompt = unpatched, 0

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, use_cache=None, **rest
    ):
        nonlocal prompt
        from transformers import DynamicCache

        held = past_key_values.get_seq_length() if past_key_values is not None else 0
        new, layers = input_ids.shape[1], self.config.num_hidden_layers
        if past_key_values is None and use_cache is not False:
            past_key_values = DynamicCache(config=self.config)
        if held == 0:
            method.reset_compression_state()
            prompt = new
        arriving = torch.arange(method.seen, method.seen + new)
        heads = self.config.num_key_value_heads
        method.positions = torch.cat(
            [*([] if method.positions is None else [method.positions]), arriving.expand(layers, heads, -1)], -1
        )
        if position_ids is None or held < method.seen:
            position_ids = arriving[None].to(input_ids.device)
        if attention_mask is not None:
            attention_mask = attention_mask[:, -(held + new) :]
        out = unpatched(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids,
            past_key_values=past_key_values, use_cache=use_cache, **rest,
        )  # fmt: skip
        method.seen += new
        counted = held + new - (0 if config_counts else prompt)
        if past_key_values is not None and method.due(counted):
            method.compress(past_key_values, prompt)
        return out

    config_counts = count_prompt_tokens or allow_prefill_compression
    model.forward = MethodType(forward, model)
