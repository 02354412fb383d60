"""Control methods, which any method should beat at the same budget."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

from triattention.architecture import Architecture
from triattention.compression import Budget, Compression, View


class Recent(Compression):
    """Keep the first ``sinks`` tokens and the newest (attention sinks, arXiv 2309.17453)."""

    def __init__(self, budget: Budget, mode: str, live: Architecture, *, sinks: int = 4) -> None:
        super().__init__(budget, mode)
        self.sinks = sinks

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        rank = view.valid.to(torch.int64).cumsum(-1) - 1
        scores = torch.where(rank < self.sinks, rank.shape[-1], rank).to(torch.float32)
        for keys in view.keys:
            yield scores[:, None].expand(-1, keys.shape[1], -1)


class KNorm(Compression):
    """Keep the keys of smallest norm (arXiv 2406.11430)."""

    def __init__(self, budget: Budget, mode: str, live: Architecture) -> None:
        super().__init__(budget, mode)

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        for keys in view.keys:
            yield -keys.float().norm(dim=-1)


class Random(Compression):
    """Keep random tokens; a row's choice depends only on ``seed`` and on how many tokens the row has seen."""

    def __init__(self, budget: Budget, mode: str, live: Architecture, *, seed: int = 0) -> None:
        super().__init__(budget, mode)
        self.seed = seed

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        _, heads, n_tokens, _ = view.keys[0].shape
        seen = torch.as_tensor(view.seen).reshape(-1).tolist()
        rows = []
        for row, length in enumerate(view.valid.sum(-1).tolist()):
            # the generator uses only 32 bits of a seed, so both numbers are hashed into them
            mixed = hashlib.sha256(f"{self.seed},{seen[row % len(seen)]}".encode()).digest()[:4]
            generator = torch.Generator().manual_seed(int.from_bytes(mixed))
            drawn = torch.rand(len(view.keys), heads, length, generator=generator)
            rows.append(torch.nn.functional.pad(drawn, (n_tokens - length, 0)))
        yield from torch.stack(rows, dim=1).to(view.valid.device)
