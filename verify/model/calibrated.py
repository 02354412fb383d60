"""Calibration: how a subject does it, and the right means, taken from the queries that a model rotates."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.checks import Measure
from verify.errors import SubjectLacks, SubjectNeeds
from verify.judge.oracle import pairs
from verify.model.live_model import LiveModel
from verify.model.observed import layers_of, rotary_of
from verify.model.tiny import tiny, tokens
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

#: Token ids ``[B, T]`` and their mask, None without padding.
Text = tuple[Any, Any]

_NAMES = ("q_mean_real", "q_mean_imag", "q_abs_mean")
_LOADER = ("methods.pruning_utils", "load_head_frequency_stats")

#: A program is given a text of so many tokens, and told to use the first ``_USED``; the reference needs 512.
_WRITTEN, _USED = 1280, 640
#: After the tokens to use, only so many different ones follow, whose means are far from those of the whole vocabulary.
_OTHERS = 16
_HELP_LIMIT_S, _RUN_LIMIT_S = 60, 150

#: Causes of failures, told as one finding each.
BEFORE_Q_NORM = "the queries are taken before q_norm"
SCALED = "the queries are multiplied by the attention scaling"
DIVIDED = "the queries are divided by the attention scaling"


@dataclass(frozen=True)
class Means:
    """E[q], complex, and E|q| ``[layers, query heads, F]``; of the dims that are not rotated, if there are any and they
    are known, E[q] and E|q| ``[layers, query heads, P]``. All float64.
    """

    mean: np.ndarray
    size: np.ndarray
    unrotated: np.ndarray | None = None
    unrotated_size: np.ndarray | None = None

    def scaled(self, by: float) -> Means:
        return Means(*(None if part is None else part * by for part in vars(self).values()))

    def off(self, right: Means) -> tuple[float, str]:
        """The largest difference from the ``right`` means, relative to E|q|, and where it is. NaN if any is NaN."""
        import numpy as np

        ratios = {
            "q_mean": np.abs(self.mean - right.mean) / right.size,
            "q_abs_mean": np.abs(self.size - right.size) / right.size,
        }
        if self.unrotated is not None and right.unrotated is not None:
            ratios["q_pass_mean"] = np.abs(self.unrotated - right.unrotated) / right.unrotated_size
        # argmax counts NaN as the largest
        places = {name: np.unravel_index(int(np.argmax(ratio)), ratio.shape) for name, ratio in ratios.items()}
        most = [float(ratios[name][place]) for name, place in places.items()]
        name, place = [*places.items()][int(np.argmax(most))]
        return float(np.max(most)), "{} of layer {}, query head {}, frequency {}".format(name, *map(int, place))


def judge(got: Means, direct: Mapping[str, Means], allowed: float, measure: Measure, whose: str = "") -> None:
    """Measure how far means are off the right ones, which ``direct`` holds under ``""``. If they agree with the means
    of a known mistake, the failure has that cause.
    """
    error, where = got.off(direct[""])
    cause = ""
    if not error <= allowed:
        cause = next((cause for cause, means in direct.items() if cause and got.off(means)[0] <= allowed), "")
    told = ": ".join(filter(None, (whose, where, cause)))
    measure("error of the means over E|q|", error, allowed, where=told, cause=cause)


def directly(live: LiveModel, loop: Callable[[Any], None], texts: Sequence[Text], style: str) -> dict[str, Means]:
    """The means over the real tokens of ``texts``, which ``loop`` runs through the model: the right ones under ``""``,
    and by cause those that known mistakes give.
    """
    model = live.model
    with live.rotated_queries() as taken, _before_q_norm(model) as before:
        loop(model)
    right = _over(model, taken, texts, style)
    found = {"": right}
    if before:
        found[BEFORE_Q_NORM] = _over(model, before, texts, style)
    if (scaling := float(rotary_of(model).attention_scaling)) != 1:
        found |= {SCALED: right.scaled(scaling), DIVIDED: right.scaled(1 / scaling)}
    return found


@contextmanager
def _before_q_norm(model: Any) -> Iterator[list[Any]]:
    """Inside, the list grows by what each layer's q_norm, if it has one, is given: ``[B, H*G, T, D]``, step by step."""
    taken: list[Any] = []

    def noting(module: Any, given: tuple[Any, ...]) -> None:
        taken.append(given[0].detach().transpose(1, 2))

    norms = [norm for layer in layers_of(model) if (norm := getattr(layer.self_attn, "q_norm", None)) is not None]
    handles = [norm.register_forward_pre_hook(noting) for norm in norms]
    try:
        yield taken
    finally:
        for handle in handles:
            handle.remove()


def _over(model: Any, taken: Sequence[Any], texts: Sequence[Text], style: str) -> Means:
    """The means over the queries ``[B, H*G, T, D]`` of each step and layer."""
    import numpy as np
    import torch

    layers, dims = model.config.num_hidden_layers, 2 * rotary_of(model).inv_freq.numel()
    real = [(torch.ones_like(ids) if mask is None else mask).bool().cpu() for ids, mask in texts]
    found: list[tuple[np.ndarray, ...]] = []
    for layer in range(layers):
        # [H*G, real tokens, D], every row of every step
        steps = zip(taken[layer::layers], real, strict=True)
        q = np.concatenate([queries.double().cpu().transpose(0, 1)[:, some] for queries, some in steps], axis=1)
        parts = [part for part in (pairs(q[..., :dims], style), q[..., dims:]) if part.size]
        found.append(tuple(mean for part in parts for mean in (part.mean(1), np.abs(part).mean(1))))
    return Means(*map(np.stack, zip(*found, strict=True)))


def of_object(found: Any, like: Means) -> Means:
    """The means in the object that ``calibrate`` returns. Raises AssertionError if they are not of the shape ``like``
    that of the model.
    """
    for name in _NAMES:
        shape = tuple(getattr(found, name).shape)
        assert shape == like.size.shape, (
            f"{name} has shape {shape}; the model has (layers, query heads, frequencies) {like.size.shape}"
        )
    real, imag, size = (getattr(found, name).double().cpu().numpy() for name in _NAMES)
    return Means(real + 1j * imag, size, None if like.unrotated is None else found.q_pass_mean.double().cpu().numpy())


def of_file(path: Path, subject: Subject, like: Means) -> Means:
    """The means in a statistics file: in the published layout, or in one that the subject's own loader reads.

    Raises AssertionError, naming what is missing, if they are not of the shape ``like`` that of the model.
    """
    import numpy as np

    layers, heads, n_freq = like.size.shape
    found = _by_name(path, subject)
    mean, size = np.empty(like.size.shape, dtype=complex), np.empty(like.size.shape)
    for layer, head in np.ndindex(layers, heads):
        name = _name(layer, head)
        assert name in found, f"the statistics file lacks {name}; the model has {layers} layers of {heads} query heads"
        for part, given in zip((mean, size), found[name], strict=True):
            assert given.shape == (n_freq,), f"{name} has values of shape {tuple(given.shape)}, expected ({n_freq},)"
            part[layer, head] = given.numpy()
    return Means(mean, size)


def _name(layer: int, head: int) -> str:
    return f"layer{layer:02d}_head{head:02d}"


def _by_name(path: Path, subject: Subject) -> dict[str, tuple[Any, Any]]:
    """E[q] and E|q|, tensors ``[F]`` on the CPU, by the published name of layer and head."""
    import torch

    try:
        content = torch.load(path, weights_only=True, map_location="cpu")
    except Exception:  # what torch raises for a file of another format depends on its first bytes
        content = None
    if not isinstance(content, dict) or "stats" not in content:
        assert subject.offers(*_LOADER), f"{path.name} is not in the published layout, and there is no {_LOADER[1]}"
        _, loaded = subject.attribute(*_LOADER)(str(path), "cpu")
        return {_name(*key): (entry.q_mean_complex, entry.q_abs_mean) for key, entry in loaded.items()}
    found = {}
    for name, entry in content["stats"].items():
        assert not (absent := {*_NAMES} - {*entry}), f"{name} of the statistics file lacks {min(absent)}"
        real, imag, size = (entry[one].float() for one in _NAMES)
        found[name] = torch.complex(real, imag), size
    return found


#: What ``--help`` of each program printed: a process takes seconds to load torch.
_TOLD: dict[tuple[Path, str], str] = {}


@dataclass(frozen=True)
class Program:
    """One way in which a subject calibrates from a shell, ``called`` so in messages: its ``verb`` of the command line,
    or a script. ``told`` is what its ``--help`` prints.
    """

    called: str
    subject: Subject
    verb: tuple[str, ...]
    script: Path | None
    told: str = ""

    def run(self, *options: str, limit_s: float) -> str:
        """What it prints. Raises AssertionError with the last line of its stderr if it fails, SubjectNeeds if it lacks
        a third-party package.
        """
        __tracebackhide__ = True
        environment = self.subject.environment()
        if self.script:
            del environment["PYTHONSAFEPATH"]  # a script may import what lies next to it
        try:
            return self.subject.run(*self.verb, *options, limit_s=limit_s, environment=environment, script=self.script)
        except AssertionError as error:
            missing = re.search(r"ModuleNotFoundError: No module named '(\w+)", str(error))
            if missing and missing[1] != self.subject.package:
                raise SubjectNeeds(f"{self.called} needs the package {missing[1]}, which is not installed") from error
            raise

    def asked(self) -> Program:
        """The same with what its ``--help`` prints, which is asked once. Raises what ``run`` does."""
        key = (self.subject.root, self.called)
        if key not in _TOLD:
            _TOLD[key] = self.run("--help", limit_s=_HELP_LIMIT_S)
        return replace(self, told=_TOLD[key])

    def calibrate(self, model: str, text: Path, device: str, output: Path) -> None:
        """Write the statistics of a model directory over the first ``_USED`` tokens of ``text`` to ``output``.

        ``--model``, ``--input`` and ``--output`` are given always, the other options if ``--help`` names them.
        """
        further = {"--max-length": str(_USED), "--device": device, "--attn-implementation": "sdpa"}
        given = {"--model": model, "--input": str(text), "--output": str(output)}
        given |= {name: value for name, value in further.items() if name in self.told}
        self.run(*(word for option in given.items() for word in option), limit_s=_RUN_LIMIT_S)
        assert output.is_file(), f"{self.called} ended with exit code 0 and wrote no --output"

    @property
    def used(self) -> int:
        """How many tokens of the text it uses."""
        return _USED if "--max-length" in self.told else _WRITTEN


def programs(subject: Subject) -> list[Program]:
    """The script of the subject's checkout that calibrates, and its command line if that has the verb ``calibrate``.

    Raises SubjectLacks if it has neither.
    """
    script, own = subject.calibration_script, subject.folder / "__main__.py"
    called = f"{script.parent.name}/{script.name}"
    found, why = [], "it has no command line"
    if script.is_file():
        found.append(Program(called, subject, (), script).asked())
    if own.is_file():
        try:
            found.append(Program(f"python -m {subject.package} calibrate", subject, ("calibrate",), None).asked())
        except AssertionError as error:
            why = f"its command line has no verb calibrate ({error})"
    if not found:
        raise SubjectLacks(f"the subject has no {called}, and {why}")
    return found


def saved(
    folder: Path, subject: Subject, device: str, seed: int, prepare: Callable[[Any], None] | None = None, **shape: Any
) -> tuple[LiveModel, Path, Any]:
    """A tiny bfloat16 model of two layers in ``folder``, with a tokenizer, as a user's model directory.

    Returns the same weights loaded in float32, a text file of ``_WRITTEN`` tokens, and their ids ``[1, _WRITTEN]``.
    ``prepare`` changes the weights first; ``shape`` are arguments of ``tiny``.
    """
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    live = tiny(folder, subject, device, seed, dtype="bfloat16", num_hidden_layers=2, **shape)
    if prepare is not None:
        prepare(live.model)
    live.model.save_pretrained(folder)
    # a special token that is part of another word would be cut out of it
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "<eos>"}
    words = [*special.values(), *(f"w{number}" for number in range(3, live.model.config.vocab_size))]
    tokenizer = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    ids = tokens(live, _WRITTEN, seed)
    ids[:, _USED:] = ids[:, _USED:] % _OTHERS + len(special)
    text = folder / "text.txt"
    text.write_text(" ".join(words[number] for number in ids[0].tolist()), "utf-8")
    exact = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    return replace(live, model=exact.to(device).eval()), text, ids
