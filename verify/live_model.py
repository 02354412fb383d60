"""A live language model under the subject's patch, and the ways the checks of phase 6 drive it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from verify import oracle
from verify.problems import OFFSETS_17
from verify.subject import Subject


def physical_length(cache: Any) -> int:
    """Tokens that the longest layer of ``cache`` really holds."""
    return max(layer.keys.shape[-2] for layer in cache.layers)


@dataclass(frozen=True)
class LiveModel:
    """A model loaded in float32 with its tokenizer, the directory it came from and its statistics file.

    ``defaults`` are the options of a patch that does not say otherwise.
    """

    model: Any
    tokenizer: Any
    location: str
    statistics: Path
    subject: Subject
    defaults: Mapping[str, Any]

    def patch(self, **options: Any) -> None:
        """Patch the model with the subject's published entry point."""
        self.subject.attribute("methods.triattention", "apply_triattention_patch")(
            self.model, stats_path=str(self.statistics), model_path=self.location, **{**self.defaults, **options}
        )

    def tokens(self, *prompts: str) -> dict[str, Any]:
        """Token ids and mask of ``prompts`` on the model's device, left-padded."""
        return self.tokenizer(list(prompts), return_tensors="pt", padding=True).to(self.model.device)

    def generate(self, encoded: dict[str, Any], new_tokens: int) -> Any:
        """New tokens ``[B, new_tokens]``, greedy and never stopping early, so that every run has the same length."""
        out = self.model.generate(
            **encoded,
            max_new_tokens=new_tokens,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        return out[:, encoded["input_ids"].shape[1] :]

    def decode(self, encoded: dict[str, Any], steps: int) -> Iterator[tuple[int, Any]]:
        """Prefill and greedy steps by hand: tokens fed in the step, and the cache after it."""
        import torch
        from transformers import DynamicCache

        cache, ids = DynamicCache(config=self.model.config), encoded["input_ids"]
        with torch.inference_mode():
            for _ in range(steps):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                yield ids.shape[1], cache
                ids = out.logits[:, -1:].argmax(-1)

    def feed(self, ids: Any, prompt: int) -> Iterator[Any]:
        """Feed ``ids`` ``[1, T]``: the first ``prompt`` at once, then one by one; the cache after each step."""
        import torch
        from transformers import DynamicCache

        cache = DynamicCache(config=self.model.config)
        with torch.inference_mode():
            for step in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
                self.model(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
                yield cache

    def oracle_cases(self, keys: list[Any], t: int, options: dict[str, Any]) -> list[oracle.Case]:
        """One scoring problem per layer, of rotated ``keys`` ``[1, H, N, D]`` and the statistics file."""
        import numpy as np
        import torch

        stats = torch.load(self.statistics, weights_only=True)
        omega = stats["architecture"]["omega"].double().numpy()
        scaling = stats["architecture"]["attention_scaling"]
        positions = np.arange(t)
        real, imag, norm = (stats[name].double().numpy() for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"))
        return [
            oracle.Case(
                k0=oracle.unrotated(layer.double().cpu().numpy(), positions, omega, "half", scaling),
                positions=positions,
                m=real[i] + 1j * imag[i],
                a=norm[i],
                w=np.full(norm[i].shape, scaling),
                omega=omega,
                offsets=np.array(OFFSETS_17),
                t=t,
                s=scaling,
                aggregation=options.get("score_aggregation", "mean"),
                disable_mlr=options.get("disable_mlr", False),
                disable_trig=options.get("disable_trig", False),
            )
            for i, layer in enumerate(keys)
        ]
