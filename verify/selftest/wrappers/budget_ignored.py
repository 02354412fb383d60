"""The patch accepts any budget, but compresses at the default one."""

from functools import wraps


def plant(names):
    original = names["apply_triattention_patch"]

    @wraps(original)
    def apply(model, *, kv_budget, **options):
        return original(model, kv_budget=2048, **options)

    names["apply_triattention_patch"] = apply
