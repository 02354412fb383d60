"""disable_mlr is accepted, but does nothing."""

from functools import wraps


def plant(names):
    original = names["triattention_scoring"]

    @wraps(original)
    def scoring(*args, **kwargs):
        return original(*args, **{**kwargs, "disable_mlr": False})

    names["triattention_scoring"] = scoring
