"""What each published name and each of its parameters means, for ``verify contract`` and the stubs of ``verify init``.

A section is one of ``verify/subject/templates/contract.md``. Shapes are in its letters.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name is for, what it returns and in which sections that is defined.

    ``parameters`` has those that mean something else here than in ``PARAMETERS``; ``methods`` has, for a class, what a
    call of a method returns, by its signature.
    """

    purpose: str
    returns: str
    sections: tuple[int, ...]
    parameters: Mapping[str, str] = field(default_factory=dict)
    methods: Mapping[str, str] = field(default_factory=dict)


_PER_HEAD_FREQUENCY = "`[H*G, F]` float32"

#: What a parameter means, wherever a name does not say otherwise.
PARAMETERS: Mapping[str, str] = MappingProxyType(
    {
        "K_rot": "the keys, `[B, H, N, D]` float32, bfloat16 or float16, any strides, rotated by RoPE",
        "key_states": "the keys, `[B, H, N, D]` float32, bfloat16 or float16, any strides, rotated by RoPE",
        "value_states": "the values, `[B, H, N, D]`, in the dtype of the keys",
        "position_indices": "None, or integers `[N]`; not needed, because the keys are rotated already",
        "cache_positions": "None, or the positions of the keys, integers `[N]` or `[B, N]`; only their maximum matters",
        "head_stats": "`{'q_mean_complex': [H*G, F, 2] float32, 'q_abs_mean': [H*G, F] float32}`: m and a",
        "q_mean_real": f"the real part of m, {_PER_HEAD_FREQUENCY}",
        "q_mean_imag": f"the imaginary part of m, {_PER_HEAD_FREQUENCY}",
        "q_abs_mean": f"a, {_PER_HEAD_FREQUENCY}",
        "q_mean_complex": "m of one head, `[F]` complex64",
        "freq_scale_sq": f"the weights w, {_PER_HEAD_FREQUENCY}, used as given, whatever the name says",
        "omega": "the frequencies, `[F]` float32, radians per token",
        "offsets": "the distances into the future, `[O]` float32, tokens",
        "round_start": "t, an integer, tokens; None where a default says so: see section 4",
        "config": "the options; those that matter here are in section 4",
        "aggregation": "`'mean'` or `'max'` over the offsets",
        "trig_cache": "None, or a TrigTableCache for the same omega and offsets",
        "trig_values": "None, or `(cos, sin)`, each `[O, F]` float32, of (t + o) omega; preferred to `trig_cache`",
        "rope_style": "`'half'` or `'interleaved'`",
        "style": "`'half'` or `'interleaved'`",
        "disable_mlr": "bool; the norm term weighs a instead of a - |m|",
        "disable_trig": "bool; only the norm term is left",
        "max_seq_len": "the last position that the table may be asked for, tokens",
        "compress_interval": "the distance between two rows of the table, tokens",
        "device": "a torch device, or its name",
        "warn_threshold_mb": "the size of the table, in MiB, above which a UserWarning is raised",
        "cache_device": "a torch device, or its name",
        "dtype": "the torch dtype of the result",
        "model_path": "the directory of a transformers model, whose configuration has the RoPE parameters; or None",
        "stats_path": "a statistics file (section 2)",
        "model": "a transformers model",
        "kv_budget": "tokens kept by a round",
        "divide_length": "tokens between two rounds",
        "offset_max_length": "the largest offset, tokens",
        "score_aggregation": "`'mean'` or `'max'` over the offsets",
        "pruning_seed": "accepted; ties go to the lowest index, not to a random one",
        "metadata_expectations": "None, or entries that the metadata of the statistics file must have",
        "normalize_scores": "bool; z-scores, step 1 of section 5",
        "count_prompt_tokens": "bool; the prompt counts towards the budget",
        "allow_prefill_compression": "bool; tokens of the prompt may be evicted",
        "use_slack_trigger": "bool; a round is due at budget + divide_length, else at multiples of divide_length",
        "per_head_pruning": "bool; mode `per_head` instead of `union`",
        "per_layer_perhead_pruning": "bool; mode `per_layer_per_head` instead of `union`",
        "layer_perhead_aggregation": "`'max'` or `'mean'`: how that mode joins the query heads of a KV head",
        "key_indices": "the positions of the keys, integers `[N]`, tokens",
        "amp": "|m| |k|, `[N, F]` float32",
        "phi": "the phase of m conj(k), `[N, F]` float32, radians",
        "extra": "the coefficient of the norm term times |k|, `[N, F]` float32",
        "k_unrot": "keys of one head before RoPE, `[N, D]` float32",
        "output_path": "the file to write, at once or not at all",
        "sampled_heads": "the (layer, query head) pairs to write",
        "stats_map": "an object with `q_mean_complex` and `q_abs_mean` by (layer, query head)",
        "metadata": "a dict that is stored with them",
        "max_length": "the largest offset allowed, tokens",
        "rotary": "the rotary module of a model; its `attention_scaling` is s",
        "head_dim": "D",
        "rotated": "keys after RoPE and attention scaling, `[..., D]`",
        "cos": "the cosines that the rotary module returned, `[..., D]`, which contain s",
        "sin": "its sines, `[..., D]`, which contain s",
        "scale": "s, the attention scaling",
        "x": "keys or queries, `[..., D]`",
        "tensor": "keys or queries, `[..., D]`",
        "forward_loop": "a function that runs the model over a text when called with it",
    }
)

_SCORES = "the scores, `[B, H*G, N]` (`[B, N]` for `per_layer`), in `config.topk_dtype`"
_PAIR = "`(cos, sin)`, each `[O, F]` float32; ValueError for a position that has no row"
_TABLE = {"get_trig_values(round_start)": _PAIR}
_ATTRIBUTES = (
    "a table with the attributes `compress_interval`, `num_positions`, `num_offsets`, `freq_count`, `cos_table` and "
    "`sin_table` `[positions, O, F]` float32, `memory_mb` (MiB, both tables) and `device`, and a readable repr"
)

#: By module and name.
MEANINGS: Mapping[str, Meaning] = MappingProxyType(
    {
        "vllm.core.scoring.compute_scores_pytorch": Meaning(
            "Scores the keys of one layer without Triton, on any device.", _SCORES, (3, 4)
        ),
        "vllm.core.scoring.compute_scores_triton": Meaning(
            "Scores the keys of one layer with a Triton kernel.", _SCORES, (3, 4)
        ),
        "vllm.core.scoring.compute_scores": Meaning(
            "Scores by the path that `config.use_triton_scoring` selects; it never falls back to the other.",
            _SCORES,
            (3, 4),
        ),
        "vllm.core.kernels.triton_scoring.triattention_scoring": Meaning(
            "Scores the keys of one layer with a Triton kernel.", "the scores, `[B, H*G, N]` float32", (3, 4)
        ),
        "vllm.core.kernels.triton_scoring.TrigTableCache": Meaning(
            "Holds cosines and sines for rounds at multiples of an interval.", _ATTRIBUTES, (7,), methods=_TABLE
        ),
        "vllm.core.kernels.triton_scoring.create_trig_cache": Meaning(
            "Makes a TrigTableCache, and warns if it is large.", "the table", (7,)
        ),
        "ranking.rank_keys": Meaning(
            "Ranks the keys of one layer, for an implementation that has no scores to show.",
            "int64 `[B, H, N]`: for each KV head the indices of its keys, best first",
            (3, 5),
            {"round_start": "t, an integer, tokens"},
        ),
        "vllm.core.compressor.TriAttentionCompressor": Meaning(
            "Compresses the cache of one layer at a time, and counts for each layer what it has seen.",
            "a compressor; ValueError without statistics for every layer and head",
            (5, 6),
            {"config": "a `vllm.core.config.TriAttentionConfig`"},
            {
                "compress(key_states, value_states, cache_positions=None, layer_idx=0)": (
                    "`(keys, values, indices)`: `[B, H, K, D]` twice and the kept indices int64 `[B, H, K]`, "
                    "ascending; K is N where no round is due. The first call of a layer holds its prompt"
                ),
                "reset()": "None; every layer is forgotten",
                "get_state()": "what is known of each layer, for a log",
            },
        ),
        "vllm.core.config.TriAttentionConfig": Meaning(
            "The options of scoring and of the compressor, all with defaults.",
            "a dataclass with `to_dict()`; ValueError for an option that cannot be honoured",
            (4, 5, 6),
            methods={"to_dict()": "the options as plain values"},
        ),
        "methods.triattention.apply_triattention_patch": Meaning(
            "Makes a transformers model compress its cache while it generates.",
            "None; the model is patched in place",
            (5, 6),
        ),
        "methods.triattention.TriAttention": Meaning(
            "The part of the patch that decides what is kept.",
            "an object with the two methods",
            (5, 6),
            {"config": "a `methods.triattention.TriAttentionConfig`"},
            {
                "compute_keep_indices(pkv_tuple, prefix_length=0)": (
                    "the indices to keep, ascending, of a cache given as (keys, values) by layer; None if none is due"
                ),
                "reset_compression_state()": "None; everything seen is forgotten",
            },
        ),
        "methods.triattention.TriAttentionConfig": Meaning(
            "The options of the patch; `stats_path`, `model_path`, `device`, `dtype` and `budget` have no defaults.",
            "a dataclass",
            (5, 6),
        ),
        "methods.pruning_utils.build_rotary": Meaning(
            "Makes the rotary module of a model.",
            "a module that takes `(x, position_ids)` and returns `(cos, sin)`",
            (6,),
            {"config": "the configuration of the model, else it is read from `model_path`"},
        ),
        "methods.pruning_utils.score_keys_for_round": Meaning(
            "Scores the keys of one head from before RoPE and their positions p: "
            "agg over o of sum w amp cos((t + o - p) omega + phi), plus sum w extra.",
            "the scores, `[N]` float32",
            (3, 6),
            {"freq_scale_sq": "w, `[F]` float32; s * s, because the keys contain no s"},
        ),
        "methods.pruning_utils.compute_frequency_statistics_from_means": Meaning(
            "Prepares score_keys_for_round from the statistics and keys of one head.",
            "`(amp, phi, extra)`, each `[N, F]` float32",
            (3, 4),
            {"q_abs_mean": "a of one head, `[F]` float32"},
        ),
        "methods.pruning_utils.load_head_frequency_stats": Meaning(
            "Reads a statistics file.",
            "`(metadata, {(layer, head): an object with q_mean_complex [F] complex64 and q_abs_mean [F] float32})`",
            (2,),
        ),
        "methods.pruning_utils.save_head_frequency_stats": Meaning("Writes a statistics file.", "None", (2,)),
        "methods.pruning_utils.build_geometric_offsets": Meaning(
            "Makes the usual offsets: 1, 2, 4 and so on up to `max_length`, inclusive.", "`[O]` float32", (3,)
        ),
        "methods.pruning_utils.compute_frequency_scaling": Meaning(
            "The weight of keys before RoPE.", "s * s at every frequency, `[head_dim / 2]` in `dtype`", (6,)
        ),
        "methods.pruning_utils.invert_rope": Meaning(
            "Undoes rotation and attention scaling.", "the keys before RoPE, `[..., D]`", (1, 6)
        ),
        "methods.pruning_utils.rotate_half": Meaning(
            "Multiplies every complex number of a head by i.", "`[..., D]`", (1,)
        ),
        "methods.pruning_utils.to_complex_pairs": Meaning(
            "The complex numbers of a head.", "`[..., F]` complex64", (1,)
        ),
        "calibration.calibrate": Meaning(
            "Measures the statistics of a model over a text; the model is left as it was.",
            "an object with `q_mean_real`, `q_mean_imag` and `q_abs_mean`, each `[layers, query heads, F]`",
            (2,),
        ),
        "vllm.plugin.register_triattention_backend": Meaning(
            "The entry point of the vLLM plugin, in the group `vllm.general_plugins`, called in every process.",
            "None; vLLM compresses the caches of its requests, as TRIATTN_RUNTIME_... variables say",
            (5, 6),
        ),
    }
)

#: The options of ``vllm.core.config.TriAttentionConfig`` beyond those in ``PARAMETERS``; the others are for the patch.
OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "sparse_round_window": "accepted",
        "pruning_mode": "`per_head`, `per_layer` or `per_layer_per_head` (section 5)",
        "disable_top_n_high_freq": "how many of the highest frequencies are left out",
        "include_prefill_in_budget": "bool; the prompt counts towards the budget",
        "protect_prefill": "bool; the prompt is never evicted",
        "window_size": "the newest tokens, which are never evicted; unset: `min(128, kv_budget // 2)`",
        "sparse_normalize_scores": "bool; z-scores, step 1 of section 5",
        "topk_dtype": "the dtype of the scores",
        "compute_dtype": "accepted; it must not make scores less exact",
        "position_indices_dtype": "accepted",
        "triton_block_size": "keys that a program of the kernel takes",
        "use_triton_scoring": "which path `compute_scores` takes",
        "use_trig_cache": "whether tables are used",
        "trig_cache_max_seq_len": "`max_seq_len` of the tables; None: as the implementation sees fit",
        "trig_cache_warn_threshold_mb": "`warn_threshold_mb` of the tables",
        "num_kv_heads": "H, or None",
        "num_layers": "the number of layers, or None",
        "seed": "accepted; ties go to the lowest index",
        "enable_debug_logging": "bool",
        "budget": "tokens kept by a round",
    }
)
