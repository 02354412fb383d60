"""A live language model under the subject's patch, and how the checks of phase 6 drive it."""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from verify.errors import Refused, SubjectLacks
from verify.files import cache_folder, keep, repository_root
from verify.judge import oracle
from verify.judge.compressor import write_statistics
from verify.judge.live_case import scoring_problem
from verify.judge.parameters import options
from verify.model.observed import Observed, Round, cache_of, layers_of, with_cache
from verify.model.settings import BUDGET
from verify.record import trail
from verify.record.grounds import Checkout, aside, tell_again
from verify.subject.published import PATCH, defaults_of, parameters_of
from verify.subject.refusal import REFUSALS, accepted, refusable
from verify.subject.subject import Subject


def _hooks(part: Any) -> list[Any]:
    """The tables of a module in which hooks are registered."""
    return [table for name, table in sorted(vars(part).items()) if "_hooks" in name and isinstance(table, dict)]


def load(location: str, statistics: Path, subject: Subject, device: str, defaults: Mapping[str, Any]) -> LiveModel:
    """The model in the directory ``location``, in float32 with sdpa attention; its tokenizer pads on the left."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(location, dtype=torch.float32, attn_implementation="sdpa")
    tokenizer = AutoTokenizer.from_pretrained(location, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return LiveModel(
        model.to(device).eval(), tokenizer, location, statistics, subject, defaults, published_layout(statistics)
    )


def locate(bundled: Subject, model: str, device: str) -> tuple[str, Path]:
    """The directory of ``model``, and its statistics in float32, both made by the bundled command line.

    The embedded model is converted once, and any model is calibrated once; the cache keeps both. For the embedded model
    it also keeps their paths and the files of the reference that made them, until the reference changes.
    """
    if model != "embedded":
        return model, Path(_calibrated(bundled, model, device, bundled.environment()).strip().splitlines()[-1])
    root = repository_root()
    note = cache_folder() / "located" / f"{bundled.content_sha256()}-{device}.json"
    statistics = note.with_suffix(".pt")
    with suppress(OSError, ValueError):  # missing or incomplete: ask again
        location, opened = json.loads(note.read_bytes())
        if Path(location).is_dir() and statistics.is_file():
            tell_again(opened, Checkout(root, bundled.root, bundled.folder))
            return location, statistics
    with aside(root, bundled.root, bundled.folder, bundled.environment()) as watched:
        asked = bundled.run("download-models", "--model", "embedded", environment=watched.environment)
        location = asked.strip().splitlines()[-1]
        # to a file of its own: the command line's cache keeps the statistics of older code for the same text
        statistics.parent.mkdir(parents=True, exist_ok=True)
        _calibrated(bundled, location, device, watched.environment, "--output", str(statistics))
        opened = watched.names()
    tell_again(opened, Checkout(root, bundled.root, bundled.folder))
    keep(note, json.dumps([location, opened]))
    return location, statistics


def _calibrated(bundled: Subject, location: str, device: str, environment: Mapping[str, str], *output: str) -> str:
    """What ``build-stats`` prints; without ``output`` its last line is the path of the cached statistics."""
    options = ("--model", location, "--dtype", "float32", "--device", device, *output)
    return bundled.run("build-stats", *options, environment=environment)


def published_layout(statistics: Path) -> Path:
    """The same numbers in the published layout, written next to ``statistics``: the file that a subject is given.

    That layout has no place for the mean of unrotated dims; if there are any, this is ``statistics`` itself.
    """
    import torch

    found = torch.load(statistics, weights_only=True)
    if found["q_pass_mean"].shape[-1]:
        return statistics
    path, m = statistics.with_suffix(".published.pt"), torch.complex(found["q_mean_real"], found["q_mean_imag"])
    write_statistics(path, m, found["q_abs_mean"], style=found["architecture"]["rope_style"])
    return path


@dataclass(frozen=True)
class LiveModel:
    """A model loaded in float32 with its tokenizer, the directory it came from and its statistics file.

    The oracle reads ``statistics``; the subject reads ``given``, the same numbers in the published layout unless
    ``restated``. ``defaults`` are the options of a patch unless it overrides them.
    """

    model: Any
    tokenizer: Any
    location: str
    statistics: Path
    subject: Subject
    defaults: Mapping[str, Any]
    given: Path
    _unpatched: list[tuple[Any, type, dict[str, Any], list[Any]]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "defaults", self.offered(self.defaults))  # the dataclass is frozen
        modules = [
            (part, type(part), dict(vars(part)), [dict(hooks) for hooks in _hooks(part)])
            for part in self.model.modules()
        ]
        object.__setattr__(self, "_unpatched", modules)

    def offered(self, options: Mapping[str, Any]) -> dict[str, Any]:
        """``options``, with each value that the subject says it does not offer replaced by one that it does."""
        offers = self.subject.patch_offers
        return {n: value if value in (taken := offers.get(n, (value,))) else taken[0] for n, value in options.items()}

    def restore(self) -> None:
        """Undo what a patch has set on the model, its parts and their hooks since it was loaded."""
        for part, kind, own, hooks in self._unpatched:
            part.__class__ = kind
            for name in vars(part).keys() - own.keys():
                delattr(part, name)
            vars(part).update(own)
            for now, before in zip(_hooks(part), hooks, strict=True):
                now.clear()
                now.update(before)

    def patch(self, **options: Any) -> None:
        """Patch the model with the subject's published entry point, in place of an earlier patch.

        Raises SubjectLacks for an option that the subject's patch does not have, and Refused for options that it
        refuses although it accepts the recommended setting.
        """
        try:
            self.apply(**options)
        except REFUSALS:
            plain = {**self.defaults, "kv_budget": BUDGET}
            with refusable(self.subject, self._refused(options, plain), lambda: self.apply(**plain)):
                raise

    def _refused(self, options: Mapping[str, Any], plain: Mapping[str, Any]) -> str:
        """The option that is refused also alone, as ``name=value``; all that are not plain if none is."""
        told = {name: f"{name}={value}" for name, value in options.items() if plain.get(name) != value}
        alone = (told[n] for n in told if not accepted(lambda n=n: self.apply(**{**plain, n: options[n]})))
        return next(alone, ", ".join(told.values()))

    def apply(self, **options: Any) -> None:
        """``patch`` with whatever the subject raises."""
        self.apply_bare(**{**self.defaults, **options})

    def apply_bare(self, **given: Any) -> None:
        """``apply`` with these options only, and those whose default the subject says that it does not offer."""
        offers, taken = self.subject.patch_offers, {*self.patch_options()}
        for name, value in given.items():
            if value not in offers.get(name, (value,)):
                raise Refused(f"{name}={value}: not offered", f"{name}={value}")
        default = defaults_of(*PATCH)
        given = {name: values[0] for name, values in offers.items() if default[name] not in values} | given
        # an option that always has one value may be none
        given = {name: value for name, value in given.items() if name in taken or name not in offers}
        if absent := sorted(given.keys() - taken):
            raise SubjectLacks(f"the subject's patch has no {absent[0]}")
        self.restore()
        about = {"model": self.model.config.model_type, "dtype": str(self.model.dtype).removeprefix("torch.")}
        trail.note(kind="live", function=PATCH[1], **about, **given)
        self.subject.attribute(*PATCH)(self.model, stats_path=str(self.given), model_path=self.location, **given)

    def patch_options(self) -> Collection[str]:
        """The published names of the options that the subject's patch takes, its own included."""
        return options(self.subject.attribute(*PATCH), parameters_of(*PATCH))

    def restated(self, path: Path, layers: Sequence[int], without: Collection[tuple[int, int]] = ()) -> LiveModel:
        """The same model, but its subject is given the file ``path``, whose layer i is ``layers[i]`` of the statistics.

        The entries of each (layer, query head) in ``without`` are left out. The oracle reads the same file as before.
        """
        import torch

        self.restore()
        mine, order = self._statistics, list(layers)
        m = torch.complex(mine["q_mean_real"], mine["q_mean_imag"])[order]
        write_statistics(path, m, mine["q_abs_mean"][order], without, mine["architecture"]["rope_style"])
        return replace(self, given=path)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

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

    def step(self, ids: Any, cache: Any, **more: Any) -> Any:
        """The output of one forward step with a cache; only the last token has logits."""
        import torch

        with torch.inference_mode():
            return self.model(input_ids=ids, **with_cache(self.model, cache), use_cache=True, logits_to_keep=1, **more)

    def logits(self, ids: Any, cache: Any, **more: Any) -> Any:
        """Log-probabilities ``[B, T, vocabulary]`` of every token of one forward step; ``cache`` may be None."""
        import torch

        given = {"use_cache": False} if cache is None else {**with_cache(self.model, cache), "use_cache": True}
        if cache is None:  # given positions with gaps and no mask, transformers takes them for several sequences
            given["attention_mask"] = torch.ones_like(ids)
        with torch.inference_mode():
            return self.model(input_ids=ids, **given, **more).logits.float().log_softmax(-1)

    def decode(self, encoded: dict[str, Any], steps: int) -> Iterator[tuple[int, Any]]:
        """Prefill, then greedy steps one by one; yields the tokens fed in each step, and the cache after it."""
        cache, ids = self.new_cache(), encoded["input_ids"]
        for _ in range(steps):
            out = self.step(ids, cache)
            cache = cache_of(out)
            yield ids.shape[1], cache
            ids = out.logits[:, -1:].argmax(-1)

    def feed(self, ids: Any, *steps: int) -> Iterator[tuple[int, Any]]:
        """Feed ``ids`` ``[1, T]``: as many tokens at once as each of ``steps`` says, then one by one.

        Yields the tokens fed so far and the cache, after each step.
        """
        cache, fed, sizes = self.new_cache(), 0, [*steps, *[1] * (ids.shape[1] - sum(steps))]
        for size in sizes:
            cache = cache_of(self.step(ids[:, fed : fed + size], cache))
            fed += size
            yield fed, cache

    @contextmanager
    def rotated_queries(self) -> Iterator[list[Any]]:
        """Inside the block, the list grows by each layer's queries ``[B, H*G, T, D]`` before rotation, step by step.

        They are taken where the model's own code rotates them, so the subject does not affect them.
        """
        module = sys.modules[type(layers_of(self.model)[0].self_attn).__module__]
        rotate, taken = module.apply_rotary_pos_emb, []

        def noting(q: Any, k: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            taken.append(q.detach())
            return rotate(q, k, *args, **kwargs)

        module.apply_rotary_pos_emb = noting
        try:
            yield taken
        finally:
            module.apply_rotary_pos_emb = rotate

    def rounds(self, ids: Any, *steps: int) -> Generator[Round, None, None]:
        """Feed ``ids`` ``[1, T]`` as ``feed`` does, and yield each round: the tokens held before it and those it kept.

        Raises what ``Observed.round_in`` does.
        """
        return (found for found, _ in self._rounds(ids, *steps))

    def first_round(self, ids: Any, *steps: int) -> tuple[Round, Any]:
        """The first of these rounds, and the cache after it. Raises AssertionError if there is none."""
        first = next(self._rounds(ids, *steps), None)
        assert first is not None, f"no round happened in {ids.shape[1]} tokens at a budget of {BUDGET}"
        return first

    def _rounds(self, ids: Any, *steps: int) -> Generator[tuple[Round, Any], None, None]:
        observed, feeding = Observed(self.model), self.feed(ids, *steps)
        while True:
            with observed.watching():
                fed = next(feeding, None)
            if fed is None:
                return
            if (found := observed.round_in(fed[1], fed[0])) is not None:
                yield found, fed[1]

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        import torch

        return torch.load(self.statistics, weights_only=True)

    def oracle_case(
        self, layer: int, keys: Any, t: int, options: Mapping[str, Any], positions: Any = None, head: int | None = None
    ) -> oracle.Case:
        """The scoring problem of one layer of this model; see ``scoring_problem``."""
        return scoring_problem(self._statistics, layer, keys, t, options, positions, head)
