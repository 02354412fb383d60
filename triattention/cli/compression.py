"""The methods of the command line: their options, the checks before a model is loaded, and the patch."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from triattention.files import expanded

if TYPE_CHECKING:
    from triattention.models import LoadedModel

#: Method names and aliases. ``methods.baselines`` is not imported for them, because that would import torch.
METHODS = {
    "full": "full", "fullkv": "full", "triattention": "triattention", "snapkv": "snapkv", "rkv": "rkv", "r1kv": "rkv",
    "recent": "recent", "random": "random", "knorm": "knorm",
}  # fmt: skip
DEFAULT_BUDGET = 2048
DEFAULT_DIVIDE_LENGTH = 128
_DEFAULT_MODES = {"triattention": "per_head"}
#: Options that only compressing methods use; the last one only triattention.
_OPTIONS = ("budget", "divide_length", "window_size", "pruning_mode", "allow_prefill_compression", "stats_path")


def add_options(parser: argparse.ArgumentParser, *, budget: bool = True) -> None:
    """Add the options of all compressing methods; ``--budget`` only for verbs with a single budget."""
    group = parser.add_argument_group("compression (ignored, with a note, by method full)")
    if budget:
        group.add_argument("--budget", type=int, metavar="N", help=f"KV tokens kept (default: {DEFAULT_BUDGET})")
    group.add_argument(
        "--divide-length",
        type=int,
        metavar="N",
        help=f"compress at budget + N tokens (default: {DEFAULT_DIVIDE_LENGTH})",
    )
    group.add_argument(
        "--window-size",
        type=int,
        metavar="N",
        help="newest tokens always kept (default: min(128, budget // 2); snapkv 32 and rkv 8, whose queries they use)",
    )
    group.add_argument(
        "--pruning-mode",
        metavar="MODE",
        help="keep sets: per_head (default of triattention), union, per_layer, per_layer_per_head (default of others)",
    )
    group.add_argument(
        "--allow-prefill-compression",
        action=argparse.BooleanOptionalAction,
        help="allow eviction of prompt tokens (default: the prompt is kept)",
    )
    group.add_argument(
        "--stats-path", metavar="FILE", help="statistics file (default: calibrate once and cache the result)"
    )


def without_effect(args: argparse.Namespace, method: str) -> list[str]:
    """The given options that ``method`` does not use."""
    unused = {"full": _OPTIONS, "triattention": ()}.get(method, ("stats_path",))
    return [f"--{option.replace('_', '-')}" for option in unused if getattr(args, option) is not None]


def check(args: argparse.Namespace, method: str) -> dict[str, Any]:
    """The settings of ``method`` with their defaults, as stored in each result line.

    Also sets them on ``args``, which ``patch`` reads. Raises TriAttentionError for invalid settings.
    """
    if method == "full":
        for option in _OPTIONS:
            setattr(args, option, None)
        return {"budget": None}
    from triattention import statistics
    from triattention.methods.baselines import check_window_of, default_window_of
    from triattention.selection import check_budget, check_mode

    args.budget = DEFAULT_BUDGET if args.budget is None else args.budget
    args.divide_length = DEFAULT_DIVIDE_LENGTH if args.divide_length is None else args.divide_length
    args.pruning_mode = check_mode(args.pruning_mode or _DEFAULT_MODES.get(method, "per_layer_per_head"))
    if args.window_size is None:
        args.window_size = default_window_of(method, args.budget)
    args.allow_prefill_compression = bool(args.allow_prefill_compression)
    check_budget(args.budget, args.divide_length, args.window_size)
    check_window_of(method, args.window_size)
    if method != "triattention":
        args.stats_path = None
    if args.stats_path is not None:
        statistics.load(expanded(args.stats_path))
    return {option: getattr(args, option) for option in _OPTIONS}


def patch(loaded: LoadedModel, args: argparse.Namespace, method: str) -> None:
    """Patch the model with the recommended setting (z-scores, slack trigger, prompt counted); none for method full."""
    if method == "full":
        return
    shared = {
        "kv_budget": args.budget, "divide_length": args.divide_length, "window_size": args.window_size,
        "pruning_mode": args.pruning_mode, "allow_prefill_compression": args.allow_prefill_compression,
    }  # fmt: skip
    if method != "triattention":
        from triattention.methods.baselines import apply_baseline_patch

        apply_baseline_patch(loaded.model, method, seed=args.seed, **shared)
        return
    from triattention.methods.triattention import apply_triattention_patch
    from triattention.text_calibration import cached_statistics

    path = cached_statistics(loaded) if args.stats_path is None else expanded(args.stats_path)
    apply_triattention_patch(
        loaded.model,
        stats_path=path,
        model_path=loaded.source.location,
        **shared,
        normalize_scores=True,
        use_slack_trigger=True,
        count_prompt_tokens=True,
    )
