"""Simple eviction rules to compare compression with (controls), and how texts are fed to a model under one."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify.model.observed import cache_of, with_cache

if TYPE_CHECKING:
    import torch

    from verify.model.live_model import LiveModel


_SINKS = 4


@dataclass(frozen=True)
class Setting:
    """Numbers of tokens: the budget, how many more make a round due, the protected window, a step, a text."""

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


#: Maps one layer's keys ``[B, H, N, D]`` to scores ``[B, H, N]``, or ``[B, 1, N]`` for all heads; the highest are kept.
#: Each row has its own generator.
Control = Callable[["torch.Tensor", Sequence[random.Random]], "torch.Tensor"]


def _recent(keys: torch.Tensor, rngs: Sequence[random.Random]) -> torch.Tensor:
    import torch

    order = torch.arange(keys.shape[2], dtype=torch.float32)
    order[:_SINKS] = math.inf
    return order.expand(keys.shape[0], 1, -1).clone()


def _random(keys: torch.Tensor, rngs: Sequence[random.Random]) -> torch.Tensor:
    import torch

    return torch.tensor([[[rng.random() for _ in range(keys.shape[2])]] for rng in rngs])


def _knorm(keys: torch.Tensor, rngs: Sequence[random.Random]) -> torch.Tensor:
    return -keys.norm(dim=-1)


#: Each in its strongest form: random and recent keep one set for all heads and layers, key norm one for each.
CONTROLS: dict[str, Control] = {"random": _random, "knorm": _knorm, "recent": _recent}


_SHARED = ("random", "recent")


@dataclass(frozen=True)
class Asked:
    """A text to feed: its token ids ``[T]``, the first position whose next-token prediction counts, and its seed."""

    ids: torch.Tensor
    first: int
    seed: int


#: For each text the log-probabilities of the tokens after ``first``, and whether each was the most likely one.
Answers = list[tuple["torch.Tensor", "torch.Tensor"]]


def _batch(texts: Sequence[Asked]) -> torch.Tensor:
    """Token ids ``[B, T]``; a shorter text is padded with its last token, which changes nothing before its end."""
    import torch

    longest = max(len(text.ids) for text in texts)
    return torch.stack([torch.cat([one.ids, one.ids[-1:].expand(longest - len(one.ids))]) for one in texts])


def begin(live: LiveModel, texts: Sequence[Asked], setting: Setting) -> Any:
    """The cache of an unpatched model when the first round is due; it is the same for every control."""
    import torch

    cache, ids = live.new_cache(), _batch(texts)[:, : setting.budget + setting.divide_length]
    with torch.inference_mode():
        for step in ids.split(setting.step, dim=1):
            given = with_cache(live.model, cache)
            cache = cache_of(live.model(input_ids=step, use_cache=True, logits_to_keep=1, **given))
    return cache


def feed(live: LiveModel, texts: Sequence[Asked], setting: Setting, control: str | None, begun: Any = None) -> Answers:
    """Feed all texts as one batch with independent rows.

    With ``control`` None the model runs as it is, patched or not. A control evicts from an unpatched model, and
    continues with the cache ``begun`` by ``begin``, which it changes.
    """
    import torch

    cache, rngs = live.new_cache() if begun is None else begun, [random.Random(text.seed) for text in texts]
    ids, parts, fed = _batch(texts), [[] for _ in texts], cache.get_seq_length()
    if begun is not None:
        evict(cache, setting, control, rngs)
    with torch.inference_mode():
        for start in range(fed, ids.shape[1], setting.step):
            step = ids[:, start : start + setting.step]
            end = start + step.shape[1]
            given = with_cache(live.model, cache)
            if control is not None:  # the cache does not know how many tokens it has seen
                given["position_ids"] = torch.arange(start, end, device=ids.device).expand(len(texts), -1)
            # only the logits that count: they take a fifth of the time, and most of the memory
            counts = [range(max(text.first, start), min(len(text.ids) - 1, end)) for text in texts]
            first = min((some[0] for some in counts if some), default=end - 1)
            out = live.model(input_ids=step, use_cache=True, logits_to_keep=end - first, **given)
            cache = cache_of(out)
            for row, some in enumerate(counts):
                if some:
                    predicted = out.logits[row, some.start - first : some.stop - first].float().log_softmax(-1)
                    targets = ids[row, some.start + 1 : some.stop + 1]
                    given_to = predicted.gather(-1, targets[:, None])[:, 0]
                    parts[row].append((given_to.cpu(), (predicted.argmax(-1) == targets).cpu()))
            if control is not None and cache.layers[0].keys.shape[2] >= setting.budget + setting.divide_length:
                evict(cache, setting, control, rngs)
    return [tuple(map(torch.cat, zip(*part, strict=True))) for part in parts]


def evict(cache: Any, setting: Setting, control: str, rngs: Sequence[random.Random]) -> None:
    kept = None
    for layer in cache.layers:
        keys = layer.keys.float().cpu()
        if kept is None or control not in _SHARED:
            scores = CONTROLS[control](keys, rngs)
            scores[..., keys.shape[2] - setting.window :] = math.inf
            kept = scores.argsort(descending=True, stable=True)[..., : setting.budget].sort().values
        rows = kept.expand(-1, keys.shape[1], -1).to(layer.keys.device)[..., None]
        layer.keys = layer.keys.gather(2, rows.expand(-1, -1, -1, layer.keys.shape[-1]))
        layer.values = layer.values.gather(2, rows.expand(-1, -1, -1, layer.values.shape[-1]))
