"""Phase 4, the published helper functions of ``methods.pruning_utils``: scores from unrotated keys, RoPE, offsets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from verify import Measure, check
from verify.judge import oracle
from verify.judge.guarded import call
from verify.judge.offers import Offers
from verify.judge.parameters import require
from verify.judge.problems import Shape, drawn, make
from verify.judge.tolerance import CLASS_A_UNITS, UNIT, budget_pre_rope, worst
from verify.subject.subject import Subject

if TYPE_CHECKING:
    import numpy as np

_UTILITIES = "methods.pruning_utils"
_HELPERS: dict[str, Any] = {"capability": "helpers"}
_ONE_HEAD = {"b": (1,), "h": (1,), "dtype": ("float32",), "strides": ("contiguous",)}

#: The options of these functions: a case is about the values that it has, the defaults included.
_OPTIONS = ("style", "aggregation", "disable_mlr", "disable_trig")


def _offers(subject: Subject, device: str) -> Offers:
    """What the author says that the subject takes, without what these functions prescribe; nothing is asked."""
    narrowed = {name: values for name, values in subject.narrowed.items() if name not in _ONE_HEAD}
    return Offers(subject, lambda problem: None, device, narrowed)


@check(
    "p4.pre_rope", gate="hard", **_HELPERS,
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
    offers = _offers(subject, device)
    offers.fit(Shape(**case), _OPTIONS)
    # only what is not the default, so that a function without an option is judged where none is needed
    of_statistics = {name: value for name, value in case.items() if name in ("style", "disable_mlr")}
    of_score = {name: value for name, value in case.items() if name == "disable_trig"}
    statistics = _function(subject, "compute_frequency_statistics_from_means", *of_statistics)
    score = _function(subject, "score_keys_for_round", *of_score)
    import torch

    choices = {name: (value,) for name, value in ({"style": "half", "aggregation": "mean"} | case).items()}
    for shape in (offers.fit(one, _OPTIONS) for one in drawn(seed, 8, **_ONE_HEAD, **choices)):
        problem = make(shape, seed, device)
        exact = replace(problem.case, k0=oracle.pairs(problem.keys.cpu().numpy(), shape.style))
        m = torch.complex(problem.q_mean_real, problem.q_mean_imag)[0]
        positions = torch.from_numpy(exact.positions).to(device)

        def scores(problem=problem, shape=shape, m=m, positions=positions) -> Any:
            amplitude, phase, extra = statistics(m, problem.q_abs_mean[0], problem.keys[0, 0], **of_statistics)
            return score(
                positions, shape.t, amplitude, phase, problem.omega, extra, problem.offsets, shape.aggregation,
                problem.freq_weight[0], **of_score,
            )  # fmt: skip

        found = call(scores, problem.tensors() | {"key_indices": positions, "q_mean_complex": torch.view_as_real(m)})
        assert not found.changed, f"it wrote to {', '.join(found.changed)}"
        _same_shape("the scores", found.result, (shape.n,), shape)
        error = found.scores.reshape(1, 1, -1) - oracle.scores(exact)
        measure("error", *worst(error, budget_pre_rope(exact)), where=shape.told())


def _function(subject: Subject, name: str, *options: str) -> Callable[..., Any]:
    """A published helper function. Raises SubjectLacks if there is none, or it does not take one of the options."""
    found = subject.attribute(_UTILITIES, name)
    require(found, name, *options)
    return found


def _same_shape(what: str, found: Any, wanted: tuple[int, ...], shape: Shape) -> None:
    assert tuple(found.shape) == wanted, (
        f"{what} have shape {list(found.shape)}, expected {list(wanted)}: {shape.told()}"
    )


_STYLES = {"half": "half", "interleaved": "interleaved"}
_SCALINGS = {"plain": 1.0, "yarn": 1.2079}


@check(
    "p4.rotary_pairs", gate="hard", **_HELPERS, cases=_STYLES,
    claim="to_complex_pairs pairs the dims of a head as rope_style says, and rotate_half multiplies every pair by i.",
    reason="All scores are computed from these pairs; the wrong layout gives scores that correlate by half.",
    tolerance="Exact: only signs change.",
    remedy="half pairs (f, f + D/2), interleaved (2f, 2f + 1); i (a + ib) is -b + ia.",
)  # fmt: skip
def test_rotary_pairs(
    case: str, subject: Subject, device: str, seed: int, measure: Measure, choose: Callable[[str], None]
) -> None:
    _offers(subject, device).fit(Shape(style=case), ("style",))
    styled = {} if case == "half" else {"style": case}
    pairs = _function(subject, "to_complex_pairs", *styled)
    turn = _function(subject, "rotate_half", *styled)
    for shape in drawn(seed, 8):
        whole = make(shape, seed, device).keys
        for keys in (whole[0, 0], whole):
            want = oracle.pairs(keys.double().cpu().numpy(), case)
            got = _pairs(partial(pairs, keys, **styled), keys, want, shape)
            if got is None:
                choose("to_complex_pairs takes keys of [N, D] only, as published")
            else:
                measure("pairs that differ", int((_numbers(got) != want).sum()), 0, where=shape.told())
            turned = call(partial(turn, keys, **styled), {"tensor": keys}).result
            _same_shape("the turned keys", turned, tuple(keys.shape), shape)
            half_turned = oracle.pairs(turned.double().cpu().numpy(), case)
            measure("turned pairs that differ", int((half_turned != 1j * want).sum()), 0, where=shape.told())


def _pairs(pairs: Callable[[], Any], keys: Any, want: np.ndarray, shape: Shape) -> Any:
    """The pairs of keys; None if they have more than two dims and the function does not take those."""
    if keys.ndim == 2:
        got = call(pairs, {"tensor": keys}).result
        _same_shape("the pairs", got, want.shape, shape)
        return got
    try:
        got = call(pairs, {"tensor": keys}).result
    except Exception:  # the published function takes two dims, and fails in any way with more
        return None
    return got if tuple(got.shape) == want.shape else None


def _numbers(tensor: Any) -> np.ndarray:
    return tensor.cpu().numpy().astype("complex128")


@check(
    "p4.invert_rope", gate="hard", **_HELPERS,
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
    offers = _offers(subject, device)
    offers.fit(Shape(style=style), ("style",))
    styled = {} if style == "half" else {"style": style}
    invert = _function(subject, "invert_rope", *styled)
    for shape in (offers.fit(one, ("style",)) for one in drawn(seed, 8, style=(style,), **_ONE_HEAD)):
        problem = make(shape, seed, device)
        angle = problem.case.positions[:, None] * problem.case.omega
        spread = {"half": lambda x: np.concatenate([x, x], -1), "interleaved": lambda x: np.repeat(x, 2, -1)}[style]
        cos, sin = (
            torch.from_numpy(scale * spread(part)).to(device, torch.float32) for part in (np.cos(angle), np.sin(angle))
        )
        got = call(
            partial(invert, problem.keys, cos, sin, scale, **styled),
            {"rotated": problem.keys, "cos": cos, "sin": sin},
        )
        _same_shape("the keys", got.result, tuple(problem.keys.shape), shape)
        want = problem.case.k0 / scale
        error = abs(oracle.pairs(got.scores, style) - want)
        measure("error", *worst(error, CLASS_A_UNITS * UNIT * abs(want)), where=shape.told())


@check(
    "p4.offsets", gate="hard", **_HELPERS, cases={f"max{n}": n for n in (1, 2, 5, 65535, 65536, 100_000)},
    claim="build_geometric_offsets returns the powers of two up to and including the maximum.",
    reason="Scores are aggregated over these future distances; one offset too many or too few is a different method.",
    tolerance="Exact: powers of two.",
    remedy="65536 gives 17 offsets, 65535 gives 16.",
)  # fmt: skip
def test_offsets(case: int, subject: Subject, device: str, seed: int, measure: Measure) -> None:
    import torch

    offsets = subject.attribute(_UTILITIES, "build_geometric_offsets")(case, device)
    assert isinstance(offsets, torch.Tensor), f"the offsets are a {type(offsets).__name__}, expected a tensor"
    want = [float(1 << i) for i in range(case.bit_length())]
    assert offsets.device.type == device, f"the offsets are on {offsets.device}, expected {device}"
    got = offsets.tolist()
    assert len(got) == len(want), f"the offsets up to {case} are {got}, expected {want}"
    measure("offsets that differ", sum(a != b for a, b in zip(got, want, strict=True)), 0, where=f"{got}")


@check(
    "p4.frequency_scaling", gate="hard", **_HELPERS, cases=_SCALINGS,
    claim="compute_frequency_scaling returns the square of the attention scaling s at every frequency, or s, which its "
    "callers then square, as in the published code.",
    reason="Unrotated keys have the weight s squared: query and key each contribute one factor of the scaling.",
    tolerance="8 x 2^-24 of the value.",
    remedy="Square the rotary module's attention_scaling; cached keys contain one factor already and need one more.",
)  # fmt: skip
def test_frequency_scaling(
    case: float, subject: Subject, device: str, seed: int, measure: Measure, choose: Callable[[str], None]
) -> None:
    import numpy as np
    import torch

    class Rotary(torch.nn.Module):
        """A rotary module as in transformers: it returns cos and sin times its attention scaling."""

        attention_scaling = case
        inv_freq: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("inv_freq", 1e6 ** -(torch.arange(0, 64, 2, device=device) / 64))

        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            angle = position_ids[..., None].float() * self.inv_freq
            both = torch.cat([angle, angle], -1)
            return (both.cos() * case).to(x.dtype), (both.sin() * case).to(x.dtype)

    found = subject.attribute(_UTILITIES, "compute_frequency_scaling")(Rotary(), 64, torch.float32, device)
    assert tuple(found.shape) == (32,), f"the scaling has shape {tuple(found.shape)}, expected (32,)"
    values = found.double().cpu().numpy()
    square, once = case**2, case
    # decided once, for all frequencies
    want = once if abs(values - once).max() < abs(values - square).max() else square
    at = int(abs(values - want).argmax())
    told = f"frequency {at}: found {values[at]:.6g}, wanted {square:.6g} (or {once:.6g}) at every frequency"
    measure("error", *worst(values - want, np.full(32, CLASS_A_UNITS * UNIT * want)), where=told)
    if square != once:
        choose(f"compute_frequency_scaling returns {'s squared' if want == square else 's, which its callers square'}")
