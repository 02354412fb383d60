"""The plugin's configuration: environment variables with the published names."""

from __future__ import annotations

import difflib
import os
from typing import Any, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from triattention.errors import TriAttentionError
from triattention.selection import check_budget, default_window

PREFIX = "TRIATTN_RUNTIME_"
SWITCH = "ENABLE_TRIATTENTION"

#: Accepted because existing deployments set them; each with the reason why it has no effect here.
_WITHOUT_EFFECT = {
    "require_triton_scoring": "keys are always scored by the Triton kernel on a GPU and by PyTorch elsewhere",
    "enable_experimental_kv_compaction": f"this plugin always compacts; {SWITCH}=0 turns it off",
    "enable_experimental_block_reclaim": "evicted blocks always go back to the pool",
    "model_path": "RoPE is read from the model that vLLM serves",
}


def _older(name: str) -> Any:
    """Aliases that also accept the older variable ``TRIATTENTION_<name>``."""
    return AliasChoices(f"{PREFIX}{name}", f"TRIATTENTION_{name}")


class RuntimeSettings(BaseSettings):
    """The plugin's settings; counts are tokens, names and defaults as published.

    ``kv_budget`` excludes the prompt unless ``include_prefill_in_budget``. A round is due ``divide_length`` tokens
    above it. The newest ``window_size`` tokens are never evicted (default: 128, or half of a budget below 256), nor is
    the prompt with ``protect_prefill``. ``sparse_stats_path`` is a file, or ``auto`` (the default) for the statistics
    in the calibration cache.
    """

    model_config = SettingsConfigDict(env_prefix=PREFIX, extra="ignore", populate_by_name=True)

    kv_budget: int = Field(2048, validation_alias=_older("KV_BUDGET"))
    divide_length: int = Field(128, validation_alias=_older("DIVIDE_LENGTH"))
    window_size: int | None = Field(None, validation_alias=_older("WINDOW_SIZE"))
    protect_prefill: bool = False
    pruning_mode: Literal["per_head", "per_layer_per_head"] = Field("per_head", validation_alias=_older("PRUNING_MODE"))
    sparse_stats_path: str = Field(
        "auto", validation_alias=AliasChoices(f"{PREFIX}SPARSE_STATS_PATH", "TRIATTENTION_STATS_PATH")
    )
    model_path: str | None = None
    sparse_score_aggregation: Literal["mean", "max"] = "mean"
    sparse_normalize_scores: bool = True
    include_prefill_in_budget: bool = True
    layer_perhead_aggregation: Literal["max", "mean"] = "max"
    disable_mlr: bool = False
    disable_trig: bool = False
    disable_compression: bool = False
    log_decisions: bool = Field(True, validation_alias=_older("LOG_DECISIONS"))
    require_triton_scoring: bool = True
    enable_experimental_kv_compaction: bool = True
    enable_experimental_block_reclaim: bool = True
    patch_scheduler: bool = True
    patch_worker: bool = True

    @field_validator("pruning_mode", mode="before")
    @classmethod
    def _published_alias(cls, value: Any) -> Any:
        return "per_layer_per_head" if value == "per_layer_perhead" else value

    @property
    def window(self) -> int:
        return min(128, default_window(self.kv_budget)) if self.window_size is None else self.window_size

    def notes(self) -> list[str]:
        """A sentence for each variable that was set but has no effect."""
        return [
            f"{PREFIX}{name.upper()} is accepted but has no effect: {reason}"
            for name, reason in _WITHOUT_EFFECT.items()
            if name in self.model_fields_set
        ]


def enabled() -> bool:
    """Whether ``ENABLE_TRIATTENTION`` is on (default: on). Raises TriAttentionError for unknown values."""
    value = os.environ.get(SWITCH, "1").strip().lower()
    if value not in ("0", "1", "true", "false", "yes", "no", "on", "off"):
        raise TriAttentionError(f"{SWITCH} is {value!r}; set it to 1 or 0")
    return value in ("1", "true", "yes", "on")


def read_settings() -> RuntimeSettings:
    """The settings in the environment. Raises TriAttentionError naming the variable, its value and the next step."""
    known = {f"{PREFIX}{name.upper()}" for name in RuntimeSettings.model_fields}
    for name in sorted(os.environ):
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            nearest = difflib.get_close_matches(name.upper(), known, n=1, cutoff=0.0)[0]
            raise TriAttentionError(f"{name} is not a setting of this plugin; the most similar one is {nearest}")
    if os.environ.get("TRIATTENTION_QUIET", "").lower() in ("1", "true", "yes"):
        os.environ.setdefault(f"{PREFIX}LOG_DECISIONS", "false")
    try:
        settings = RuntimeSettings()
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]).upper()
        name = name if name.startswith("TRIATT") else f"{PREFIX}{name}"
        older = name.replace(PREFIX, "TRIATTENTION_")
        name = older if name not in os.environ and older in os.environ else name
        raise TriAttentionError(f"{name} is {problem['input']!r}: {problem['msg']}; correct or unset it") from error
    check_budget(settings.kv_budget, settings.divide_length, settings.window)
    if settings.layer_perhead_aggregation == "mean" and settings.pruning_mode != "per_layer_per_head":
        raise TriAttentionError(
            f"{PREFIX}LAYER_PERHEAD_AGGREGATION is 'mean', which is for the mode per_layer_per_head only; unset it"
        )
    return settings
