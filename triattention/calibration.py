"""Calibration: stream text through a model and average its queries, after q_norm and before RoPE (paper, Q/K
centers).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from triattention.architecture import Architecture, describe, inside
from triattention.errors import TriAttentionError
from triattention.queries import queries_read, real_tokens_noted
from triattention.rope import split_pairs
from triattention.statistics import Statistics

#: Tokens converted to float64 at a time: a whole batch of long sequences would take gigabytes.
_WIDENED = 4096


class _Means:
    """Streaming float64 sums of every layer's queries over real tokens, on the device of each layer."""

    def __init__(self, live: Architecture) -> None:
        self.live = live
        self.real_tokens: torch.Tensor | None = None
        self.count = 0
        self._sums: list[list[torch.Tensor] | None] = [None] * live.num_layers

    def note(self, real_tokens: torch.Tensor | None) -> None:
        self.real_tokens = real_tokens

    def add(self, layer: int, q: torch.Tensor) -> None:
        q = q.flatten(0, 1) if self.real_tokens is None else q[self.real_tokens.to(q.device)]
        if layer == 0:
            self.count += q.shape[0]
        for some in q.split(_WIDENED):
            real, imag = split_pairs(some[..., : self.live.rotary_dim].to(torch.float64), self.live.rope_style)
            parts = (real, imag, torch.hypot(real, imag), some[..., self.live.rotary_dim :].to(torch.float64))
            step = [part.sum(0) for part in parts]
            total = self._sums[layer]
            self._sums[layer] = step if total is None else [a + b for a, b in zip(total, step, strict=True)]

    def statistics(self) -> Statistics:
        live = self.live
        if self.count == 0:
            raise TriAttentionError("the calibration loop ran no tokens through the model; give it text")
        for layer, sums in enumerate(self._sums):
            if sums is None:
                raise TriAttentionError(
                    f"the calibration loop did not run layer {layer} of {live.model_id}; run it all"
                )
            if not all(part.isfinite().all() for part in sums):
                raise TriAttentionError(
                    f"layer {layer} of {live.model_id} has queries that are NaN or Inf; check its weights, or load it "
                    "in float32"
                )
        means = (
            torch.stack([sums[part].cpu() for sums in self._sums]).div(self.count).to(torch.float32)
            for part in range(4)
        )
        return Statistics(*means, self.count, live, f"calibration of {live.model_id}")


def calibrate(model: Any, forward_loop: Callable[[Any], None]) -> Statistics:
    """Statistics of ``model`` over the text that ``forward_loop(model)`` runs through it, in any number of batches.

    Padding marked by a 2D ``attention_mask`` does not count. The model is restored, also if the loop raises. Sums are
    float64, so they do not depend on the batches, and even millions of tokens lose no precision. Raises
    TriAttentionError for an unsupported model, a loop that ran no tokens, and queries that are NaN or Inf. Source:
    paper, Q/K centers.
    """
    if hasattr(inside(model), "triattention"):
        raise TriAttentionError("the model is patched to compress; call remove_triattention_patch(model) first")
    live = describe(model)
    means = _Means(live)
    with queries_read(model, live, means.add), real_tokens_noted(model, means.note), torch.inference_mode():
        forward_loop(model)
    return means.statistics()
