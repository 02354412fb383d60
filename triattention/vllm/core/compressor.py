"""The published per-layer compressor: score a layer's cache, keep the budget, gather keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from triattention import statistics
from triattention.errors import TriAttentionError
from triattention.selection import evictable, group_max, keep_indices, keep_mask, z_score
from triattention.trig import TrigTableCache, create_trig_cache, geometric_offsets
from triattention.vllm.core.config import TriAttentionConfig
from triattention.vllm.core.scoring import compute_scores


@dataclass
class _LayerState:
    """What one layer has been through since ``reset``: tokens evicted, rounds run, the protected prompt."""

    evicted: int = 0
    rounds: int = 0
    prefill_length: int = 0


class TriAttentionCompressor:
    """Compress one layer's cache at a time to ``config.kv_budget`` tokens; state is per layer.

    Needs ``config.stats_path``. A statistics file in the published layout says nothing about RoPE, so it also needs
    ``config.model_path`` (for omega and the attention scaling). Raises TriAttentionError for either, when first used.
    """

    def __init__(self, config: TriAttentionConfig) -> None:
        self.config = config
        self._layers: dict[int, _LayerState] = {}
        self._loaded: _Loaded | None = None

    def compress(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        cache_positions: torch.Tensor | None = None,
        layer_idx: int = 0,
        *,
        prefill_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Keep the budget of a layer: ``[B, H, N, D]`` twice to ``[B, H, K, D]`` twice and ascending indices ``[B,
        H, K]``.

        Below the trigger (budget + divide_length) everything is kept. ``cache_positions`` ``[N]`` or ``[B, N]``
        gives the position of the newest token; without it tokens are counted from ``reset``. ``prefill_length``
        says how many tokens at the front are the prompt, which ``protect_prefill`` protects; a length once given
        holds until ``reset``. Raises TriAttentionError when a score is NaN or Inf (a key is), naming the layer.
        """
        state = self._layers.setdefault(layer_idx, _LayerState())
        if prefill_length is not None:
            state.prefill_length = prefill_length
        batch, heads, length, _ = key_states.shape
        config = self.config
        budget = config.kv_budget + (0 if config.include_prefill_in_budget else state.prefill_length)
        prompt = min(state.prefill_length, length) if config.protect_prefill else 0
        protected_count = min(prompt + config.window_size, length)
        if length < max(budget, protected_count) + config.divide_length:
            everything = torch.arange(length, device=key_states.device).expand(batch, heads, length)
            return key_states, value_states, everything
        evict = evictable(length, budget, protected_count)
        t = int(cache_positions.max()) + 1 if cache_positions is not None else length + state.evicted
        position = torch.arange(length, device=key_states.device)
        protected = ((position < prompt) | (position >= length - config.window_size)).expand(batch, length)
        valid = torch.ones_like(protected)
        scores = self._scores(key_states, layer_idx, t, ~protected)
        mask = keep_mask(scores, valid, protected, [evict] * batch)
        kept = keep_indices(mask, length - evict).expand(batch, heads, -1)
        gather = kept[..., None].expand(-1, -1, -1, key_states.shape[-1])
        state.evicted += evict
        state.rounds += 1
        return key_states.gather(2, gather), value_states.gather(2, gather), kept

    def _scores(self, keys: torch.Tensor, layer_idx: int, t: int, region: torch.Tensor) -> torch.Tensor:
        """Selection scores ``[B, H, N]``, or ``[B, 1, N]`` for ``per_layer`` (the maximum over KV heads)."""
        config, loaded = self.config, self._load(keys)
        if layer_idx not in loaded.head_stats:
            raise TriAttentionError(
                f"{config.stats_path} has {len(loaded.head_stats)} layers and layer {layer_idx} was asked for"
            )
        per_query_head = TriAttentionConfig(**{**vars(config), "pruning_mode": "per_head", "topk_dtype": torch.float32})
        scores = compute_scores(
            keys, None, loaded.head_stats[layer_idx], loaded.omega, loaded.offsets, loaded.freq_weight,
            per_query_head, round_start=t, trig_cache=loaded.trig_cache,
        )  # fmt: skip
        if not scores.isfinite().all():
            raise TriAttentionError(
                f"layer {layer_idx} has a NaN or Inf score, so a cached key is NaN or Inf; check the model's dtype"
            )
        if config.sparse_normalize_scores:
            scores = z_score(scores, region)
        scores = group_max(scores, keys.shape[1])
        scores = scores.amax(1, keepdim=True) if config.pruning_mode == "per_layer" else scores
        return scores.to(config.topk_dtype)

    def _load(self, keys: torch.Tensor) -> _Loaded:
        if self._loaded is None:
            self._loaded = _Loaded.from_config(self.config, keys.device)
        return self._loaded

    def reset(self) -> None:
        """Forget every layer's state, before the next sequence."""
        self._layers.clear()

    def get_state(self) -> dict[int, dict[str, Any]]:
        """Per layer: tokens evicted, rounds run, length of the protected prompt."""
        return {layer: dict(vars(state)) for layer, state in sorted(self._layers.items())}


@dataclass(frozen=True)
class _Loaded:
    """Statistics on the device of the cache, with what their model's RoPE needs."""

    head_stats: dict[int, dict[str, torch.Tensor]]
    omega: torch.Tensor
    offsets: torch.Tensor
    freq_weight: torch.Tensor
    trig_cache: TrigTableCache | None

    @classmethod
    def from_config(cls, config: TriAttentionConfig, device: torch.device) -> _Loaded:
        if config.stats_path is None:
            raise TriAttentionError("stats_path is not set; give the compressor a statistics file")
        loaded = statistics.load(config.stats_path)
        omega, scaling = rope_of(loaded, config.model_path)
        omega, offsets = omega.to(device), geometric_offsets(config.offset_max_length, device)
        trig_cache = None
        if config.use_trig_cache:
            longest = config.trig_cache_max_seq_len or max(65536, config.kv_budget + config.divide_length)
            trig_cache = create_trig_cache(
                longest, config.divide_length, offsets, omega, device, config.trig_cache_warn_threshold_mb
            )
        head_stats = {
            layer: {
                "q_mean_complex": torch.stack([loaded.q_mean_real[layer], loaded.q_mean_imag[layer]], -1).to(device),
                "q_abs_mean": loaded.q_abs_mean[layer].to(device),
            }
            for layer in range(loaded.q_abs_mean.shape[0])
        }
        weight = torch.full(loaded.q_abs_mean.shape[1:], scaling, device=device)
        return cls(head_stats, omega, offsets, weight, trig_cache)


def rope_of(loaded: statistics.Statistics, model_path: Any) -> tuple[torch.Tensor, float]:
    """omega float32 ``[F]`` and s of the model the statistics are of: from the file, or from the model at
    ``model_path``.

    Raises TriAttentionError when the file does not say and no path is given.
    """
    if loaded.architecture is not None:
        return loaded.architecture.omega, loaded.architecture.attention_scaling
    if model_path is None:
        raise TriAttentionError(f"{loaded.source} does not carry omega; give model_path as well, or calibrate again")
    from triattention.methods.pruning_utils import build_rotary

    rotary = build_rotary("cpu", model_path, torch.float32)
    return rotary.inv_freq.float(), float(getattr(rotary, "attention_scaling", 1.0))
