"""The patch of a live model: a class derived from the model's own, whose ``forward`` compresses the cache.

So everything that copies, stores or wraps the model keeps working, with the weights of the copy: no function holds on
to the model that was patched.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial, wraps
from typing import Any

import transformers
from transformers.cache_utils import Cache

from triattention.architecture import Architecture, decoder_of, describe, inside
from triattention.cache import NO_OFFLOADING, NO_REORDERING, NO_ROLL_BACK
from triattention.compression import Compression
from triattention.errors import TriAttentionError
from triattention.forward import CACHE_NAMES, require_length, step

#: Where a class made by ``_compressing`` has the class it was made from.
_BASE = "_triattention_base"

#: The ways into continuous batching. Its steps run in another thread, so it is refused where it is called.
_CONTINUOUS = ("generate_batch", "continuous_batching_context_manager", "init_continuous_batching")

#: The newest transformers with which the tests were run (docs/setup.md).
TESTED = "5.24"

#: The options of ``generate`` that ask for speculative decoding.
_SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def patch(model: Any, make: Callable[[Architecture], Compression]) -> None:
    """Make ``model`` compress its cache with the method that ``make`` returns, until ``unpatch``.

    The method is stored as ``model.triattention``. Of a wrapper (``torch.compile``, peft, ``DataParallel``) the model
    inside is patched. Raises TriAttentionError for a model that is already patched or not supported.
    """
    model = inside(model)
    if hasattr(model, "triattention"):
        raise TriAttentionError("the model is patched already; call remove_triattention_patch(model) first")
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise TriAttentionError(f"the model is spread over {', '.join(sorted(devices))}; load it on one device")
    live = describe(model)
    if tuple(map(int, transformers.__version__.split(".")[:2])) > tuple(map(int, TESTED.split("."))):
        warnings.warn(
            f"transformers {transformers.__version__} is newer than {TESTED}, the newest that this was tested with",
            stacklevel=3,
        )
    method = make(live)
    method.live, method.max_positions = live, live.max_positions
    decoder = decoder_of(model)
    if decoder is not model:
        method.guard = decoder.register_forward_pre_hook(_refuse_to_pass_by, with_kwargs=True)
    # another library may have set its own functions on the instance, which would hide those of the class
    method.replaced = {name: vars(model).pop(name) for name in ("forward", "generate") if name in vars(model)}
    model.triattention = method
    model.__class__ = _compressing(vars(type(model)).get(_BASE, type(model)))


def unpatch(model: Any) -> None:
    """Undo ``patch``; does nothing to an unpatched model."""
    model = inside(model)
    method = vars(model).pop("triattention", None)
    if method is None:
        return
    # where another library has derived a class of its own, ours stays below it and passes every call on
    model.__class__ = vars(type(model)).get(_BASE, type(model))
    if method.guard is not None:
        method.guard.remove()
    for name, function in method.replaced.items():
        setattr(model, name, function)


@cache
def _compressing(base: type) -> type:
    """A class of the same name as ``base``, derived from it, whose instances compress if they have ``triattention``.

    Configurations and pipelines look at the name.
    """
    signature = inspect.signature(base.forward)
    cache_name = next(name for name in CACHE_NAMES if name in signature.parameters)

    @wraps(base.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = vars(self).get("triattention")
        if method is None:  # made by the class, as by from_pretrained
            return base.forward(self, *args, **kwargs)
        call = signature.bind_partial(self, *args, **kwargs).arguments
        given = {name: value for name, value in call.items() if name not in ("self", "kwargs")} | call.get("kwargs", {})
        original = method.replaced.get("forward", partial(base.forward, self))
        return step(self, method, original, cache_name, given)

    members: dict[str, Any] = {"forward": forward, "__reduce_ex__": lambda self, _: _reduced(self, base)}
    if hasattr(base, "generate"):
        members["generate"] = _checked(base)
    members |= {name: _refusing(base, name) for name in _CONTINUOUS if hasattr(base, name)}
    members |= {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__, _BASE: base}
    return type(base.__name__, (base,), members)


def _reduced(model: Any, base: type) -> tuple[Any, ...]:
    """How ``copy`` and ``pickle`` make a copy of a patched ``model``."""
    return _blank, (base,), model.__getstate__()


def _blank(base: type) -> Any:
    made = _compressing(base)
    return made.__new__(made)


def _refusing(base: type, name: str) -> Callable[..., Any]:
    original = getattr(base, name)

    @wraps(original)
    def refused(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "triattention" not in vars(self):
            return original(self, *args, **kwargs)
        raise TriAttentionError(
            "continuous batching (generate_batch, cache_implementation='paged') keeps a paged cache, which cannot be "
            "compressed; use generate, or vLLM with the plugin"
        )

    return refused


def _refuse_to_pass_by(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Raise TriAttentionError where the decoder of a patched model gets a cache from elsewhere: it would only grow."""
    given = next((one for one in (*args, *kwargs.values()) if isinstance(one, Cache)), None)
    if given is not None and not getattr(getattr(given, "triattention", None), "stepping", False):
        raise TriAttentionError(
            f"{type(decoder).__name__} was called with a cache, which is compressed only by a step of the whole model; "
            "call the patched model itself"
        )


def _checked(base: type) -> Callable[..., Any]:
    """``generate`` that raises at its start for what would be refused on the way."""
    signature = inspect.signature(base.generate)

    @wraps(base.generate)
    def generate(self: Any, *args: Any, **kwargs: Any) -> Any:
        method = vars(self).get("triattention")
        if method is not None:
            given = signature.bind_partial(self, *args, **kwargs).arguments
            asked = _Asked({**given, **given.pop("kwargs", {})}, self.generation_config)
            if asked.option("use_cache") is not False:
                asked.require_served(method.max_positions)
        original = (method and method.replaced.get("generate")) or partial(base.generate, self)
        return original(*args, **kwargs)

    return generate


@dataclass(frozen=True)
class _Asked:
    """The arguments of a ``generate`` call; what they leave open, the model's generation configuration says."""

    given: dict[str, Any]
    default: Any

    def option(self, name: str) -> Any:
        configurations = (self.given.get("generation_config"), self.default)
        found = (self.given.get(name), *(getattr(one, name, None) for one in configurations))
        return next((value for value in found if value is not None), None)

    def require_served(self, max_positions: int | None) -> None:
        """Raise TriAttentionError for beams, speculative decoding, an offloaded cache, and too long a sequence."""
        if (self.option("num_beams") or 1) > 1:
            raise TriAttentionError(NO_REORDERING)
        if any(self.option(name) for name in _SPECULATIVE):
            raise TriAttentionError(NO_ROLL_BACK)
        if "offloaded" in str(self.option("cache_implementation")):
            raise TriAttentionError(NO_OFFLOADING)
        if max_positions is not None:
            require_length(self._longest(), max_positions)

    def _longest(self) -> int:
        """The most tokens that a row may feed; the last new token is never fed."""
        named = (self.given.get(name) for name in ("inputs", "input_ids", "inputs_embeds"))
        ids = next((x for x in named if x is not None), None)
        mask = self.given.get("attention_mask")
        width = 1 if ids is None else ids.shape[1]
        prompt = width if mask is None or mask.ndim != 2 else int(mask.sum(-1).max())
        new = self.option("max_new_tokens")
        if new is None:
            # the default of generate: 20 new tokens
            new = 20 if (whole := self.option("max_length")) is None else max(whole - width, 1)
        return prompt + new - 1
