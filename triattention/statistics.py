"""Calibration statistics: the mean queries of each head, and the checks that refuse a wrong file.

Two layouts can be read: ours (one stacked tensor per quantity, with the model's description) and the published one
(``{"metadata": ..., "stats": {"layer00_head00": {...}}}``), which contains dimensions only.
"""

from __future__ import annotations

import operator
import os
import pickle
import re
import reprlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from triattention.architecture import CALIBRATE, Architecture, build_rotary, describe, rope_of
from triattention.errors import TriAttentionError
from triattention.files import write_atomic

#: Errors that torch.load raises for truncated or damaged files.
_UNREADABLE = (
    RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError,
    TypeError,
)  # fmt: skip

FORMAT, FORMAT_VERSION = "triattention-statistics", 2
CAPTURE_POINT = "after q_norm, before RoPE"
_NAMES = ("q_mean_real", "q_mean_imag", "q_abs_mean")
_HEAD = re.compile(r"layer_?(\d{1,9})_head_?(\d{1,9})")


@dataclass(frozen=True)
class Statistics:
    """m = E[q] and a = E|q| per (layer, query head, frequency), over calibration text.

    ``q_mean_real``, ``q_mean_imag``, ``q_abs_mean``: float32 ``[L, H*G, F]``; ``q_pass_mean`` float32 ``[L, H*G, P]``,
    the means of the P dims that are not rotated (P is 0 for most models). ``architecture`` describes the calibrated
    model; it is None for a published file, which does not contain it. ``declared`` are the parts of it that such a
    file's metadata does contain.
    """

    q_mean_real: torch.Tensor
    q_mean_imag: torch.Tensor
    q_abs_mean: torch.Tensor
    q_pass_mean: torch.Tensor
    token_count: int
    architecture: Architecture | None
    source: str
    declared: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.q_abs_mean.shape
        for name in _NAMES:
            tensor = getattr(self, name)
            if tensor.ndim != 3 or tensor.shape != shape:
                raise TriAttentionError(
                    f"{self.source}: {name} has shape {tuple(tensor.shape)}; expected [L, heads, F]"
                )
            if not tensor.isfinite().all():
                raise TriAttentionError(f"{self.source}: {name} holds NaN or Inf; calibrate again")
        if self.q_pass_mean.shape[:2] != shape[:2] or not self.q_pass_mean.isfinite().all():
            raise TriAttentionError(
                f"{self.source}: q_pass_mean has shape {tuple(self.q_pass_mean.shape)}, or NaN or Inf in it; "
                "calibrate again"
            )
        short = (torch.hypot(self.q_mean_real, self.q_mean_imag) - self.q_abs_mean * (1 + 1e-5) > 1e-6).nonzero()
        if len(short):
            layer, head, freq = short[0].tolist()
            raise TriAttentionError(
                f"{self.source}: |E q| exceeds E|q| at layer {layer}, head {head}, frequency {freq}, "
                "which is impossible; calibrate again"
            )

    def concentration(self) -> torch.Tensor:
        """R = |m| / a averaged over heads and frequencies, per layer: float32 ``[L]``, in [0, 1]."""
        return (torch.hypot(self.q_mean_real, self.q_mean_imag) / self.q_abs_mean.clamp_min(1e-30)).mean((1, 2))

    def check_model(self, model: Any) -> None:
        """Raise TriAttentionError, naming both values, unless these can be the statistics of ``model``."""
        self.check_architecture(describe(model))

    def check_architecture(self, live: Architecture) -> None:
        """``check_model`` for the description of a model."""
        here = (*self.q_abs_mean.shape, self.q_pass_mean.shape[-1])
        for name, mine in self.declared.items():
            if mine != getattr(live, name):
                raise TriAttentionError(
                    f"{self.source} declares {name} {mine!r}, but the model {live.model_id} has "
                    f"{getattr(live, name)!r}; {CALIBRATE}"
                )
        wanted = (live.num_layers, live.num_query_heads, len(live.omega), live.head_dim - live.rotary_dim)
        if here != wanted:
            raise TriAttentionError(
                f"{self.source} holds statistics of (layers, query heads, frequencies, unrotated dims) {here}, but the "
                f"model {live.model_id} has {wanted}; {CALIBRATE}"
            )
        if self.architecture is not None:
            self.architecture.require_same(live, self.source)

    def rope(self, model_path: str | os.PathLike[str] | None) -> tuple[torch.Tensor, float, str]:
        """omega float32 ``[F]``, s and the pair layout, from the file or else from the model at ``model_path``.

        Raises TriAttentionError if the file does not contain them and no path is given.
        """
        if self.architecture is not None:
            return self.architecture.omega, self.architecture.attention_scaling, self.architecture.rope_style
        if model_path is None:
            raise TriAttentionError(f"{self.source} does not contain omega; give model_path too, or calibrate again")
        omega, scaling, _ = rope_of(build_rotary("cpu", model_path, torch.float32))
        return omega, scaling, self.declared.get("rope_style", "half")


def save(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write our layout atomically. Raises TriAttentionError if the statistics have no description of their model."""
    if statistics.architecture is None:
        raise TriAttentionError(
            f"{statistics.source} does not say which model it is of; calibrate the model to save it"
        )
    _save_atomic(
        path,
        {
            "format": FORMAT,
            "format_version": FORMAT_VERSION,
            "capture_point": CAPTURE_POINT,
            "token_count": statistics.token_count,
            "architecture": statistics.architecture.to_dict(),
            "q_mean_real": statistics.q_mean_real,
            "q_mean_imag": statistics.q_mean_imag,
            "q_abs_mean": statistics.q_abs_mean,
            "q_pass_mean": statistics.q_pass_mean,
        },
    )


def _save_atomic(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(target, lambda stream: torch.save(payload, stream))


def load(path: str | os.PathLike[str]) -> Statistics:
    """Read either layout with ``weights_only=True``. Raises TriAttentionError naming the file and the problem."""
    return parse(read_payload(path), str(path))


def parse(payload: Mapping[str, Any], source: str) -> Statistics:
    """The statistics in a payload of either layout; ``source`` names it in errors. Raises TriAttentionError."""
    with _malformed(source):
        if payload.get("format") != FORMAT:
            return _from_published(payload, source)
        for name, expected in (("format_version", FORMAT_VERSION), ("capture_point", CAPTURE_POINT)):
            if payload[name] != expected:
                raise TriAttentionError(
                    f"{source} has {name} {payload[name]!r}, but this release reads {expected!r}; calibrate again"
                )
        means = [_float32(payload[name]) for name in (*_NAMES, "q_pass_mean")]
        return Statistics(
            *means, _count(payload["token_count"]), Architecture.from_dict(payload["architecture"]), source
        )


@contextmanager
def _malformed(source: str) -> Iterator[None]:
    """Turns errors from missing or malformed entries into one TriAttentionError that names ``source``."""
    try:
        yield
    except TriAttentionError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, RuntimeError, ArithmeticError) as error:
        raise TriAttentionError(f"{source} is not a statistics file ({error!r:.120}); calibrate again") from error


def read_payload(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a ``.pt`` file, tensors on the CPU. Raises TriAttentionError for a missing or damaged file."""
    source = Path(path)
    if not source.is_file():
        if source.exists():
            raise TriAttentionError(f"{source} is not a regular file; give a statistics file")
        raise TriAttentionError(
            f"there is no statistics file {source}; make one with python -m triattention build-stats "
            f"--model MODEL --output {source}"
        )
    try:
        payload = torch.load(source, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise TriAttentionError(
            f"the statistics file {source} ({source.stat().st_size} bytes) cannot be read, so it is damaged "
            f"or not a statistics file ({reason}); calibrate again"
        ) from error
    if not isinstance(payload, dict):
        raise TriAttentionError(f"{source} holds a {type(payload).__name__}, not statistics; calibrate again")
    return payload


def published_heads(payload: Mapping[str, Any], source: str) -> dict[tuple[int, int], dict[str, torch.Tensor]]:
    """The entries of a published file by (layer, head), each with three float32 tensors; heads may be missing.

    Entries may stand in ``stats`` or at the top, their keys may lack zeros, and the mean may be one complex tensor, or
    one of (real, imaginary) pairs. Raises TriAttentionError for a listed head without an entry, or a malformed one.
    """
    with _malformed(source):
        entries = _entries(payload, source)
        listed = payload.get("metadata", {}).get("sampled_heads", list(entries))
        found = {}
        for layer, head in ((operator.index(layer), operator.index(head)) for layer, head in listed):
            if (layer, head) not in entries:
                raise TriAttentionError(f"{source} lacks layer {layer}, head {head}; calibrate every head")
            found[layer, head] = _means(entries[layer, head], f"{source}, layer {layer}, head {head}")
        if not found:
            raise TriAttentionError(f"{source} lists no heads; calibrate again")
        return found


def _entries(payload: Mapping[str, Any], source: str) -> dict[tuple[int, int], Mapping[str, Any]]:
    if "layer_stats" in payload:
        raise TriAttentionError(
            f"{source} has 'layer_stats', means of KV heads without E|q|, from which TriAttention cannot score; "
            "calibrate this model"
        )
    stats = payload.get("stats", payload)
    found: dict[tuple[int, int], Any] = {}
    for key, entry in stats.items():
        if named := _HEAD.fullmatch(str(key)):
            place = int(named[1]), int(named[2])
            if place in found:
                raise TriAttentionError(f"{source} has layer {place[0]}, head {place[1]} twice; calibrate again")
            found[place] = entry
    if not found:
        keys = reprlib.repr([str(key) for key in stats])
        raise TriAttentionError(
            f"{source} is not a statistics file: it has no entries such as layer00_head00, but {keys}; "
            "calibrate this model"
        )
    return found


def _means(entry: Mapping[str, Any], where: str) -> dict[str, torch.Tensor]:
    both = entry.get("q_mean_complex")
    if "q_mean_real" not in entry and isinstance(both, torch.Tensor):
        if not both.is_complex():
            both = torch.view_as_complex(both.float().contiguous())
        entry = {**entry, "q_mean_real": both.real, "q_mean_imag": both.imag}
    if absent := [name for name in _NAMES if name not in entry]:
        raise TriAttentionError(f"{where} has no {absent[0]}, but {reprlib.repr(sorted(entry))}; calibrate this model")
    means = {name: _float32(entry[name]) for name in _NAMES}
    if shapes := [tuple(mean.shape) for mean in means.values() if mean.ndim != 1]:
        raise TriAttentionError(f"{where} has means of shape {shapes[0]}; expected [F]; calibrate this model")
    return means


def _float32(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        raise TypeError("a complex tensor where a real one belongs")
    return tensor.to(torch.float32)


def _count(value: Any) -> int:
    if isinstance(value, bool) or int(value) != value or not 0 <= value < 2**63:
        raise ValueError(f"token_count {reprlib.repr(value)}")
    return int(value)


def _from_published(payload: Mapping[str, Any], source: str) -> Statistics:
    """Stack the published per-head entries. Raises TriAttentionError unless every layer has every head."""
    heads = published_heads(payload, source)
    layers, per_layer = (1 + max(key[axis] for key in heads) for axis in (0, 1))
    every = ((layer, head) for layer in range(layers) for head in range(per_layer))
    if (absent := next((key for key in every if key not in heads), None)) is not None:
        raise TriAttentionError(f"{source} lacks layer {absent[0]}, head {absent[1]}; calibrate every head")
    stacked = [
        torch.stack([heads[divmod(n, per_layer)][name] for n in range(layers * per_layer)]).view(layers, per_layer, -1)
        for name in _NAMES
    ]
    metadata = payload.get("metadata", {})
    declared = {name: metadata[name] for name in ("rope_style", "head_dim") if name in metadata}
    no_pass = stacked[0].new_zeros(layers, per_layer, 0)
    return Statistics(*stacked, no_pass, _count(metadata.get("token_count", 0)), None, source, declared)


def save_published(
    path: str | os.PathLike[str], statistics_by_head: dict[tuple[int, int], Any], metadata: dict[str, Any]
) -> None:
    """Write ``{(layer, head): HeadFrequencyStats}`` in the published layout, atomically."""
    stats = {
        f"layer{layer:02d}_head{head:02d}": {
            "q_mean_real": entry.q_mean_complex.real.to(torch.float32).cpu().clone(),
            "q_mean_imag": entry.q_mean_complex.imag.to(torch.float32).cpu().clone(),
            "q_abs_mean": entry.q_abs_mean.to(torch.float32).cpu().clone(),
        }
        for (layer, head), entry in sorted(statistics_by_head.items())
    }
    sampled = [list(key) for key in sorted(statistics_by_head)]
    _save_atomic(path, {"metadata": metadata | {"sampled_heads": sampled}, "stats": stats})
