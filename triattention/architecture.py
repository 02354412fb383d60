"""What a live Hugging Face model looks like to TriAttention, read off the model and never guessed from a name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

import torch

from triattention.errors import TriAttentionError

#: Model types whose attention is q_proj (-> q_norm) -> RoPE -> cache, with their pair layout.
STYLE_OF_TYPE = {"llama": "half", "qwen2": "half", "qwen3": "half"}

#: RoPE kinds whose omega never changes with the length of the sequence.
STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")

#: Configuration entries that decide what a model's queries are; token ids, dropout and the like do not.
_SHAPING = (
    "model_type", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Shape and rotary parameters of a model; ``omega`` is float32 ``[F]`` as its rotary module holds it."""

    model_id: str
    fingerprint: str
    num_layers: int
    num_query_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    rope_style: str
    attention_scaling: float
    omega: torch.Tensor

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Architecture:
        architecture = cls(**data)
        if architecture.omega.ndim != 1 or not architecture.omega.isfinite().all():
            raise ValueError("omega is not a list of finite numbers")
        return architecture

    def require_same(self, live: Architecture, source: str) -> None:
        """Raise TriAttentionError, naming both values, unless ``live`` is the model these statistics are of."""
        for name in (
            "num_layers",
            "num_query_heads",
            "num_kv_heads",
            "head_dim",
            "rotary_dim",
            "rope_style",
            "attention_scaling",
        ):
            mine, its = getattr(self, name), getattr(live, name)
            if mine != its:
                raise TriAttentionError(
                    f"{source} is of {self.model_id} with {name} {mine} and the model {live.model_id} has "
                    f"{its}; calibrate this model"
                )
        ulp = torch.nextafter(live.omega, torch.full_like(live.omega, torch.inf)) - live.omega
        off = (~((self.omega - live.omega).abs() <= ulp)).nonzero()
        if len(off):
            f = int(off[0])
            raise TriAttentionError(
                f"{source} is of {self.model_id} with omega[{f}] = {self.omega[f].item():.9g} and the "
                f"model {live.model_id} "
                f"has {live.omega[f].item():.9g}; calibrate this model"
            )
        if self.fingerprint != live.fingerprint:
            raise TriAttentionError(
                f"{source} is of {self.model_id} (configuration {self.fingerprint}) and the model is {live.model_id} "
                f"(configuration {live.fingerprint}); calibrate this model"
            )


def decoder_of(model: Any) -> Any:
    """The module that holds ``layers`` and ``rotary_emb``. Raises TriAttentionError when the model has none."""
    decoder = getattr(model, "model", model)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise TriAttentionError(
            f"{type(model).__name__} has no decoder layers with a rotary module; supported: "
            f"{', '.join(sorted(STYLE_OF_TYPE))}"
        )
    return decoder


def describe(model: Any) -> Architecture:
    """Read a live causal language model. Raises TriAttentionError, naming the kind, for what cannot be served."""
    config = model.config.get_text_config()
    if config.model_type not in STYLE_OF_TYPE:
        raise TriAttentionError(
            f"model type {config.model_type!r} is not supported; supported: {', '.join(sorted(STYLE_OF_TYPE))}"
        )
    sliding = [kind for kind in getattr(config, "layer_types", None) or [] if kind != "full_attention"]
    if sliding:
        raise TriAttentionError(
            f"the model has {sliding[0]} layers, which cannot be compressed; use a full-attention model"
        )
    rotary = decoder_of(model).rotary_emb
    if rotary.rope_type not in STATIC_ROPE_TYPES:
        raise TriAttentionError(
            f"RoPE type {rotary.rope_type!r} is not supported; supported: {', '.join(STATIC_ROPE_TYPES)}"
        )
    omega = rotary.inv_freq.detach().to("cpu", torch.float32)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if 2 * len(omega) != head_dim:
        raise TriAttentionError(
            f"the model rotates {2 * len(omega)} of {head_dim} head dims; partial rotary models are not supported yet"
        )
    described = {key: value for key, value in sorted(config.to_dict().items()) if key in _SHAPING}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Architecture(
        model_id=str(getattr(config, "_name_or_path", "") or config.model_type).rstrip("/").rsplit("/", 1)[-1],
        fingerprint=digest,
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        rotary_dim=2 * len(omega),
        rope_style=STYLE_OF_TYPE[config.model_type],
        attention_scaling=float(rotary.attention_scaling),
        omega=omega,
    )
