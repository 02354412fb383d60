"""Caches for the checks of the published compressor: keys, values and model files, with the oracle's view of them."""

from __future__ import annotations

import io
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.files import write_atomic
from verify.judge import oracle
from verify.judge.guarded import Call, call
from verify.judge.keep_set import Selection, select
from verify.judge.problems import OFFSETS_17
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np
    import torch

_LAYERS, _KV_HEADS, _GROUP, _HEAD_DIM, _THETA = 2, 2, 2, 64, 1e4
#: Small offsets: with large ones, the error of fp32 phases blurs the gaps between scores.
_OFFSET_MAX_LENGTH = 64


@dataclass(frozen=True)
class Caches:
    """Two layers of one model: for each, ``keys`` and ``values`` float32 ``[B, H, N, D]``; and the statistics of the
    four query heads, ``m`` complex and ``a``, ``[L, H*G, F]``.

    ``statistics`` is a file in the published layout, ``model`` a directory with the model's configuration.
    """

    keys: list[torch.Tensor]
    values: list[torch.Tensor]
    m: torch.Tensor
    a: torch.Tensor
    omega: np.ndarray
    statistics: Path
    model: Path

    def compressor(self, subject: Subject, **options: Any) -> Any:
        """The published compressor for these caches; everything can be evicted unless ``options`` say otherwise."""
        usual = {
            "kv_budget": 48, "divide_length": 16, "window_size": 0, "protect_prefill": False,
            "offset_max_length": _OFFSET_MAX_LENGTH,
            "trig_cache_max_seq_len": 1024, "rope_style": "half", "head_dim": _HEAD_DIM, "num_kv_heads": _KV_HEADS,
            "num_layers": _LAYERS, "device": self.keys[0].device.type, "stats_path": str(self.statistics),
            "model_path": str(self.model),
        }  # fmt: skip
        config = subject.attribute("vllm.core.config", "TriAttentionConfig")(**usual | options)
        return subject.attribute("vllm.core.compressor", "TriAttentionCompressor")(config)

    def selection(
        self, layer: int, row: int, tokens: slice, t: int, evictable: np.ndarray, options: dict[str, Any]
    ) -> Selection:
        """The oracle's selection scores for one row of a layer whose cache holds ``tokens``, at position ``t``."""
        import numpy as np

        keys = self.keys[layer][row : row + 1, :, tokens].double().cpu().numpy()
        # the score of a rotated key does not depend on its position
        positions = np.arange(keys.shape[2])
        case = oracle.Case(
            k0=oracle.unrotated(keys, positions, self.omega, "half"),
            positions=positions,
            m=self.m[layer].cpu().numpy().astype(np.complex128),
            a=self.a[layer].double().cpu().numpy(),
            w=np.ones(self.a.shape[1:]),
            omega=self.omega,
            offsets=np.array([o for o in OFFSETS_17 if o <= options.get("offset_max_length", _OFFSET_MAX_LENGTH)]),
            t=t,
            aggregation=options.get("score_aggregation", "mean"),
            disable_mlr=options.get("disable_mlr", False),
            disable_trig=options.get("disable_trig", False),
        )
        mode, normalize = options.get("pruning_mode", "per_head"), options.get("sparse_normalize_scores", True)
        return select([case], evictable, mode=mode, normalize=normalize)


def make_caches(folder: Path, seed: int, device: str, *, tokens: int, rows: int = 1) -> Caches:
    """Caches of ``tokens`` tokens, drawn from ``seed`` identically on every device, and their files in ``folder``."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    freq, query_heads = _HEAD_DIM // 2, _KV_HEADS * _GROUP

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=draw)

    size = (rows, _KV_HEADS, tokens, _HEAD_DIM)
    keys = [(normal(*size) * (1 + normal(*size[:-1], 1).abs())).to(device) for _ in range(_LAYERS)]
    values = [normal(*size).to(device) for _ in range(_LAYERS)]
    # each head has another scale, so that normalising scores before joining them matters
    scale = torch.logspace(0, 1, query_heads)[:, None]
    m = torch.complex(normal(_LAYERS, query_heads, freq), normal(_LAYERS, query_heads, freq)) * scale
    a = m.abs() * (1 + torch.rand(m.shape, generator=draw))
    omega = 1.0 / (_THETA ** (torch.arange(0, freq, dtype=torch.float32) / freq))
    (folder / "config.json").write_text(json.dumps(_MODEL))
    write_statistics(folder / "statistics.pt", m, a)
    return Caches(keys, values, m, a, omega.double().numpy(), folder / "statistics.pt", folder)


#: The minimal configuration of a model; the default RoPE base, so that every transformers release reads it alike.
_MODEL = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": _KV_HEADS * _GROUP * _HEAD_DIM,
    "intermediate_size": 256, "num_hidden_layers": _LAYERS, "num_attention_heads": _KV_HEADS * _GROUP,
    "num_key_value_heads": _KV_HEADS, "head_dim": _HEAD_DIM, "vocab_size": 128, "max_position_embeddings": 131072,
    "rope_theta": _THETA, "rms_norm_eps": 1e-6,
}  # fmt: skip


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


@dataclass(frozen=True)
class Kept:
    """The result of ``compress``: ``keys`` and ``values`` ``[B, H, K, D]``, ``indices`` int64 ``[B, H, K]``."""

    keys: torch.Tensor
    values: torch.Tensor
    indices: torch.Tensor
    call: Call

    def mask(self, row: int, length: int) -> np.ndarray:
        """Which of ``length`` tokens each KV head of a row keeps, bool ``[H, length]``."""
        import numpy as np

        kept = np.zeros((self.indices.shape[1], length), dtype=bool)
        np.put_along_axis(kept, self.indices[row].cpu().numpy(), True, axis=-1)
        return kept


def compress(compressor: Any, keys: torch.Tensor, values: torch.Tensor, **more: Any) -> Kept:
    """A guarded call of ``compress``, whose indices may be shared by heads or rows.

    Raises AssertionError if the returned keys have another number of rows or heads.
    """
    found = call(lambda: compressor.compress(keys, values, **more), {"key_states": keys, "value_states": values})
    held, carried, indices = found.result
    assert held.shape[:2] == keys.shape[:2], f"keys {tuple(keys.shape)} came back as {tuple(held.shape)}"
    while indices.ndim < 3:
        indices = indices.unsqueeze(-2)
    return Kept(held, carried, indices.long().expand(*held.shape[:3]), found)
