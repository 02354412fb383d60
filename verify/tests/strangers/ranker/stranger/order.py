"""The order of keys, best first."""

import numpy as np
import torch


def order(keys, stats, omega, distances, weights, now):
    """int64 ``[B, H, N]``."""
    if keys.dtype != torch.float32:
        raise TypeError(f"keys must be float32, not {keys.dtype}")
    k = keys.double().numpy()
    half = k.shape[-1] // 2
    k = k[..., :half] + 1j * k[..., half:]
    m = stats["q_mean_complex"].double().numpy()
    m, a, w = m[..., 0] + 1j * m[..., 1], stats["q_abs_mean"].double().numpy(), weights.double().numpy()
    rows, heads, n, _ = k.shape
    group = m.shape[0] // heads
    phases = np.exp(1j * (now + distances.double().numpy())[:, None] * omega.double().numpy()).mean(0)
    k = k.repeat(group, axis=1)
    raw = np.einsum("bhnf,hf->bhn", k.conj(), w * m * phases).real
    raw += np.einsum("bhnf,hf->bhn", abs(k), w * (a - abs(m)))
    z = (raw - raw.mean(-1, keepdims=True)) / np.maximum(raw.std(-1, keepdims=True), 1e-9)
    joined = z.reshape(rows, heads, group, n).max(2)
    return torch.from_numpy(np.argsort(-joined, axis=-1, kind="stable"))
