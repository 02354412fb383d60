"""SnapKV (arXiv 2404.14469): keep the keys that the newest queries attend to, and their neighbours."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from triattention.architecture import Architecture
from triattention.compression import Budget, Compression, View
from triattention.methods.attention import window_attention
from triattention.selection import group_mean


class SnapKV(Compression):
    """Mean attention of the window's queries, average-pooled over ``kernel_size`` keys, averaged over each group."""

    observes = True

    def __init__(self, budget: Budget, mode: str, live: Architecture, *, kernel_size: int = 5) -> None:
        super().__init__(budget, mode)
        self.live, self.kernel_size = live, kernel_size

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        for layer, keys in enumerate(view.keys):
            weights = window_attention(view, layer, self.live, outside_only=False)
            pooled = torch.nn.functional.avg_pool1d(weights, self.kernel_size, padding=self.kernel_size // 2, stride=1)
            scores = group_mean(pooled, keys.shape[1])
            yield torch.nn.functional.pad(scores, (0, keys.shape[2] - scores.shape[2]))
