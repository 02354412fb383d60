"""Calibration: stream text through a model and average its queries, after q_norm and before RoPE (paper, Q/K
centers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triattention.architecture import decoder_of, describe
from triattention.errors import TriAttentionError
from triattention.rope import split_pairs
from triattention.statistics import Statistics


class _Means:
    """Streaming float64 sums of one layer's queries, kept where the layer is."""

    def __init__(self, n_heads: int, head_dim: int, style: str) -> None:
        self.n_heads, self.head_dim, self.style = n_heads, head_dim, style
        self.real = self.imag = self.norm = torch.zeros((), dtype=torch.float64)
        self.count = 0

    def hook(self, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        """Take q as ``[..., heads * D]`` (q_proj) or ``[..., heads, D]`` (q_norm); each leading element is one
        token.
        """
        q = output.detach().reshape(-1, self.n_heads, self.head_dim).to(torch.float64)
        real, imag = split_pairs(q, self.style)
        self.real = self.real.to(q.device) + real.sum(0)
        self.imag = self.imag.to(q.device) + imag.sum(0)
        self.norm = self.norm.to(q.device) + torch.hypot(real, imag).sum(0)
        self.count += q.shape[0]


def calibrate(model: Any, forward_loop: Callable[[Any], None]) -> Statistics:
    """Statistics of ``model`` over whatever ``forward_loop(model)`` runs through it: any number of unpadded batches.

    The model is left as it was, also when the loop raises. Raises TriAttentionError for a model that cannot be served
    or a loop that ran no tokens.
    """
    live = describe(model)
    means, handles = [], []
    try:
        for index, layer in enumerate(decoder_of(model).layers):
            attention = layer.self_attn
            source = getattr(attention, "q_norm", None) or getattr(attention, "q_proj", None)
            if source is None:
                raise TriAttentionError(
                    f"layer {index} is a {type(attention).__name__} with neither q_norm nor q_proj; its "
                    "queries cannot be read"
                )
            means.append(_Means(live.num_query_heads, live.head_dim, live.rope_style))
            handles.append(source.register_forward_hook(means[-1].hook))
        with torch.inference_mode():
            forward_loop(model)
    finally:
        for handle in handles:
            handle.remove()
    count = means[0].count
    if count == 0:
        raise TriAttentionError("the calibration loop ran no tokens through the model; give it text")

    for index, mean in enumerate(means):
        if not mean.norm.isfinite().all():
            raise TriAttentionError(
                f"layer {index} of {live.model_id} has queries that are NaN or Inf; check its weights, or load it "
                "in float32"
            )

    def stack(name: str) -> torch.Tensor:
        return torch.stack([getattr(mean, name).cpu() for mean in means]).div(count).to(torch.float32)

    return Statistics(stack("real"), stack("imag"), stack("norm"), count, live, f"calibration of {live.model_id}")
