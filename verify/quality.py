"""What compression costs a model, beside simple controls at the same budget: perplexity and needle recall.

Everything is teacher-forced, so five seeds take a minute on two cores and no sampling noise is in the numbers. The
controls are the suite's own, so that a subject is not compared with its own idea of them: they evict from the same
cache, at the same moments, down to the same budget, and protect the same window.
"""

from __future__ import annotations

import importlib
import inspect
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from verify.live_model import LiveModel

#: Modules of the standard library, whose source every machine has; one for each seed.
_TEXTS = ("argparse", "difflib", "inspect", "tarfile", "statistics")
SEEDS = tuple(range(len(_TEXTS)))

#: Student's t for a 95 % interval from five values.
_T95 = 2.776

_SINKS = 4


@dataclass(frozen=True)
class Setting:
    """Tokens: the budget, how many more make a round due, the newest that are protected, how many are fed a step."""

    budget: int = 128
    divide_length: int = 32
    window: int = 32
    step: int = 32
    text: int = 1024

    @property
    def patch(self) -> dict[str, Any]:
        """Options of the subject's patch: the recommended setting at this budget."""
        return {
            "kv_budget": self.budget, "divide_length": self.divide_length, "window_size": self.window,
            "per_head_pruning": True, "normalize_scores": True, "use_slack_trigger": True,
            "count_prompt_tokens": True, "allow_prefill_compression": True,
        }  # fmt: skip


#: Scores ``[H, N]``, or ``[1, N]`` for all heads, of one layer's keys ``[H, N, D]``; the best stay.
Control = Callable[["torch.Tensor", random.Random], "torch.Tensor"]


def _recent(keys: torch.Tensor, rng: random.Random) -> torch.Tensor:
    import torch

    order = torch.arange(keys.shape[1], dtype=torch.float32)
    order[:_SINKS] = math.inf
    return order[None]


def _random(keys: torch.Tensor, rng: random.Random) -> torch.Tensor:
    import torch

    return torch.tensor([[rng.random() for _ in range(keys.shape[1])]])


def _knorm(keys: torch.Tensor, rng: random.Random) -> torch.Tensor:
    return -keys.norm(dim=-1)


#: Each in its strongest form: random and recent keep one set for all heads and layers, key norm one for each.
CONTROLS: dict[str, Control] = {"random": _random, "knorm": _knorm, "recent": _recent}
_SHARED = ("random", "recent")


@dataclass(frozen=True)
class Margin:
    """By how much the subject beats a control, in nats or in recall, one value for each seed; positive is better."""

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t over the seeds."""
        variance = sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1)
        return _T95 * math.sqrt(variance / len(self.values))

    @property
    def low(self) -> float:
        return self.mean - self.half_width


def _fed(
    live: LiveModel, ids: torch.Tensor, setting: Setting, control: str | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed ``ids`` ``[1, T]``: log-probability of each but the first, and whether it was the likeliest, ``[T - 1]``.

    ``control`` None is the model as it is, patched or not; a control evicts from an unpatched one.
    """
    import torch
    from transformers import DynamicCache

    cache, rng, parts, fed = DynamicCache(config=live.model.config), random.Random(seed), [], 0
    with torch.inference_mode():
        for step in ids.split(setting.step, dim=1):
            given = {}
            if control is not None:  # the cache forgets how many tokens it has seen
                given["position_ids"] = torch.arange(fed, fed + step.shape[1], device=ids.device)[None]
            parts.append(live.model(input_ids=step, past_key_values=cache, use_cache=True, **given).logits[0])
            fed += step.shape[1]
            if control is not None and cache.layers[0].keys.shape[2] >= setting.budget + setting.divide_length:
                _evict(cache, setting, control, rng)
    predicted, targets = torch.cat(parts)[:-1].float().log_softmax(-1), ids[0, 1:]
    return predicted.gather(-1, targets[:, None])[:, 0].cpu(), (predicted.argmax(-1) == targets).cpu()


def _evict(cache: Any, setting: Setting, control: str, rng: random.Random) -> None:
    kept = None
    for layer in cache.layers:
        keys = layer.keys[0].float().cpu()
        if kept is None or control not in _SHARED:
            scores = CONTROLS[control](keys, rng)
            scores[:, keys.shape[1] - setting.window :] = math.inf
            kept = scores.argsort(descending=True, stable=True)[:, : setting.budget].sort().values
        rows = kept.expand(keys.shape[0], -1).to(layer.keys.device)[None, :, :, None]
        layer.keys = layer.keys.gather(2, rows.expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(2, rows.expand(-1, -1, -1, layer.values.shape[-1]))


def perplexity_loss(live: LiveModel, setting: Setting, control: str | None, seed: int) -> float:
    """Mean negative log-likelihood in nats per token, over the text of ``seed`` after the first round is due."""
    source = inspect.getsource(importlib.import_module(_TEXTS[seed]))
    ids = live.tokens(source)["input_ids"][:, : setting.text]
    log_probs, _ = _fed(live, ids, setting, control, seed)
    return -float(log_probs[setting.budget + setting.divide_length :].mean())


#: Depths of the needle in the haystack of one seed, as a share of it.
_DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
_PLACES = ("harbour", "library", "orchard", "station", "theatre", "museum", "bakery", "school", "garden", "market")
_PEOPLE = ("The baker", "An old sailor", "The teacher", "A young painter", "The doctor", "My neighbour", "The farmer")
_ACTS = ("walked along", "looked at", "talked about", "painted", "remembered", "wrote a letter about", "dreamed of")
_THINGS = ("the quiet river", "a wooden bridge", "the tall trees", "an empty street", "the old clock", "a small boat")


def needle(seed: int, depth: float, sentences: int = 60) -> tuple[str, str]:
    """A text of ``sentences`` sentences, one of which tells a code, asked for at its end; and the code."""
    rng = random.Random(f"needle {seed} {depth}")
    place, code = rng.choice(_PLACES), "".join(rng.choices("0123456789", k=5))
    told = f"The secret code of the {place} is"
    lines = [f"{rng.choice(_PEOPLE)} {rng.choice(_ACTS)} {rng.choice(_THINGS)}." for _ in range(sentences)]
    lines.insert(round(depth * sentences), f"{told} {code}.")
    return f"{' '.join(lines)} Do you remember it? {told}", f" {code}"


def needle_recall(live: LiveModel, setting: Setting, control: str | None, seed: int) -> float:
    """Share of the digits of the codes that get the highest probability, over the depths of ``seed``."""
    found = total = 0
    for depth in _DEPTHS:
        text, code = needle(seed, depth)
        prompt = live.tokens(text)["input_ids"]
        ids = live.tokens(text + code)["input_ids"]
        _, hits = _fed(live, ids, setting, control, seed)
        answer = hits[prompt.shape[1] - 1 :]
        found, total = found + int(answer.sum()), total + len(answer)
    return found / total
