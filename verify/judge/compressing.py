"""The only way in which checks call the published compressor: guarded, noted, and with refusals told from crashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from verify.errors import SubjectLacks, Wrong
from verify.judge import parameters
from verify.judge.compressor import (
    BUDGET,
    DIVIDE,
    HEAD_DIM,
    KV_HEADS,
    LAYERS,
    OFFSET_MAX_LENGTH,
    Caches,
    make_caches,
    scored_with,
)
from verify.judge.guarded import Call, call
from verify.judge.offers import require
from verify.judge.problems import strides_of
from verify.judge.scoring import CONFIG, configuration
from verify.record import trail
from verify.subject.refusal import REFUSALS, refusable, refusal
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import torch


@dataclass(frozen=True)
class Compressor:
    """A compressor of the subject, ``made`` with the ``options`` that a check asked for."""

    made: Any
    caches: Caches
    subject: Subject
    options: Mapping[str, Any]

    @classmethod
    def of(cls, subject: Subject, caches: Caches, **options: Any) -> Compressor:
        """The subject's compressor for these caches; everything can be evicted unless ``options`` say otherwise.

        Raises SubjectLacks if it has none or does not take an option, Refused if it refuses one.
        """
        make = subject.attribute("vllm.core.compressor", "TriAttentionCompressor")
        if not hasattr(make, "compress"):
            raise SubjectLacks("the subject's TriAttentionCompressor has no method compress")
        with _refusable(subject, caches, options):
            return cls(_made(make, subject, caches, options), caches, subject, options)

    def compress(self, keys: torch.Tensor, values: torch.Tensor, **more: Any) -> Kept:
        """A guarded call of ``compress``. Raises Refused if the subject refuses what is special about it, or does not
        offer to score such keys, and AssertionError if keys, values and indices of the result do not fit together.
        """
        dtype = str(keys.dtype).removeprefix("torch.")
        shape = {
            "b": keys.shape[0], "h": keys.shape[1], "g": self.caches.group, "d": keys.shape[-1], "dtype": dtype,
            "strides": strides_of(keys), "style": "half", **scored_with(self.options),
        }  # fmt: skip
        require(self.subject.narrowed, shape)
        special = {
            "rows": keys.shape[0] if keys.shape[0] > 1 else None,
            "dtype": dtype if dtype != "float32" else None,
            "strides": None if keys.is_contiguous() else "strided",
            "cache_positions": "given" if "cache_positions" in more else None,
        }
        asked = dict(self.options) | {name: value for name, value in special.items() if value is not None}
        trail.note(kind="compressor", **{"group": self.caches.group, "rows": 1, "dtype": "float32"} | asked)
        with _refusable(self.subject, self.caches, asked):
            found = call(lambda: self.made.compress(keys, values, **more), {"key_states": keys, "value_states": values})
        return _kept(found, keys)

    def reset(self) -> None:
        """Raises SubjectLacks if the compressor has no ``reset``."""
        if not hasattr(self.made, "reset"):
            raise SubjectLacks("the subject's TriAttentionCompressor has no method reset")
        self.made.reset()


def _made(make: Callable[[Any], Any], subject: Subject, caches: Caches, options: Mapping[str, Any]) -> Any:
    given = _offered(subject, caches, options)
    try:
        return make(configuration(subject, given))
    except REFUSALS as error:
        if "compute_dtype" in options or not refusal(error, subject):
            raise
    given.pop("compute_dtype", None)  # an implementation may offer its own only
    return make(configuration(subject, given))


def _offered(subject: Subject, caches: Caches, options: Mapping[str, Any]) -> dict[str, Any]:
    """``options``, and of the usual ones those that the subject's configuration takes."""
    import torch

    usual = {
        "kv_budget": BUDGET, "divide_length": DIVIDE, "window_size": 0, "protect_prefill": False,
        "offset_max_length": OFFSET_MAX_LENGTH, "compute_dtype": torch.float32, "trig_cache_max_seq_len": 1024,
        "rope_style": "half", "head_dim": HEAD_DIM, "num_kv_heads": KV_HEADS, "num_layers": LAYERS,
        "device": caches.keys[0].device.type, "model_path": str(caches.model),
        "stats_path": None if caches.statistics is None else str(caches.statistics),
    }  # fmt: skip
    if subject.offers(CONFIG, "TriAttentionConfig"):
        make = subject.attribute(CONFIG, "TriAttentionConfig")
        parameters.require(make, "TriAttentionConfig", *options)
        usual = {name: value for name, value in usual.items() if parameters.takes(make, name)}
    return usual | dict(options)


def _refusable(subject: Subject, caches: Caches, asked: Mapping[str, Any]) -> ExitStack:
    """Inside, a refusal of what was ``asked``, or of groups of query heads, raises Refused if the same without it is
    accepted: one row of float32 keys, compressed with the usual options.
    """
    stack = ExitStack()
    if caches.group > 1:
        stack.enter_context(refusable(subject, f"group={caches.group}", lambda: _plain(subject, caches, 1)))
    if asked:
        words = ", ".join(f"{name}={value}" for name, value in asked.items())
        stack.enter_context(refusable(subject, words, lambda: _plain(subject, caches, caches.group)))
    return stack


def _plain(subject: Subject, caches: Caches, group: int) -> None:
    folder = caches.model / "plain"
    folder.mkdir(exist_ok=True)
    usual = make_caches(folder, 0, caches.keys[0].device.type, tokens=BUDGET + DIVIDE, group=group)
    Compressor.of(subject, usual).compress(usual.keys[0], usual.values[0]).must_count(BUDGET, "the plain round")


@dataclass(frozen=True)
class Kept:
    """What is left of ``given`` tokens: ``keys`` and ``values`` ``[B, H, K, D]``, ``indices`` int64 ``[B, H, K]``."""

    keys: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    given: int
    call: Call

    @property
    def count(self) -> int:
        return self.keys.shape[2]

    @property
    def untouched(self) -> bool:
        """Whether every token is kept, as if no round had happened."""
        return self.count == self.given

    def must_count(self, expected: int, what: str, where: str = "", cause: str = "") -> None:
        """Raise Wrong, for this ``cause``, naming ``what`` kept another number of tokens ``where``."""
        if self.count != expected:
            nothing = ": no round happened" if self.untouched and self.given > expected else ""
            place = where and f", {where}"
            raise Wrong(f"{what} kept {self.count} tokens, expected {expected}{place}{nothing}", cause)

    def mask(self, row: int) -> np.ndarray:
        """Which of the given tokens each KV head of a row keeps, bool ``[H, N]``."""
        import numpy as np

        kept = np.zeros((self.indices.shape[1], self.given), dtype=bool)
        np.put_along_axis(kept, self.indices[row].cpu().numpy(), True, axis=-1)
        return kept


def _kept(found: Call, keys: torch.Tensor) -> Kept:
    result = found.result if isinstance(found.result, tuple | list) else [found.result]
    kinds = [type(one).__name__ for one in result]
    assert kinds == 3 * ["Tensor"], (
        f"compress returned {', '.join(kinds)}, expected the tensors of keys, values and indices"
    )
    held, carried, indices = result
    rows, heads, given, dim = keys.shape
    count = held.shape[2] if held.ndim == 4 else 0
    for name, tensor in (("keys", held), ("values", carried)):
        wanted = (rows, heads, count, dim)
        assert tuple(tensor.shape) == wanted, f"the {name} came back as {list(tensor.shape)}, expected {list(wanted)}"
    indices = _by_head(indices, rows, heads, count)
    assert not count or bool((indices >= 0).all() and (indices < given).all()), (
        f"the indices are from {indices.min()} to {indices.max()}, but there are {given} tokens"
    )
    twice = (indices.sort(-1).values.diff(dim=-1) == 0).any(-1).nonzero().tolist()
    assert not twice, (
        f"row {twice[0][0]}, KV head {twice[0][1]} keeps a token twice: {indices[tuple(twice[0])].tolist()}"
    )
    return Kept(held, carried, indices, given, found)


def _by_head(indices: torch.Tensor, rows: int, heads: int, count: int) -> torch.Tensor:
    """Indices shared by rows or heads, as int64 ``[B, H, K]``."""
    shape = list(indices.shape)
    assert shape[-1:] == [count], f"{count} keys came back with indices of shape {shape}"
    if shape in ([heads, count], [rows, count]):
        indices = indices.unsqueeze(0 if rows == 1 and shape[0] == heads else 1)
    assert indices.ndim in (1, 3), f"the indices have shape {shape}, expected {[rows, heads, count]}"
    try:
        return indices.long().expand(rows, heads, count)
    except RuntimeError as error:
        raise AssertionError(f"the indices have shape {shape}, expected {[rows, heads, count]}") from error
