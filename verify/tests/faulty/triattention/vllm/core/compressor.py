from __future__ import annotations

import torch

from ...methods.pruning_utils import build_geometric_offsets, build_rotary, load_head_frequency_stats
from .scoring import compute_scores


class TriAttentionCompressor:
    def __init__(self, config):
        self.config = config
        self.rounds = {}

    def compress(self, key_states, value_states, cache_positions=None, layer_idx=0):
        config, device, n = self.config, key_states.device, key_states.shape[2]
        if n < config.kv_budget + config.divide_length:
            return key_states, value_states, torch.arange(n, device=device)
        # fault compressor-file: no file is no error of its own, it is a crash
        _, heads = load_head_frequency_stats(config.stats_path, device)
        mine = [stats for (layer, _), stats in sorted(heads.items()) if layer == layer_idx]
        stats = {
            "q_mean_complex": torch.view_as_real(torch.stack([one.q_mean_complex for one in mine])),
            "q_abs_mean": torch.stack([one.q_abs_mean for one in mine]),
        }
        omega = build_rotary(device, config.model_path, torch.float32).inv_freq
        group = len(mine) // key_states.shape[1]
        scores = compute_scores(
            key_states.repeat_interleave(group, 1), cache_positions, stats, omega,
            build_geometric_offsets(config.offset_max_length, device), torch.ones_like(stats["q_abs_mean"]), config,
        )  # fmt: skip
        # fault compressor-z: over every token, protected ones too, with ddof 1
        scores = (scores - scores.mean(-1, keepdim=True)) / (scores.std(-1, keepdim=True) + 1e-8)
        scores = scores.unflatten(1, (-1, group)).amax(2)
        scores[..., n - config.window_size :] = torch.inf
        # fault ties: whatever topk takes, in whatever order
        kept = scores.topk(config.kv_budget, dim=-1, sorted=False).indices
        self.rounds[layer_idx] = self.rounds.get(layer_idx, 0) + 1
        index = kept[..., None].expand(-1, -1, -1, key_states.shape[-1])
        return key_states.gather(2, index), value_states.gather(2, index), kept

    def reset(self):
        self.rounds.clear()

    def get_state(self):
        return dict(self.rounds)
