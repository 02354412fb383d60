"""A live language model under the subject's patch, and how the checks of phase 6 drive it."""

from __future__ import annotations

import inspect
import json
import sys
from collections.abc import Collection, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.files import cache_folder, keep, repository_root
from verify.judge import oracle
from verify.judge.compressor import write_statistics
from verify.judge.live_case import scoring_problem
from verify.record.grounds import Checkout, aside, tell_again
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np


def physical_length(cache: Any) -> int:
    """The number of tokens in the longest layer of ``cache``."""
    return max(layer.keys.shape[-2] for layer in cache.layers)


def _rows_of(original: Any, held: Any) -> Any:
    """The index of each held row ``[H, K, D]`` among the rows ``[H, N, D]``, compared bit for bit: int64 ``[H, K]``.

    Raises AssertionError for a held row that is none of them.
    """
    same = (held[:, :, None] == original[:, None]).all(-1)
    assert same.any(-1).all(), f"{int((~same.any(-1)).sum())} held rows do not equal any cached row bit for bit"
    return same.to(int).argmax(-1)


def _held(given: tuple[Any, Any], layer: Any, number: int) -> Any:
    """Which of the tokens ``given`` to a layer it holds, bool ``[H, N]`` on the CPU; keys and values must agree."""
    import torch

    original = given[0][0]
    rows = _rows_of(original, layer.keys[0])
    want = given[1].gather(2, rows[None, :, :, None].expand_as(layer.values))
    assert (want == layer.values).all(), f"layer {number} holds values of other tokens than its keys"
    rows = rows.cpu()
    return torch.zeros(original.shape[:2], dtype=torch.bool).scatter_(1, rows, torch.ones_like(rows, dtype=torch.bool))


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
class Round:
    """One round of one sequence, after ``seen`` tokens; ``keys`` are ``[1, H, seen, D]`` for each layer.

    ``before`` and ``kept`` are bool ``[L, H, seen]``: the tokens held before and after it.
    """

    seen: int
    keys: list[Any]
    before: np.ndarray
    kept: np.ndarray


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

    def patch(self, **options: Any) -> None:
        """Patch the model with the subject's published entry point."""
        self.subject.attribute("methods.triattention", "apply_triattention_patch")(
            self.model, stats_path=str(self.given), model_path=self.location, **{**self.defaults, **options}
        )

    def restated(self, path: Path, layers: Sequence[int], without: Collection[tuple[int, int]] = ()) -> LiveModel:
        """The same model, but its subject is given the file ``path``, whose layer i is ``layers[i]`` of the statistics.

        The entries of each (layer, query head) in ``without`` are left out. The oracle reads the same file as before.
        """
        import torch

        mine, order = self._statistics, list(layers)
        m = torch.complex(mine["q_mean_real"], mine["q_mean_imag"])[order]
        write_statistics(path, m, mine["q_abs_mean"][order], without, mine["architecture"]["rope_style"])
        return replace(self, given=path)

    def new_cache(self) -> Any:
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def patch_options(self) -> Collection[str]:
        """The names of the options that the subject's patch takes, its own included."""
        return inspect.signature(self.subject.attribute("methods.triattention", "apply_triattention_patch")).parameters

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
        """Prefill, then greedy steps one by one; yields the tokens fed in each step, and the cache after it."""
        import torch

        cache, ids = self.new_cache(), encoded["input_ids"]
        with torch.inference_mode():
            for _ in range(steps):
                out = self.model(input_ids=ids, past_key_values=cache, use_cache=True)
                cache = out.past_key_values
                yield ids.shape[1], cache
                ids = out.logits[:, -1:].argmax(-1)

    def feed(self, ids: Any, prompt: int, cache: Any = None) -> Iterator[Any]:
        """Feed ``ids`` ``[1, T]``: the first ``prompt`` at once, then one by one; yields the cache after each step."""
        import torch

        cache = self.new_cache() if cache is None else cache
        with torch.inference_mode():
            for step in (ids[:, :prompt], *ids[:, prompt:].split(1, dim=1)):
                cache = self.model(
                    input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1
                ).past_key_values
                yield cache

    @contextmanager
    def rotated_queries(self) -> Iterator[list[Any]]:
        """Inside the block, the list grows by each layer's queries ``[B, H*G, T, D]`` before rotation, step by step.

        They are taken where the model's own code rotates them, so the subject does not affect them.
        """
        layers = next(part.layers for part in self.model.modules() if hasattr(part, "layers"))
        module = sys.modules[type(layers[0].self_attn).__module__]
        rotate, taken = module.apply_rotary_pos_emb, []

        def noting(q: Any, k: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            taken.append(q.detach())
            return rotate(q, k, *args, **kwargs)

        module.apply_rotary_pos_emb = noting
        try:
            yield taken
        finally:
            module.apply_rotary_pos_emb = rotate

    def rounds(self, ids: Any, prompt: int) -> Generator[Round, None, None]:
        """Feed ``ids`` ``[1, T]`` as ``feed`` does, and yield each round: the tokens held before it and those it kept.

        Keys and values are noted as the model passes them to its cache. Raises AssertionError if a layer holds a row
        that was never passed to it, or values of other tokens than its keys.
        """
        import torch

        cache, given = self.new_cache(), {}
        update = cache.update

        def noting(keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            before = given.get(layer)
            step = (keys.detach(), values.detach())
            given[layer] = (
                step if before is None else tuple(torch.cat(x, dim=2) for x in zip(before, step, strict=True))
            )
            return update(keys, values, layer, *args, **kwargs)

        cache.update = noting
        held: Any = None
        for after in self.feed(ids, prompt, cache):
            layers = [given[number] for number in sorted(given)]
            assert len(layers) == len(after.layers), f"{len(layers)} of {len(after.layers)} layers used the given cache"
            heads, seen = layers[0][0].shape[1:3]
            before = torch.ones(len(layers), heads, seen, dtype=torch.bool)
            if held is not None:
                before[:, :, : held.shape[2]] = held
            held = before
            if physical_length(after) < int(before[0, 0].sum()):
                held = torch.stack([_held(*pair, n) for n, pair in enumerate(zip(layers, after.layers, strict=True))])
                yield Round(seen, [keys for keys, _ in layers], before.numpy(), held.numpy())

    @cached_property
    def _statistics(self) -> dict[str, Any]:
        import torch

        return torch.load(self.statistics, weights_only=True)

    def oracle_case(
        self, layer: int, keys: Any, t: int, options: Mapping[str, Any], positions: Any = None, head: int | None = None
    ) -> oracle.Case:
        """The scoring problem of one layer of this model; see ``scoring_problem``."""
        return scoring_problem(self._statistics, layer, keys, t, options, positions, head)
