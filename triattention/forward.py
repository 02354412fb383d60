"""The patched ``forward``, which compresses the model's cache."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import DynamicCache

from triattention.architecture import Architecture, describe
from triattention.cache import CacheState, adopt
from triattention.compression import Compression
from triattention.errors import TriAttentionError
from triattention.queries import queries_read


def patch(model: Any, make: Callable[[Architecture], Compression]) -> None:
    """Make ``model`` compress its cache with the method that ``make`` returns, until ``unpatch``.

    The method is stored as ``model.triattention``. Raises TriAttentionError for a model that is already patched or not
    supported.
    """
    if hasattr(model, "triattention"):
        raise TriAttentionError("the model is patched already; call remove_triattention_patch(model) first")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise TriAttentionError(f"the model is spread over {', '.join(sorted(devices))}; load it on one device")
    live = describe(model)
    method = make(live)
    # another library may have set its own functions on the instance
    method.replaced = {name: vars(model)[name] for name in ("forward", "generate") if name in vars(model)}
    method.max_positions = live.max_positions
    model.triattention = method
    model.forward = _compressing(model.forward, model, method, live)
    if live.max_positions is not None:
        model.generate = _limited(model.generate, model, live.max_positions)


def unpatch(model: Any) -> None:
    """Undo ``patch``; does nothing to an unpatched model."""
    if not hasattr(model, "triattention"):
        return
    before = model.triattention.replaced
    for name in ("triattention", "forward", "generate"):
        vars(model).pop(name, None)
    for name, function in before.items():
        setattr(model, name, function)


def _limited(generate: Callable[..., Any], model: Any, max_positions: int) -> Callable[..., Any]:
    """``generate`` that raises at the start if the sequence could exceed the length where the model's RoPE changes."""
    signature = inspect.signature(generate)

    @wraps(generate)
    def limited_generate(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        given = {**given, **given.pop("kwargs", {})}
        if given.get("use_cache") is not False:
            require_length(_longest(given, model.generation_config), max_positions)
        return generate(*args, **kwargs)

    return limited_generate


def _longest(given: dict[str, Any], default: Any) -> int:
    """The most tokens that a row of this ``generate`` call may feed; the last new token is never fed."""
    named = (given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
    ids = next((x for x in named if x is not None), None)
    mask = given.get("attention_mask")
    width = 1 if ids is None else ids.shape[1]
    prompt = width if mask is None or mask.ndim != 2 else int(mask.sum(-1).max())

    def option(name: str) -> int | None:
        found = (given.get(name), getattr(given.get("generation_config"), name, None), getattr(default, name, None))
        return next((value for value in found if value is not None), None)

    new = option("max_new_tokens")
    if new is None:
        # the default of generate: 20 new tokens
        new = 20 if (whole := option("max_length")) is None else max(whole - width, 1)
    return prompt + new - 1


def require_length(tokens: int, max_positions: int | None) -> None:
    """Raise TriAttentionError if a sequence of ``tokens`` exceeds the length where the model's RoPE changes."""
    if max_positions is not None and tokens > max_positions:
        raise TriAttentionError(
            f"the sequence would have {tokens} tokens, but the frequencies of the model's RoPE change after "
            f"{max_positions}, which a compressed cache does not support; ask for fewer tokens"
        )


@contextmanager
def _observing(model: Any, method: Compression, live: Architecture, state: CacheState) -> Iterator[None]:
    """Collects the queries of the newest columns during one step and stores them in ``state``."""
    if not method.observes:
        yield
        return
    window, step = method.budget.window_size, []
    with queries_read(model, live, lambda layer, q: step.append(q[:, -window:].clone())):
        yield
    state.observe(torch.stack(step), window)


def _compressing(
    forward: Callable[..., Any], model: Any, method: Compression, live: Architecture
) -> Callable[..., Any]:
    """``forward`` with the masks and positions of a compressed cache, and a round after the step if one is due.

    A call without a cache (``use_cache=False``) is passed through unchanged.
    """
    signature = inspect.signature(forward)

    @wraps(forward)
    def compressed_forward(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind_partial(*args, **kwargs)
        extra = call.arguments.pop("kwargs", {})
        given = {**call.arguments, **extra}
        use_cache = given.get("use_cache")
        inputs = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if inputs is None or use_cache is False or (use_cache is None and not model.config.use_cache):
            return forward(*args, **kwargs)
        cache = given.get("past_key_values")
        cache = DynamicCache(config=model.config) if cache is None else cache
        adopt(cache, live.num_layers)
        state = _state_of(cache, inputs)
        if state.valid.shape[1] == 0:
            method.reset()
        before = state.copy()
        try:
            new, ragged = _new_columns(given.get("attention_mask"), inputs, cache.get_seq_length())
            positions = state.append(new, ragged)
            # the first step is checked at any width: a caller that lost its cache restarts with positions far from 0
            _require_positions(given.get("position_ids"), positions, new, always=before.fed == 0)
            if live.max_positions is not None and state.fed > live.max_positions:
                require_length(int(state.seen.max()), live.max_positions)  # fed includes padding, so count real tokens
            mask = torch.nn.functional.pad(state.valid, (cache.layers[0].evicted, 0)) if state.ragged else None
            given |= {"past_key_values": cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
            with _observing(model, method, live, state):
                output = forward(**given)
        except BaseException:
            cache.triattention = before  # the next step compares it with what the cache really holds
            raise
        if cache.layers[0].keys is not None:  # gradient checkpointing drops the cache
            method.after_step(cache, state)
        return output

    return compressed_forward


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
