"""The Hugging Face front end (plan 2.3, 4): a patch of ``model.forward`` that compresses the cache as it grows."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from triattention import statistics
from triattention.architecture import Architecture, describe
from triattention.errors import TriAttentionError
from triattention.scoring import check_inputs, score
from triattention.selection import (
    check_budget,
    evictable,
    group_max,
    keep_indices,
    keep_mask,
    protection_exceeds,
    to_device,
    z_score,
)
from triattention.trig import fold, geometric_offsets, phases

if TYPE_CHECKING:
    from triattention.cache import CacheState

__all__ = ["TriAttention", "TriAttentionConfig", "apply_triattention_patch", "remove_triattention_patch"]


@dataclass
class TriAttentionConfig:
    """Options of the Hugging Face path; names, order and defaults as published, ``window_size`` is ours.

    ``budget`` counts cached tokens, beyond the prompt unless ``count_prompt_tokens``. The prompt is protected
    unless ``allow_prefill_compression``. ``use_slack_trigger`` waits for budget + divide_length tokens; without it
    a round is due whenever a multiple of ``divide_length`` tokens has been passed since the budget was.
    ``per_head_pruning`` keeps one set per KV head, else one ``union`` set. ``pruning_seed`` is accepted; ties go to
    the lowest index, not to noise. ``metadata_expectations`` are entries the statistics file must hold. Raises
    TriAttentionError (a ValueError) for what cannot be honoured.
    """

    stats_path: str | os.PathLike[str]
    model_path: str | os.PathLike[str] | None
    device: torch.device | str
    dtype: torch.dtype
    budget: int
    offset_max_length: int = 65536
    score_aggregation: str = "mean"
    pruning_seed: int = 0
    metadata_expectations: Mapping[str, Any] | None = None
    normalize_scores: bool = False
    count_prompt_tokens: bool = False
    allow_prefill_compression: bool = False
    divide_length: int = 128
    use_slack_trigger: bool = False
    per_head_pruning: bool = False
    per_layer_perhead_pruning: bool = False
    layer_perhead_aggregation: str = "max"
    disable_mlr: bool = False
    disable_trig: bool = False
    window_size: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        check_budget(self.budget, self.divide_length, self.window_size)
        if self.per_layer_perhead_pruning:
            raise TriAttentionError(
                "per_layer_perhead_pruning is not available yet; use per_head_pruning=True, or neither for union"
            )
        if self.score_aggregation not in ("mean", "max"):
            raise TriAttentionError(f"score_aggregation is {self.score_aggregation!r}; use 'mean' or 'max'")
        if self.layer_perhead_aggregation != "max":
            raise TriAttentionError(
                f"layer_perhead_aggregation is {self.layer_perhead_aggregation!r}; only 'max' is available"
            )


class TriAttention:
    """Statistics on a device, and the keep sets of a round.

    ``rounds`` and ``peak_length`` (physical tokens of the longest row, after a step and its round) count since
    ``reset``. RoPE is that of ``live``, the description of a live model; without one it is the statistics file's,
    or the model's at ``config.model_path``. Raises TriAttentionError when the statistics file is missing, damaged
    or of another model.
    """

    def __init__(self, config: TriAttentionConfig, *, live: Architecture | None = None) -> None:
        self.config = config
        payload = statistics.read_payload(config.stats_path)
        self.statistics = loaded = statistics.parse(payload, str(config.stats_path))
        if config.metadata_expectations:
            _require(payload, config.metadata_expectations, loaded.source)
        if live is not None:
            loaded.check_architecture(live)
            omega, self.attention_scaling, self.style = live.omega, live.attention_scaling, live.rope_style
        else:
            omega, self.attention_scaling, self.style = loaded.rope(config.model_path)
        self.device = torch.device(config.device)
        self.omega = omega.to(self.device)
        self.offsets = geometric_offsets(config.offset_max_length, self.device)
        self.q_mean_real, self.q_mean_imag, self.q_abs_mean = (
            x.to(self.device) for x in (loaded.q_mean_real, loaded.q_mean_imag, loaded.q_abs_mean)
        )
        self.freq_weight = torch.full_like(self.q_abs_mean[0], self.attention_scaling)
        self.replaced_forward: Callable[..., Any] | None = None
        self.reset()

    def reset(self) -> None:
        """Count rounds, peak and evictions from zero, before the next sequence."""
        self.rounds = 0
        self.peak_length = 0
        self._evicted = 0

    reset_compression_state = reset

    def selection_scores(
        self, keys: Sequence[torch.Tensor], seen: torch.Tensor | int, region: torch.Tensor
    ) -> torch.Tensor:
        """Scores that a round keeps the best of: ``[B, H, N]`` (per_head) or ``[B, 1, N]`` (union).

        ``keys`` one ``[B, H, N, D]`` per layer; ``seen`` the position of the next token, one per row; ``region``
        bool ``[B, N]`` what can be evicted. per_head is the mean over layers of the maximum over each group; union
        the maximum over everything. One batched call per layer.
        """
        config = self.config
        if len(keys) != len(self.q_abs_mean):
            raise TriAttentionError(
                f"the cache has {len(keys)} layers and {self.statistics.source} has {len(self.q_abs_mean)}; "
                "calibrate this model"
            )
        check_inputs(keys[0], {"q_abs_mean": self.q_abs_mean[0]}, self.omega, self.style)
        cos, sin = phases(seen, self.offsets, self.omega)
        total: torch.Tensor | None = None
        for layer, layer_keys in enumerate(keys):
            weights = fold(
                self.q_mean_real[layer], self.q_mean_imag[layer], self.q_abs_mean[layer], self.freq_weight, cos, sin,
                aggregation=config.score_aggregation, disable_mlr=config.disable_mlr, disable_trig=config.disable_trig,
            )  # fmt: skip
            scores = score(layer_keys, weights, self.style)
            if config.normalize_scores:
                scores = z_score(scores, region)
            scores = group_max(scores, layer_keys.shape[1])
            if not config.per_head_pruning:
                scores = scores.amax(1, keepdim=True)
            if total is None:
                total = scores
            else:
                total = total + scores if config.per_head_pruning else torch.maximum(total, scores)
        return total / len(keys) if config.per_head_pruning else total

    def compute_keep_indices(
        self, pkv_tuple: Sequence[tuple[torch.Tensor, torch.Tensor]], prefix_length: int = 0
    ) -> torch.Tensor | None:
        """Indices to keep of one sequence, ascending: ``[H, K]`` (per_head), ``[K]`` (union), or None within the
        budget.

        ``pkv_tuple`` holds (keys, values) ``[1, H, N, D]`` per layer; the first ``prefix_length`` tokens are the
        prompt. The caller applies the indices; positions are counted as if it had, until
        ``reset_compression_state``.
        """
        keys = [layer[0] for layer in pkv_tuple]
        if not keys or keys[0].shape[0] != 1:
            raise TriAttentionError(
                "compute_keep_indices takes the cache of one sequence; patch the model to compress batches"
            )
        length = keys[0].shape[2]
        budget, protected_count = self._limits(prefix_length)
        evict = evictable(length, budget, protected_count)
        if evict == 0:
            return None
        valid = torch.ones(1, length, dtype=torch.bool, device=keys[0].device)
        protected = self._protected(valid, torch.tensor([prefix_length], device=valid.device))
        scores = self.selection_scores(keys, length + self._evicted, ~protected)
        _require_finite(scores.isfinite().all())
        self._evicted += evict
        kept = keep_indices(keep_mask(scores, valid, protected, [evict]), length - evict)[0]
        return kept if self.config.per_head_pruning else kept[0]

    def _limits(self, prompt: int) -> tuple[int, int]:
        """Budget and number of protected tokens of a row with a prompt of ``prompt`` tokens."""
        config = self.config
        budget = config.budget + (0 if config.count_prompt_tokens else prompt)
        return budget, (0 if config.allow_prefill_compression else prompt) + config.window_size

    def _protected(self, valid: torch.Tensor, prompt: torch.Tensor) -> torch.Tensor:
        """Prompt and window among the real tokens: bool ``[B, P]``."""
        rank = valid.to(torch.int64).cumsum(-1) - 1
        in_window = rank >= valid.sum(-1, keepdim=True) - self.config.window_size
        in_prompt = rank < (0 if self.config.allow_prefill_compression else prompt[:, None])
        return valid & (in_window | in_prompt)

    def after_step(self, cache: Any, state: CacheState) -> None:
        """Compress the rows of ``cache`` that are due after a forward step, and keep the counters."""
        if state.until_due <= 0:
            # the only wait for the device before a round: three small vectors
            lengths, prompts, seen = torch.stack([state.valid.sum(-1), state.prompt, state.seen]).tolist()
            limits = [self._limit(state, n, prompt) for n, prompt in zip(lengths, prompts, strict=True)]
            evict = [
                n - limit if n > limit and self._until_due(n, limit, s) <= 0 else 0
                for n, limit, s in zip(lengths, limits, seen, strict=True)
            ]
            if any(evict):
                self._round(cache, state, lengths, evict)
            kept = [n - gone for n, gone in zip(lengths, evict, strict=True)]
            state.longest = max(kept)
            state.until_due = min(
                self._until_due(n, limit, s, after=True) for n, limit, s in zip(kept, limits, seen, strict=True)
            )
        self.peak_length = max(self.peak_length, state.longest)

    def _limit(self, state: CacheState, length: int, prompt: int) -> int:
        """How many tokens a row holds after a round: its budget, or its protected tokens where those are more."""
        budget, protected = self._limits(prompt)
        if min(length, protected) > budget and not state.warned:
            state.warned = True
            warnings.warn(protection_exceeds(protected, budget), stacklevel=2)
        return max(budget, protected)

    def _until_due(self, length: int, limit: int, seen: int, *, after: bool = False) -> int:
        """Tokens that a row of ``length`` can still take before a round is due; 0 or less: it is due.

        Without the slack trigger a round is due when, since the limit was passed, a multiple of ``divide_length``
        has been seen; ``after`` a look at the row, that is the next multiple.
        """
        interval = self.config.divide_length
        if self.config.use_slack_trigger:
            return limit + interval - length
        first_over = seen - (length - limit) + 1  # tokens seen when the row first exceeded its limit
        earliest = max(first_over, seen + 1) if after else first_over
        return -(-earliest // interval) * interval - seen

    def _round(self, cache: Any, state: CacheState, lengths: list[int], evict: list[int]) -> None:
        keys = [layer.keys for layer in cache.layers]
        protected = self._protected(state.valid, state.prompt)
        scores = self.selection_scores(keys, state.seen, state.valid & ~protected)
        finite = scores.masked_fill(~state.valid[:, None], 0).isfinite().all()
        mask = keep_mask(scores, state.valid, protected, evict)
        kept = [n - gone for n, gone in zip(lengths, evict, strict=True)]
        width = max(kept)
        indices = keep_indices(mask, width).expand(-1, keys[0].shape[1], -1)
        for layer in cache.layers:
            layer.keep(indices)
        column = torch.arange(width, device=state.valid.device)
        state.valid = column >= width - to_device(kept, column.device)[:, None]
        state.ragged = min(kept) < width
        self.rounds += 1
        _require_finite(finite)  # waits for the device, so it comes when the whole round is queued


def _require_finite(finite: torch.Tensor) -> None:
    if not finite:
        raise TriAttentionError(
            "a score is NaN or Inf, so a cached key is NaN or Inf; load the model with dtype float32 or "
            "bfloat16 and try again"
        )


def _require(payload: dict[str, Any], expectations: Mapping[str, Any], source: str) -> None:
    found = {**payload, **payload.get("architecture", {}), **payload.get("metadata", {})}
    for key, value in expectations.items():
        if found.get(key) != value:
            raise TriAttentionError(
                f"{source} has {key} = {found.get(key)!r} and {value!r} was expected; calibrate this model"
            )


def apply_triattention_patch(
    model: Any,
    *,
    stats_path: str | os.PathLike[str],
    model_path: str | os.PathLike[str] | None,
    kv_budget: int,
    offset_max_length: int = 65536,
    score_aggregation: str = "mean",
    pruning_seed: int = 0,
    metadata_expectations: Mapping[str, Any] | None = None,
    normalize_scores: bool = False,
    count_prompt_tokens: bool = False,
    allow_prefill_compression: bool = False,
    divide_length: int = 128,
    use_slack_trigger: bool = False,
    per_head_pruning: bool = False,
    per_layer_perhead_pruning: bool = False,
    layer_perhead_aggregation: str = "max",
    disable_mlr: bool = False,
    disable_trig: bool = False,
    window_size: int = 0,
) -> None:
    """Make ``model`` compress its cache to ``kv_budget`` tokens per row while it generates (plan 4.1).

    Works with ``generate`` and with hand-written loops, sdpa, eager and flash_attention_2, chunked prefill and
    left-padded batches. State lives on the cache: a new cache starts afresh. Positions keep counting, so
    ``position_ids`` may be left out; given ones must agree, which multi-token steps check. ``model.triattention``
    holds the counters; ``remove_triattention_patch`` undoes it. The arguments are those of ``TriAttentionConfig``.
    Raises TriAttentionError for options that cannot be honoured, a statistics file of another model, or a model
    that cannot be served.
    """
    if hasattr(model, "triattention"):
        raise TriAttentionError("the model is patched already; call remove_triattention_patch(model) first")
    config = TriAttentionConfig(
        stats_path, model_path, model.device, model.dtype, kv_budget, offset_max_length, score_aggregation,
        pruning_seed, metadata_expectations, normalize_scores, count_prompt_tokens, allow_prefill_compression,
        divide_length, use_slack_trigger, per_head_pruning, per_layer_perhead_pruning, layer_perhead_aggregation,
        disable_mlr, disable_trig, window_size=window_size,
    )  # fmt: skip
    from triattention.forward import compressing  # needs transformers, which scoring alone does not

    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise TriAttentionError(f"the model is spread over {', '.join(sorted(devices))}; load it on one device")
    live = describe(model)
    method = TriAttention(config, live=live)
    # another library's hook may have put a forward of its own on the instance
    method.replaced_forward = vars(model).get("forward")
    model.triattention = method
    model.forward = compressing(model.forward, model, method, live.num_layers)


def remove_triattention_patch(model: Any) -> None:
    """Undo ``apply_triattention_patch``; a model without the patch is left as it is."""
    if hasattr(model, "triattention"):
        before = model.triattention.replaced_forward
        del model.forward, model.triattention
        if before is not None:
            model.forward = before
