"""The plan of a run: settings, questions and batches, known before a model is loaded."""

from __future__ import annotations

import argparse
import hashlib
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from triattention import models
from triattention.cli import compression
from triattention.cli.options import (
    DEFAULT_TEMPERATURE,
    DEFAULT_TOP_P,
    require_at_least_one,
    require_writable,
    source_of,
)
from triattention.errors import TriAttentionError
from triattention.evaluation.datasets import Question, load_dataset
from triattention.files import expanded

#: Options that change the configuration of a model.
_CONFIGURING = ("hf_overrides", "hf_config_path", "revision")


@dataclass(frozen=True, slots=True)
class Unit:
    """One reply to generate: sample ``sample`` of question ``index`` (from 0) of the dataset."""

    index: int
    sample: int


@dataclass(frozen=True)
class Plan:
    """One run. Every line of its results repeats ``settings``.

    Settings known only from a loaded model (``dtype`` if it was not given, ``gpu``) are absent. Batches are fixed
    sequences of (question, sample) in file order, regardless of what is already done, so that a resumed or shared run
    generates the same batches from the same seeds as an uninterrupted one.
    """

    args: argparse.Namespace
    method: str
    name: str
    questions: tuple[Question, ...]
    settings: dict[str, Any]

    @classmethod
    def of(cls, args: argparse.Namespace) -> Plan:
        """Check everything that can be checked without loading weights, and make the plan; writes nothing."""
        args = argparse.Namespace(**vars(args))
        method = compression.METHODS[args.method]
        _check_numbers(args)
        sampling = _sampling(args)
        dataset = load_dataset(args.dataset, seed=args.seed)
        compressed = compression.check(args, method)
        if args.out is not None:
            require_writable(expanded(args.out), "--out")
        # find_source converts the embedded model if needed, which a dry run must not do
        source = models.ModelSource(args.model, "") if args.model == models.EMBEDDED else source_of(args)
        parts = [method, *([] if args.budget is None else [f"b{args.budget}"]), source.label, dataset.name]
        questions = dataset.questions[: args.max_questions]
        settings = {
            "method": method, **compressed, "model": args.model, "dataset": dataset.name, "questions": len(questions),
            "max_new_tokens": args.max_new_tokens, "batch_size": args.batch_size, "num_samples": args.num_samples,
            **sampling, "seed": args.seed, "attn": args.attn_implementation,
            **{name: getattr(args, name) or None for name in _CONFIGURING},
            "device": models.choose_device(args.device).type, **({} if args.dtype == "auto" else {"dtype": args.dtype}),
        }  # fmt: skip
        name = "-".join([*parts, *([] if args.run_tag is None else [args.run_tag])])
        return cls(args, method, name, questions, settings)

    @property
    def path(self) -> Path | None:
        """The JSON lines file, or None without ``--out``."""
        return None if self.args.out is None else expanded(self.args.out) / f"{self.name}.jsonl"

    @cached_property
    def batches(self) -> list[list[Unit]]:
        units = [Unit(index, n) for index in range(len(self.questions)) for n in range(self.args.num_samples)]
        size = self.args.batch_size
        return [units[first : first + size] for first in range(0, len(units), size)]

    def batch_seed(self, batch: int) -> int:
        """The seed set before a batch: 32 bits of a hash of the run's seed and the batch's number."""
        return int.from_bytes(hashlib.sha256(f"{self.args.seed} {batch}".encode()).digest()[:4], "big")


def describe(plans: Sequence[Plan], done: Sequence[int], workers: int) -> list[str]:
    """The output of ``--dry-run``: the settings common to all ``plans``, then each run with its differing settings."""
    first, *others = [plan.settings for plan in plans]
    shared = [key for key in first if all(key in s and s[key] == first[key] for s in others)]
    lines = [f"{'run' if len(plans) == 1 else 'runs'} that would start; nothing is loaded or written"]
    lines += [f"  {key:<27}{shown(first[key])}" for key in shared]
    lines += [f"  {'workers':<27}{workers}"]
    for plan, finished in zip(plans, done, strict=True):
        differing = "".join(f"{key} {shown(value)}, " for key, value in plan.settings.items() if key not in shared)
        lines += [
            f"{plan.name}: {differing}{len(plan.questions)} questions, {len(plan.batches)} batches, "
            f"{finished} done, {plan.path or 'nothing is saved (no --out)'}"
        ]
    return lines


def _check_numbers(args: argparse.Namespace) -> None:
    require_at_least_one(args, "max_questions", "max_new_tokens", "batch_size", "num_samples", "workers")
    if not 0 <= args.seed < 2**32:
        raise TriAttentionError(f"--seed is {args.seed}; give a number from 0 to {2**32 - 1}")
    if args.run_tag is not None and not re.fullmatch(r"[\w.-]+", args.run_tag):
        raise TriAttentionError(f"--run-tag is {args.run_tag!r}; give letters, digits, dots, dashes and underscores")


def _sampling(args: argparse.Namespace) -> dict[str, float | None]:
    """``temperature`` and ``top_p``, both None for greedy decoding."""
    temperature = args.temperature
    if temperature is None and args.num_samples > 1:
        temperature = DEFAULT_TEMPERATURE
    if temperature is not None and not (math.isfinite(temperature) and temperature >= 0):
        raise TriAttentionError(
            f"--temperature is {temperature}; give 0 (greedy) or more, {DEFAULT_TEMPERATURE} is usual"
        )
    if args.top_p is not None and not 0 < args.top_p <= 1:
        raise TriAttentionError(f"--top-p is {args.top_p}; give more than 0 and at most 1, {DEFAULT_TOP_P} is usual")
    if temperature:
        return {"temperature": temperature, "top_p": DEFAULT_TOP_P if args.top_p is None else args.top_p}
    if args.num_samples > 1:
        raise TriAttentionError(
            f"--num-samples is {args.num_samples} and --temperature 0, so all samples of a question would be the same; "
            "give a temperature, or one sample"
        )
    if args.top_p is not None:
        raise TriAttentionError(f"--top-p {args.top_p} needs --temperature: decoding is greedy without it")
    return {"temperature": None, "top_p": None}


def shown(setting: Any) -> str:
    return "-" if setting is None else str(setting)
