"""Tiny random models with random statistics, which a check makes, runs and judges within a second."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from verify.judge.compressor import write_statistics
from verify.model.live_model import LiveModel
from verify.model.observed import rotary_of
from verify.model.settings import RECOMMENDED
from verify.subject.subject import Subject

#: A RoPE base that no implementation falls back to.
BASE = 7.3e5

_TOKENS = 256

_SIZES = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": _TOKENS, "max_position_embeddings": 4096,
    "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip


def tiny(
    folder: Path, subject: Subject, device: str, seed: int, *, kind: str = "llama", style: str = "half",
    dtype: str = "float32", rope: dict[str, Any] | None = None, **config: Any,
) -> LiveModel:  # fmt: skip
    """A model of type ``kind``, drawn from ``seed``, and statistics drawn at random, in the published layout.

    ``rope`` are further RoPE parameters, ``style`` says which dims its type pairs, ``config`` overrides its sizes. Its
    configuration and statistics are written to ``folder``.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    parameters = {"rope_type": "default", "rope_theta": BASE, **(rope or {})}
    shape = AutoConfig.for_model(kind, **{**_SIZES, **config}, rope_parameters=parameters)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # not with .to(dtype), which would round omega: a model that is loaded keeps it in float32
        model = AutoModelForCausalLM.from_config(shape, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(4)  # as it is drawn, attention is uniform and no eviction changes a token
    model = model.to(device).eval()
    model.config.architectures = [type(model).__name__]  # as every model that was saved has it
    folder.mkdir(parents=True, exist_ok=True)
    model.config.save_pretrained(folder)
    m, a = drawn_statistics(seed, shape.num_hidden_layers, shape.num_attention_heads, _omega(model).numel())
    write_statistics(folder / "published.pt", m, a, style=style)
    torch.save(_content(model, m, a, style), folder / "statistics.pt")
    return LiveModel(
        model, SimpleNamespace(pad_token_id=0), str(folder), folder / "statistics.pt", subject, RECOMMENDED,
        folder / "published.pt",
    )  # fmt: skip


def drawn_statistics(seed: int, layers: int, heads: int, n_freq: int) -> tuple[Any, Any]:
    """E[q] (complex) and E|q|, ``[layers, heads, n_freq]``; each head has another scale."""
    import torch

    draw = torch.Generator().manual_seed(seed)
    size = (layers, heads, n_freq)
    scale = torch.logspace(0, 1, heads)[:, None]
    m = torch.complex(torch.randn(size, generator=draw), torch.randn(size, generator=draw)) * scale
    return m, m.abs() * (1 + torch.rand(size, generator=draw))


def tokens(live: LiveModel, count: int, seed: int) -> Any:
    """Random token ids ``[1, count]``, none of them padding."""
    import torch

    drawn = torch.randint(3, _TOKENS, (1, count), generator=torch.Generator().manual_seed(seed))
    return drawn.to(live.model.device)


def _omega(model: Any) -> Any:
    return rotary_of(model).inv_freq.detach().float().cpu()


def _content(model: Any, m: Any, a: Any, style: str) -> dict[str, Any]:
    """The statistics as the oracle reads them, with what the live model says of its RoPE."""
    omega, config = _omega(model), model.config
    return {
        "architecture": {
            "omega": omega, "attention_scaling": float(rotary_of(model).attention_scaling),
            "rotary_dim": 2 * omega.numel(), "rope_style": style,
            "num_query_heads": config.num_attention_heads, "num_kv_heads": config.num_key_value_heads,
        },
        "q_mean_real": m.real.clone(), "q_mean_imag": m.imag.clone(), "q_abs_mean": a,
        # the published layout has no place for it, so it is not part of the score
        "q_pass_mean": a.new_zeros(*a.shape[:2], config.head_dim - 2 * omega.numel()),
    }  # fmt: skip
