"""A model of transformers that compresses its cache: after a forward step, rows that are due keep their best keys."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..algorithm import AGGREGATIONS, Rule, keep_set, one_of, score
from ..model_statistics import load_model_statistics
from .pruning_utils import build_geometric_offsets


@dataclass
class TriAttentionConfig:
    """The published options; ``window_size`` newest tokens are protected as well.

    Scores are float64 whatever ``dtype`` is. Ties keep the lowest index, so ``pruning_seed`` has nothing to decide.
    A prompt that may be compressed (``allow_prefill_compression``) counts towards the budget. Raises ValueError for an
    option out of range.
    """

    stats_path: Any
    model_path: Any
    device: Any
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
    window_size: int = 0

    def __post_init__(self) -> None:
        one_of("score_aggregation", self.score_aggregation, AGGREGATIONS)
        one_of("layer_perhead_aggregation", self.layer_perhead_aggregation, AGGREGATIONS)
        if self.per_head_pruning and self.per_layer_perhead_pruning:
            raise ValueError("per_head_pruning and per_layer_perhead_pruning are both set; choose one")

    @property
    def mode(self) -> str:
        if self.per_layer_perhead_pruning:
            return "per_layer_per_head"
        return "per_head" if self.per_head_pruning else "union"


class TriAttention:
    """Chooses what a cache keeps. It has no state: what is known of a sequence lies with its cache."""

    def __init__(self, config: TriAttentionConfig, *, model_config: Any = None) -> None:
        self.config = config
        self.rule = Rule(
            config.budget, config.divide_length, config.window_size, not config.allow_prefill_compression,
            config.count_prompt_tokens, config.use_slack_trigger,
        )  # fmt: skip
        self.statistics = load_model_statistics(
            config.stats_path, config.model_path, config.device, config=model_config,
            expected=config.metadata_expectations,
        )  # fmt: skip
        self._warned = False

    def keep(self, layers: Sequence[torch.Tensor], prompt: int, seen: int) -> torch.Tensor:
        """The keys of one row that stay, int64 ``[L, H, K]``: ``layers`` are its keys, each ``[H, N, D]``."""
        length, device = layers[0].shape[1], layers[0].device
        scores = torch.stack([self._scores(keys, number, seen) for number, keys in enumerate(layers)])
        count = self.rule.target(prompt)
        if count > self.config.budget and self.config.count_prompt_tokens and not self._warned:
            self._warned = True
            warnings.warn(f"{count} tokens are protected, more than the budget, and stay", stacklevel=2)
        return keep_set(
            scores, self.rule.evictable(length, prompt, device), count, mode=self.config.mode,
            normalize=self.config.normalize_scores, group=self.config.layer_perhead_aggregation,
        )  # fmt: skip

    def _scores(self, keys: torch.Tensor, layer: int, seen: int) -> torch.Tensor:
        """``[H, G, N]`` of one layer's ``[H, N, D]``, for the next token, whose position is ``seen``."""
        mean, mean_abs, weight, omega = self.statistics.of_layer(layer, keys.device)
        scores = score(
            keys[None], mean, mean_abs, weight, omega,
            build_geometric_offsets(self.config.offset_max_length, keys.device), seen,
            aggregation=self.config.score_aggregation, style=self.statistics.style,
            disable_mlr=self.config.disable_mlr, disable_trig=self.config.disable_trig,
        )  # fmt: skip
        return scores[0].unflatten(0, (keys.shape[0], -1))

    def compute_keep_indices(
        self, pkv_tuple: Sequence[tuple[torch.Tensor, torch.Tensor]], prefix_length: int = 0, *, seen: int | None = None
    ) -> torch.Tensor | None:
        """What one row keeps of its keys and values, a pair for each layer; None where it holds no more than that.

        Int64 ``[K]`` for union, ``[H, K]`` for per_head, else ``[L, H, K]``. ``prefix_length`` tokens are its prompt;
        it has ``seen`` as many tokens as it holds unless told otherwise. Raises ValueError for several rows.
        """
        if pkv_tuple[0][0].shape[0] != 1:
            raise ValueError(f"{pkv_tuple[0][0].shape[0]} rows were given; give one at a time")
        length = pkv_tuple[0][0].shape[2]
        if length <= self.rule.target(prefix_length):
            return None
        kept = self.keep([keys[0] for keys, _ in pkv_tuple], prefix_length, length if seen is None else seen)
        return {"union": kept[0, 0], "per_head": kept[0], "per_layer_per_head": kept}[self.config.mode]

    def reset_compression_state(self) -> None:
        """Published; a generation's state ends with its cache."""


@dataclass
class CacheState:
    """What is known of a cache: which slots hold tokens and no padding, bool ``[B, slots]``, and by row how many tokens
    were ever seen and how many of them were the prompt, int64 ``[B]``; rounds so far, and the most slots after a step.

    The prompt is what came before the first step of a single token.
    """

    held: torch.Tensor
    seen: torch.Tensor
    prompt: torch.Tensor
    in_prompt: bool = True
    rounds: int = 0
    peak: int = 0


def state_of(cache: Any) -> CacheState | None:
    """The state that lies with ``cache``; None for one that no patched model has used."""
    return getattr(cache, "_plain_triattention", None)


def _state_for_step(cache: Any, mask: torch.Tensor | None, rows: int, new: int, device: torch.device) -> CacheState:
    """The state before a step of ``new`` tokens; a fresh one where the cache is empty or was filled without a patch."""
    from transformers.cache_utils import DynamicLayer

    if other := [type(layer).__name__ for layer in cache.layers if type(layer) is not DynamicLayer]:
        raise ValueError(f"the cache has a {other[0]}; only the plain dynamic cache can be compressed")
    slots, state = cache.get_seq_length(), state_of(cache)
    if state is None or not slots:
        held = torch.ones(rows, slots, dtype=torch.bool, device=device)
        if mask is not None and slots:
            held = mask[:, -new - slots : -new].bool()
        state = CacheState(held, held.sum(1), held.sum(1), in_prompt=not slots)
        cache._plain_triattention = state
    if state.held.shape != (rows, slots):
        raise ValueError(
            f"the cache has {rows} x {slots} slots and {tuple(state.held.shape)} after the last step; use a new one"
        )
    return state


def _gathered(x: torch.Tensor, kept: Sequence[torch.Tensor], slots: int) -> torch.Tensor:
    """Of each row of ``x`` ``[B, H, N, D]`` the slots in ``kept`` ``[H, K]``, right-aligned: ``[B, H, slots, D]``."""
    out = x.new_zeros(*x.shape[:2], slots, x.shape[3])
    for row, index in enumerate(kept):
        out[row, :, slots - index.shape[1] :] = x[row].gather(1, index[..., None].expand(-1, -1, x.shape[3]))
    return out


@torch.no_grad()
def _round(method: TriAttention, cache: Any, state: CacheState, seen_before: Sequence[int]) -> None:
    """Compress the rows that are due; the others keep all they have."""
    seen, prompt, lengths = state.seen.tolist(), state.prompt.tolist(), state.held.sum(1).tolist()
    rows = range(len(lengths))
    due = [row for row in rows if method.rule.due(lengths[row], prompt[row], seen_before[row], seen[row])]
    if not due:
        return
    n_layers, heads = len(cache.layers), cache.layers[0].keys.shape[1]
    kept = []
    for row in rows:
        tokens = state.held[row].nonzero()[:, 0]
        chosen = torch.arange(len(tokens), device=tokens.device).expand(n_layers, heads, -1)
        if row in due:
            chosen = method.keep([layer.keys[row][:, tokens] for layer in cache.layers], prompt[row], seen[row])
        kept.append(tokens[chosen])
    slots = max(index.shape[2] for index in kept)
    for number, layer in enumerate(cache.layers):
        of_layer = [index[number] for index in kept]
        layer.keys, layer.values = _gathered(layer.keys, of_layer, slots), _gathered(layer.values, of_layer, slots)
    free = torch.tensor([slots - index.shape[2] for index in kept], device=state.held.device)
    state.held = torch.arange(slots, device=free.device) >= free[:, None]
    state.rounds += 1


def apply_triattention_patch(
    model: Any, *, stats_path: Any, model_path: Any, kv_budget: int, offset_max_length: int = 65536,
    score_aggregation: str = "mean", pruning_seed: int = 0, metadata_expectations: Mapping[str, Any] | None = None,
    normalize_scores: bool = False, count_prompt_tokens: bool = False, allow_prefill_compression: bool = False,
    divide_length: int = 128, use_slack_trigger: bool = False, per_head_pruning: bool = False,
    per_layer_perhead_pruning: bool = False, layer_perhead_aggregation: str = "max", disable_mlr: bool = False,
    disable_trig: bool = False, window_size: int = 0,
) -> None:  # fmt: skip
    """Make ``model`` compress every cache that it fills from now on; a second patch replaces the first.

    Statistics are read from ``stats_path``, omega and the attention scaling from the model's own configuration. Raises
    ValueError for options, statistics or caches that it cannot honour.
    """
    options = {name: value for name, value in locals().items() if name not in ("model", "kv_budget")}
    config = TriAttentionConfig(device=model.device, dtype=model.dtype, budget=kv_budget, **options)
    method = TriAttention(config, model_config=model.config)
    unpatched = getattr(model.forward, "unpatched", model.forward)
    renamed = "cache" in inspect.signature(unpatched).parameters

    @functools.wraps(unpatched)
    def forward(
        input_ids: torch.Tensor | None = None, attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None, past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None, *, cache: Any = None, **rest: Any,
    ) -> Any:  # fmt: skip
        from transformers import DynamicCache

        # since transformers 5.24 it is called cache
        past_key_values = cache if past_key_values is None else past_key_values
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds, **rest}
        uses_cache = rest.get("use_cache")
        if past_key_values is None and (model.config.use_cache if uses_cache is None else uses_cache):
            past_key_values = DynamicCache(config=model.config)
        if past_key_values is None:
            return unpatched(attention_mask=attention_mask, position_ids=position_ids, **given)
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(f"attention_mask has {attention_mask.dim()} dims; give one of rows and tokens")
        rows, new = (input_ids if inputs_embeds is None else inputs_embeds).shape[:2]
        state = _state_for_step(past_key_values, attention_mask, rows, new, model.device)
        arriving = state.held.new_ones(rows, new) if attention_mask is None else attention_mask[:, -new:].bool()
        # positions go on counting, whatever the caller knows of the cache
        position_ids = (state.seen[:, None] + arriving.cumsum(1) - 1).clamp(min=0)
        mask = torch.cat([state.held, arriving], dim=1)
        given["cache" if renamed else "past_key_values"] = past_key_values
        out = unpatched(attention_mask=mask.long(), position_ids=position_ids, **given)
        seen_before = state.seen.tolist()
        state.in_prompt = state.in_prompt and (new > 1 or not any(seen_before))
        state.held, state.seen = mask, state.seen + arriving.sum(1)
        if state.in_prompt:
            state.prompt = state.seen
        _round(method, past_key_values, state, seen_before)
        state.peak = max(state.peak, state.held.shape[1])
        return out

    forward.unpatched = unpatched
    model.forward = forward
