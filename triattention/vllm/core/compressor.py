"""The published per-layer compressor: score a layer's cache, keep the budget, gather keys and values."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch

from triattention import statistics
from triattention.errors import TriAttentionError
from triattention.selection import evictable, group_max, keep_indices, keep_mask, protection_exceeds, z_score
from triattention.trig import TrigTableCache, create_trig_cache, geometric_offsets
from triattention.vllm.core.config import TriAttentionConfig
from triattention.vllm.core.scoring import compute_scores

_log = logging.getLogger("triattention.compressor")


@dataclass
class _LayerState:
    """The history of one layer since ``reset``; ``prefill_length`` is None until the prompt has been seen."""

    evicted: int = 0
    rounds: int = 0
    prefill_length: int | None = None


class TriAttentionCompressor:
    """Compress one layer's cache at a time to ``config.kv_budget`` tokens; state is per layer.

    Needs ``config.stats_path``. A statistics file in the published layout contains no RoPE parameters, so it also needs
    ``config.model_path`` (for omega and the attention scaling). Raises TriAttentionError at first use without them.
    """

    def __init__(self, config: TriAttentionConfig) -> None:
        self.config = config
        # scores of every head in float32; pruning_mode and topk_dtype are applied afterwards
        self._per_query_head = replace(config, pruning_mode="per_head", topk_dtype=torch.float32)
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
        """Compress to the budget: keys and values ``[B, H, N, D]`` to ``[B, H, K, D]``, with ascending indices
        ``[B, H, K]``.

        Below the trigger (budget + divide_length) everything is kept. The maximum of ``cache_positions`` ``[N]`` or
        ``[B, N]`` is the position of the newest token in every row; without it tokens are counted since ``reset``. The
        prompt, which ``protect_prefill`` protects, is the cache of a layer's first call after ``reset``, or the first
        ``prefill_length`` tokens. Raises TriAttentionError if the first call is already due and the prompt's length is
        needed but not given, if the cache does not match the configuration or the statistics, or if a score is NaN or
        Inf.
        """
        config = self.config
        batch, heads, length, _ = key_states.shape
        state = self._layers.setdefault(layer_idx, _LayerState())
        prompt = self._prompt(state, length, prefill_length)
        budget = config.kv_budget + (0 if config.include_prefill_in_budget else prompt)
        protected_count = (prompt if config.protect_prefill else 0) + config.window_size
        if length < max(budget, protected_count) + config.divide_length:
            everything = torch.arange(length, device=key_states.device).expand(batch, heads, length)
            return key_states, value_states, everything
        if protected_count > budget and state.rounds == 0:
            warnings.warn(protection_exceeds(protected_count, budget), stacklevel=2)
        evict = evictable(length, budget, protected_count)
        t = int(cache_positions.max()) + 1 if cache_positions is not None else length + state.evicted
        position = torch.arange(length, device=key_states.device)
        protected = position >= length - config.window_size
        if config.protect_prefill:
            protected = protected | (position < prompt)
        protected = protected.expand(batch, length)
        scores = self._scores(key_states, layer_idx, t, ~protected)
        mask = keep_mask(scores, torch.ones_like(protected), protected, [evict] * batch)
        kept = keep_indices(mask, length - evict).expand(batch, heads, -1)
        state.evicted += evict
        state.rounds += 1
        if config.enable_debug_logging:
            _log.warning("layer %d, t = %d: %d of %d tokens evicted", layer_idx, t, evict, length)
        keys, values = (
            x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (key_states, value_states)
        )
        return keys, values, kept

    def _prompt(self, state: _LayerState, length: int, given: int | None) -> int:
        """The length of the prompt, stored until ``reset``."""
        config = self.config
        if given is not None:
            state.prefill_length = given
        elif state.prefill_length is None:
            matters = config.protect_prefill or not config.include_prefill_in_budget
            if matters and length >= config.kv_budget + config.divide_length:
                raise TriAttentionError(
                    f"the first call has {length} tokens and is due for compression, but the length of the prompt is "
                    "unknown; pass prefill_length, or set protect_prefill=False and include_prefill_in_budget=True"
                )
            state.prefill_length = length
        return state.prefill_length

    def _scores(self, keys: torch.Tensor, layer_idx: int, t: int, region: torch.Tensor) -> torch.Tensor:
        """Selection scores ``[B, H, N]``, or ``[B, 1, N]`` for ``per_layer`` (the maximum over KV heads)."""
        config, loaded = self.config, self._load(keys)
        loaded.check(config, keys, layer_idx)
        scores = compute_scores(
            keys, None, loaded.head_stats[layer_idx], loaded.omega, loaded.offsets, loaded.freq_weight,
            self._per_query_head, round_start=t, trig_cache=loaded.trig_cache,
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
        """Clear the state of all layers before a new sequence."""
        self._layers.clear()

    def get_state(self) -> dict[int, dict[str, Any]]:
        """Per layer: tokens evicted, rounds run, length of the protected prompt."""
        return {layer: dict(vars(state)) for layer, state in sorted(self._layers.items())}


@dataclass(frozen=True)
class _Loaded:
    """Statistics on the device of the cache, with the RoPE parameters of their model."""

    head_stats: dict[int, dict[str, torch.Tensor]]
    omega: torch.Tensor
    offsets: torch.Tensor
    freq_weight: torch.Tensor
    trig_cache: TrigTableCache | None
    style: str
    kv_heads: int | None
    source: str

    @classmethod
    def from_config(cls, config: TriAttentionConfig, device: torch.device) -> _Loaded:
        if config.stats_path is None:
            raise TriAttentionError("stats_path is not set; give the compressor a statistics file")
        loaded = statistics.load(config.stats_path)
        omega, scaling, style = loaded.rope(config.model_path)
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
                "q_pass_mean": loaded.q_pass_mean[layer].to(device),
            }
            for layer in range(loaded.q_abs_mean.shape[0])
        }
        weight = torch.full(loaded.q_abs_mean.shape[1:], scaling, device=device)
        kv_heads = loaded.architecture.num_kv_heads if loaded.architecture else None
        return cls(head_stats, omega, offsets, weight, trig_cache, style, kv_heads, str(config.stats_path))

    def check(self, config: TriAttentionConfig, keys: torch.Tensor, layer_idx: int) -> None:
        """Raise TriAttentionError, naming both values, unless configuration, statistics and cache match."""
        layers = len(self.head_stats)
        if not 0 <= layer_idx < layers:
            raise TriAttentionError(f"{self.source} has {layers} layers, but layer {layer_idx} was requested")
        if config.rope_style != self.style:
            raise TriAttentionError(
                f"rope_style is {config.rope_style!r}, but that of {self.source} is {self.style!r}; use that"
            )
        for name, given, found in (
            ("num_layers", config.num_layers, layers),
            ("num_kv_heads", config.num_kv_heads, keys.shape[1]),
            ("head_dim", config.head_dim, keys.shape[3]),
            ("statistics' KV heads", self.kv_heads, keys.shape[1]),
        ):
            if given is not None and given != found:
                raise TriAttentionError(f"{name} is {given}, but {found} here; use the values of one model")
