"""A step of a patched model: the masks and positions of a compressed cache, and a round after it if one is due."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any

import torch
from transformers import DynamicCache

from triattention.cache import CacheState, adopt
from triattention.compression import Compression
from triattention.errors import TriAttentionError
from triattention.queries import queries_read

#: What Hugging Face models call the cache they are given; since transformers 5.24 it is ``cache``.
CACHE_NAMES = ("cache", "past_key_values")


def require_length(tokens: int, max_positions: int) -> None:
    """Raise TriAttentionError if a sequence of ``tokens`` exceeds the length where the model's RoPE changes."""
    if tokens > max_positions:
        raise TriAttentionError(
            f"the sequence would have {tokens} tokens, but the frequencies of the model's RoPE change after "
            f"{max_positions}, which a compressed cache does not support; ask for fewer tokens"
        )


@contextmanager
def _observing(model: Any, method: Compression, state: CacheState) -> Iterator[None]:
    """Collects the queries of the newest columns during one step and stores them in ``state``."""
    if not method.observes:
        yield
        return
    window, thread, step = method.budget.window_size, get_ident(), []

    def receive(layer: int, q: torch.Tensor) -> None:
        if get_ident() == thread:  # another thread runs a sequence of its own on the same model
            step.append(q[:, -window:].clone())

    with queries_read(model, method.live, receive):
        yield
    state.observe(torch.stack(step), window)


def step(model: Any, method: Compression, forward: Callable[..., Any], cache_name: str, given: dict[str, Any]) -> Any:
    """``forward(**given)`` with the masks and positions of a compressed cache, and a round after it if one is due.

    The cache is passed on as ``cache_name``. A call that neither has a cache nor makes one is passed on unchanged.
    """
    inputs = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
    caches = [given[name] for name in CACHE_NAMES if given.get(name) is not None]
    use_cache = model.config.use_cache if given.get("use_cache") is None else given["use_cache"]
    if inputs is None or not (caches or use_cache):
        return forward(**given)
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        raise TriAttentionError(
            "a patched model cannot be exported or traced; export it before the patch, or with use_cache=False"
        )
    if len(caches) > 1:
        raise TriAttentionError(f"both {' and '.join(CACHE_NAMES)} are given; give one cache")
    cache = caches[0] if caches else DynamicCache(config=model.config)
    before, changed = _begin(method, cache, inputs, given)
    given = {name: value for name, value in given.items() if name not in CACHE_NAMES} | changed
    given |= {cache_name: cache, "use_cache": given.get("use_cache") if caches else True}
    try:
        with _observing(model, method, cache.triattention):
            output = forward(**given)
    except BaseException:
        cache.triattention = before  # the next step compares it with what the cache really holds
        raise
    _end(method, cache)
    return output


# These two work on numbers that differ at every step, so torch.compile must leave them alone and compile the model.
@torch.compiler.disable
def _begin(
    method: Compression, cache: Any, inputs: torch.Tensor, given: dict[str, Any]
) -> tuple[CacheState, dict[str, torch.Tensor | None]]:
    """The state of the cache before the step, and the mask and the positions of the step.

    Afterwards the state of the cache is that of the step. Raises TriAttentionError for what cannot be fed to this
    cache, whose state is then unchanged.
    """
    adopt(cache, method.live.num_layers)
    state = _state_of(cache, inputs)
    if state.valid.shape[1] == 0:
        method.reset()
    before = state.copy()
    try:
        new, ragged = _new_columns(given.get("attention_mask"), inputs, cache.get_seq_length())
        positions = state.append(new, ragged)
        # the first step is checked at any width: a caller that lost its cache restarts with positions far from 0
        _require_positions(given.get("position_ids"), positions, new, always=before.fed == 0)
        if method.max_positions is not None and state.fed > method.max_positions:
            require_length(int(state.seen.max()), method.max_positions)  # fed includes padding, so count real tokens
    except BaseException:
        cache.triattention = before
        raise
    state.stepping = True
    mask = torch.nn.functional.pad(state.valid, (cache.layers[0].evicted, 0)) if state.ragged else None
    return before, {"attention_mask": mask, "position_ids": positions}


@torch.compiler.disable
def _end(method: Compression, cache: Any) -> None:
    """The round after a step, if one is due."""
    cache.triattention.stepping = False
    if cache.layers[0].keys is not None:  # gradient checkpointing drops the cache
        method.after_step(cache, cache.triattention)


def _state_of(cache: Any, inputs: torch.Tensor) -> CacheState:
    """The state stored on ``cache``, created for an empty cache. A cache that others have changed is refused."""
    held = cache.layers[0].held
    state = getattr(cache, "triattention", None)
    if held == 0:
        state = cache.triattention = CacheState.empty(inputs.shape[0], inputs.device)
    elif state is None:
        raise TriAttentionError(f"the cache holds {held} tokens from before the patch; start with an empty cache")
    elif held != state.valid.shape[1]:
        raise TriAttentionError(
            f"the cache holds {held} columns, but the patched model expects {state.valid.shape[1]}; "
            "start with an empty cache"
        )
    if inputs.shape[1] == 0:
        raise TriAttentionError("the step has no tokens; feed at least one")
    if inputs.shape[0] != state.valid.shape[0]:
        raise TriAttentionError(
            f"the inputs have {inputs.shape[0]} rows and the cache {state.valid.shape[0]}; feed one row per cached row"
        )
    return state


def _new_columns(attention_mask: torch.Tensor | None, inputs: torch.Tensor, cached: int) -> tuple[torch.Tensor, bool]:
    """Which of the new columns are real, bool ``[B, q]``, and whether any may be a pad.

    The mask covers everything ever fed, as in every Hugging Face model; only its last q columns are used. The single
    decode token of a single row is always real.
    """
    batch, q_len = inputs.shape[:2]
    if isinstance(attention_mask, dict):
        raise TriAttentionError("attention_mask is a dict of masks; give one of shape [batch, tokens]")
    if attention_mask is not None and attention_mask.shape != (batch, cached + q_len):
        raise TriAttentionError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [{batch}, {cached + q_len}], "
            "one column per "
            "token ever fed (cache.get_seq_length() plus the new ones)"
        )
    if attention_mask is None or (batch == 1 and q_len == 1):
        return torch.ones(batch, q_len, dtype=torch.bool, device=inputs.device), False
    new = attention_mask[:, -q_len:].to(inputs.device, torch.bool)
    # a prefill may wait for the device to see whether anything is padded; a decode step must not, so it assumes so
    return new, q_len == 1 or not bool(new.all())


def _require_positions(given: torch.Tensor | None, positions: torch.Tensor, new: torch.Tensor, *, always: bool) -> None:
    """Refuse position ids that disagree with the tokens counted here; one-token steps only if ``always``."""
    if given is None or (positions.shape[1] == 1 and not always):
        return
    differs = (given.to(positions.device) != positions) & new
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        wrong = int(given.expand_as(positions)[row, column])
        raise TriAttentionError(
            f"position_ids[{row}, {column}] is {wrong}, but by the tokens seen so far it is "
            f"{int(positions[row, column])}; leave position_ids out"
        )
