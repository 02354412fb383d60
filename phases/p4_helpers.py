"""Phase 4, the published helper functions of ``methods.pruning_utils``: scores from unrotated keys, RoPE, offsets."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from verify import Measure, check
from verify.judge import oracle
from verify.judge.guarded import call
from verify.judge.problems import Shape, drawn, make
from verify.judge.tolerance import CLASS_A_UNITS, UNIT, budget_pre_rope, worst
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

_UTILITIES = "methods.pruning_utils"
_ONE_HEAD = {"b": (1,), "h": (1,), "dtype": ("float32",), "strides": ("contiguous",)}


@check(
    "p4.pre_rope", gate="hard",
    cases={
        "mean": {}, "max": {"aggregation": "max"}, "interleaved": {"style": "interleaved"},
        "no_mlr": {"disable_mlr": True}, "no_trig": {"disable_trig": True},
    },
    claim="score_keys_for_round, given compute_frequency_statistics_from_means, agrees with the oracle.",
    reason="It is the paper's formula, from keys before RoPE and their positions; calibration tools rank keys with it.",
    tolerance="Class B, plus 8 x 2^-24 T because amplitudes and phases are passed in float32.",
    remedy="Check the sign of the distance (t + o - p), the conjugate in m conj k, and the effect of disable_mlr.",
)  # fmt: skip
def test_scores_from_unrotated_keys(
    case: dict[str, Any], subject: Subject, device: str, seed: int, measure: Measure
) -> None:
    statistics = subject.attribute(_UTILITIES, "compute_frequency_statistics_from_means")
    score = subject.attribute(_UTILITIES, "score_keys_for_round")
    import torch

    choices = {name: (value,) for name, value in ({"style": "half", "aggregation": "mean"} | case).items()}
    for shape in drawn(seed, 8, **_ONE_HEAD, **choices):
        problem = make(shape, seed, device)
        exact = replace(problem.case, k0=oracle.pairs(problem.keys.cpu().numpy(), shape.style))
        m = torch.complex(problem.q_mean_real, problem.q_mean_imag)[0]
        positions = torch.from_numpy(exact.positions).to(device)

        def scores(problem=problem, shape=shape, m=m, positions=positions) -> Any:
            amplitude, phase, extra = statistics(
                m, problem.q_abs_mean[0], problem.keys[0, 0], style=shape.style, disable_mlr=shape.disable_mlr
            )
            return score(
                positions, shape.t, amplitude, phase, problem.omega, extra, problem.offsets, shape.aggregation,
                problem.freq_weight[0], disable_trig=shape.disable_trig,
            )  # fmt: skip

        found = call(scores, problem.tensors() | {"key_indices": positions, "q_mean_complex": torch.view_as_real(m)})
        assert not found.changed, f"it wrote to {', '.join(found.changed)}"
        error = found.scores.reshape(1, 1, -1) - oracle.scores(exact)
        measure("error", *worst(error, budget_pre_rope(exact)), where=shape.told())


_STYLES = {"half": "half", "interleaved": "interleaved"}
_SCALINGS = {"plain": 1.0, "yarn": 1.2079}


@check(
    "p4.rotary_pairs", gate="hard", cases=_STYLES,
    claim="to_complex_pairs pairs the dims of a head as rope_style says, and rotate_half multiplies every pair by i.",
    reason="All scores are computed from these pairs; the wrong layout gives scores that correlate by half.",
    tolerance="Exact: only signs change.",
    remedy="half pairs (f, f + D/2), interleaved (2f, 2f + 1); i (a + ib) is -b + ia.",
)  # fmt: skip
def test_rotary_pairs(case: str, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    pairs = subject.attribute(_UTILITIES, "to_complex_pairs")
    turn = subject.attribute(_UTILITIES, "rotate_half")
    for shape in drawn(seed, 8):
        keys = make(shape, seed, device).keys
        want = oracle.pairs(keys.double().cpu().numpy(), case)
        both = partial(lambda keys: (pairs(keys, style=case), turn(keys, style=case)), keys)
        got = call(both, {"tensor": keys}).result
        measure("pairs that differ", int((_numbers(got[0]) != want).sum()), 0, where=shape.told())
        turned = oracle.pairs(got[1].double().cpu().numpy(), case)
        measure("turned pairs that differ", int((turned != 1j * want).sum()), 0, where=shape.told())


def _numbers(tensor: Any) -> np.ndarray:
    return tensor.cpu().numpy().astype("complex128")


@check(
    "p4.invert_rope", gate="hard",
    cases={f"{style}-{name}": (style, scaling) for style in _STYLES for name, scaling in _SCALINGS.items()},
    claim="invert_rope returns the key before RoPE, without the attention scaling contained in the cached key.",
    reason="If the scaling is not removed, or removed twice, every key of a YaRN model gets the wrong weight.",
    tolerance="8 x 2^-24 of each pair: two products, a sum, a division, and one rounding of cos and sin.",
    remedy="The key and the rotary module's cos and sin all contain the scaling: divide by its square.",
)  # fmt: skip
def test_invert_rope(case: tuple[str, float], subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import numpy as np
    import torch

    style, scale = case
    invert = subject.attribute(_UTILITIES, "invert_rope")
    for shape in drawn(seed, 8, style=(style,), **_ONE_HEAD):
        problem = make(shape, seed, device)
        angle = problem.case.positions[:, None] * problem.case.omega
        spread = {"half": lambda x: np.concatenate([x, x], -1), "interleaved": lambda x: np.repeat(x, 2, -1)}[style]
        cos, sin = (
            torch.from_numpy(scale * spread(part)).to(device, torch.float32) for part in (np.cos(angle), np.sin(angle))
        )
        got = call(
            partial(invert, problem.keys, cos, sin, scale, style=style),
            {"rotated": problem.keys, "cos": cos, "sin": sin},
        )
        want = problem.case.k0 / scale
        error = abs(oracle.pairs(got.scores, style) - want)
        measure("error", *worst(error, CLASS_A_UNITS * UNIT * abs(want)), where=shape.told())


@check(
    "p4.offsets", gate="hard", cases={f"max{n}": n for n in (1, 2, 5, 65535, 65536, 100_000)},
    claim="build_geometric_offsets returns the powers of two up to and including the maximum.",
    reason="Scores are aggregated over these future distances; one offset too many or too few is a different method.",
    tolerance="Exact: powers of two.",
    remedy="65536 gives 17 offsets, 65535 gives 16.",
)  # fmt: skip
def test_offsets(case: int, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    offsets = subject.attribute(_UTILITIES, "build_geometric_offsets")(case, device)
    want = [float(1 << i) for i in range(case.bit_length())]
    assert offsets.device.type == device, f"the offsets are on {offsets.device}, expected {device}"
    got = offsets.tolist()
    assert len(got) == len(want), f"the offsets up to {case} are {got}, expected {want}"
    measure("offsets that differ", sum(a != b for a, b in zip(got, want, strict=True)), 0, where=f"{got}")


@check(
    "p4.frequency_scaling", gate="hard", cases=_SCALINGS,
    claim="compute_frequency_scaling returns the square of the attention scaling at every frequency.",
    reason="It is the weight of unrotated keys: query and key each contribute one factor of the scaling.",
    tolerance="8 x 2^-24 of the value.",
    remedy="Square the rotary module's attention_scaling; cached keys contain one factor already and need one more.",
)  # fmt: skip
def test_frequency_scaling(case: float, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import numpy as np
    import torch

    class Rotary(torch.nn.Module):
        """A rotary module as in transformers: it returns cos and sin times its attention scaling."""

        attention_scaling = case
        inv_freq: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", 10000.0 ** -(torch.arange(0, 64, 2, device=device) / 64))

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = position_ids[..., None].float() * self.inv_freq
            both = torch.cat([angle, angle], -1)
            return (both.cos() * case).to(x.dtype), (both.sin() * case).to(x.dtype)

    found = subject.attribute(_UTILITIES, "compute_frequency_scaling")(Rotary(), 64, torch.float32, device)
    assert tuple(found.shape) == (32,), f"the scaling has shape {tuple(found.shape)}, expected (32,)"
    error = found.double().cpu().numpy() - case**2
    measure("error", *worst(error, np.full(32, CLASS_A_UNITS * UNIT * case**2)))


@check(
    "p4.statistics_file", gate="hard", cases="round_trip",
    claim="load_head_frequency_stats returns bitwise what save_head_frequency_stats wrote, for every head.",
    reason="If heads are read in another order, each is silently scored with another head's statistics.",
    tolerance="Exact: float32 in, float32 out.",
    remedy="Look up a head by its layer and number, not by its place in the file.",
)  # fmt: skip
def test_statistics_file(case: str, subject: Subject, device: str, seed: int, tmp_path: Path, measure: Measure) -> None:
    import torch

    save = subject.attribute(_UTILITIES, "save_head_frequency_stats")
    load = subject.attribute(_UTILITIES, "load_head_frequency_stats")
    problem = make(Shape(n=1, h=33), seed, device)  # two-digit heads: sorting by name differs from sorting by number
    heads = [(number % 11, number // 11) for number in range(33)]
    means = torch.complex(problem.q_mean_real, problem.q_mean_imag)
    given = {
        head: SimpleNamespace(q_mean_complex=means[row], q_abs_mean=problem.q_abs_mean[row])
        for row, head in enumerate(heads)
    }
    save(tmp_path / "statistics.pt", heads, given, {"head_dim": 128, "note": "kept"})
    metadata, found = load(tmp_path / "statistics.pt", device)
    assert metadata.get("note") == "kept", f"the metadata has {sorted(metadata)}, not the entries that were saved"
    assert set(found) == set(given), f"{len(found)} of {len(given)} heads were read"
    wrong = [
        head
        for head, one in given.items()
        if not torch.equal(found[head].q_mean_complex, one.q_mean_complex)
        or not torch.equal(found[head].q_abs_mean, one.q_abs_mean)
    ]
    measure("heads read with other numbers", len(wrong), 0, where=f"(layer, head) {wrong[0]}" if wrong else "")
