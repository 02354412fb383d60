"""A Hugging Face cache whose layers can evict tokens: columns fed, columns held, and which of those are real tokens.

A compressed layer behaves like the library's own sliding-window layers: ``get_seq_length`` counts every column ever
fed, and the mask sizes say that the held columns are the newest. So positions, masks and ``generate`` need no patch
of their own; the physical length is ``layer.keys.shape[-2]``.

    columns ever fed:   [ evicted ......... | held: pads, then real tokens, ascending ]
    2D mask passed on:  [ 0 ............... | valid                                   ]
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Never

import torch
from transformers.cache_utils import Cache, DynamicLayer

from triattention.errors import TriAttentionError

NO_REORDERING = "beam search and row reordering are not supported with a compressed cache; use num_beams=1"
NO_ROLL_BACK = (
    "a compressed cache cannot be rolled back, so speculative decoding is not supported; leave assistant_model and "
    "prompt_lookup_num_tokens unset"
)
NO_OFFLOADING = "an offloaded cache cannot be compressed; leave cache_implementation unset"


class CompressedLayer(DynamicLayer):
    """A dynamic layer that has evicted ``evicted`` columns and holds ``held``."""

    is_croppable = False
    evicted: int = 0

    @property
    def held(self) -> int:
        return super().get_seq_length()

    def get_seq_length(self) -> int:
        return self.held + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.held + query_length, self.evicted

    def reset(self) -> None:
        self.keys = self.values = None
        self.is_initialized, self.evicted = False, 0

    def keep(self, indices: torch.Tensor) -> None:
        """Keep only ``indices`` ``[B, H, K]``, in this order, with unchanged keys and values; the rest is freed."""
        self.evicted += self.held - indices.shape[-1]
        gather = indices[..., None].to(self.keys.device)
        self.keys = self.keys.gather(2, gather.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, gather.expand(-1, -1, -1, self.values.shape[-1]))

    def crop(self, *args: object, **kwargs: object) -> Never:
        raise TriAttentionError(NO_ROLL_BACK)

    def _refuse_rows(self, *args: object, **kwargs: object) -> Never:
        raise TriAttentionError(NO_REORDERING)

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse_rows


@dataclass
class CacheState:
    """The state of one cache's rows apart from its tensors; stored on the cache, so it has the cache's lifetime.

    ``valid`` bool ``[B, P]``: real tokens among the held columns. ``seen`` int64 ``[B]``: real tokens ever fed,
    which is the position of the next one. ``prompt`` int64 ``[B]``: tokens of the prompt. The rest is on the host,
    so that a decode step never waits for the device: ``longest``, an upper bound of the real tokens in any row;
    ``until_due``, how many more tokens no row can need a round before; ``ragged``, whether any held column may be a
    pad; ``last_step``, columns of the last step while the prefill may continue, 0 once it is over; ``fed``, columns
    ever fed; ``stepping``, whether a step of the patched model is under way. ``recent``: the queries of the newest
    columns, oldest first, ``[L, B, q, H*G, D]`` for each step.
    """

    valid: torch.Tensor
    seen: torch.Tensor
    prompt: torch.Tensor
    longest: int = 0
    until_due: int = 0
    ragged: bool = False
    last_step: int | None = None
    fed: int = 0
    warned: bool = False
    stepping: bool = False
    recent: list[torch.Tensor] = field(default_factory=list)

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> CacheState:
        counts = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(torch.zeros(batch, 0, dtype=torch.bool, device=device), counts, counts.clone())

    def append(self, new: torch.Tensor, ragged: bool) -> torch.Tensor:
        """Add new columns ``[B, q]`` (real or pad) and return the positions of their tokens ``[B, q]`` (0 for a pad).

        The prompt is the first step and the chunks after it, up to the first that is shorter than the previous one. A
        chunk of one token is indistinguishable from a decode step and counts as one.
        """
        counts = new.to(torch.int64).cumsum(-1)
        positions = (self.seen[:, None] + counts - 1).masked_fill(~new, 0)
        self.valid = torch.cat([self.valid, new], dim=1)
        self.seen = self.seen + counts[:, -1]
        width = new.shape[1]
        if self.last_step is None or (self.last_step and width > 1):
            self.prompt = self.seen.clone()
            self.last_step = width if width >= (self.last_step or 0) else 0
        else:
            self.last_step = 0
        self.fed += width
        self.longest += width
        self.until_due -= width
        self.ragged = self.ragged or ragged
        return positions

    def copy(self) -> CacheState:
        """A copy of the current state; tensors are shared, because no step changes them in place."""
        return replace(self, recent=list(self.recent))

    def observe(self, step: torch.Tensor, window: int) -> None:
        """Store the queries ``[L, B, q, H*G, D]`` of a step, and drop steps older than the newest ``window``."""
        self.recent.append(step)
        width = sum(part.shape[2] for part in self.recent)
        while width - self.recent[0].shape[2] >= window:
            width -= self.recent.pop(0).shape[2]

    def observed(self, window: int) -> torch.Tensor | None:
        """Queries of up to ``window`` newest columns: ``[L, B, W, H*G, D]``, or None if there are none."""
        return torch.cat(self.recent, dim=2)[:, :, -window:] if self.recent else None


def adopt(cache: Cache, n_layers: int) -> None:
    """Turn the layers of a dynamic cache into compressed ones, in place.

    Raises TriAttentionError for a cache that is static, sliding, quantised, offloaded or of an encoder and a decoder.
    """
    if not isinstance(cache, Cache) or not hasattr(cache, "layers"):
        raise TriAttentionError(
            f"the cache is a {type(cache).__name__}; leave past_key_values out, or pass a DynamicCache"
        )
    while len(cache.layers) < n_layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    if getattr(cache, "offloading", False):
        raise TriAttentionError(NO_OFFLOADING)
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            layer.__class__ = CompressedLayer
        elif type(layer) is not CompressedLayer:
            raise TriAttentionError(
                f"layer {index} of the cache is a {type(layer).__name__}, which cannot be compressed; "
                "leave cache_implementation unset, or pass a DynamicCache"
            )
