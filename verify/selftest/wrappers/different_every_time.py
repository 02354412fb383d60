"""Every third call is off by one unit in the last place at one key, as after a race or an atomic sum."""

from functools import wraps
from itertools import count


def plant(names):
    import torch

    original, calls = names["compute_scores_triton"], count(1)

    @wraps(original)
    def scoring(*args, **kwargs):
        scores = original(*args, **kwargs)
        if next(calls) % 3 == 0:
            first = scores.view(-1)[:1]
            first.copy_(torch.nextafter(first, torch.full_like(first, torch.inf)))
        return scores

    names["compute_scores_triton"] = scoring
