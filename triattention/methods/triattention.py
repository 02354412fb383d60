"""The Hugging Face front end (plan 2.3, 4): a patch of ``model.forward`` that compresses the growing cache."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from triattention import statistics
from triattention.architecture import Architecture, inside
from triattention.compression import Budget, Compression, View, require_finite
from triattention.errors import TriAttentionError
from triattention.scoring import check_inputs, score
from triattention.selection import check_mode, evictable, group_max, group_mean, keep_indices, keep_mask, z_score
from triattention.trig import fold, geometric_offsets, phases

__all__ = ["TriAttention", "TriAttentionConfig", "apply_triattention_patch", "remove_triattention_patch"]


@dataclass
class TriAttentionConfig:
    """Options of the Hugging Face path; names, order and defaults as published, plus two of ours.

    ``window_size`` and ``pruning_mode`` are not published. ``budget``, ``divide_length``, ``window_size``,
    ``count_prompt_tokens``, ``allow_prefill_compression`` and ``use_slack_trigger`` are those of
    ``compression.Budget``. ``pruning_mode`` is one of ``selection.MODES``; without it, ``per_head_pruning`` or
    ``per_layer_perhead_pruning`` select the mode as published, else it is ``union``. In mode ``per_layer_per_head``,
    ``layer_perhead_aggregation`` combines the query heads of a group by ``max`` or ``mean``. ``pruning_seed`` has no
    effect: ties go to the lowest index. The statistics file must contain the entries ``metadata_expectations``. Raises
    TriAttentionError (a ValueError) for invalid options.
    """

    stats_path: str | os.PathLike[str] | None
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
    pruning_mode: str | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        self.limits  # noqa: B018 - raises for contradictory values
        flagged = [
            mode for mode, on in (
                ("per_head", self.per_head_pruning), ("per_layer_per_head", self.per_layer_perhead_pruning)
            ) if on
        ]  # fmt: skip
        if len(flagged) > 1:
            raise TriAttentionError("per_head_pruning and per_layer_perhead_pruning exclude each other; set one")
        if self.pruning_mode is None:
            self.pruning_mode = flagged[0] if flagged else "union"
        self.pruning_mode = check_mode(self.pruning_mode)
        if flagged and flagged != [self.pruning_mode]:
            raise TriAttentionError(
                f"pruning_mode is {self.pruning_mode!r}, but the flag of {flagged[0]} is set; leave one out"
            )
        for name, known in (("score_aggregation", ("mean", "max")), ("layer_perhead_aggregation", ("max", "mean"))):
            if getattr(self, name) not in known:
                raise TriAttentionError(f"{name} is {getattr(self, name)!r}; use 'mean' or 'max'")
        if self.layer_perhead_aggregation == "mean" and self.pruning_mode != "per_layer_per_head":
            raise TriAttentionError(
                f"layer_perhead_aggregation 'mean' is for per_layer_per_head only; the mode is {self.pruning_mode}: "
                "leave it out"
            )

    @property
    def limits(self) -> Budget:
        return Budget(
            kv_budget=self.budget,
            divide_length=self.divide_length,
            window_size=self.window_size,
            count_prompt_tokens=self.count_prompt_tokens,
            allow_prefill_compression=self.allow_prefill_compression,
            use_slack_trigger=self.use_slack_trigger,
        )


#: The tensors of ``TriAttention``, which are on the device of the keys.
_TENSORS = ("omega", "offsets", "q_mean_real", "q_mean_imag", "q_abs_mean", "q_pass_mean", "freq_weight")


class TriAttention(Compression):
    """Trigonometric scores from statistics (paper, score of a key), and the keep sets of a round.

    The RoPE parameters are those of ``live``, the description of a live model; without it, those in the statistics
    file or of the model at ``config.model_path``. ``calibrated`` are statistics in memory, instead of the file. Raises
    TriAttentionError if the statistics file is missing, damaged or of another model.
    """

    def __init__(
        self,
        config: TriAttentionConfig,
        *,
        live: Architecture | None = None,
        calibrated: statistics.Statistics | None = None,
    ) -> None:
        super().__init__(config.limits, config.pruning_mode)
        self.config = config
        self.statistics = loaded = _read(config) if calibrated is None else calibrated
        if live is not None:
            loaded.check_architecture(live)
            omega, self.attention_scaling, self.style = live.omega, live.attention_scaling, live.rope_style
        else:
            omega, self.attention_scaling, self.style = loaded.rope(config.model_path)
        self.omega = omega
        self.offsets = geometric_offsets(config.offset_max_length)
        self.q_mean_real, self.q_mean_imag = loaded.q_mean_real, loaded.q_mean_imag
        self.q_abs_mean, self.q_pass_mean = loaded.q_abs_mean, loaded.q_pass_mean
        # a cached key already contains one factor of s, so the weight is s, not s^2
        self.freq_weight = torch.full_like(self.q_abs_mean[0], self.attention_scaling)
        self._move(torch.device(config.device))

    def _move(self, device: torch.device) -> None:
        self.device = device
        for name in _TENSORS:
            setattr(self, name, getattr(self, name).to(device))

    def _follow(self, keys: Sequence[torch.Tensor]) -> None:
        """Move the statistics to the keys, after the model was moved. Raises TriAttentionError for several devices."""
        devices = {one.device for one in keys}
        if len(devices) > 1:
            raise TriAttentionError(
                f"the cache is spread over {', '.join(sorted(map(str, devices)))}; keep the model on one device"
            )
        if devices != {self.device}:
            self._move(*devices)

    def score_only(self, query_heads: slice) -> None:
        """Use only these query heads, those of one tensor-parallel rank."""
        for name in ("q_mean_real", "q_mean_imag", "q_abs_mean", "q_pass_mean"):
            setattr(self, name, getattr(self, name)[:, query_heads])
        self.freq_weight = self.freq_weight[query_heads]

    def reset(self) -> None:
        super().reset()
        self._evicted = 0

    reset_compression_state = reset

    def scores(self, view: View) -> Iterator[torch.Tensor]:
        """Per layer, the scores of each group of query heads combined, after a z-score if ``normalize_scores``."""
        config = self.config
        if len(view.keys) != len(self.q_abs_mean):
            raise TriAttentionError(
                f"the cache has {len(view.keys)} layers, but {self.statistics.source} has {len(self.q_abs_mean)}; "
                "calibrate this model"
            )
        self._follow(view.keys)
        check_inputs(view.keys[0], {"q_abs_mean": self.q_abs_mean[0]}, self.omega, self.style, self.q_pass_mean[0])
        join = group_mean if config.layer_perhead_aggregation == "mean" else group_max
        cos, sin = phases(view.seen, self.offsets, self.omega)
        use_triton = _launches(self.device)
        for layer, keys in enumerate(view.keys):
            weights = fold(
                self.q_mean_real[layer], self.q_mean_imag[layer], self.q_abs_mean[layer], self.freq_weight, cos, sin,
                aggregation=config.score_aggregation, disable_mlr=config.disable_mlr, disable_trig=config.disable_trig,
                q_pass=self.q_pass_mean[layer],
            )  # fmt: skip
            scores = score(keys, weights, self.style, use_triton=use_triton)
            if config.normalize_scores:
                scores = z_score(scores, view.region)
            yield join(scores, keys.shape[1])

    def compute_keep_indices(
        self, pkv_tuple: Sequence[tuple[torch.Tensor, torch.Tensor]], prefix_length: int = 0
    ) -> torch.Tensor | None:
        """Ascending indices of the tokens to keep of one sequence, or None within the budget.

        ``[H, K]`` (per_head), ``[K]`` (union), ``[L, K]`` (per_layer), ``[L, H, K]`` (per_layer_per_head).
        ``pkv_tuple`` holds (keys, values) ``[1, H, N, D]`` per layer; the first ``prefix_length`` tokens are the
        prompt. The caller must apply the indices: until ``reset_compression_state``, later positions assume that it
        did.
        """
        keys, values = [layer[0] for layer in pkv_tuple], [layer[1] for layer in pkv_tuple]
        if not keys or keys[0].shape[0] != 1:
            raise TriAttentionError(
                "compute_keep_indices takes the cache of one sequence; patch the model to compress batches"
            )
        length = keys[0].shape[2]
        evict = evictable(length, *self.budget.limits(prefix_length))
        if evict == 0:
            return None
        valid = torch.ones(1, length, dtype=torch.bool, device=keys[0].device)
        protected = self.budget.protected(valid, torch.tensor([prefix_length], device=valid.device))
        scores = self.selection_scores(View(keys, values, length + self._evicted, valid, ~protected))
        require_finite(scores.isfinite().all())
        self._evicted += evict
        kept = keep_indices(keep_mask(scores, valid, protected, [evict]), length - evict)[0]
        if self.mode == "per_layer_per_head":
            return kept.view(len(keys), -1, kept.shape[-1])
        return kept[0] if self.mode == "union" else kept


@cache
def _launches(device: torch.device) -> bool:
    """Whether the kernel takes keys on a device: on a GPU, or where TRITON_INTERPRET=1 says that they may be elsewhere
    and Triton has an active driver for that device, which then compiles the kernel instead of interpreting it.
    """
    if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") != "1":
        return device.type == "cuda"
    try:
        from triton.runtime.driver import driver

        return driver.active.get_active_torch_device().type == device.type
    except (ImportError, RuntimeError):  # no Triton, or no driver
        return False


def _read(config: TriAttentionConfig) -> statistics.Statistics:
    if config.stats_path is None:
        raise TriAttentionError("stats_path is not set; give a statistics file, or statistics in memory")
    payload = statistics.read_payload(config.stats_path)
    loaded = statistics.parse(payload, str(config.stats_path))
    if config.metadata_expectations:
        _require(payload, config.metadata_expectations, loaded.source)
    return loaded


def _require(payload: dict[str, Any], expectations: Mapping[str, Any], source: str) -> None:
    found = {**payload, **payload.get("architecture", {}), **payload.get("metadata", {})}
    for key, value in expectations.items():
        if found.get(key) != value:
            raise TriAttentionError(
                f"{source} has {key} = {found.get(key)!r}, but {value!r} was expected; calibrate this model"
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
    pruning_mode: str | None = None,
) -> None:
    """Make ``model`` compress its cache to ``kv_budget`` tokens per row while it generates (plan 4.1).

    Works with ``generate`` and with hand-written loops, sdpa, eager and flash_attention_2, chunked prefill and
    left-padded batches; docs/reference.md lists which ways to call the model are served and which are refused. The
    state is stored on the cache, so a new cache starts from zero. Positions count all tokens seen, so ``position_ids``
    may be left out; given ones must agree, which the first and multi-token steps check. ``model.triattention`` has the
    counters; ``remove_triattention_patch`` undoes the patch. The arguments are those of ``TriAttentionConfig``. Raises
    TriAttentionError for invalid options, a statistics file of another model, or an unsupported model.
    """
    from triattention.patching import patch  # needs transformers, which scoring alone does not

    model = inside(model)
    config = TriAttentionConfig(
        stats_path=stats_path,
        model_path=model_path,
        device=model.device,
        dtype=model.dtype,
        budget=kv_budget,
        offset_max_length=offset_max_length,
        score_aggregation=score_aggregation,
        pruning_seed=pruning_seed,
        metadata_expectations=metadata_expectations,
        normalize_scores=normalize_scores,
        count_prompt_tokens=count_prompt_tokens,
        allow_prefill_compression=allow_prefill_compression,
        divide_length=divide_length,
        use_slack_trigger=use_slack_trigger,
        per_head_pruning=per_head_pruning,
        per_layer_perhead_pruning=per_layer_perhead_pruning,
        layer_perhead_aggregation=layer_perhead_aggregation,
        disable_mlr=disable_mlr,
        disable_trig=disable_trig,
        window_size=window_size,
        pruning_mode=pruning_mode,
    )
    patch(model, lambda live: TriAttention(config, live=live))


def remove_triattention_patch(model: Any) -> None:
    """Undo ``apply_triattention_patch``; does nothing to an unpatched model."""
    from triattention.patching import unpatch

    unpatch(model)
