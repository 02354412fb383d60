"""The published API as data: what a subject must offer, in which order, with which defaults.

Source: plan 2.3 and the public repository's release 0.2.0. A signature is compared by parameter names, order and
defaults; a subject may append keyword-only parameters with defaults.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Name:
    """A published name, what it is about (``verify.checks.CAPABILITIES``), and, if it is callable, its parameters as
    ``name`` or ``name=default`` (``repr`` of the default).
    """

    module: str
    name: str
    capability: str
    parameters: str | None = None

    @property
    def full(self) -> str:
        return f"{self.module}.{self.name}"


_SCORES = "key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None"
_HELPERS, _KERNELS = "methods.pruning_utils", "vllm.core.kernels.triton_scoring"
_TABLE = "max_seq_len, compress_interval, offsets, omega, device"

#: The function that chooses between the two paths, and the one that patches a live model.
DISPATCH, PATCH = ("vllm.core.scoring", "compute_scores"), ("methods.triattention", "apply_triattention_patch")

NAMES = (
    Name("methods.triattention", "TriAttention", "live_model", "config"),
    Name("methods.triattention", "TriAttentionConfig", "api"),
    Name(
        "methods.triattention",
        "apply_triattention_patch",
        "live_model",
        "model, stats_path, model_path, kv_budget, offset_max_length=65536, score_aggregation='mean', pruning_seed=0, "
        "metadata_expectations=None, normalize_scores=False, count_prompt_tokens=False, "
        "allow_prefill_compression=False, "
        "divide_length=128, use_slack_trigger=False, per_head_pruning=False, per_layer_perhead_pruning=False, "
        "layer_perhead_aggregation='max', disable_mlr=False, disable_trig=False",
    ),
    Name(_HELPERS, "build_rotary", "helpers", "cache_device, model_path, dtype, config=None"),
    Name(
        _HELPERS,
        "score_keys_for_round",
        "helpers",
        "key_indices, round_start, amp, phi, omega, extra, offsets, aggregation, freq_scale_sq, disable_trig=False",
    ),
    Name(
        _HELPERS,
        "compute_frequency_statistics_from_means",
        "helpers",
        "q_mean_complex, q_abs_mean, k_unrot, style='half', disable_mlr=False",
    ),
    Name(_HELPERS, "load_head_frequency_stats", "statistics", "stats_path, device"),
    Name(_HELPERS, "save_head_frequency_stats", "statistics", "output_path, sampled_heads, stats_map, metadata"),
    Name(_HELPERS, "build_geometric_offsets", "helpers", "max_length, device"),
    Name(_HELPERS, "compute_frequency_scaling", "helpers", "rotary, head_dim, dtype, device"),
    Name(
        _KERNELS,
        "triattention_scoring",
        "triton",
        "K_rot, position_indices, q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, omega, offsets, round_start, "
        "aggregation='max', trig_cache=None, trig_values=None, rope_style='interleaved', disable_mlr=False",
    ),
    Name(_KERNELS, "TrigTableCache", "trig_table", _TABLE),
    Name(_KERNELS, "create_trig_cache", "trig_table", f"{_TABLE}, warn_threshold_mb=100.0"),
    Name("vllm.core.scoring", "compute_scores", "api", f"{_SCORES}, trig_cache=None"),
    Name("vllm.core.scoring", "compute_scores_triton", "triton", f"{_SCORES}, trig_cache=None"),
    Name("vllm.core.scoring", "compute_scores_pytorch", "pytorch", _SCORES),
    Name("vllm.core.compressor", "TriAttentionCompressor", "compressor", "config"),
    Name("vllm.core.config", "TriAttentionConfig", "api"),
)

#: The vLLM plugin, as the entry point of the published distribution names it.
PLUGIN = "triattention.vllm.plugin:register_triattention_backend"

#: What the published API does not have, or names but does not require: judged where a subject offers it.
OPTIONAL = (
    Name(_HELPERS, "invert_rope", "helpers", "rotated, cos, sin, scale, style='half'"),
    Name(_HELPERS, "rotate_half", "helpers", "x, style='half'"),
    Name(_HELPERS, "to_complex_pairs", "helpers", "tensor, style='half'"),
    Name("calibration", "calibrate", "calibration", "model, forward_loop"),
    Name("vllm.plugin", "register_triattention_backend", "plugin", ""),
    Name("ranking", "rank_keys", "ranking", "key_states, head_stats, omega, offsets, freq_scale_sq, round_start"),
)


def parameters_of(module: str, name: str) -> tuple[str, ...]:
    """The published parameters of a name, in order; none for one that is not a function."""
    return tuple(parameter for parameter, _ in _parameters(module, name))


def dispatch_alone(offers: Callable[[str, str], bool]) -> bool:
    """Whether ``compute_scores`` is the only scoring function of a subject, which makes it a scorer without Triton.

    ``offers(module, name)`` says whether the subject has a published name.
    """
    paths = (one for one in NAMES if one.capability in ("triton", "pytorch"))
    return offers(*DISPATCH) and not any(offers(one.module, one.name) for one in paths)


def defaults_of(module: str, name: str) -> dict[str, object]:
    """The published defaults of a function's parameters, of those that have one."""
    return {parameter: ast.literal_eval(default) for parameter, default in _parameters(module, name) if default}


def _parameters(module: str, name: str) -> list[tuple[str, str]]:
    """Each published parameter of a name with its default as written; without a default, an empty string."""
    found = next((one for one in (*NAMES, *OPTIONAL) if (one.module, one.name) == (module, name)), None)
    parts = (part.strip().partition("=") for part in ((found and found.parameters) or "").split(","))
    return [(parameter, default) for parameter, _, default in parts if parameter]


class Renamed:
    """A subject's function under the published names of its parameters. ``names`` has the subject's name by published
    name, or None for one that it does not take, which is then left out.
    """

    def __init__(
        self, function: Callable[..., object], parameters: tuple[str, ...], names: Mapping[str, str | None]
    ) -> None:
        self.function, self.parameters, self.names = function, parameters, names

    def __call__(self, *args: object, **given: object) -> object:
        __tracebackhide__ = True
        given = dict(zip(self.parameters, args, strict=False)) | given
        theirs = {self.names.get(name, name): value for name, value in given.items()}
        return self.function(**{name: value for name, value in theirs.items() if name is not None})


#: Defaults of the two configurations, by field; a window that is not set follows the budget and is left out.
CONFIG_DEFAULTS: Mapping[str, Mapping[str, object]] = MappingProxyType(
    {
        "methods.triattention": {
            "offset_max_length": 65536,
            "score_aggregation": "mean",
            "normalize_scores": False,
            "count_prompt_tokens": False,
            "allow_prefill_compression": False,
            "divide_length": 128,
            "use_slack_trigger": False,
            "per_head_pruning": False,
            "per_layer_perhead_pruning": False,
            "layer_perhead_aggregation": "max",
            "disable_mlr": False,
            "disable_trig": False,
        },
        "vllm.core.config": {
            "kv_budget": 2048,
            "divide_length": 128,
            "sparse_round_window": 32,
            "pruning_mode": "per_head",
            "score_aggregation": "mean",
            "offset_max_length": 65536,
            "disable_top_n_high_freq": 0,
            "disable_mlr": False,
            "disable_trig": False,
            "include_prefill_in_budget": True,
            "protect_prefill": True,
            "sparse_normalize_scores": True,
            "triton_block_size": 128,
            "use_triton_scoring": True,
            "use_trig_cache": True,
            "trig_cache_max_seq_len": None,
            "trig_cache_warn_threshold_mb": 100.0,
            "stats_path": None,
            "model_path": None,
            "rope_style": "half",
            "head_dim": None,
            "num_kv_heads": None,
            "num_layers": None,
            "seed": None,
            "enable_debug_logging": False,
        },
    }
)


def signature_differs(name: Name, found: Callable[..., object]) -> str:
    """What is wrong with the signature of ``found``; an empty string if nothing."""
    if name.parameters is None:
        return ""
    parts = filter(None, name.parameters.split(","))
    want = [tuple(part.strip() for part in text.split("=")) for text in parts]
    if isinstance(found, Renamed):
        return _renamed_differs(found)
    have = [p for p in inspect.signature(found).parameters.values() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    for index, (parameter, *default) in enumerate(want):
        if index >= len(have) or have[index].name != parameter:
            other = have[index].name if index < len(have) else "nothing"
            return f"parameter {index + 1} is {other}, published is {parameter}"
        given = have[index].default
        shown = [] if given is inspect.Parameter.empty else [repr(given)]
        if shown != default:
            theirs, ours = (values[0] if values else "none" for values in (shown, default))
            return f"{parameter} has default {theirs}, published is {ours}"
    for extra in have[len(want) :]:
        if extra.kind is not extra.KEYWORD_ONLY or extra.default is extra.empty:
            return f"{extra.name} is not published; an added parameter must be keyword-only with a default"
    return ""


def _renamed_differs(found: Renamed) -> str:
    """The same for a function whose author has said how its parameters are called: it must take them by those names."""
    have = inspect.signature(found.function).parameters.values()
    named = {p.name for p in have if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    taken = [theirs for ours in found.parameters if (theirs := found.names.get(ours, ours)) is not None]
    absent = [theirs for theirs in taken if theirs not in named]
    if absent and not any(p.kind is p.VAR_KEYWORD for p in have):
        return f"it has no parameter {absent[0]}; say in [arguments] of subject.toml what it is called, or false"
    needed = [p.name for p in have if p.name in named and p.default is p.empty and p.name not in taken]
    return f"its parameter {needed[0]} has no default, and no published parameter is mapped to it" if needed else ""
