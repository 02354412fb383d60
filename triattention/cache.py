"""A Hugging Face cache whose layers can forget: columns seen, columns held, and which of them are real tokens.

A compressed layer answers like the library's own sliding-window layers: ``get_seq_length`` counts every column ever
fed, and the mask sizes say that the held ones are the newest. So positions, masks and ``generate`` stay right without a
patch of their own; the physical length is ``layer.keys.shape[-2]``.

    columns ever fed:   [ evicted ......... | held: pads, then real tokens, ascending ]
    2D mask handed on:  [ 0 ............... | valid                                   ]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers.cache_utils import Cache, DynamicLayer

from triattention.errors import TriAttentionError


class CompressedLayer(DynamicLayer):
    """A dynamic layer that has dropped ``evicted`` columns."""

    evicted: int = 0

    def get_seq_length(self) -> int:
        return super().get_seq_length() + self.evicted

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return super().get_seq_length() + query_length, self.evicted

    def reset(self) -> None:
        super().reset()
        self.evicted = 0

    def keep(self, indices: torch.Tensor) -> None:
        """Hold only ``indices`` ``[B, H, K]``, in this order; keys and values are moved bit for bit, the rest is
        freed.
        """
        self.evicted += self.keys.shape[-2] - indices.shape[-1]
        gather = indices[..., None].to(self.keys.device)
        self.keys = self.keys.gather(2, gather.expand(-1, -1, -1, self.keys.shape[-1]))
        self.values = self.values.gather(2, gather.expand(-1, -1, -1, self.values.shape[-1]))

    def _refuse(self, *args: object, **kwargs: object) -> None:
        raise TriAttentionError(
            "beam search and row reordering are not supported with a compressed cache; use num_beams=1"
        )

    reorder_cache = batch_repeat_interleave = batch_select_indices = _refuse


@dataclass
class CacheState:
    """What is known of the rows of one cache beside its tensors; kept on the cache, so it dies with it.

    ``valid`` bool ``[B, P]``: real tokens among the held columns. ``seen`` int64 ``[B]``: real tokens ever fed,
    which is the position of the next one. ``prompt`` int64 ``[B]``: tokens of the prompt. Host side, so that a
    decode step asks the device nothing: ``longest``, an upper bound of the real tokens in any row, and ``ragged``,
    whether any column may be a pad.
    """

    valid: torch.Tensor
    seen: torch.Tensor
    prompt: torch.Tensor
    longest: int = 0
    ragged: bool = False
    prefilling: bool = True
    warned: bool = False

    @classmethod
    def empty(cls, batch: int, device: torch.device) -> CacheState:
        counts = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(torch.zeros(batch, 0, dtype=torch.bool, device=device), counts, counts.clone())

    def append(self, new: torch.Tensor, new_is_ragged: bool) -> torch.Tensor:
        """Add new columns ``[B, q]`` (real or pad) and return the positions of their tokens ``[B, q]`` (0 for a
        pad).
        """
        counts = new.to(torch.int64).cumsum(-1)
        positions = (self.seen[:, None] + counts - 1).masked_fill(~new, 0)
        self.prefilling = self.prefilling and (self.valid.shape[1] == 0 or new.shape[1] > 1)
        self.valid = torch.cat([self.valid, new], dim=1)
        self.seen = self.seen + counts[:, -1]
        if self.prefilling:
            self.prompt = self.seen.clone()
        self.longest += new.shape[1]
        self.ragged = self.ragged or new_is_ragged
        return positions

    def crop_to(self, held: int) -> None:
        """Follow a cache that was cropped from the right to ``held`` columns."""
        dropped = self.valid[:, held:]
        self.valid, self.seen = self.valid[:, :held], self.seen - dropped.sum(-1)
        self.longest = min(self.longest, held)


def adopt(cache: Cache, n_layers: int) -> None:
    """Turn the layers of a dynamic cache into compressed ones, in place.

    Raises TriAttentionError for a cache that is static, sliding, quantised or offloaded.
    """
    while len(cache.layers) < n_layers and cache.layer_class_to_replicate is DynamicLayer:
        cache.layers.append(DynamicLayer())
    if getattr(cache, "offloading", False):
        raise TriAttentionError("an offloaded cache cannot be compressed; leave cache_implementation unset")
    for index, layer in enumerate(cache.layers):
        if type(layer) is DynamicLayer:
            layer.__class__ = CompressedLayer
        elif type(layer) is not CompressedLayer:
            raise TriAttentionError(
                f"layer {index} of the cache is a {type(layer).__name__}, which cannot be compressed; "
                "leave cache_implementation unset, or pass a DynamicCache"
            )
