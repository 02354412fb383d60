"""The memory layout of a block in vLLM's KV cache, found by writing through the layer's own code, not assumed.

The layout changes often in vLLM: five shapes between 0.19 and 0.33, and on a CPU keys are transposed. So numbered keys
and values are written into the null block, the block is read back raw, and the permutation is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from triattention.errors import TriAttentionError

#: Numbers are written digit by digit in this base, because bfloat16 represents integers exactly only up to 256.
_BASE = 128
_PLAIN = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class BlockLayout:
    """Reads and compacts whole blocks of KV cache tensors of one shape.

    ``block_dim`` is the block dimension of the tensor; ``places`` int32 ``[2, H, N, D]`` are the offsets of keys and
    values of the N slots in a raw block, which consists of the other dimensions, flattened.
    """

    block_dim: int
    places: torch.Tensor

    def _raw(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """A copy of the blocks ``[n]``, raw: ``[n, elements of a block]``."""
        return cache.index_select(self.block_dim, blocks).movedim(self.block_dim, 0).flatten(1)

    def keys(self, cache: torch.Tensor, blocks: torch.Tensor) -> torch.Tensor:
        """A copy of the keys ``[H, n * N, D]`` in the blocks ``[n]`` of ``cache``, in the order of the blocks."""
        _, heads, slots, dim = self.places.shape
        picked = self._raw(cache, blocks).index_select(1, self.places[0].flatten())
        return picked.view(-1, heads, slots, dim).transpose(0, 1).reshape(heads, -1, dim)

    def picks(self, indices: torch.Tensor) -> torch.Tensor:
        """The int32 argument of ``thin``, one per element, that keeps the tokens ``indices`` int64 ``[H, n * N]``."""
        _, heads, slots, dim = self.places.shape
        n_elements = self.places.numel()
        slot = (indices % slots)[None, :, :, None].expand(2, -1, -1, dim)
        starts = (indices // slots * n_elements).to(torch.int32)  # int64 would double the memory of all that follows
        sources = (
            (self.places.gather(2, slot) + starts[None, :, :, None])
            .view(2, heads, -1, slots, dim)
            .movedim(2, 0)
            .flatten(1)
        )
        picks = torch.empty_like(sources)
        picks[:, self.places.flatten().long()] = sources
        return picks

    def thin(self, cache: torch.Tensor, sources: torch.Tensor, kept: torch.Tensor, picks: torch.Tensor) -> None:
        """Copy tokens of the blocks ``sources``, bitwise unchanged, into the blocks ``kept``; the two may overlap."""
        raw = self._raw(cache, sources).flatten().index_select(0, picks.flatten())
        rest = [size for dim, size in enumerate(cache.shape) if dim != self.block_dim]
        cache.index_copy_(self.block_dim, kept, raw.view(len(kept), *rest).movedim(0, self.block_dim))


def learn(layer: Any, num_blocks: int, block_size: int, n_kv_heads: int, head_dim: int) -> BlockLayout:
    """The layout of an attention layer's cache ``layer.kv_cache``; block 0 is overwritten and then restored.

    Raises TriAttentionError for a quantised cache, or one whose blocks are not a permutation of keys and values.
    """
    cache = layer.kv_cache
    if not hasattr(layer.impl, "do_kv_cache_update"):
        raise TriAttentionError(
            f"{type(layer.impl).__name__} of this vLLM writes its KV cache inside the forward, so its layout cannot be "
            "determined; use vLLM 0.24 or newer on a CPU, or another --attention-backend"
        )
    if cache.dtype not in _PLAIN:
        raise TriAttentionError(f"the KV cache is {cache.dtype}, which cannot be scored; use --kv-cache-dtype auto")
    for dim in (dim for dim, size in enumerate(cache.shape) if size == num_blocks):
        block = cache.select(dim, 0)
        if block.numel() != 2 * n_kv_heads * block_size * head_dim:
            continue
        saved = block.clone()
        try:
            codes = _coded(layer, block, block_size, n_kv_heads, head_dim)
        finally:
            block.copy_(saved)
        order = codes.argsort()
        if torch.equal(codes[order], torch.arange(block.numel(), device=codes.device)):
            places = order.view(2, block_size, n_kv_heads, head_dim).transpose(1, 2)
            return BlockLayout(dim, places.to(torch.int32).contiguous())
    raise TriAttentionError(
        f"the KV cache of shape {list(cache.shape)} does not consist of {num_blocks} blocks of {block_size} slots, "
        f"{n_kv_heads} heads and {head_dim} dims; choose another --block-size or --attention-backend"
    )


def _coded(layer: Any, block: torch.Tensor, block_size: int, n_kv_heads: int, head_dim: int) -> torch.Tensor:
    """Write every element's number through the layer, and return the numbers in raw order: int64 ``[elements]``."""
    cache = layer.kv_cache
    number = torch.arange(block.numel(), device=cache.device).view(2, block_size, n_kv_heads, head_dim)
    slots = torch.arange(block_size, device=cache.device)
    codes, scale = torch.zeros(block.numel(), dtype=torch.int64, device=cache.device), 1
    while scale < block.numel():
        keys, values = (number // scale % _BASE).to(cache.dtype)
        layer.impl.do_kv_cache_update(layer, keys, values, cache, slots)
        codes += block.flatten().to(torch.int64) * scale
        scale *= _BASE
    return codes
