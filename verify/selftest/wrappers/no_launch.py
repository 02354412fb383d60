"""The Triton entry point returns the scores of the subject's own PyTorch path."""

from functools import wraps
from importlib import import_module


def plant(names):
    import torch

    core, original = names["__name__"].rpartition(".kernels.")[0], names["triattention_scoring"]

    @wraps(original)
    def scoring(**given):
        config = import_module(f"{core}.config").TriAttentionConfig(
            kv_budget=256, score_aggregation=given["aggregation"], rope_style=given["rope_style"],
            disable_mlr=given.get("disable_mlr", False),
        )  # fmt: skip
        mean = torch.stack([given["q_mean_real"], given["q_mean_imag"]], -1)
        return import_module(f"{core}.scoring").compute_scores_pytorch(
            given["K_rot"], None, {"q_mean_complex": mean, "q_abs_mean": given["q_abs_mean"]}, given["omega"],
            given["offsets"], given["freq_scale_sq"], config, given["round_start"],
        )  # fmt: skip

    names["triattention_scoring"] = scoring
