"""The shape and rotary parameters of a Hugging Face model, read from the model itself, never guessed from a name."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from triattention.errors import TriAttentionError

#: Supported model types (attention: projection, optional q_norm, RoPE, cache) and their rotary pair layouts.
STYLE_OF_TYPE = {
    "llama": "half", "qwen2": "half", "qwen3": "half", "phi3": "half", "glm": "interleaved", "glm4": "interleaved",
}  # fmt: skip

#: RoPE kinds whose omega does not depend on the sequence length, and those whose omega changes at some length.
STATIC_ROPE_TYPES = ("default", "linear", "yarn", "llama3")
GROWING_ROPE_TYPES = ("dynamic", "longrope")

#: The next step for statistics of another model, or of this one with another configuration.
CALIBRATE = (
    "calibrate this model, with --hf-overrides if entries of its config.json, such as rope_parameters, are replaced "
    "when it is loaded"
)

#: What transformers raises for RoPE parameters that it cannot use.
_UNUSABLE = (LookupError, TypeError, AttributeError, ArithmeticError)

#: Configuration entries that affect a model's queries; token ids, dropout and the like do not.
_SHAPING = (
    "model_type", "hidden_size", "intermediate_size", "vocab_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "attention_bias", "mlp_bias", "rope_parameters",
)  # fmt: skip


#: Fields that are the same for the same model, whichever library describes it.
_COMPARED = (
    "num_layers", "num_query_heads", "num_kv_heads", "head_dim", "rotary_dim", "rope_style", "attention_scaling",
    "max_positions",
)  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """Shape and rotary parameters of a model; ``omega`` is float32 ``[F]`` as in its rotary module.

    The first ``rotary_dim`` of the ``head_dim`` dims are rotated. ``max_positions`` is the longest sequence for which
    omega does not change, None if it never does.
    """

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
    max_positions: int | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def identity(self) -> str:
        """16 hex digits over the fields that ``require_same`` compares exactly."""
        compared = [getattr(self, name) for name in (*_COMPARED, "fingerprint")]
        return hashlib.sha256(json.dumps(compared).encode()).hexdigest()[:16]

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Architecture:
        architecture = cls(**data)
        if architecture.omega.ndim != 1 or not architecture.omega.isfinite().all():
            raise ValueError("omega is not a list of finite numbers")
        return architecture

    def require_same(self, live: Architecture, source: str) -> None:
        """Raise TriAttentionError, naming both values, unless ``live`` is the model of these statistics."""
        for name in _COMPARED:
            mine, its = getattr(self, name), getattr(live, name)
            if mine != its:
                raise TriAttentionError(
                    f"{source} is of {self.model_id} with {name} {mine} and the model {live.model_id} has "
                    f"{its}; {CALIBRATE}"
                )
        ulp = torch.nextafter(live.omega, torch.full_like(live.omega, torch.inf)) - live.omega
        off = (~((self.omega - live.omega).abs() <= ulp)).nonzero()
        if len(off):
            f = int(off[0])
            raise TriAttentionError(
                f"{source} is of {self.model_id} with omega[{f}] = {self.omega[f].item():.9g} and the "
                f"model {live.model_id} "
                f"has {live.omega[f].item():.9g}; {CALIBRATE}"
            )
        if self.fingerprint != live.fingerprint:
            raise TriAttentionError(
                f"{source} is of {self.model_id} (configuration {self.fingerprint}) and the model is {live.model_id} "
                f"(configuration {live.fingerprint}); {CALIBRATE}"
            )


def inside(model: Any) -> Any:
    """The model that generates: ``model`` itself or, of a wrapper, the first one inside it."""
    from transformers.generation import GenerationMixin

    if isinstance(model, GenerationMixin) or not isinstance(model, torch.nn.Module):
        return model
    return next((module for module in model.modules() if isinstance(module, GenerationMixin)), model)


def decoder_of(model: Any) -> Any:
    """The module that holds ``layers`` and ``rotary_emb``. Raises TriAttentionError when the model has none."""
    model = inside(model)
    decoder = getattr(model, "model", model)
    if not hasattr(decoder, "layers") or not hasattr(decoder, "rotary_emb"):
        raise TriAttentionError(
            f"{type(model).__name__} has no decoder layers with a rotary module; supported: "
            f"{', '.join(sorted(STYLE_OF_TYPE))}"
        )
    return decoder


def describe(model: Any) -> Architecture:
    """Describe a live causal language model. Raises TriAttentionError, naming the kind, if it is not supported."""
    return _describe(inside(model).config.get_text_config(), lambda: decoder_of(model).rotary_emb)


def describe_config(config: Any) -> Architecture:
    """``describe`` from the configuration alone, for engines with their own model classes."""
    return _describe(config.get_text_config(), lambda: build_rotary("cpu", "", torch.float32, config))


def _describe(config: Any, rotary: Callable[[], Any]) -> Architecture:
    if config.model_type not in STYLE_OF_TYPE:
        raise TriAttentionError(
            f"model type {config.model_type!r} is not supported; supported: {', '.join(sorted(STYLE_OF_TYPE))}"
        )
    _refuse_sliding(config)
    omega, scaling, max_positions = _rope_from(config, rotary)
    complete = copy.deepcopy(config)
    if getattr(complete, "rope_parameters", None):
        complete.standardize_rope_params()  # entries that were left out count as their defaults
    described = {key: value for key, value in sorted(complete.to_dict().items()) if key in _SHAPING}
    digest = hashlib.sha256(json.dumps(described, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return Architecture(
        model_id=str(getattr(config, "_name_or_path", "") or config.model_type).rstrip("/").rsplit("/", 1)[-1],
        fingerprint=digest,
        num_layers=config.num_hidden_layers,
        num_query_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        rotary_dim=2 * len(omega),
        rope_style=STYLE_OF_TYPE[config.model_type],
        attention_scaling=scaling,
        omega=omega,
        max_positions=max_positions,
    )


def require_rope(config: Any) -> None:
    """Raise TriAttentionError unless RoPE can be made from a configuration."""
    _rope_from(config.get_text_config(), lambda: build_rotary("cpu", "", torch.float32, copy.deepcopy(config)))


def _rope_from(config: Any, rotary: Callable[[], Any]) -> tuple[torch.Tensor, float, int | None]:
    try:
        return rope_of(rotary())
    except _UNUSABLE as error:
        raise TriAttentionError(
            f"rope_parameters {getattr(config, 'rope_parameters', None)} cannot be used ({error!r:.80}); give "
            "rope_type, rope_theta and the entries of that type"
        ) from error


def _refuse_sliding(config: Any) -> None:
    kinds = getattr(config, "layer_types", None)
    sliding = [kind for kind in kinds or [] if kind != "full_attention"]
    window = None if kinds else getattr(config, "sliding_window", None)
    if sliding or (window is not None and window < config.max_position_embeddings):
        raise TriAttentionError(
            f"the model has {sliding[0] if sliding else f'sliding attention (window {window})'} layers, which cannot "
            "be compressed; use a full-attention model"
        )


def rope_of(rotary: Any) -> tuple[torch.Tensor, float, int | None]:
    """omega float32 ``[F]``, s and ``max_positions`` of a live rotary module, for short sequences.

    Raises TriAttentionError, naming the kind, if it is unknown.
    """
    kind, omega, limit = rotary.rope_type, rotary.inv_freq, None
    if kind in GROWING_ROPE_TYPES:
        # a long sequence replaces inv_freq in place; the module also keeps the original
        omega = rotary.original_inv_freq
        parameters = rotary.config.rope_parameters
        limit = parameters["original_max_position_embeddings"] if kind == "longrope" else rotary.original_max_seq_len
    elif kind not in STATIC_ROPE_TYPES:
        raise TriAttentionError(
            f"RoPE type {kind!r} is not supported; supported: {', '.join(STATIC_ROPE_TYPES + GROWING_ROPE_TYPES)}"
        )
    return omega.detach().to("cpu", torch.float32), float(rotary.attention_scaling), limit


def build_rotary(
    cache_device: torch.device | str, model_path: str | os.PathLike[str], dtype: torch.dtype, config: Any = None
) -> torch.nn.Module:
    """The rotary module of the model at ``model_path`` (or of ``config``), built by the model's own class.

    ``dtype`` has no effect: cos and sin take the dtype of the module's input, and ``inv_freq`` stays float32, because a
    frequency rounded to bf16 is off by 0.4 %. Raises TriAttentionError for a path without a config.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if config is None:
        try:
            config = AutoConfig.from_pretrained(model_path)
        except (OSError, ValueError) as error:
            raise TriAttentionError(
                f"{model_path} has no model configuration; give a model directory or hub name"
            ) from error
    with torch.device("meta"):
        skeleton = AutoModelForCausalLM.from_config(config)
    rotary = next((m for m in skeleton.modules() if hasattr(m, "inv_freq")), None)
    if rotary is None:
        raise TriAttentionError(f"model type {config.model_type!r} has no rotary module; TriAttention needs RoPE")
    return type(rotary)(config=config.get_text_config()).to(cache_device)
