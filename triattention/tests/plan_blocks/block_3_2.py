import torch

from triattention.vllm.core.config import TriAttentionConfig
from triattention.vllm.core.kernels.triton_scoring import triattention_scoring
from triattention.vllm.core.scoring import compute_scores_pytorch

batch, heads, seq_len, head_dim = 1, 4, 256, 128
freq_count = head_dim // 2

K_rot = torch.randn(batch, heads, seq_len, head_dim, device="cuda", dtype=torch.bfloat16)
q_mean_real = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_mean_imag = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_abs_mean = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32).abs() + 0.1
freq_scale_sq = torch.ones(heads, freq_count, device="cuda", dtype=torch.float32)
omega = torch.randn(freq_count, device="cuda", dtype=torch.float32) * 0.01
offsets = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device="cuda", dtype=torch.float32)

# Triton path
triton_scores = triattention_scoring(
    K_rot=K_rot,
    position_indices=None,
    q_mean_real=q_mean_real,
    q_mean_imag=q_mean_imag,
    q_abs_mean=q_abs_mean,
    freq_scale_sq=freq_scale_sq,
    omega=omega,
    offsets=offsets,
    round_start=256,
    aggregation="mean",
    rope_style="half",
)

# PyTorch path
config = TriAttentionConfig(
    kv_budget=128,
    pruning_mode="per_head",
    score_aggregation="mean",
    rope_style="half",
    use_triton_scoring=False,
    head_dim=head_dim,
    num_kv_heads=heads,
    disable_mlr=False,
)
q_mean_complex = torch.stack([q_mean_real, q_mean_imag], dim=-1)
head_stats = {"q_mean_complex": q_mean_complex, "q_abs_mean": q_abs_mean}
pytorch_scores = compute_scores_pytorch(
    key_states=K_rot,
    cache_positions=None,
    head_stats=head_stats,
    omega=omega,
    offsets=offsets,
    freq_scale_sq=freq_scale_sq,
    config=config,
    round_start=256,
)

max_diff = (triton_scores - pytorch_scores).abs().max().item()
mean_diff = (triton_scores - pytorch_scores).abs().mean().item()
print(f"Max diff: {max_diff:.6e}, Mean diff: {mean_diff:.6e}")
assert max_diff < 1e-2, f"Triton/PyTorch mismatch too large: {max_diff}"
print("Triton vs PyTorch equivalence: PASSED")
