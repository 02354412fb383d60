from triattention.methods.triattention import TriAttention, TriAttentionConfig, apply_triattention_patch
from triattention.methods.pruning_utils import (
    build_rotary, score_keys_for_round, compute_frequency_statistics_from_means,
    load_head_frequency_stats, build_geometric_offsets, compute_frequency_scaling,
)
from triattention.vllm.core.kernels.triton_scoring import (
    triattention_scoring, TrigTableCache, create_trig_cache,
)
from triattention.vllm.core.scoring import compute_scores
from triattention.vllm.core.compressor import TriAttentionCompressor
from triattention.vllm.core.config import TriAttentionConfig as VLLMTriAttentionConfig
print("All imports: PASSED")
