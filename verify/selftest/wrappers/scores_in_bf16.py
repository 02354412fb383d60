"""Scores are rounded to bf16 on their way."""

from functools import wraps


def plant(names):
    import torch

    for name in ("triattention_scoring", "compute_scores_triton"):
        if name in names:
            names[name] = _rounded(names[name], torch)


def _rounded(original, torch):
    @wraps(original)
    def scoring(*args, **kwargs):
        return original(*args, **kwargs).to(torch.bfloat16).to(torch.float32)

    return scoring
