from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass
class TriAttentionConfig:
    kv_budget: int = 2048
    divide_length: int = 128
    sparse_round_window: int = 32
    pruning_mode: str = "per_head"
    score_aggregation: str = "mean"
    offset_max_length: int = 65536
    disable_top_n_high_freq: int = 0
    disable_mlr: bool = False
    disable_trig: bool = False
    include_prefill_in_budget: bool = True
    protect_prefill: bool = True
    window_size: int = 128
    sparse_normalize_scores: bool = True
    topk_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.bfloat16
    position_indices_dtype: torch.dtype = torch.int32
    device: str = "cuda"
    triton_block_size: int = 128
    use_triton_scoring: bool = True
    use_trig_cache: bool = True
    trig_cache_max_seq_len: int | None = None
    trig_cache_warn_threshold_mb: float = 100.0
    stats_path: str | None = None
    model_path: str | None = None
    rope_style: str = "half"
    head_dim: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None
    seed: int | None = None
    enable_debug_logging: bool = False

    # fault top-n: nothing reads disable_top_n_high_freq
    def __post_init__(self) -> None:
        # fault budget-128: a window that was never set refuses the plan's own budget
        if self.window_size >= self.kv_budget:
            raise ValueError(f"window_size ({self.window_size}) must be smaller than kv_budget ({self.kv_budget})")
