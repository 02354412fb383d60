"""The published configuration of the engine-side front ends (plan 3.2), validated on creation."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from triattention.errors import TriAttentionError
from triattention.rope import check_style
from triattention.selection import check_budget, default_window

_ALIASES = {"per_layer_perhead": "per_layer_per_head"}
PRUNING_MODES = ("per_head", "per_layer", "per_layer_per_head")


@dataclass
class TriAttentionConfig:
    """Options of scoring and selection; names, order and defaults as published.

    ``window_size=None`` becomes ``min(128, kv_budget // 2)``. ``rope_style``, ``head_dim``, ``num_kv_heads`` and
    ``num_layers`` are checked against the cache and the statistics if given. Four options accept any value and have no
    effect: ``compute_dtype`` (scoring uses at least float32), ``position_indices_dtype`` (keys are already rotated),
    ``device`` (that of the keys is used) and ``seed`` (ties are broken by index, not at random).
    ``disable_top_n_high_freq``, ``sparse_round_window`` and ``triton_block_size`` belong to the published kernel; only
    their defaults are accepted. Raises TriAttentionError (a ValueError) for unsupported values.
    """

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
    window_size: int | None = None
    sparse_normalize_scores: bool = True
    topk_dtype: torch.dtype = torch.float32
    compute_dtype: torch.dtype = torch.bfloat16
    position_indices_dtype: torch.dtype = torch.int32
    device: torch.device | str = "cuda"
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

    def __post_init__(self) -> None:
        if self.window_size is None:
            self.window_size = default_window(self.kv_budget)
        check_budget(self.kv_budget, self.divide_length, self.window_size)
        check_style(self.rope_style)
        self.pruning_mode = _ALIASES.get(self.pruning_mode, self.pruning_mode)
        if self.pruning_mode not in PRUNING_MODES:
            raise TriAttentionError(f"pruning_mode is {self.pruning_mode!r}; use one of {', '.join(PRUNING_MODES)}")
        if self.score_aggregation not in ("mean", "max"):
            raise TriAttentionError(f"score_aggregation is {self.score_aggregation!r}; use 'mean' or 'max'")
        if self.trig_cache_max_seq_len is not None and self.trig_cache_max_seq_len < self.divide_length:
            raise TriAttentionError(
                f"trig_cache_max_seq_len is {self.trig_cache_max_seq_len}; it must be at least divide_length "
                f"({self.divide_length}), or unset"
            )
        if self.offset_max_length < 1:
            raise TriAttentionError(f"offset_max_length is {self.offset_max_length}; it must be at least 1")
        self.device = torch.device(self.device)
        for name, only in (("disable_top_n_high_freq", 0), ("sparse_round_window", 32), ("triton_block_size", 128)):
            if getattr(self, name) != only:
                raise TriAttentionError(f"{name} is {getattr(self, name)}; only {only} is supported, leave it out")

    def to_dict(self) -> dict[str, Any]:
        """All options as plain values; dtypes and the device as their names."""
        plain = (bool, int, float, str, type(None))
        return {key: value if isinstance(value, plain) else str(value) for key, value in asdict(self).items()}
