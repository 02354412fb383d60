"""The Hugging Face front end (plan 2.3, 4): a patch of ``model.forward`` that compresses the cache as it grows."""

from __future__ import annotations

import inspect
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch

from triattention import statistics
from triattention.architecture import Architecture, describe
from triattention.errors import TriAttentionError
from triattention.scoring import score
from triattention.selection import evictable, group_max, keep_indices, keep_mask, to_device, z_score
from triattention.trig import fold, geometric_offsets, phases
from triattention.vllm.core.compressor import rope_of
from triattention.vllm.core.config import check_budget

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
        self.statistics = loaded = statistics.load(config.stats_path)
        if config.metadata_expectations:
            _require(statistics.read_payload(config.stats_path), config.metadata_expectations, loaded.source)
        if live is not None:
            loaded.check_architecture(live)
            omega, self.attention_scaling, self.style = live.omega, live.attention_scaling, live.rope_style
        else:
            omega, self.attention_scaling = rope_of(loaded, config.model_path)
            self.style = loaded.architecture.rope_style if loaded.architecture else "half"
        self.device = torch.device(config.device)
        self.omega = omega.to(self.device)
        self.offsets = geometric_offsets(config.offset_max_length, self.device)
        self.q_mean_real, self.q_mean_imag, self.q_abs_mean = (
            x.to(self.device) for x in (loaded.q_mean_real, loaded.q_mean_imag, loaded.q_abs_mean)
        )
        self.freq_weight = torch.full_like(self.q_abs_mean[0], self.attention_scaling)
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
        """Scores from which a round keeps: ``[B, H, N]`` (per_head) or ``[B, 1, N]`` (union), float64 where
        normalised.

        ``keys`` one ``[B, H, N, D]`` per layer; ``seen`` the position of the next token, one per row; ``region``
        bool ``[B, N]`` what can be evicted. per_head is the mean over layers of the maximum over each group; union
        the maximum over everything. One batched call per layer.
        """
        config = self.config
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
        if total is None:
            raise TriAttentionError("there are no layers to score; pass the cache of at least one layer")
        return total / len(keys) if config.per_head_pruning else total

    def compute_keep_indices(
        self, pkv_tuple: Sequence[tuple[torch.Tensor, torch.Tensor]], prefix_length: int = 0
    ) -> torch.Tensor | None:
        """Indices to keep of one sequence, ascending: ``[H, K]`` (per_head) or ``[K]`` (union); None within the
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

    def after_step(self, cache: Any, state: Any) -> None:
        """Compress the rows of ``cache`` that are due after a forward step, and keep the counters."""
        if not self._may_be_due(state):
            self.peak_length = max(self.peak_length, state.longest)
            return
        # the only wait for the device: three small vectors, before the round
        lengths, prompts, seen = torch.stack([state.valid.sum(-1), state.prompt, state.seen]).tolist()
        evict = [self._due(state, *row) for row in zip(lengths, prompts, seen, strict=True)]
        if any(evict):
            self._round(cache, state, lengths, evict)
        state.longest = max(n - gone for n, gone in zip(lengths, evict, strict=True))
        self.peak_length = max(self.peak_length, state.longest)

    def _may_be_due(self, state: Any) -> bool:
        """Whether any row can be due, from host-side bounds alone."""
        slack = self.config.divide_length if self.config.use_slack_trigger else 1
        return state.longest >= self.config.budget + slack

    def _due(self, state: Any, length: int, prompt: int, seen: int) -> int:
        """How many tokens of a row go now; 0 when it is not due."""
        config = self.config
        budget, protected = self._limits(prompt)
        if protected > budget and not state.warned:
            state.warned = True
            warnings.warn(
                f"{protected} protected tokens (prompt and window) exceed the budget of {budget}; they "
                "are kept and the rest "
                "is compressed, so give a larger budget or allow_prefill_compression=True to go below them",
                stacklevel=2,
            )
        limit = max(budget, protected)
        if config.use_slack_trigger:
            due = length >= limit + config.divide_length
        else:
            over = length - limit  # a multiple of the interval has been passed since the limit was
            due = over > 0 and seen // config.divide_length > (seen - over) // config.divide_length
        return evictable(length, budget, protected) if due else 0

    def _round(self, cache: Any, state: Any, lengths: list[int], evict: list[int]) -> None:
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
    ``position_ids`` may be left out; given ones must agree. ``model.triattention`` holds the counters;
    ``remove_triattention_patch`` undoes it. The arguments are those of ``TriAttentionConfig``. Raises
    TriAttentionError for options that cannot be honoured, a statistics file of another model, or a model that
    cannot be served.
    """
    if hasattr(model, "triattention"):
        raise TriAttentionError("the model is patched already; call remove_triattention_patch(model) first")
    config = TriAttentionConfig(
        stats_path, model_path, model.device, model.dtype, kv_budget, offset_max_length, score_aggregation,
        pruning_seed, metadata_expectations, normalize_scores, count_prompt_tokens, allow_prefill_compression,
        divide_length, use_slack_trigger, per_head_pruning, per_layer_perhead_pruning, layer_perhead_aggregation,
        disable_mlr, disable_trig, window_size=window_size,
    )  # fmt: skip
    devices = {str(parameter.device) for parameter in model.parameters()}
    if len(devices) > 1:
        raise TriAttentionError(f"the model is spread over {', '.join(sorted(devices))}; load it on one device")
    live = describe(model)
    model.triattention = method = TriAttention(config, live=live)
    model.forward = _compressing(model.forward, model, method, live.num_layers)


def remove_triattention_patch(model: Any) -> None:
    """Undo ``apply_triattention_patch``; a model without the patch is left as it is."""
    if hasattr(model, "triattention"):
        del model.forward, model.triattention


def _compressing(forward: Callable[..., Any], model: Any, method: TriAttention, n_layers: int) -> Callable[..., Any]:
    """``forward`` with the cache compressed after each step."""
    from transformers import DynamicCache

    from triattention.cache import CacheState, adopt

    signature = inspect.signature(forward)

    @wraps(forward)
    def compressed_forward(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind_partial(*args, **kwargs)
        extra = call.arguments.pop("kwargs", {})
        given = {**call.arguments, **extra}
        use_cache = given.get("use_cache")
        if use_cache is False or (use_cache is None and not model.config.use_cache):
            return forward(*args, **kwargs)
        inputs = given["input_ids"] if given.get("input_ids") is not None else given["inputs_embeds"]
        cache = given.get("past_key_values")
        cache = DynamicCache(config=model.config) if cache is None else cache
        adopt(cache, n_layers)
        state = _state_of(cache, inputs, CacheState)
        if state.valid.shape[1] == 0:
            method.reset()
        new, ragged = _new_columns(given.get("attention_mask"), inputs, cache.get_seq_length())
        positions = state.append(new, ragged)
        _require_positions(given.get("position_ids"), positions, new)
        evicted = cache.layers[0].evicted
        mask = torch.nn.functional.pad(state.valid, (evicted, 0)) if state.ragged else None
        given |= {"past_key_values": cache, "attention_mask": mask, "position_ids": positions, "use_cache": True}
        output = forward(**given)
        method.after_step(cache, state)
        return output

    return compressed_forward


def _state_of(cache: Any, inputs: torch.Tensor, state_type: type) -> Any:
    """The state kept on ``cache``; made when the cache is empty, cut when the cache was cropped, refused when it is
    foreign.
    """
    held = 0 if cache.layers[0].keys is None or cache.layers[0].keys.numel() == 0 else cache.layers[0].keys.shape[-2]
    state = getattr(cache, "triattention", None)
    if held == 0:
        state = cache.triattention = state_type.empty(inputs.shape[0], inputs.device)
    elif state is None:
        raise TriAttentionError(
            f"the cache holds {held} tokens that were cached without the patch; start with an empty cache"
        )
    elif held < state.valid.shape[1]:
        state.crop_to(held)
    elif held > state.valid.shape[1]:
        raise TriAttentionError(
            f"the cache holds {held} columns and {state.valid.shape[1]} were fed through the patched "
            "model; start with an empty cache"
        )
    if inputs.shape[0] != state.valid.shape[0]:
        raise TriAttentionError(
            f"the inputs have {inputs.shape[0]} rows and the cache {state.valid.shape[0]}; feed one row per row"
        )
    return state


def _new_columns(attention_mask: torch.Tensor | None, inputs: torch.Tensor, cached: int) -> tuple[torch.Tensor, bool]:
    """Which of the new columns are real, bool ``[B, q]``, and whether any may be a pad.

    The mask covers everything ever fed, as in every Hugging Face model; only its last q columns are news.
    """
    batch, q_len = inputs.shape[:2]
    if attention_mask is None:
        return torch.ones(batch, q_len, dtype=torch.bool, device=inputs.device), False
    if attention_mask.ndim != 2 or attention_mask.shape[1] != cached + q_len:
        raise TriAttentionError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected [batch, {cached + q_len}], "
            "one column per token "
            "ever fed (cache.get_seq_length() plus the new ones)"
        )
    new = attention_mask[:, -q_len:].to(inputs.device, torch.bool)
    # a prefill may wait for the device to learn that nothing is padded; a decode step must not, so it assumes the worst
    return new, batch > 1 if q_len == 1 else not bool(new.all())


def _require_positions(given: torch.Tensor | None, positions: torch.Tensor, new: torch.Tensor) -> None:
    """Refuse position ids that disagree with the tokens counted here; looked at in multi-token steps only."""
    if given is None or positions.shape[1] == 1:
        return
    differs = (given.to(positions.device) != positions) & new
    if bool(differs.any()):
        row, column = differs.nonzero()[0].tolist()
        wrong = int(given.expand_as(positions)[row, column])
        raise TriAttentionError(
            f"position_ids[{row}, {column}] is {wrong} and the tokens seen so far make it "
            f"{int(positions[row, column])}; "
            "leave position_ids out"
        )
