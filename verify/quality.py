"""What compression costs a model, beside simple controls at the same budget: perplexity and needle recall.

Everything is teacher-forced, so five seeds take some minutes on two cores and no sampling noise is in the numbers. The
controls are the suite's own, so that a subject is not compared with its own idea of them: they evict from the same
cache, at the same moments, down to the same budget, and protect the same window.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.outcome import ConfigurationError
from verify.record import write_atomic
from verify.request import repository_root

if TYPE_CHECKING:
    import torch
    from rich.console import Console

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
    """By how much the subject beats a control, in ``unit``, one value for each seed; positive is better."""

    values: tuple[float, ...]
    unit: str

    @property
    def mean(self) -> float:
        return sum(self.values) / len(self.values)

    @property
    def half_width(self) -> float:
        """Half of the 95 % interval of the mean, by Student's t over the seeds."""
        variance = sum((value - self.mean) ** 2 for value in self.values) / (len(self.values) - 1)
        return _T95 * math.sqrt(variance / len(self.values))

    @property
    def proven(self) -> bool:
        """Whether the interval lies above 0; a margin that does not is published and gates nothing."""
        return self.mean - self.half_width > 0


def _fed(
    live: LiveModel, ids: torch.Tensor, setting: Setting, control: str | None, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Feed ``ids`` ``[1, T]``: log-probability of each but the first, and whether it was the likeliest, ``[T - 1]``.

    ``control`` None is the model as it is, patched or not; a control evicts from an unpatched one.
    """
    import torch

    cache, rng, parts, fed = live.new_cache(), random.Random(seed), [], 0
    with torch.inference_mode():
        for step in ids.split(setting.step, dim=1):
            given = {}
            if control is not None:  # the cache forgets how many tokens it has seen
                given["position_ids"] = torch.arange(fed, fed + step.shape[1], device=ids.device)[None]
            out = live.model(input_ids=step, past_key_values=cache, use_cache=True, **given)
            cache = out.past_key_values
            parts.append(out.logits[0])
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
_DEPTHS = (0.2, 0.4, 0.6, 0.8)
_PLACES = ("harbour", "library", "orchard", "station", "theatre", "museum", "bakery", "school", "garden", "market")
_PEOPLE = ("The baker", "An old sailor", "The teacher", "A young painter", "The doctor", "My neighbour", "The farmer")
_ACTS = ("walked along", "looked at", "talked about", "painted", "remembered", "wrote a letter about", "dreamed of")
_THINGS = ("the quiet river", "a wooden bridge", "the tall trees", "an empty street", "the old clock", "a small boat")


def needle(seed: int, depth: float, sentences: int = 40) -> tuple[str, str]:
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


#: What is measured: how, the sign that makes more of it better, and the unit of a difference.
MEASURES: dict[str, tuple[Callable[[LiveModel, Setting, str | None, int], float], int, str]] = {
    "perplexity": (perplexity_loss, -1, "nats"),
    "needle": (needle_recall, 1, "recall"),
}
NAMES = tuple(f"{measure}_{control}" for measure in MEASURES for control in CONTROLS)


class Measured:
    """Values by measure and by who was measured: ``full``, a control or ``subject``; one for each seed."""

    def __init__(self, values: dict[str, dict[str, list[float]]] | None = None) -> None:
        self.values = {measure: {} for measure in MEASURES} if values is None else values

    def take(self, live: LiveModel, measure: str, who: str) -> None:
        """Measure now, unless that was done; the model must be patched for ``subject``, and unpatched for others."""
        if who not in self.values[measure]:
            control = who if who in CONTROLS else None
            run = MEASURES[measure][0]
            self.values[measure][who] = [run(live, Setting(), control, seed) for seed in SEEDS]

    def margin(self, live: LiveModel, name: str) -> Margin:
        """One of NAMES, measured now where it was not; takes an unpatched model and leaves it patched."""
        measure, control = name.split("_")
        self.take(live, measure, control)
        if "subject" not in self.values[measure]:
            live.patch(**Setting().patch)
            self.take(live, measure, "subject")
        return self.of(name)

    def of(self, name: str) -> Margin:
        measure, control = name.split("_")
        _, sign, unit = MEASURES[measure]
        pairs = zip(self.values[measure]["subject"], self.values[measure][control], strict=True)
        return Margin(tuple(sign * (subject - other) for subject, other in pairs), unit)


def recorded() -> Path:
    """The file of the values that the gates come from, of the bundled reference on the embedded model."""
    return repository_root() / "reports" / "quality" / "embedded.json"


@cache
def recorded_margins() -> dict[str, Margin]:
    """Every margin of NAMES as it was recorded. Raises ConfigurationError where the file is missing."""
    if not recorded().is_file():
        raise ConfigurationError(
            f"{recorded()} is missing, so the gates of p6.quality are unknown; restore it, or measure it anew with "
            "python -m verify quality --out"
        )
    measured = Measured(json.loads(recorded().read_text("utf-8"))["values"])
    return {name: measured.of(name) for name in NAMES}


def gated() -> list[str]:
    """The margins that gate: those whose interval lies above 0."""
    return [name for name, margin in recorded_margins().items() if margin.proven]


def quality_verb(subject_name: str, device: str, out: Path | None) -> int:
    """Measure everything on the embedded model, print it, and write it to ``out``; the exit code, 0.

    Raises ConfigurationError when the subject or the device cannot be used.
    """
    from rich.console import Console

    from verify.device import prepare, resolve
    from verify.environment import capture
    from verify.live_model import load, locate
    from verify.subject import find_subject

    chosen = resolve(device)
    prepare(chosen.name, "embedded")
    root = repository_root()
    subject = find_subject(subject_name, root)
    subject.activate()
    live = load(*locate(find_subject("bundled", root), "embedded", chosen.name), subject, chosen.name, {})
    if absent := sorted(Setting().patch.keys() - set(live.patch_options())):
        raise ConfigurationError(
            f"the patch of subject {subject.source!r} has no {absent[0]}, and the controls protect a window; "
            "give it one to compare them"
        )
    measured = Measured()
    for measure in MEASURES:
        for who in ("full", *CONTROLS):
            measured.take(live, measure, who)
    live.patch(**Setting().patch)
    for measure in MEASURES:
        measured.take(live, measure, "subject")
    _print(measured, Console(highlight=False))
    if out is not None:
        content = {
            "subject": subject.source, "model": "embedded", "device": chosen.name, "dtype": "float32",
            "setting": asdict(Setting()), "seeds": list(SEEDS),
            "environment": capture(chosen.name).model_dump(mode="json"), "values": measured.values,
        }  # fmt: skip
        write_atomic(out, json.dumps(content, indent=1) + "\n")
    return 0


def _print(measured: Measured, console: Console) -> None:
    for measure, (_, _, unit) in MEASURES.items():
        for who, values in measured.values[measure].items():
            by_seed = "  ".join(f"{value:.4f}" for value in values)
            console.print(f"{measure:<11} {who:<8} mean {sum(values) / len(values):.4f} {unit:<7} by seed {by_seed}")
    for name in NAMES:
        margin = measured.of(name)
        verdict = f"gate at {margin.mean / 2:.4f}" if margin.proven else "no margin"
        console.print(
            f"margin over {name:<18} {margin.mean:+.4f} \u00b1 {margin.half_width:.4f} {margin.unit}: {verdict}"
        )
