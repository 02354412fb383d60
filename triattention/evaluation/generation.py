"""Answering batches of questions in the model's chat template, by greedy decoding or sampling."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria

from triattention.errors import TriAttentionError
from triattention.forward import CACHE_NAMES

if TYPE_CHECKING:
    from triattention.evaluation.datasets import Question
    from triattention.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Sampling:
    """Temperature and top-p of sampling; never top-k, even if the checkpoint recommends it."""

    temperature: float
    top_p: float


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply: one row of a batch.

    ``new_tokens`` includes the end token; ``truncated`` means that there was none. ``seconds`` runs from the start of
    the batch to this row's last token, ``batch_seconds`` to the end of the batch; both include the prefill.
    ``peak_kv_tokens`` is the row's largest cache length after a step, per KV head: exact if nothing was evicted, else
    an upper bound, from the batch's longest row. ``rounds`` counts the batch's rounds. ``peak_memory_bytes`` is torch's
    peak GPU allocation during the batch, or on a CPU the largest resident set of the process so far.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    truncated: bool
    seconds: float
    batch_seconds: float
    peak_kv_tokens: int
    peak_kv_bytes: int
    peak_memory_bytes: int
    rounds: int

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


def encode(loaded: LoadedModel, questions: Sequence[Question], max_new_tokens: int) -> list[torch.Tensor]:
    """Token ids ``[1, T]`` of every question in the model's chat template.

    Raises TriAttentionError for a model without a template, and for a question too long for the reply to fit.
    """
    if not loaded.tokenizer.chat_template:
        raise TriAttentionError(f"model {loaded.source.name} has no chat template; use an instruction-tuned model")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    prompts = []
    for number, question in enumerate(questions, start=1):
        encoded = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.prompt}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = encoded["input_ids"]
        if limit is not None and ids.shape[1] + max_new_tokens > limit:
            raise TriAttentionError(
                f"question {number} has {ids.shape[1]} tokens and the reply up to {max_new_tokens}, together more than "
                f"the {limit} positions of {loaded.source.name}; lower --max-new-tokens or leave the question out"
            )
        prompts.append(ids)
    return prompts


class _StepTimes(StoppingCriteria):
    """The host time at the end of each step; ``generate`` waits for the device in every step to check for the end."""

    def __init__(self) -> None:
        self.ended: list[float] = []

    def __call__(self, input_ids: torch.LongTensor, scores: Any, **kwargs: Any) -> torch.BoolTensor:
        self.ended.append(time.perf_counter())
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_batch(
    loaded: LoadedModel, prompts: Sequence[torch.Tensor], max_new_tokens: int, sampling: Sampling | None = None
) -> list[Answer]:
    """Answer ``prompts`` ``[1, T]`` together, left-padded; the model may be patched or not.

    Without ``sampling`` decoding is greedy, and in float32 each row gets the same tokens as alone. With it, tokens are
    drawn from torch's generator, so set its seed before.
    """
    model = loaded.model
    end_tokens = _as_list(model.generation_config.eos_token_id)
    pad_token = next(iter([*_as_list(model.generation_config.pad_token_id), *end_tokens]), 0)
    ids = _left_padded(prompts, pad_token)
    mask = _left_padded([torch.ones_like(prompt) for prompt in prompts], 0)
    times = _StepTimes()
    _reset_peak_memory(model.device)
    started = time.perf_counter()
    output = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token,
        return_dict_in_generate=True,
        stopping_criteria=[times],
        # override all of the checkpoint's recommendations
        do_sample=sampling is not None,
        temperature=None if sampling is None else sampling.temperature,
        top_p=None if sampling is None else sampling.top_p,
        top_k=None if sampling is None else 0,
        repetition_penalty=1.0,
    )
    generated = output.sequences[:, ids.shape[1] :].tolist()  # waits for the device
    batch_seconds = time.perf_counter() - started
    replies = [_until_end(row, end_tokens) for row in generated]
    peak_memory = _peak_memory_bytes(model.device)
    method = getattr(model, "triattention", None)
    cache = next(filter(None, (getattr(output, name, None) for name in CACHE_NAMES)), None)
    longest = cache.get_seq_length() if method is None else method.peak_length
    answers = []
    for prompt, reply in zip(prompts, replies, strict=True):
        # the last new token is never fed back, so it is not in the cache
        peak_kv_tokens = min(longest, prompt.shape[1] + len(reply) - 1)
        answers.append(
            Answer(
                text=loaded.tokenizer.decode(reply, skip_special_tokens=True).strip(),
                prompt_tokens=prompt.shape[1],
                new_tokens=len(reply),
                truncated=reply[-1] not in end_tokens,
                seconds=times.ended[len(reply) - 1] - started,
                batch_seconds=batch_seconds,
                peak_kv_tokens=peak_kv_tokens,
                peak_kv_bytes=peak_kv_tokens * kv_bytes_per_token(model),
                peak_memory_bytes=peak_memory,
                rounds=0 if method is None else method.rounds,
            )
        )
    return answers


def kv_bytes_per_token(model: Any) -> int:
    """Bytes per token in the cache: layers x 2 x KV heads x head dim x bytes of the dtype."""
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return config.num_hidden_layers * 2 * kv_heads * head_dim * model.dtype.itemsize


def _as_list(token: int | Sequence[int] | None) -> list[int]:
    if token is None:
        return []
    return [token] if isinstance(token, int) else list(token)


def _left_padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
    """Rows ``[1, T]`` as one ``[B, longest T]``."""
    width = max(row.shape[1] for row in rows)
    return torch.cat([torch.nn.functional.pad(row, (width - row.shape[1], 0), value=value) for row in rows])


def _until_end(reply: list[int], end_tokens: list[int]) -> list[int]:
    """``reply`` up to and including its first end token; after that there is only padding."""
    end = next((index for index, token in enumerate(reply) if token in end_tokens), len(reply) - 1)
    return reply[: end + 1]


def _reset_peak_memory(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak_memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
