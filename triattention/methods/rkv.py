"""R-KV (arXiv 2505.24133): keep the keys that the newest queries attend to, unless they are redundant."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from triattention.architecture import Architecture
from triattention.compression import Budget, Compression, View
from triattention.methods.attention import window_attention
from triattention.selection import group_mean


class RKV(Compression):
    """``balance`` times importance minus (1 - ``balance``) times redundancy, per KV head.

    Importance is the attention of the window's queries, max-pooled over ``kernel_size`` neighbours, averaged over each
    group. Redundancy is the softmax over the keys of each key's mean cosine similarity to the others. Similarities of a
    key above ``threshold`` do not count for the newest such keys, up to a share ``forgiven`` of the tokens, so that the
    newest of many similar keys are kept.
    """

    observes = True

    def __init__(
        self,
        budget: Budget,
        mode: str,
        live: Architecture,
        *,
        kernel_size: int = 7,
        balance: float = 0.1,
        threshold: float = 0.5,
        forgiven: float = 0.1,
    ) -> None:
        super().__init__(budget, mode)
        self.live, self.kernel_size = live, kernel_size
        self.balance, self.threshold, self.forgiven = balance, threshold, forgiven

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        for layer, keys in enumerate(view.keys):
            weights = window_attention(view, layer, self.live, outside_only=True)
            pooled = torch.nn.functional.max_pool1d(weights, self.kernel_size, padding=self.kernel_size // 2, stride=1)
            importance = group_mean(pooled, keys.shape[1])
            importance = torch.nn.functional.pad(importance, (0, keys.shape[2] - importance.shape[2]))
            yield self.balance * importance - (1 - self.balance) * self.redundancy(keys, view.valid)

    def redundancy(self, keys: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
        """How similar each key ``[B, H, N, D]`` is to the others, ``[B, H, N]``: sums to 1 over the real tokens."""
        unit = torch.nn.functional.normalize(keys.float(), dim=-1)
        pair = valid[:, None, :, None] & valid[:, None, None, :]
        others = pair & ~torch.eye(keys.shape[2], dtype=torch.bool, device=keys.device)
        similarity = (unit @ unit.mT).masked_fill(~others, 0.0)
        alike = similarity > self.threshold
        # rank of each similar key in its row, counted from the newest
        newer = alike.flip(-1).cumsum(-1, dtype=torch.int32).flip(-1)
        n_real = valid.sum(-1)[:, None, None, None]
        spared = alike & (newer <= (self.forgiven * n_real).floor().clamp_min(1))
        mean = similarity.masked_fill(spared, 0.0).sum(-2) / n_real[..., 0]
        return mean.masked_fill(~valid[:, None], -torch.inf).softmax(-1)
