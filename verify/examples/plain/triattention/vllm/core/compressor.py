"""The published compressor: the cache of one layer at a time, handed in and handed back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace

import torch

from ...algorithm import keep_set
from ...methods.pruning_utils import build_geometric_offsets
from ...model_statistics import load_model_statistics
from .config import TriAttentionConfig
from .kernels.triton_scoring import create_trig_cache
from .scoring import compute_scores


@dataclass
class _Layer:
    """One layer's tokens: in its prompt, evicted, held after the last call; and rounds."""

    prefill_length: int
    evicted: int = 0
    held: int = 0
    rounds: int = 0


class TriAttentionCompressor:
    """Compresses the keys and values of single layers; state is by layer. Raises ValueError without statistics."""

    def __init__(self, config: TriAttentionConfig) -> None:
        if config.stats_path is None:
            raise ValueError("stats_path is None; name a statistics file in the published layout")
        self.config, self._layers, self._table = config, {}, None
        self._statistics = found = load_model_statistics(config.stats_path, config.model_path, "cpu")
        has = {
            "head_dim": 2 * len(found.omega), "num_kv_heads": found.kv_heads, "num_layers": len(found.mean),
            "rope_style": found.style,
        }  # fmt: skip
        for name, value in has.items():
            if getattr(config, name) not in (None, value):
                raise ValueError(f"{name} is {getattr(config, name)!r} and the statistics are for {value!r}")

    def compress(
        self, key_states: torch.Tensor, value_states: torch.Tensor, cache_positions: torch.Tensor | None = None,
        layer_idx: int = 0, *, prefill_length: int | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
        """Keys and values ``[B, H, K, D]`` and their indices ``[B, H, K]`` among those given, which are N if not due.

        The first call of a layer holds its prompt, unless ``prefill_length`` says how long that was. The next token's
        position is one past the largest of ``cache_positions``, or else the number of tokens ever given. Rows are as
        long as one another.
        """
        rows, heads, n = key_states.shape[:3]
        layer = self._layers.setdefault(layer_idx, _Layer(n if prefill_length is None else prefill_length))
        t = n + layer.evicted if cache_positions is None else int(cache_positions.max()) + 1
        rule = self.config.rule()
        target = rule.target(layer.prefill_length)
        if rule.due(n, layer.prefill_length, layer.held + layer.evicted, t):
            scores = self._scores(key_states, layer_idx, t)
            normalize = self.config.sparse_normalize_scores
            evictable = rule.evictable(n, layer.prefill_length, key_states.device)
            mode = "per_layer" if self.config.pruning_mode == "per_layer" else "per_layer_per_head"
            kept = torch.cat(
                [keep_set(row[None], evictable, target, mode=mode, normalize=normalize, group="max") for row in scores]
            )
            layer.rounds, layer.evicted = layer.rounds + 1, layer.evicted + n - target
        else:
            kept = torch.arange(n, device=key_states.device).expand(rows, heads, n)
        layer.held = kept.shape[2]
        keys, values = (x.gather(2, kept[..., None].expand(-1, -1, -1, x.shape[3])) for x in (key_states, value_states))
        return keys, values, kept

    def _scores(self, keys: torch.Tensor, layer_idx: int, t: int) -> torch.Tensor:
        """By row, KV head and query head of it: ``[B, H, G, N]``."""
        config = replace(self.config, pruning_mode="per_head")
        mean, mean_abs, weight, omega = self._statistics.of_layer(layer_idx, keys.device)
        offsets = build_geometric_offsets(config.offset_max_length, keys.device)
        if self._table is None and config.use_triton_scoring and config.use_trig_cache:
            longest = config.trig_cache_max_seq_len or max(65536, config.kv_budget + config.divide_length)
            self._table = create_trig_cache(
                longest, config.divide_length, offsets, omega, keys.device, config.trig_cache_warn_threshold_mb
            )
        stats = {"q_mean_complex": torch.view_as_real(mean), "q_abs_mean": mean_abs}
        scores = compute_scores(keys, None, stats, omega, offsets, weight, config, t, self._table)
        return scores.unflatten(1, (keys.shape[1], -1))

    def get_state(self) -> dict[int, dict[str, int]]:
        """What is known of each layer."""
        return {number: asdict(layer) for number, layer in self._layers.items()}

    def reset(self) -> None:
        """Forget every layer."""
        self._layers.clear()
