"""A model's configuration with entries replaced, as vLLM replaces them for ``--hf-overrides``."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig

from triattention.architecture import require_rope
from triattention.errors import TriAttentionError

#: Entries that say how transformers runs a model; vLLM does not look at them.
_STEERING = ("return_dict", "output_attentions", "output_hidden_states", "use_cache")


def read_configuration(place: str, overrides: Mapping[str, Any], *, name: str, revision: str | None = None) -> Any:
    """The configuration of the model ``name`` at ``place``, a directory or hub name, with ``overrides``.

    Values and lists are replaced first, after which transformers brings the RoPE parameters into one form; then
    objects, which replace a whole entry, or entries of a configuration inside. A warning says which overrides have no
    effect. Raises TriAttentionError for another model type and unusable RoPE parameters, and what transformers raises.
    """
    config = AutoConfig.from_pretrained(place, local_files_only=Path(place).is_dir(), revision=revision)
    if (kind := overrides.get("model_type", config.model_type)) != config.model_type:
        raise TriAttentionError(
            f"--hf-overrides has model_type {kind!r}, but {name} has {config.model_type!r} in its config.json, which "
            "decides the classes; change it there"
        )
    effective = {entry: value for entry, value in overrides.items() if _has_effect(config, entry, name)}
    flat = {entry: value for entry, value in effective.items() if not isinstance(value, dict)}
    config.update(flat)
    if flat and (getattr(config, "rope_parameters", None) or getattr(config, "rope_theta", None) is not None):
        config.standardize_rope_params()
    _replace(config, {entry: value for entry, value in effective.items() if entry not in flat})
    if any("rope" in entry for entry in effective):
        require_rope(config)
    return config


def _replace(config: Any, entries: Mapping[str, Any]) -> None:
    for entry, value in entries.items():
        inside = getattr(config, entry, None)
        if isinstance(value, dict) and isinstance(inside, PreTrainedConfig):
            _replace(inside, value)
        else:
            setattr(config, entry, value)


def _has_effect(config: Any, entry: str, name: str) -> bool:
    """Whether an override is to be applied; a warning says why it is not, or does nothing in vLLM either."""
    if entry in _STEERING or (hasattr(GenerationConfig(), entry) and not hasattr(config, entry)):
        _warn(f"--hf-overrides has {entry}, which steers transformers, not the model; it is left out")
        return False
    if entry == "rope_theta" and (getattr(config, "rope_parameters", None) or {}).get("rope_theta") is not None:
        _warn("--hf-overrides has rope_theta, but that of rope_parameters counts; replace it there")
    elif not hasattr(config, entry) and entry not in ("rope_theta", "architectures"):
        _warn(f"--hf-overrides has {entry}, which the configuration of {name} does not have")
    return True


def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=2)
