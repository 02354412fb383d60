import torch

from triattention.vllm.core.kernels.triton_scoring import (
    create_trig_cache,
    triattention_scoring,
)

batch, heads, seq_len, head_dim = 1, 8, 1024, 128
freq_count = head_dim // 2

K_rot = torch.randn(batch, heads, seq_len, head_dim, device="cuda", dtype=torch.bfloat16)
q_mean_real = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_mean_imag = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32)
q_abs_mean = torch.randn(heads, freq_count, device="cuda", dtype=torch.float32).abs()
freq_scale_sq = torch.ones(heads, freq_count, device="cuda", dtype=torch.float32)
omega = torch.randn(freq_count, device="cuda", dtype=torch.float32) * 0.01
offsets = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], device="cuda", dtype=torch.float32)

trig_cache = create_trig_cache(
    max_seq_len=8192,
    compress_interval=128,
    offsets=offsets,
    omega=omega,
    device=torch.device("cuda"),
)
print(f"TrigTableCache created: {trig_cache}")

scores = triattention_scoring(
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
    trig_cache=trig_cache,
)
assert scores.shape == (batch, heads, seq_len)
assert scores.isfinite().all()
print("TrigTableCache kernel path: PASSED")
