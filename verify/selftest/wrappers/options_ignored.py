"""One option of the patch is accepted, but its default is used."""

from functools import wraps


def plant(names):
    original = names["apply_triattention_patch"]

    @wraps(original)
    def apply(model, **options):
        options.pop("score_aggregation", None)
        return original(model, **options)

    names["apply_triattention_patch"] = apply
