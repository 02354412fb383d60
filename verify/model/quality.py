"""What compression costs a model, compared with simple controls at the same budget: perplexity and needle recall.

Everything is teacher-forced, so five seeds take a few minutes on two cores and the numbers have no sampling noise. The
controls are the suite's own, not the subject's version of them. They evict from the same cache, at the same moments,
down to the same budget, and protect the same window.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import inspect
import json
import math
import os
import platform
import random
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.errors import ConfigurationError
from verify.files import REPORTS, cache_folder, keep, kept_place, repository_root, require_writable, write_atomic
from verify.machine.environment import version_of
from verify.model.controls import CONTROLS, Answers, Asked, Setting, begin, feed

if TYPE_CHECKING:
    from rich.console import Console

    from verify.model.live_model import LiveModel

#: Modules of the standard library whose source is the text, one for each seed; every machine has them.
_TEXTS = ("argparse", "difflib", "inspect", "tarfile", "statistics")
SEEDS = tuple(range(len(_TEXTS)))

#: Student's t for a 95 % interval from five values.
_T95 = 2.776


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
        """Whether the interval is above 0; otherwise the margin is reported only."""
        return self.mean - self.half_width > 0


def _sources(live: LiveModel, setting: Setting) -> list[Asked]:
    """One text for each seed; the tokens after the first round count."""
    first = setting.budget + setting.divide_length
    sources = [inspect.getsource(importlib.import_module(name)) for name in _TEXTS]
    return [
        Asked(live.tokens(source)["input_ids"][0, : setting.text], first, seed)
        for seed, source in zip(SEEDS, sources, strict=True)
    ]


def _losses(answers: Answers) -> list[float]:
    """The mean negative log-likelihood in nats per token, for each seed."""
    return [-float(log_probs.mean()) for log_probs, _ in answers]


#: Depths of the needle in the haystacks of one seed, as a share of the haystack.
_DEPTHS = (0.2, 0.4, 0.6, 0.8)
_PLACES = ("harbour", "library", "orchard", "station", "theatre", "museum", "bakery", "school", "garden", "market")
_PEOPLE = ("The baker", "An old sailor", "The teacher", "A young painter", "The doctor", "My neighbour", "The farmer")
_ACTS = ("walked along", "looked at", "talked about", "painted", "remembered", "wrote a letter about", "dreamed of")
_THINGS = ("the quiet river", "a wooden bridge", "the tall trees", "an empty street", "the old clock", "a small boat")


def needle(seed: int, depth: float, sentences: int = 40) -> tuple[str, str]:
    """A text of ``sentences`` sentences and one more that contains a code, which its end asks for; and the code."""
    rng = random.Random(f"needle {seed} {depth}")
    place, code = rng.choice(_PLACES), "".join(rng.choices("0123456789", k=5))
    told = f"The secret code of the {place} is"
    lines = [f"{rng.choice(_PEOPLE)} {rng.choice(_ACTS)} {rng.choice(_THINGS)}." for _ in range(sentences)]
    lines.insert(round(depth * sentences), f"{told} {code}.")
    return f"{' '.join(lines)} Do you remember it? {told}", f" {code}"


def _needles(live: LiveModel, setting: Setting) -> list[Asked]:
    """For each seed one text for each depth; the digits of the code count."""
    texts = []
    for seed in SEEDS:
        for depth in _DEPTHS:
            text, code = needle(seed, depth)
            prompt = live.tokens(text)["input_ids"]
            texts.append(Asked(live.tokens(text + code)["input_ids"][0], prompt.shape[1] - 1, seed))
    return texts


def _recalls(answers: Answers) -> list[float]:
    """For each seed the share of its codes' digits that get the highest probability."""
    hits = [hit for _, hit in answers]
    of_seeds = [hits[start : start + len(_DEPTHS)] for start in range(0, len(hits), len(_DEPTHS))]
    return [sum(int(hit.sum()) for hit in some) / sum(map(len, some)) for some in of_seeds]


@dataclass(frozen=True)
class Measure:
    """The texts, the value for each seed, the ``sign`` that makes more of it better, and the unit of a difference."""

    texts: Callable[[LiveModel, Setting], list[Asked]]
    values: Callable[[Answers], list[float]]
    sign: int
    unit: str


MEASURES = {
    "perplexity": Measure(_sources, _losses, -1, "nats"),
    "needle": Measure(_needles, _recalls, 1, "recall"),
}
NAMES = tuple(f"{measure}_{control}" for measure in MEASURES for control in CONTROLS)


class Measured:
    """Values by measure and by what was measured (``full``, a control or ``subject``), one for each seed.

    With ``keep``, the values of the controls are cached until something that they depend on changes.
    """

    def __init__(self, values: dict[str, dict[str, list[float]]] | None = None, *, keep: bool = False) -> None:
        self.values = {measure: {} for measure in MEASURES} if values is None else values
        self._begun: dict[str, Any] = {}
        self._keep = keep

    @property
    def count(self) -> int:
        """The number of measurements so far."""
        return sum(map(len, self.values.values()))

    def take(self, live: LiveModel, measure: str, who: str) -> None:
        """Measure now, unless already done. The model must be patched for ``subject``, and unpatched for the others."""
        if who in self.values[measure]:
            return
        asked, setting, control = MEASURES[measure], Setting(), who if who in CONTROLS else None
        place = _place(live, measure, who) if self._keep and control is not None else None
        if place and (kept := _kept(place)):
            self.values[measure][who] = kept
            return
        texts, begun = asked.texts(live, setting), None
        if control is not None:
            if measure not in self._begun:
                self._begun[measure] = begin(live, texts, setting)
            begun = copy.deepcopy(self._begun[measure])
        found = self.values[measure][who] = asked.values(feed(live, texts, setting, control, begun))
        if place:
            keep(place, json.dumps(found) + "\n")

    def margin(self, live: LiveModel, name: str) -> Margin:
        """The margin ``name`` of NAMES, measured now if needed; takes an unpatched model and leaves it patched."""
        measure, control = name.split("_")
        self.take(live, measure, control)
        if "subject" not in self.values[measure]:
            live.patch(**Setting().patch)
            self.take(live, measure, "subject")
        return self.of(name)

    def of(self, name: str) -> Margin:
        measure, control = name.split("_")
        asked = MEASURES[measure]
        pairs = zip(self.values[measure]["subject"], self.values[measure][control], strict=True)
        return Margin(tuple(asked.sign * (subject - other) for subject, other in pairs), asked.unit)


#: The modules that determine the values of a control.
_OWN = tuple(Path(__file__).with_name(f"{name}.py") for name in ("controls", "live_model", "quality"))


def _place(live: LiveModel, measure: str, control: str) -> Path:
    """A file named after everything that the values of a control depend on: these modules, the model, the software, the
    texts (those of the standard library), and the subject, which may leave something behind in the process.
    """
    import torch

    device = live.model.device
    what = [
        measure, control, *(hashlib.sha256(file.read_bytes()).hexdigest() for file in _OWN), Path(live.location).name,
        live.subject.content_sha256(), torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        platform.processor(), platform.python_version(), os.environ.get("OMP_NUM_THREADS"),
        *(version_of(name) for name in ("torch", "transformers", "tokenizers")),
    ]  # fmt: skip
    return kept_place(cache_folder() / "quality", *what)


def _kept(place: Path) -> list[float] | None:
    """The cached values, one for each seed; None if they are missing or unreadable."""
    with suppress(OSError, ValueError):  # missing or incomplete: measure again
        values = json.loads(place.read_bytes())
        if isinstance(values, list) and len(values) == len(SEEDS) and all(isinstance(one, float) for one in values):
            return values
    return None


def recorded() -> Path:
    """The file of the values behind the gates: the bundled reference on the embedded model."""
    return repository_root() / REPORTS / "quality" / "embedded.json"


@cache
def recorded_margins() -> dict[str, Margin]:
    """Every recorded margin of NAMES. Raises ConfigurationError if the file is missing."""
    if not recorded().is_file():
        raise ConfigurationError(
            f"{recorded()} is missing, so the gates of p6.quality are unknown; restore it, or measure it again with "
            "python -m verify quality --out"
        )
    measured = Measured(json.loads(recorded().read_text("utf-8"))["values"])
    return {name: measured.of(name) for name in NAMES}


def gated() -> list[str]:
    """The margins that gate: those whose interval is above 0."""
    return [name for name, margin in recorded_margins().items() if margin.proven]


def quality_verb(subject_name: str, device: str, out: Path | None) -> int:
    """Measure everything on the embedded model, print it, and write it to ``out``; returns 0.

    Raises ConfigurationError when the subject or the device cannot be used.
    """
    from rich.console import Console

    from verify.heartbeat import Heartbeat
    from verify.machine.device import prepare, resolve
    from verify.machine.environment import capture
    from verify.model.live_model import load, locate
    from verify.subject.find import find_subject

    if out is not None:
        require_writable(out.parent)
    chosen = resolve(device)
    prepare(chosen.name, "embedded")
    root = repository_root()
    subject = find_subject(subject_name, root)
    subject.activate()
    live = load(*locate(find_subject("bundled", root), "embedded", chosen.name), subject, chosen.name, {})
    if absent := sorted(Setting().patch.keys() - set(live.patch_options())):
        raise ConfigurationError(
            f"the patch of subject {subject.source!r} has no option {absent[0]}, which the comparison needs; add it"
        )
    measured, console = Measured(), Console(highlight=False)
    whole = len(MEASURES) * (len(CONTROLS) + 2)
    log = Console(stderr=True)
    with Heartbeat(log, lambda: f"{measured.count} of {whole} measurements, each over {len(SEEDS)} seeds"):
        for measure in MEASURES:
            for who in ("full", *CONTROLS):
                measured.take(live, measure, who)
        live.patch(**Setting().patch)
        for measure in MEASURES:
            measured.take(live, measure, "subject")
    _print(measured, console)
    if out is not None:
        content = {
            "subject": subject.source, "model": "embedded", "device": chosen.name, "dtype": "float32",
            "setting": asdict(Setting()), "seeds": list(SEEDS),
            "environment": capture(chosen.name).model_dump(mode="json"), "values": measured.values,
        }  # fmt: skip
        write_atomic(out, json.dumps(content, indent=1) + "\n")
    return 0


def _print(measured: Measured, console: Console) -> None:
    for measure, asked in MEASURES.items():
        for who, values in measured.values[measure].items():
            by_seed = "  ".join(f"{value:.4f}" for value in values)
            console.print(
                f"{measure:<11} {who:<8} mean {sum(values) / len(values):.4f} {asked.unit:<7} by seed {by_seed}"
            )
    for name in NAMES:
        margin = measured.of(name)
        verdict = f"gate at {margin.mean / 2:.4f}" if margin.proven else "no margin"
        console.print(
            f"margin over {name:<18} {margin.mean:+.4f} \u00b1 {margin.half_width:.4f} {margin.unit}: {verdict}"
        )
