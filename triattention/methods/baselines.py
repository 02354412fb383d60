"""Other compression methods on the same cache and budget, for comparison with TriAttention."""

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

#: Each has one keep set per layer and KV head by default, as published.
BASELINES: Mapping[str, Callable[..., Compression]] = MappingProxyType(
    {"snapkv": SnapKV, "rkv": RKV, "recent": Recent, "random": Random, "knorm": KNorm}
)
#: The number of newest queries used by the methods that use queries, as published; their tokens are protected.
_OBSERVED = {"snapkv": 32, "rkv": 8}


def default_window_of(method: str, kv_budget: int) -> int:
    """The default protected window of a method, in tokens."""
    return min(_OBSERVED[method], kv_budget // 2) if method in _OBSERVED else default_window(kv_budget)


def check_window_of(method: str, window_size: int) -> None:
    """Raise TriAttentionError if the window is empty and the method needs its queries."""
    if method in _OBSERVED and window_size < 1:
        raise TriAttentionError(
            f"{method} uses the newest queries, but the window is {window_size}; give 1 or more, below the budget"
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
    """Make ``model`` compress its cache with one of ``BASELINES``; the counterpart of ``apply_triattention_patch``.

    No statistics are needed. ``window_size`` None is the method's default; ``seed`` is for ``random``.
    ``remove_triattention_patch`` undoes it. Raises TriAttentionError for an unknown method, invalid options, or an
    unsupported model.
    """
    if method not in BASELINES:
        raise TriAttentionError(f"method {method!r} is not known; known: {', '.join(BASELINES)}")
    window = default_window_of(method, kv_budget) if window_size is None else window_size
    check_window_of(method, window)
    budget = Budget(
        kv_budget=kv_budget,
        divide_length=divide_length,
        window_size=window,
        count_prompt_tokens=count_prompt_tokens,
        allow_prefill_compression=allow_prefill_compression,
        use_slack_trigger=use_slack_trigger,
    )
    make = partial(BASELINES[method], budget, pruning_mode, **({"seed": seed} if method == "random" else {}))
    from triattention.patching import patch  # needs transformers

    patch(model, make)
