"""Scores of rotated keys."""

import numpy as np
import torch

OFFSETS = 2.0 ** np.arange(17)


def score(keys, q_mean, q_abs, weights, omega, distances, now):
    """float32 ``[B, H*G, N]``, in the half layout."""
    if distances.shape != (17,) or not np.array_equal(distances.numpy(), OFFSETS):
        raise ValueError("the offsets are fixed: 1, 2, 4, ..., 65536")
    k = keys.double().numpy()
    half = k.shape[-1] // 2
    k = k[..., :half] + 1j * k[..., half:]
    m = q_mean.double().numpy()
    m, a, w = m[..., 0] + 1j * m[..., 1], q_abs.double().numpy(), weights.double().numpy()
    group = m.shape[0] // k.shape[1]
    k = k.repeat(group, axis=1)
    phases = np.exp(1j * (now + OFFSETS)[:, None] * omega.double().numpy()).mean(0)
    trig = np.einsum("bhnf,hf->bhn", k.conj(), w * m * phases).real
    norm = np.einsum("bhnf,hf->bhn", abs(k), w * (a - abs(m)))
    return torch.from_numpy((trig + norm).astype(np.float32))


def scores(keys, stats, omega, distances, weights, now, aggregation="mean", style="half"):
    if aggregation != "mean":
        raise NotImplementedError("only the mean over the offsets")
    if style != "half":
        raise NotImplementedError("only the half layout")
    return score(keys, stats["q_mean_complex"], stats["q_abs_mean"], weights, omega, distances, now)


def compute_scores(key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None):
    if config.disable_mlr or config.disable_trig:
        raise NotImplementedError("no options")
    return scores(
        key_states, head_stats, omega, offsets, freq_scale_sq, round_start, config.score_aggregation, config.rope_style
    )
