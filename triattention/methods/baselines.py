"""Other methods at the same budget, over the same cache: what TriAttention is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

from triattention.compression import Budget, Compression
from triattention.errors import TriAttentionError
from triattention.methods.controls import KNorm, Random, Recent
from triattention.methods.rkv import RKV
from triattention.methods.snapkv import SnapKV
from triattention.selection import default_window

#: Each keeps sets per layer and KV head, as it was published.
BASELINES: Mapping[str, Callable[..., Compression]] = MappingProxyType(
    {"snapkv": SnapKV, "rkv": RKV, "recent": Recent, "random": Random, "knorm": KNorm}
)
#: The newest queries that the methods which look at queries look at, as published; they are protected with their keys.
_OBSERVED = {"snapkv": 32, "rkv": 8}


def default_window_of(method: str, kv_budget: int) -> int:
    """The protected window of a method where none is given, in tokens."""
    return min(_OBSERVED[method], kv_budget // 2) if method in _OBSERVED else default_window(kv_budget)


def check_window_of(method: str, window_size: int) -> None:
    """Raise TriAttentionError for a method that ranks by the queries of an empty window."""
    if method in _OBSERVED and window_size < 1:
        raise TriAttentionError(
            f"{method} ranks by the newest queries and the window is {window_size}; give 1 or more, below the budget"
        )


def apply_baseline_patch(
    model: Any,
    method: str,
    *,
    kv_budget: int,
    divide_length: int = 128,
    window_size: int | None = None,
    pruning_mode: str = "per_layer_per_head",
    count_prompt_tokens: bool = True,
    allow_prefill_compression: bool = True,
    use_slack_trigger: bool = True,
    seed: int = 0,
) -> None:
    """Make ``model`` compress its cache by one of ``BASELINES``, as ``apply_triattention_patch`` does by its own.

    No statistics are needed. ``window_size`` None is the method's own; ``seed`` is for ``random``.
    ``remove_triattention_patch`` undoes it. Raises TriAttentionError for an unknown method, options that cannot be
    honoured, or a model that cannot be served.
    """
    if method not in BASELINES:
        raise TriAttentionError(f"method {method!r} is not known; known: {', '.join(BASELINES)}")
    window = default_window_of(method, kv_budget) if window_size is None else window_size
    check_window_of(method, window)
    budget = Budget(kv_budget, divide_length, window, count_prompt_tokens, allow_prefill_compression, use_slack_trigger)
    make = partial(BASELINES[method], budget, pruning_mode, **({"seed": seed} if method == "random" else {}))
    from triattention.forward import patch  # needs transformers

    patch(model, make)
