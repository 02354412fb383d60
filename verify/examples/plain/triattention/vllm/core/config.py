"""The published options of the compressor."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

import torch

from ...algorithm import AGGREGATIONS, STYLES, Rule, one_of

#: What might change a result in another implementation, and has no counterpart here: only the default is accepted.
_DEFAULT_ONLY = (
    "sparse_round_window", "disable_top_n_high_freq", "compute_dtype", "position_indices_dtype",
    "enable_debug_logging",
)  # fmt: skip


@dataclass
class TriAttentionConfig:
    """The published options, with an unset ``window_size`` as ``min(128, kv_budget // 2)``.

    Scores are computed where the keys are, whatever ``device`` says, and the index decides ties, whatever ``seed`` is.
    The size of blocks and of tables changes no score, and nothing here.
    Raises ValueError naming an option that cannot be honoured.
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
    device: str = "cuda"
    triton_block_size: int = 128
    use_triton_scoring: bool = True
    use_trig_cache: bool = True
    trig_cache_max_seq_len: int | None = None
    trig_cache_warn_threshold_mb: float = 100.0
    stats_path: Any = None
    model_path: Any = None
    rope_style: str = "half"
    head_dim: int | None = None
    num_kv_heads: int | None = None
    num_layers: int | None = None
    seed: int | None = None
    enable_debug_logging: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.name in _DEFAULT_ONLY and getattr(self, field.name) != field.default:
                raise ValueError(
                    f"{field.name} is {getattr(self, field.name)!r} and has no effect here; leave it at {field.default}"
                )
        one_of("pruning_mode", self.pruning_mode, ("per_head", "per_layer", "per_layer_per_head", "per_layer_perhead"))
        one_of("score_aggregation", self.score_aggregation, AGGREGATIONS)
        one_of("rope_style", self.rope_style, STYLES)
        if self.window_size is None:
            self.window_size = min(128, self.kv_budget // 2)
        self.rule()

    def rule(self) -> Rule:
        """Budget, trigger and protected ranges."""
        return Rule(
            self.kv_budget, self.divide_length, self.window_size, self.protect_prefill, self.include_prefill_in_budget
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values; dtypes by name."""
        return {name: str(x) if isinstance(x, torch.dtype) else x for name, x in asdict(self).items()}
