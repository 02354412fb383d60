"""Reading the queries of a live model, after q_norm (if any) and before RoPE, without changing its forward."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from triattention.architecture import Architecture, decoder_of
from triattention.errors import TriAttentionError

#: Modules whose output contains a layer's queries, in order of preference; a fused projection has them first.
_SOURCES = ("q_norm", "q_proj", "qkv_proj")

Receive = Callable[[int, torch.Tensor], None]


@contextmanager
def queries_read(model: Any, live: Architecture, receive: Receive) -> Iterator[None]:
    """In this context every forward step calls ``receive(layer, q)`` with q ``[B, T, H*G, D]``, layer by layer.

    The hooks are removed at the end, also after an error. Raises TriAttentionError for a layer whose queries cannot
    be read.
    """
    handles = []
    try:
        for index, layer in enumerate(decoder_of(model).layers):
            handles.append(_source(layer.self_attn, index).register_forward_hook(_hook(index, live, receive)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _source(attention: torch.nn.Module, index: int) -> torch.nn.Module:
    for name in _SOURCES:
        if (module := getattr(attention, name, None)) is not None:
            return module
    raise TriAttentionError(
        f"layer {index} is a {type(attention).__name__} with none of {', '.join(_SOURCES)}; its queries cannot be read"
    )


def _hook(index: int, live: Architecture, receive: Receive) -> Callable[..., None]:
    width = live.num_query_heads * live.head_dim

    def hook(module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        # [B, T, heads, D] after q_norm; [B, T, heads * D] after a projection, followed by keys and values if fused
        flat = output.detach().flatten(2)[..., :width]
        receive(index, flat.unflatten(-1, (live.num_query_heads, live.head_dim)))

    return hook


@contextmanager
def real_tokens_noted(model: Any, note: Callable[[torch.Tensor | None], None]) -> Iterator[None]:
    """In this context every forward step first calls ``note(mask)``: bool ``[B, T]``, False for padding.

    None means no padding. Raises TriAttentionError for a mask that is not 2D, which does not identify padding.
    """
    decoder = decoder_of(model)
    signature = inspect.signature(decoder.forward)

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        mask = given.get("attention_mask")
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        if mask is not None and mask.ndim != 2:
            raise TriAttentionError(
                f"attention_mask has shape {tuple(mask.shape)}, which does not identify padding; give one of "
                "shape [batch, tokens]"
            )
        # with a cache, the mask covers the cached tokens as well
        note(None if mask is None else mask[:, -inputs.shape[1] :].to(torch.bool))

    handle = decoder.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
