"""What a model's layers pass to their cache, and which of it the cache still holds after a step.

Both are seen from outside, whatever cache object the subject returns. Where they cannot be seen, the check has nothing
to judge: it says "not observed", never that no round happened.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from verify.errors import SubjectLacks

if TYPE_CHECKING:
    import numpy as np


#: What transformers calls the cache that a step is given and returns; the first name since 5.24, the second before.
_CACHE_NAMES = ("cache", "past_key_values")


def with_cache(model: Any, cache: Any) -> dict[str, Any]:
    """The keyword argument by which a step of ``model`` is given a cache."""
    parameters = {**inspect.signature(type(model).forward).parameters, **inspect.signature(model.forward).parameters}
    return {next((name for name in _CACHE_NAMES if name in parameters), _CACHE_NAMES[-1]): cache}


def cache_of(output: Any) -> Any:
    """The cache that a step returned."""
    return next((cache for name in _CACHE_NAMES if (cache := getattr(output, name, None)) is not None), None)


@dataclass(frozen=True)
class Round:
    """One round of one sequence, after ``seen`` tokens; ``keys`` are ``[1, H, seen, D]`` for each layer.

    ``before`` and ``kept`` are bool ``[L, H, seen]``: the tokens held before and after it.
    """

    seen: int
    keys: list[Any]
    before: np.ndarray
    kept: np.ndarray


def lengths(cache: Any) -> list[int]:
    """The number of tokens that each layer of ``cache`` holds. Raises SubjectLacks where it shows no keys by layer."""
    layers = getattr(cache, "layers", None) or ()
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise SubjectLacks(f"not observed: a step returns a {type(cache).__name__} that shows no keys by layer")
    return [layer.keys.shape[-2] for layer in layers]


def physical_length(cache: Any) -> int:
    """The number of tokens in the longest layer of ``cache``."""
    return max(lengths(cache))


class Observed:
    """The keys and values ``[1, H, T, D]`` that each attention layer of ``model`` has passed to a cache so far."""

    def __init__(self, model: Any) -> None:
        self._attentions = [layer.self_attn for layer in layers_of(model)]
        self._inside = 0
        self._given: dict[int, tuple[Any, Any]] = {}
        self._held: Any = None

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, what the attention layers pass to any cache is noted; what the subject itself stores is not."""
        from transformers import Cache

        update = Cache.update

        def noting(cache: Any, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            if self._inside:
                self._note(keys.detach(), values.detach(), layer)
            return update(cache, keys, values, layer, *args, **kwargs)

        def entering(*_: Any) -> None:
            self._inside += 1

        def leaving(*_: Any) -> None:
            self._inside -= 1

        with ExitStack() as stack:
            stack.enter_context(mock.patch.object(Cache, "update", noting))
            for attention in self._attentions:
                stack.callback(attention.register_forward_pre_hook(entering).remove)
                stack.callback(attention.register_forward_hook(leaving, always_call=True).remove)
            yield

    def _note(self, keys: Any, values: Any, layer: int) -> None:
        import torch

        before = self._given.get(layer)
        step = keys, values
        self._given[layer] = (
            step if before is None else tuple(torch.cat(x, dim=2) for x in zip(before, step, strict=True))
        )

    def round_in(self, cache: Any, seen: int) -> Round | None:
        """The round that the last step ended with, after ``seen`` tokens of one sequence; None if no layer evicted.

        Raises AssertionError if a layer holds a row that was never passed to it, or values of other tokens than its
        keys; SubjectLacks if it cannot be seen what the layers passed on, or what they hold.
        """
        import torch

        held = lengths(cache)
        if len(held) != len(self._attentions):
            raise SubjectLacks(f"not observed: the cache has {len(held)} layers, the model {len(self._attentions)}")
        for number in range(len(held)):
            passed = self._given[number][0].shape[2] if number in self._given else 0
            if passed != seen:
                raise SubjectLacks(
                    f"not observed: layer {number} has passed {passed} of {seen} tokens to a cache of transformers"
                )
        given = [self._given[number] for number in range(len(held))]
        heads = given[0][0].shape[1]
        before = torch.ones(len(held), heads, seen, dtype=torch.bool)
        if self._held is not None:
            before[:, :, : self._held.shape[2]] = self._held
        self._held = before
        if all(now >= int(was.sum()) for now, was in zip(held, before[:, 0], strict=True)):
            return None
        self._held = torch.stack([_held(*pair, n) for n, pair in enumerate(zip(given, cache.layers, strict=True))])
        return Round(seen, [keys for keys, _ in given], before.numpy(), self._held.numpy())


@contextmanager
def positions_noted(model: Any) -> Iterator[list[int]]:
    """Inside, the list grows by the position that the model's RoPE is given for each token of the first row."""
    noted: list[int] = []

    def note(module: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        positions = kwargs["position_ids"] if "position_ids" in kwargs else args[1]
        noted.extend(positions[0].tolist())

    handle = rotary_of(model).register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield noted
    finally:
        handle.remove()


def require_counting(positions: list[int]) -> None:
    """Raise AssertionError unless ``positions`` are 0, 1, 2 and so on."""
    wrong = next((i for i, position in enumerate(positions) if position != i), None)
    assert wrong is None, f"token {wrong} was given position {positions[wrong]}"


def rotary_of(model: Any) -> Any:
    """The module that turns positions into the angles of RoPE."""
    return next(module for module in model.modules() if hasattr(module, "inv_freq"))


def layers_of(model: Any) -> Any:
    """The decoder layers of a model."""
    return next(part.layers for part in model.modules() if hasattr(part, "layers"))


def _held(given: tuple[Any, Any], layer: Any, number: int) -> Any:
    """Which of the tokens ``given`` to a layer it holds, bool ``[H, N]`` on the CPU; keys and values must agree."""
    import torch

    keys, values = given
    for name, had, has in (("keys", keys, layer.keys), ("values", values, layer.values)):
        count = layer.keys.shape[2]
        want = (1, had.shape[1], count, had.shape[3])
        assert tuple(has.shape) == want, (
            f"layer {number} holds {name} of shape {list(has.shape)}; with {count} keys per head, {list(want)} is "
            "expected"
        )
    same = (layer.keys[0].to(keys.device)[:, :, None] == keys[0][:, None]).all(-1)
    for head, row in (~same.any(-1)).nonzero()[:1].tolist():
        raise AssertionError(
            f"layer {number}, KV head {head}: {int((~same[head].any(-1)).sum())} held keys equal no cached key bit for "
            f"bit; the first is row {row}"
        )
    rows = same.to(int).argmax(-1)
    want = values.gather(2, rows[None, :, :, None].expand_as(layer.values))
    for head, row in (want != layer.values.to(want.device)).any(-1)[0].nonzero()[:1].tolist():
        raise AssertionError(
            f"layer {number}, KV head {head} holds values of other tokens than its keys; the first is that of "
            f"token {int(rows[head, row])}"
        )
    rows = rows.cpu()
    return torch.zeros(keys.shape[1:3], dtype=torch.bool).scatter_(1, rows, torch.ones_like(rows, dtype=torch.bool))
