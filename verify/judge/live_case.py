"""A scoring problem for the oracle from the keys and statistics of a real model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from verify.judge import oracle
from verify.judge.problems import OFFSETS_17


def scoring_problem(
    statistics: Mapping[str, Any],
    layer: int,
    keys: Any,
    t: int,
    options: Mapping[str, Any],
    positions: Any = None,
    head: int | None = None,
) -> oracle.Case:
    """The scoring problem of one layer, from rotated ``keys`` ``[1, H, N, D]`` and the content of a statistics file.

    ``positions`` ``[N]`` are the positions of the keys, 0 to t - 1 by default. With ``head``, the keys are those of
    that KV head alone, and the problem has only its query heads.
    """
    import numpy as np

    here = statistics["architecture"]
    omega, scaling, rotary_dim = here["omega"].double().numpy(), here["attention_scaling"], here["rotary_dim"]
    group = here["num_query_heads"] // here["num_kv_heads"]
    rows = slice(None) if head is None else slice(head * group, (head + 1) * group)
    positions = np.arange(t) if positions is None else np.asarray(positions)
    real, imag, norm, passed = (
        statistics[name][layer, rows].double().numpy()
        for name in ("q_mean_real", "q_mean_imag", "q_abs_mean", "q_pass_mean")
    )
    whole = keys.double().cpu().numpy()
    return oracle.Case(
        k0=oracle.unrotated(whole[..., :rotary_dim], positions, omega, here["rope_style"], scaling),
        positions=positions,
        m=real + 1j * imag,
        a=norm,
        w=np.full(norm.shape, scaling),
        omega=omega,
        offsets=np.array([o for o in OFFSETS_17 if o <= options.get("offset_max_length", OFFSETS_17[-1])]),
        t=t,
        s=scaling,
        aggregation=options.get("score_aggregation", "mean"),
        disable_mlr=options.get("disable_mlr", False),
        disable_trig=options.get("disable_trig", False),
        k_pass=whole[..., rotary_dim:],
        q_pass=passed,
    )
