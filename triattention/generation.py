"""The answer loop: one question at a time, greedily, through the model's chat template."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from triattention.errors import TriAttentionError

if TYPE_CHECKING:
    from triattention.datasets import Question
    from triattention.models import LoadedModel


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply.

    ``seconds`` is prefill and decoding; ``new_tokens`` counts the end token; ``peak_kv_tokens`` is the longest the
    cache was after a step, per KV head.
    """

    text: str
    prompt_tokens: int
    new_tokens: int
    seconds: float
    peak_kv_tokens: int
    rounds: int

    @property
    def tokens_per_s(self) -> float:
        return self.new_tokens / self.seconds


def encode(loaded: LoadedModel, questions: Sequence[Question], max_new_tokens: int) -> list[torch.Tensor]:
    """Token ids ``[1, T]`` of every question in the model's chat template.

    Raises TriAttentionError for a model without a template, and for a question that leaves no room for the reply.
    """
    if not loaded.tokenizer.chat_template:
        raise TriAttentionError(f"model {loaded.source.name} has no chat template; use an instruction-tuned model")
    limit = getattr(loaded.model.config, "max_position_embeddings", None)
    prompts = []
    for number, question in enumerate(questions, start=1):
        encoded = loaded.tokenizer.apply_chat_template(
            [{"role": "user", "content": question.question}],
            add_generation_prompt=True,
            return_tensors="pt",
            return_dict=True,
        )
        ids = encoded["input_ids"]
        if limit is not None and ids.shape[1] + max_new_tokens > limit:
            raise TriAttentionError(
                f"question {number} has {ids.shape[1]} tokens and the reply may have {max_new_tokens}, together more "
                f"than the {limit} positions of {loaded.source.name}; lower --max-new-tokens or leave the question out"
            )
        prompts.append(ids)
    return prompts


def answer(loaded: LoadedModel, prompt: torch.Tensor, max_new_tokens: int) -> Answer:
    """Generate greedily from ``prompt`` ``[1, T]``, on the model as it is: patched or not."""
    model = loaded.model
    ids = prompt.to(model.device)
    end_token = model.generation_config.eos_token_id
    pad_token = model.generation_config.pad_token_id
    if pad_token is None:
        pad_token = end_token[0] if isinstance(end_token, list) else end_token
    started = time.perf_counter()
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad_token,
        return_dict_in_generate=True,
        # greedy, whatever sampling the checkpoint recommends
        do_sample=False,
        temperature=None,
        top_p=None,
        top_k=None,
        repetition_penalty=1.0,
    )
    reply = output.sequences[0, ids.shape[1] :].tolist()  # waits for the device
    seconds = time.perf_counter() - started
    method = getattr(model, "triattention", None)
    return Answer(
        text=loaded.tokenizer.decode(reply, skip_special_tokens=True).strip(),
        prompt_tokens=ids.shape[1],
        new_tokens=len(reply),
        seconds=seconds,
        peak_kv_tokens=output.past_key_values.get_seq_length() if method is None else method.peak_length,
        rounds=0 if method is None else method.rounds,
    )
