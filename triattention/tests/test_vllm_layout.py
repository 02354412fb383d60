"""The layout of a KV cache is learned from any code that writes one, and blocks are thinned bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from triattention.errors import TriAttentionError
from triattention.vllm.runtime.layout import learn

BLOCKS, SLOTS, HEADS, DIM = 7, 4, 3, 6

Write = Callable[[torch.Tensor, int, int, torch.Tensor, torch.Tensor], None]


def _split_first(cache: torch.Tensor, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    cache[0, block, slot], cache[1, block, slot] = k, v


def _split_second(cache: torch.Tensor, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    cache[block, 0, slot], cache[block, 1, slot] = k, v


def _side_by_side(cache: torch.Tensor, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    cache[block, :, slot, :DIM], cache[block, :, slot, DIM:] = k, v


def _transposed_keys(cache: torch.Tensor, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    flat = cache[block].view(HEADS, 2 * SLOTS * DIM)
    flat[:, : SLOTS * DIM].view(HEADS, DIM, SLOTS)[:, :, slot] = k
    flat[:, SLOTS * DIM :].view(HEADS, SLOTS, DIM)[:, slot] = v


def _paired_keys(cache: torch.Tensor, block: int, slot: int, k: torch.Tensor, v: torch.Tensor) -> None:
    """Pairs of dims beside each other over all slots, as matrix units of CPUs want them."""
    flat = cache[block].view(HEADS, 2 * SLOTS * DIM)
    flat[:, : SLOTS * DIM].view(HEADS, DIM // 2, SLOTS, 2)[:, :, slot] = k.view(HEADS, DIM // 2, 2)
    flat[:, SLOTS * DIM :].view(HEADS, SLOTS, DIM)[:, slot] = v


LAYOUTS: dict[str, tuple[Write, Callable[[torch.dtype], torch.Tensor]]] = {
    "2-blocks": (_split_first, lambda dtype: torch.zeros(2, BLOCKS, SLOTS, HEADS, DIM, dtype=dtype)),
    "blocks-2": (_split_second, lambda dtype: torch.zeros(BLOCKS, 2, SLOTS, HEADS, DIM, dtype=dtype)),
    "heads-first": (_side_by_side, lambda dtype: torch.zeros(BLOCKS, HEADS, SLOTS, 2 * DIM, dtype=dtype)),
    "slots-first-strided": (
        _side_by_side, lambda dtype: torch.zeros(BLOCKS, SLOTS, HEADS, 2 * DIM, dtype=dtype).transpose(1, 2)
    ),
    "keys-transposed": (_transposed_keys, lambda dtype: torch.zeros(BLOCKS, HEADS, SLOTS, 2 * DIM, dtype=dtype)),
    "keys-in-pairs": (_paired_keys, lambda dtype: torch.zeros(BLOCKS, HEADS, SLOTS, 2 * DIM, dtype=dtype)),
}  # fmt: skip


def _layer(write: Write, cache: torch.Tensor) -> SimpleNamespace:
    def update(layer: SimpleNamespace, keys: torch.Tensor, values: torch.Tensor, kv: torch.Tensor, slots: torch.Tensor):
        for k, v, slot in zip(keys, values, slots.tolist(), strict=True):
            write(kv, slot // SLOTS, slot % SLOTS, k, v)

    return SimpleNamespace(kv_cache=cache, impl=SimpleNamespace(do_kv_cache_update=update))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LAYOUTS)
def test_a_layout_is_learned_and_its_blocks_are_thinned(name: str, dtype: torch.dtype) -> None:
    write, make = LAYOUTS[name]
    layer = _layer(write, make(dtype))
    keys, values = torch.randn(2, 3 * SLOTS, HEADS, DIM, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = [4, 2, 6]
    slots = torch.tensor([block * SLOTS + slot for block in blocks for slot in range(SLOTS)])
    layer.impl.do_kv_cache_update(layer, keys, values, layer.kv_cache, slots)
    layer.kv_cache.select(list(layer.kv_cache.shape).index(BLOCKS), 0).fill_(3.5)
    before = layer.kv_cache.clone()

    layout = learn(layer, BLOCKS, SLOTS, HEADS, DIM)
    assert torch.equal(layer.kv_cache, before), "the null block was not restored"
    assert sorted(layout.places.flatten().tolist()) == list(range(2 * HEADS * SLOTS * DIM))
    sources = torch.tensor(blocks)
    assert torch.equal(layout.keys(layer.kv_cache, sources), keys.transpose(0, 1))

    keep = torch.stack([torch.tensor(sorted(torch.randperm(3 * SLOTS)[: 2 * SLOTS].tolist())) for _ in range(HEADS)])
    kept = torch.tensor([2, 5])  # one of the sources, and a block of its own
    layout.thin(layer.kv_cache, sources, kept, layout.picks(keep))
    want_keys, want_values = (x.transpose(0, 1).gather(1, keep[:, :, None].expand(-1, -1, DIM)) for x in (keys, values))
    assert torch.equal(layout.keys(layer.kv_cache, kept), want_keys)
    again = _layer(write, make(dtype))
    slots = torch.tensor([block * SLOTS + slot for block in (2, 5) for slot in range(SLOTS)])
    again.impl.do_kv_cache_update(again, want_keys.transpose(0, 1), want_values.transpose(0, 1), again.kv_cache, slots)
    where = list(layer.kv_cache.shape).index(BLOCKS)
    assert torch.equal(layer.kv_cache.index_select(where, kept), again.kv_cache.index_select(where, kept))
    others = torch.tensor([0, 1, 3, 4, 6])
    assert torch.equal(layer.kv_cache.index_select(where, others), before.index_select(where, others))


def test_a_cache_that_is_quantised_or_holds_something_else_is_refused() -> None:
    write, make = LAYOUTS["blocks-2"]
    with pytest.raises(TriAttentionError, match=r"the KV cache is torch.uint8, which cannot be scored; use --kv-cache"):
        learn(_layer(write, make(torch.uint8)), BLOCKS, SLOTS, HEADS, DIM)
    lossy = _layer(lambda cache, block, slot, k, v: write(cache, block, slot, k // 2, v), make(torch.float32))
    with pytest.raises(TriAttentionError, match="does not consist of 7 blocks of 4 slots, 3 heads and 6 dims"):
        learn(lossy, BLOCKS, SLOTS, HEADS, DIM)
