import torch

from triattention.vllm.core.kernels.triton_scoring import triattention_scoring

batch, heads, seq_len, head_dim = 1, 8, 512, 128
freq_count = head_dim // 2

K_rot = torch.randn(batch, heads, seq_len, head_dim, device="cuda", dtype=torch.bfloat16)
q_mean_real = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_mean_imag = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_abs_mean = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32).abs()
freq_scale_sq = torch.ones(heads, freq_count, device="cuda", dtype=torch.float32)
omega = torch.randn(freq_count, device="cuda", dtype=torch.float32)
offsets = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device="cuda", dtype=torch.float32)

scores = triattention_scoring(
    K_rot=K_rot,
    position_indices=None,
    q_mean_real=q_mean_real,
    q_mean_imag=q_mean_imag,
    q_abs_mean=q_abs_mean,
    freq_scale_sq=freq_scale_sq,
    omega=omega,
    offsets=offsets,
    round_start=512,
    aggregation="mean",
    rope_style="half",
)
assert scores.shape == (batch, heads, seq_len), f"Bad shape: {scores.shape}"
assert scores.isfinite().all(), "Non-finite scores detected"
print(f"Triton scoring kernel: PASSED (shape={tuple(scores.shape)}, range=[{scores.min():.4f}, {scores.max():.4f}])")
