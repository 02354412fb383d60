"""Caches for the checks of the published compressor: keys, values and model files, with the oracle's view of them."""

from __future__ import annotations

import io
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.files import write_atomic
from verify.judge import oracle
from verify.judge.keep_set import Selection, select
from verify.judge.problems import OFFSETS_17

if TYPE_CHECKING:
    import numpy as np
    import torch

#: The budget of every compressor here, and how many tokens more make a round due.
BUDGET, DIVIDE = 48, 16

LAYERS, KV_HEADS, HEAD_DIM = 2, 2, 64
#: Small offsets: with large ones, the error of fp32 phases blurs the gaps between scores.
OFFSET_MAX_LENGTH = 64


@dataclass(frozen=True)
class Caches:
    """Two layers of one model: for each, ``keys`` and ``values`` float32 ``[B, H, N, D]``; and the statistics of the
    query heads, ``m`` complex and ``a``, ``[L, H*G, F]``.

    ``statistics`` is a file in the published layout, ``model`` a directory with the model's configuration, whose RoPE
    base is ``theta``.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    m: torch.Tensor
    a: torch.Tensor
    omega: np.ndarray
    theta: float
    statistics: Path | None
    model: Path

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.m.shape[1] // self.keys[0].shape[1]

    def first(self, layer: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The keys and values of a layer's first tokens, in memory of their own."""
        return self.keys[layer][:, :, :tokens].contiguous(), self.values[layer][:, :, :tokens].contiguous()

    def selection(
        self, layer: int, row: int, keys: torch.Tensor, t: int, evictable: np.ndarray, options: Mapping[str, Any], *,
        omega: np.ndarray | None = None, averaged: bool = False, rounded: bool = False, everywhere: bool = False,
        mean_heads: bool = False,
    ) -> Selection:  # fmt: skip
        """The oracle's selection scores for one row of a layer's cached ``keys``, at position ``t``.

        The other arguments are departures: another ``omega``; statistics ``averaged`` over each group of query heads,
        or ``rounded`` to bfloat16; z-scores ``everywhere``, over protected tokens too; ``mean_heads``, in mode
        ``per_layer`` the mean of the KV heads' scores.
        """
        import numpy as np

        omega = self.omega if omega is None else omega
        m, a = self.m[layer].cpu().numpy().astype(np.complex128), self.a[layer].double().cpu().numpy()
        if rounded:
            m, a = as_bfloat16(m.real) + 1j * as_bfloat16(m.imag), as_bfloat16(a)
        if averaged:
            m, a = (x.reshape(KV_HEADS, -1, x.shape[-1]).mean(1) for x in (m, a))
        asked = scored_with(options)
        # the score of a rotated key does not depend on its position
        positions = np.arange(keys.shape[2])
        case = oracle.Case(
            k0=oracle.unrotated(keys[row : row + 1].double().cpu().numpy(), positions, omega, "half"),
            positions=positions,
            m=m,
            a=a,
            w=np.ones(a.shape),
            omega=omega,
            t=t,
            offsets=np.array(asked.pop("offsets")),
            **asked,
        )
        return select(
            [case], evictable, mode=options.get("pruning_mode", "per_head"),
            normalize=options.get("sparse_normalize_scores", True) and not mean_heads,
            region=np.ones_like(evictable) if everywhere else None, heads="mean" if mean_heads else "max",
        )  # fmt: skip


def scored_with(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a score that these options of a compressor choose; ``offsets`` as a tuple."""
    return {
        "offsets": tuple(o for o in OFFSETS_17 if o <= options.get("offset_max_length", OFFSET_MAX_LENGTH)),
        "aggregation": options.get("score_aggregation", "mean"),
        "disable_mlr": options.get("disable_mlr", False),
        "disable_trig": options.get("disable_trig", False),
    }


def as_bfloat16(x: np.ndarray) -> np.ndarray:
    """The numbers rounded to bfloat16, in float64."""
    import torch

    return torch.from_numpy(x).to(torch.float32).to(torch.bfloat16).double().numpy()


def frequencies(theta: float) -> np.ndarray:
    """omega of a RoPE base, as transformers computes it in float32."""
    import torch

    freq = HEAD_DIM // 2
    return (1.0 / (theta ** (torch.arange(0, freq, dtype=torch.float32) / freq))).double().numpy()


def make_caches(
    folder: Path, seed: int, device: str, *, tokens: int, rows: int = 1, group: int = 2, theta: float = 1e6
) -> Caches:
    """Caches of ``tokens`` tokens, drawn from ``seed`` identically on every device, and their files in ``folder``.

    The usual base is not 10000, to which an implementation that cannot read the model may fall back.
    """
    import torch

    draw = torch.Generator().manual_seed(seed)
    freq, query_heads = HEAD_DIM // 2, KV_HEADS * group

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    size = (rows, KV_HEADS, tokens, HEAD_DIM)
    keys = [(normal(*size) * (1 + normal(*size[:-1], 1).abs())).to(device) for _ in range(LAYERS)]
    values = [normal(*size).to(device) for _ in range(LAYERS)]
    # each head has another scale, so that normalising scores before joining them matters
    scale = torch.logspace(0, 1, query_heads)[:, None]
    m = torch.complex(normal(LAYERS, query_heads, freq), normal(LAYERS, query_heads, freq)) * scale
    a = m.abs() * (1 + torch.rand(m.shape, generator=draw))
    (folder / "config.json").write_text(json.dumps(_model(query_heads, theta)))
    write_statistics(folder / "statistics.pt", m, a)
    return Caches(keys, values, m, a, frequencies(theta), theta, folder / "statistics.pt", folder)


def tied(caches: Caches) -> Caches:
    """The caches with so many equal keys, every second one, that any budget of about half cuts through them."""
    for keys in caches.keys:
        keys[:, :, ::2] = keys[:, :, :1].clone()
        keys[:, :, 1::4] = 0.01 * keys[:, :, :1]
        keys[:, :, 3::4] = 3.0 * keys[:, :, :1]
    return caches


def _model(query_heads: int, theta: float) -> dict[str, Any]:
    """The minimal configuration of a model; the RoPE base is where each transformers release looks for it."""
    return {
        "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": query_heads * HEAD_DIM,
        "intermediate_size": 256, "num_hidden_layers": LAYERS, "num_attention_heads": query_heads,
        "num_key_value_heads": KV_HEADS, "head_dim": HEAD_DIM, "vocab_size": 128, "max_position_embeddings": 131072,
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta}, "rms_norm_eps": 1e-6,
    }  # fmt: skip


#: The cause of what happens with a file of statistics that is not complete.
HEAD_ABSENT = "statistics that lack a head are not refused"


def write_statistics(
    path: Path, m: torch.Tensor, a: torch.Tensor, without: Collection[tuple[int, int]] = (), style: str = "half"
) -> None:
    """Write a statistics file in the published layout, in float32, ``without`` some (layer, head)."""
    import torch

    heads = [(i, j) for i in range(m.shape[0]) for j in range(m.shape[1]) if (i, j) not in without]
    stats = {
        f"layer{i:02d}_head{j:02d}": {
            "q_mean_real": m[i, j].real.float().cpu().clone(),
            "q_mean_imag": m[i, j].imag.float().cpu().clone(),
            "q_abs_mean": a[i, j].float().cpu().clone(),
        }
        for i, j in heads
    }
    metadata = {"sampled_heads": [list(head) for head in heads], "head_dim": 2 * m.shape[-1], "rope_style": style}
    buffer = io.BytesIO()
    torch.save({"metadata": metadata, "stats": stats}, buffer)
    write_atomic(path, buffer.getvalue())
