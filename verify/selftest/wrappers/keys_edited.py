"""The keys are scaled in place for the call, and scaled back, which rounds some of them."""

from functools import wraps


def plant(names):
    original = names["triattention_scoring"]

    @wraps(original)
    def scoring(K_rot, *args, **kwargs):
        K_rot.mul_(0.3)
        scores = original(K_rot, *args, **kwargs) / 0.3
        K_rot.div_(0.3)
        return scores

    names["triattention_scoring"] = scoring
