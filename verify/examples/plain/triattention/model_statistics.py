"""Statistics of a whole model, with the frequencies of its RoPE: what scoring needs besides the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .algorithm import STYLES, one_of
from .methods.pruning_utils import build_rotary, load_head_frequency_stats

#: The models that rotate neighbouring dims; others pair a dim with one in the other half.
_INTERLEAVED = ("glm", "glm4")


@dataclass(frozen=True)
class ModelStatistics:
    """``mean`` complex and ``mean_abs`` ``[L, H*G, F]``, ``omega`` ``[F]``, and ``weight`` ``[H*G, F]``.

    A cached key carries the model's attention scaling once, so the weight is that scaling and not its square.
    """

    mean: torch.Tensor
    mean_abs: torch.Tensor
    omega: torch.Tensor
    weight: torch.Tensor
    style: str
    kv_heads: int

    def of_layer(self, layer: int, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Mean, mean length, weight and omega of one layer, on ``device``. Raises ValueError where it has none."""
        if not 0 <= layer < len(self.mean):
            raise ValueError(f"layer {layer} has no statistics; there are some of layers 0 to {len(self.mean) - 1}")
        return tuple(x.to(device) for x in (self.mean[layer], self.mean_abs[layer], self.weight, self.omega))


def load_model_statistics(
    stats_path: str | Path, model_path: str | Path | None, device: torch.device | str, *, config: Any = None,
    expected: Mapping[str, Any] | None = None,
) -> ModelStatistics:  # fmt: skip
    """The statistics of the model in ``model_path``, or of ``config``.

    ``expected`` are metadata that the file must have. Raises ValueError naming both values where file and model differ,
    and for a head that the file lacks.
    """
    from transformers import AutoConfig

    if config is None and model_path is None:
        raise ValueError("model_path is None; name the model's directory, which says how it rotates its keys")
    config = (AutoConfig.from_pretrained(model_path) if config is None else config).get_text_config()
    metadata, found = load_head_frequency_stats(stats_path, device)
    for name, value in (expected or {}).items():
        if metadata.get(name) != value:
            raise ValueError(f"{stats_path} has {name} = {metadata.get(name)!r}, expected {value!r}")
    one_of("rope_style of the statistics", metadata.get("rope_style"), STYLES)
    rotated = "interleaved" if config.model_type in _INTERLEAVED else "half"
    if metadata["rope_style"] != rotated:
        raise ValueError(f"{stats_path} has rope_style {metadata['rope_style']!r}, the model rotates {rotated!r}")
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    wanted = [(layer, head) for layer in range(layers) for head in range(heads)]
    if found.keys() != set(wanted):
        raise ValueError(f"{stats_path} has statistics of {len(found)} heads, the model has {layers} x {heads}")
    rotary = build_rotary(device, model_path, torch.float32, config=config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = {metadata.get("head_dim"), 2 * len(rotary.inv_freq), *(2 * len(one.q_abs_mean) for one in found.values())}
    if sizes != {head_dim}:
        raise ValueError(
            f"the statistics are of head_dim {metadata.get('head_dim')}, the model has {head_dim} and rotates "
            f"{2 * len(rotary.inv_freq)} dims of it; all must be equal"
        )
    return ModelStatistics(
        mean=torch.stack([found[head].q_mean_complex for head in wanted]).view(layers, heads, -1),
        mean_abs=torch.stack([found[head].q_abs_mean for head in wanted]).view(layers, heads, -1),
        omega=rotary.inv_freq,
        weight=torch.full((heads, head_dim // 2), float(rotary.attention_scaling), device=device),
        style=metadata["rope_style"],
        kv_heads=config.num_key_value_heads,
    )
