"""Calibration statistics: what a query head asks for on average, and everything needed to refuse a wrong file.

Two layouts are read: ours (one stacked tensor per quantity, with the model's description) and the published one
(``{"metadata": ..., "stats": {"layer00_head00": {...}}}``), which carries dimensions only.
"""

from __future__ import annotations

import os
import pickle
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from triattention.architecture import Architecture, describe
from triattention.errors import TriAttentionError

FORMAT, FORMAT_VERSION = "triattention-statistics", 1
CAPTURE_POINT = "after q_norm, before RoPE"


@dataclass(frozen=True)
class Statistics:
    """m = E[q] and a = E|q| per (layer, query head, frequency), over calibration text.

    ``q_mean_real``, ``q_mean_imag``, ``q_abs_mean``: float32 ``[L, H*G, F]``. ``architecture`` describes the model
    they were taken from; it is None for a published file, which does not say.
    """

    q_mean_real: torch.Tensor
    q_mean_imag: torch.Tensor
    q_abs_mean: torch.Tensor
    token_count: int
    architecture: Architecture | None
    source: str

    def __post_init__(self) -> None:
        shape = self.q_abs_mean.shape
        for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
            tensor = getattr(self, name)
            if tensor.ndim != 3 or tensor.shape != shape:
                raise TriAttentionError(
                    f"{self.source}: {name} has shape {tuple(tensor.shape)}; expected [L, heads, F]"
                )
            if not tensor.isfinite().all():
                raise TriAttentionError(f"{self.source}: {name} holds NaN or Inf; calibrate again")
        short = (torch.hypot(self.q_mean_real, self.q_mean_imag) - self.q_abs_mean * (1 + 1e-5) > 1e-6).nonzero()
        if len(short):
            layer, head, freq = short[0].tolist()
            raise TriAttentionError(
                f"{self.source}: |E q| exceeds E|q| at layer {layer}, head {head}, frequency {freq}, "
                "which no data can give; calibrate again"
            )

    def concentration(self) -> torch.Tensor:
        """R = |m| / a averaged over heads and frequencies, per layer: float32 ``[L]``, in [0, 1]."""
        return (torch.hypot(self.q_mean_real, self.q_mean_imag) / self.q_abs_mean.clamp_min(1e-30)).mean((1, 2))

    def check_model(self, model: Any) -> None:
        """Raise TriAttentionError, naming both values, unless these can be the statistics of ``model``."""
        self.check_architecture(describe(model))

    def check_architecture(self, live: Architecture) -> None:
        """``check_model`` for a model that has been described already."""
        here = tuple(self.q_abs_mean.shape)
        wanted = (live.num_layers, live.num_query_heads, len(live.omega))
        if here != wanted:
            raise TriAttentionError(
                f"{self.source} holds statistics of (layers, query heads, frequencies) {here} and the model "
                f"{live.model_id} has {wanted}; calibrate this model"
            )
        if self.architecture is not None:
            self.architecture.require_same(live, self.source)


def save(path: str | os.PathLike[str], statistics: Statistics) -> None:
    """Write our layout atomically. Raises TriAttentionError when the statistics do not say which model they are of."""
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
        },
    )


def _save_atomic(path: str | os.PathLike[str], payload: dict[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            torch.save(payload, stream)
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load(path: str | os.PathLike[str]) -> Statistics:
    """Read either layout with ``weights_only=True``. Raises TriAttentionError naming the file and what is wrong
    with it.
    """
    payload, source = read_payload(path), str(path)
    try:
        if payload.get("format") == FORMAT:
            if payload["format_version"] != FORMAT_VERSION:
                raise TriAttentionError(
                    f"{source} has format version {payload['format_version']} and this release reads {FORMAT_VERSION}; "
                    "calibrate again"
                )
            return Statistics(
                payload["q_mean_real"], payload["q_mean_imag"], payload["q_abs_mean"],
                payload["token_count"], Architecture.from_dict(payload["architecture"]), source,
            )  # fmt: skip
        return _from_published(payload, source)
    except (KeyError, TypeError, AttributeError) as error:
        raise TriAttentionError(
            f"{source} is not a statistics file: {error!r} is missing or malformed; calibrate again"
        ) from error


def read_payload(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The dictionary in a ``.pt`` file, tensors on the CPU. Raises TriAttentionError for a missing or damaged file."""
    source = Path(path)
    if not source.is_file():
        raise TriAttentionError(
            f"there is no statistics file {source}; make one with python -m triattention build-stats "
            f"--model MODEL --output {source}"
        )
    try:
        payload = torch.load(source, map_location="cpu", weights_only=True)
    except (RuntimeError, pickle.UnpicklingError, EOFError, OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0].split(". ")[0] if str(error) else type(error).__name__
        raise TriAttentionError(
            f"the statistics file {source} ({source.stat().st_size} bytes) cannot be read: {reason}; calibrate again"
        ) from error
    if not isinstance(payload, dict):
        raise TriAttentionError(f"{source} holds a {type(payload).__name__}, not statistics; calibrate again")
    return payload


def _from_published(payload: dict[str, Any], source: str) -> Statistics:
    """Stack the published per-head entries; every layer must have every head, a gap is an error and never filled."""
    heads = {(int(layer), int(head)) for layer, head in payload["metadata"]["sampled_heads"]}
    if not heads:
        raise TriAttentionError(f"{source} lists no heads; calibrate again")
    layers, per_layer = max(layer for layer, _ in heads) + 1, max(head for _, head in heads) + 1
    names = ("q_mean_real", "q_mean_imag", "q_abs_mean")
    columns: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    for layer in range(layers):
        for head in range(per_layer):
            entry = payload["stats"].get(f"layer{layer:02d}_head{head:02d}") if (layer, head) in heads else None
            if entry is None:
                raise TriAttentionError(f"{source} lacks layer {layer}, head {head}; calibrate every head")
            for name in names:
                columns[name].append(entry[name].to(torch.float32))
    stacked = [torch.stack(columns[name]).view(layers, per_layer, -1) for name in names]
    return Statistics(
        *stacked, token_count=int(payload["metadata"].get("token_count", 0)), architecture=None, source=source
    )


def published_payload(statistics_by_head: dict[tuple[int, int], Any], metadata: dict[str, Any]) -> dict[str, Any]:
    """The published layout of ``{(layer, head): HeadFrequencyStats}`` with its metadata."""
    return {
        "metadata": metadata | {"sampled_heads": [list(key) for key in sorted(statistics_by_head)]},
        "stats": {
            f"layer{layer:02d}_head{head:02d}": {
                "q_mean_real": entry.q_mean_complex.real.to(torch.float32).cpu().clone(),
                "q_mean_imag": entry.q_mean_complex.imag.to(torch.float32).cpu().clone(),
                "q_abs_mean": entry.q_abs_mean.to(torch.float32).cpu().clone(),
            }
            for (layer, head), entry in sorted(statistics_by_head.items())
        },
    }


def save_published(
    path: str | os.PathLike[str], statistics_by_head: dict[tuple[int, int], Any], metadata: dict[str, Any]
) -> None:
    """Write the published layout atomically."""
    _save_atomic(path, published_payload(statistics_by_head, metadata))
