"""``run-one``: load a model, answer a dataset, grade the answers."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention import models
from triattention.cli.options import add_model_options, quiet_transformers
from triattention.cli.results import Result, Results, run_name
from triattention.datasets import BUNDLED, load_dataset
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.datasets import Question
    from triattention.models import LoadedModel

METHODS = {"full": "full", "fullkv": "full", "triattention": "triattention"}
DEFAULT_BUDGET = 2048
DEFAULT_DIVIDE_LENGTH = 128
_SHOWN_CHARACTERS = 400
#: Options that mean something to the compressed method alone.
_COMPRESSION_OPTIONS = (
    "budget",
    "divide_length",
    "window_size",
    "pruning_mode",
    "allow_prefill_compression",
    "stats_path",
)


def add_parser(verbs: Any) -> None:
    parser = verbs.add_parser(
        "run-one",
        help="answer a dataset with one model and one method, and grade it",
        description="Answer the questions one at a time, greedily; print and grade each; end with the accuracy.",
    )
    add_model_options(parser)
    parser.add_argument(
        "--dataset",
        required=True,
        metavar="D",
        help=f"{', '.join(BUNDLED)}, or a .jsonl file with question and answer on each line",
    )
    parser.add_argument("--method", choices=METHODS, required=True, help="full (or fullkv): no compression")
    parser.add_argument(
        "--attn-implementation", choices=models.ATTENTION, default="sdpa", help="attention of the model (default: sdpa)"
    )
    parser.add_argument("--max-questions", type=int, metavar="K", help="only the first K questions")
    parser.add_argument(
        "--max-new-tokens", type=int, default=128, metavar="N", help="longest reply in tokens (default: 128)"
    )
    parser.add_argument("--seed", type=int, default=0, help="set and recorded; decoding is greedy (default: 0)")
    parser.add_argument("--out", metavar="DIR", help="write JSON lines and a summary there")
    group = parser.add_argument_group("compression (method triattention)")
    group.add_argument("--budget", type=int, metavar="N", help=f"KV tokens kept (default: {DEFAULT_BUDGET})")
    group.add_argument(
        "--divide-length",
        type=int,
        metavar="N",
        help=f"compress when budget + N are reached (default: {DEFAULT_DIVIDE_LENGTH})",
    )
    group.add_argument(
        "--window-size", type=int, metavar="N", help="newest tokens kept (default: min(128, budget // 2))"
    )
    group.add_argument(
        "--pruning-mode", metavar="{per_head,union}", help="one keep set per KV head (default), or one for all heads"
    )
    group.add_argument(
        "--allow-prefill-compression", action="store_true", default=None, help="let the prompt be evicted too"
    )
    group.add_argument(
        "--stats-path", metavar="FILE", help="statistics (default: calibrate once, and keep them in the cache)"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Everything that can be wrong is looked at before the first file is written."""
    method = METHODS[args.method]
    questions, dataset = _questions(args)
    if method == "full":
        _say_what_has_no_effect(args)
    else:
        _check_compression(args)
    out = None if args.out is None else Path(args.out).expanduser()
    from transformers import set_seed

    from triattention import grading  # noqa: F401 - a missing math-verify must show before the first question
    from triattention.generation import encode

    quiet_transformers()
    source = models.find_source(args.model)
    name = run_name(method, args.budget, source.label, dataset)
    results = Results(out, name)
    results.check()
    loaded = models.load(source, dtype=args.dtype, device=args.device, attention=args.attn_implementation)
    prompts = encode(loaded, questions, args.max_new_tokens)
    if method == "triattention":
        _patch(loaded, args)
    set_seed(args.seed)
    described = {
        "method": method, "budget": args.budget if method == "triattention" else None, "seed": args.seed,
        "model": args.model, "dataset": args.dataset, "attn": args.attn_implementation,
        "dtype": str(loaded.model.dtype).removeprefix("torch."), "device": str(loaded.model.device),
    }  # fmt: skip
    with results:
        for number, (question, prompt) in enumerate(zip(questions, prompts, strict=True), start=1):
            result = _ask(loaded, question, prompt, args.max_new_tokens, described)
            results.append(result)
            _print(result, number, len(questions))
    print(results.finish(described))


def _questions(args: argparse.Namespace) -> tuple[tuple[Question, ...], str]:
    for option, value in (("--max-questions", args.max_questions), ("--max-new-tokens", args.max_new_tokens)):
        if value is not None and value < 1:
            raise TriAttentionError(f"{option} is {value}; give 1 or more")
    if not 0 <= args.seed < 2**32:
        raise TriAttentionError(f"--seed is {args.seed}; give a number from 0 to {2**32 - 1}")
    dataset = load_dataset(args.dataset)
    return dataset.questions[: args.max_questions], dataset.name


def _say_what_has_no_effect(args: argparse.Namespace) -> None:
    given = [f"--{option.replace('_', '-')}" for option in _COMPRESSION_OPTIONS if getattr(args, option) is not None]
    if given:
        print(f"note: --method {args.method} does not compress, so {', '.join(given)} has no effect")
    args.budget = None


def _check_compression(args: argparse.Namespace) -> None:
    """Fill in the defaults and refuse what cannot work, before a model is loaded."""
    from triattention import statistics
    from triattention.selection import check_budget, default_window

    args.budget = DEFAULT_BUDGET if args.budget is None else args.budget
    args.divide_length = DEFAULT_DIVIDE_LENGTH if args.divide_length is None else args.divide_length
    args.pruning_mode = args.pruning_mode or "per_head"
    if args.pruning_mode in ("per_layer", "per_layer_per_head", "per_layer_perhead"):
        raise TriAttentionError(f"--pruning-mode {args.pruning_mode} is not available yet; use per_head or union")
    if args.pruning_mode not in ("per_head", "union"):
        raise TriAttentionError(f"--pruning-mode {args.pruning_mode} is not known; use per_head or union")
    args.window_size = default_window(args.budget) if args.window_size is None else args.window_size
    check_budget(args.budget, args.divide_length, args.window_size)
    if args.stats_path is not None:
        statistics.load(Path(args.stats_path).expanduser())


def _patch(loaded: LoadedModel, args: argparse.Namespace) -> None:
    """Patch the model with the recommended setting: z-scores, slack trigger, prompt counted."""
    from triattention.methods.triattention import apply_triattention_patch
    from triattention.text_calibration import cached_statistics

    path = cached_statistics(loaded) if args.stats_path is None else Path(args.stats_path).expanduser()
    apply_triattention_patch(
        loaded.model,
        stats_path=path,
        model_path=loaded.source.location,
        kv_budget=args.budget,
        divide_length=args.divide_length,
        window_size=args.window_size,
        per_head_pruning=args.pruning_mode == "per_head",
        allow_prefill_compression=bool(args.allow_prefill_compression),
        normalize_scores=True,
        use_slack_trigger=True,
        count_prompt_tokens=True,
    )


def _ask(
    loaded: LoadedModel, question: Question, prompt: Any, max_new_tokens: int, described: dict[str, Any]
) -> Result:
    import torch

    from triattention.generation import answer
    from triattention.grading import grade

    try:
        reply = answer(loaded, prompt, max_new_tokens)
    except torch.OutOfMemoryError as error:
        raise TriAttentionError(
            f"the GPU ran out of memory in the question {question.question[:60]!r}; lower --max-new-tokens or --budget"
            ", or use --dtype bfloat16"
        ) from error
    return Result.of(question, reply, grade(reply.text, question.answer), described)


def _print(result: Result, number: int, total: int) -> None:
    verdict = "correct" if result.correct else "wrong"
    reply = textwrap.shorten(result.answer, _SHOWN_CHARACTERS, placeholder=" ...")
    print(f"[{number}/{total}] {verdict}: {result.question}")
    print(f"    answer: {reply}")
    print(
        f"    expected {result.expected}, got {result.extracted or 'nothing'}; {result.new_tokens} tokens, "
        f"{result.tokens_per_s:.1f} tokens/s, peak KV {result.peak_kv_tokens}, rounds {result.rounds}",
        flush=True,
    )
