"""Answering the batches of a plan with one loaded model, in this process."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from triattention import models
from triattention.cli import compression
from triattention.cli.options import quiet_transformers, source_of
from triattention.cli.plan import Plan
from triattention.cli.results import Line, Result, Results
from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    import torch

    from triattention.evaluation.generation import Answer
    from triattention.models import LoadedModel


def answer_batches(
    plan: Plan, batches: Sequence[int], results: Results, report: Callable[[Sequence[Line]], None]
) -> None:
    """Load the model, answer the ``batches`` with these numbers, and append each to ``results`` when it is done."""
    from transformers import set_seed

    from triattention.evaluation.generation import Sampling, encode
    from triattention.forward import require_length

    quiet_transformers()
    args, settings = plan.args, plan.settings
    loaded = models.load(source_of(args), dtype=args.dtype, device=args.device, attention=args.attn_implementation)
    prompts = encode(loaded, plan.questions, args.max_new_tokens)
    settings = {**settings, **_known_now(loaded)}
    results.done(settings)
    compression.patch(loaded, args, plan.method)
    if (limit := getattr(getattr(loaded.model, "triattention", None), "max_positions", None)) is not None:
        require_length(max(prompt.shape[1] for prompt in prompts) + args.max_new_tokens, limit)
    sampling = Sampling(settings["temperature"], settings["top_p"]) if settings["temperature"] else None
    for batch in batches:
        units = plan.batches[batch]
        set_seed(plan.batch_seed(batch))
        replies = _generate(loaded, [prompts[unit.index] for unit in units], plan, batch, sampling)
        lines = [_line(plan, batch, n, reply, settings) for n, reply in enumerate(replies)]
        results.append(lines)
        report(lines)


def answer_in_child(args: Mapping[str, Any], path: str, batches: Sequence[int]) -> None:
    """``answer_batches`` for a child process: ``args`` are the options of ``run-one``, ``path`` the results file."""
    plan = Plan.of(argparse.Namespace(**args))
    answer_batches(plan, batches, Results(plan, Path(path)), lambda lines: None)


def _known_now(loaded: LoadedModel) -> dict[str, Any]:
    import torch

    on_gpu = loaded.model.device.type == "cuda"
    return {
        "dtype": str(loaded.model.dtype).removeprefix("torch."),
        "gpu": torch.cuda.get_device_name(loaded.model.device) if on_gpu else None,
    }


def _generate(loaded: LoadedModel, prompts: list[torch.Tensor], plan: Plan, batch: int, sampling: Any) -> list[Answer]:
    import torch

    from triattention.evaluation.generation import generate_batch

    try:
        return generate_batch(loaded, prompts, plan.args.max_new_tokens, sampling)
    except torch.OutOfMemoryError as error:
        first = plan.questions[plan.batches[batch][0].index].question
        smaller = "lower --batch-size" if plan.args.batch_size > 1 else "lower --max-new-tokens or --budget"
        raise TriAttentionError(
            f"the GPU ran out of memory with a batch size of {plan.args.batch_size}, in the batch that starts with the "
            f"question {first[:60]!r}; {smaller}, or use --dtype bfloat16"
        ) from error


def _line(plan: Plan, batch: int, number: int, reply: Answer, settings: Mapping[str, Any]) -> Line:
    from triattention.evaluation.grading import grade

    unit = plan.batches[batch][number]
    question = plan.questions[unit.index]
    graded = grade(reply.text, question.answer, grader=question.grader)
    result = Result(
        question=question.question,
        expected=question.answer,
        answer=reply.text,
        extracted=graded.extracted,
        correct=graded.correct,
        index=unit.index,
        sample=unit.sample,
        batch=batch,
        batch_seed=plan.batch_seed(batch),
        prompt_tokens=reply.prompt_tokens,
        new_tokens=reply.new_tokens,
        truncated=reply.truncated,
        seconds=reply.seconds,
        batch_seconds=reply.batch_seconds,
        tokens_per_s=reply.tokens_per_s,
        peak_kv_tokens=reply.peak_kv_tokens,
        peak_kv_bytes=reply.peak_kv_bytes,
        peak_memory_bytes=reply.peak_memory_bytes,
        rounds=reply.rounds,
    )
    return {**asdict(result), **settings}
