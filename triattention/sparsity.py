"""``calibrate`` and ``sparsify``: the interface of NVIDIA's Model-Optimizer (pull request 1216) to the same code.

model = calibrate(model, forward_loop=loop)
model = sparsify(model, TriAttentionConfig(budget=2048, prune_interval=128))
model.generate(...)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from triattention import calibration
from triattention.architecture import inside
from triattention.errors import TriAttentionError
from triattention.selection import default_window

__all__ = ["TriAttentionConfig", "calibrate", "sparsify"]

#: The attribute in which ``calibrate`` stores a model's statistics.
_STATISTICS = "triattention_statistics"


@dataclass(frozen=True)
class TriAttentionConfig:
    """The recommended setting for a ``budget`` of cached tokens, compressed every ``prune_interval`` tokens.

    ``window_size`` None is ``min(128, budget // 2)``; ``pruning_mode`` is one of ``selection.MODES``; the other options
    are as in ``methods.triattention``.
    """

    budget: int = 2048
    prune_interval: int = 128
    window_size: int | None = None
    pruning_mode: str = "per_head"
    score_aggregation: str = "mean"
    offset_max_length: int = 65536
    disable_mlr: bool = False
    disable_trig: bool = False


def calibrate(model: Any, forward_loop: Callable[[Any], None]) -> Any:
    """Collect statistics of ``model`` while ``forward_loop(model)`` runs, store them on it, and return it.

    Raises TriAttentionError as ``calibration.calibrate`` does.
    """
    setattr(model, _STATISTICS, calibration.calibrate(model, forward_loop))
    return model


def sparsify(model: Any, config: TriAttentionConfig) -> Any:
    """Make a calibrated ``model`` compress its cache, and return it; ``remove_triattention_patch`` undoes it.

    Raises TriAttentionError for a model that was not calibrated, and as ``apply_triattention_patch`` does.
    """
    from triattention.methods import triattention as method
    from triattention.patching import patch

    calibrated = getattr(model, _STATISTICS, None)
    if calibrated is None:
        raise TriAttentionError("the model is not calibrated; call calibrate(model, forward_loop) first")
    target = inside(model)
    options = method.TriAttentionConfig(
        stats_path=None,
        model_path=None,
        device=target.device,
        dtype=target.dtype,
        budget=config.budget,
        offset_max_length=config.offset_max_length,
        score_aggregation=config.score_aggregation,
        normalize_scores=True,
        count_prompt_tokens=True,
        allow_prefill_compression=True,
        divide_length=config.prune_interval,
        use_slack_trigger=True,
        disable_mlr=config.disable_mlr,
        disable_trig=config.disable_trig,
        window_size=default_window(config.budget) if config.window_size is None else config.window_size,
        pruning_mode=config.pruning_mode,
    )
    patch(model, lambda live: method.TriAttention(options, live=live, calibrated=calibrated))
    return model
