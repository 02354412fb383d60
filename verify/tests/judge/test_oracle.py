"""The arbiter itself: identities that the definition has, and budgets that reject what they should."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from verify.judge import oracle, tolerance
from verify.judge.problems import Shape, make, restride, strides_of


@pytest.fixture
def case() -> oracle.Case:
    return make(Shape(n=17, d=16, h=2, g=2, t=5000), 3, "cpu").case


@pytest.mark.parametrize("aggregation", ["mean", "max"])
def test_moving_t_and_every_position_changes_nothing(case: oracle.Case, aggregation: str) -> None:
    case = replace(case, aggregation=aggregation)
    np.testing.assert_allclose(oracle.scores(case.shifted(12345)), oracle.scores(case), rtol=0, atol=1e-9)
    moved = replace(case, t=case.t + 1)
    assert np.abs(oracle.scores(moved) - oracle.scores(case)).max() > 1e-3


def test_one_offset_makes_mean_and_max_agree_and_max_is_never_below_mean(case: oracle.Case) -> None:
    one = replace(case, offsets=np.array([4.0]))
    np.testing.assert_allclose(oracle.scores(one), oracle.scores(replace(one, aggregation="max")))
    assert (oracle.scores(replace(case, aggregation="max")) >= oracle.scores(case) - 1e-12).all()


def test_linear_in_the_size_of_the_key_and_zero_for_zero_statistics(case: oracle.Case) -> None:
    np.testing.assert_allclose(oracle.scores(replace(case, k0=3 * case.k0)), 3 * oracle.scores(case))
    zero = replace(case, m=0 * case.m, a=0 * case.a)
    assert not oracle.scores(zero).any()
    assert not oracle.term_sum(zero).any()


def test_scaling_multiplies_the_cached_key_once(case: oracle.Case) -> None:
    np.testing.assert_allclose(oracle.scores(replace(case, s=1.3)), 1.3 * oracle.scores(case))


def test_the_options_change_the_second_coefficient_and_drop_the_first_term(case: oracle.Case) -> None:
    k_abs = np.repeat(np.abs(case.k0), 2, axis=1)
    second = np.einsum("hf,bhnf->bhn", case.w * (case.a - np.abs(case.m)), k_abs)
    np.testing.assert_allclose(oracle.scores(replace(case, disable_trig=True)), second)
    no_mlr = oracle.scores(replace(case, disable_mlr=True)) - oracle.scores(case)
    np.testing.assert_allclose(no_mlr, np.einsum("hf,bhnf->bhn", case.w * np.abs(case.m), k_abs))


def test_unrotated_dims_add_their_product_without_the_scaling(case: oracle.Case) -> None:
    rng = np.random.default_rng(0)
    q_pass, k_pass = rng.normal(size=(4, 6)), rng.normal(size=(case.k0.shape[0], 2, 17, 6))
    partial = replace(case, s=1.3, q_pass=q_pass, k_pass=k_pass)
    content = np.stack([k_pass[:, h // 2] @ q_pass[h] for h in range(4)], axis=1)
    np.testing.assert_allclose(oracle.scores(partial), oracle.scores(replace(case, s=1.3)) + content)
    size = np.stack([np.abs(k_pass[:, h // 2]) @ np.abs(q_pass[h]) for h in range(4)], axis=1)
    np.testing.assert_allclose(oracle.term_sum(partial), oracle.term_sum(replace(case, s=1.3)) + size)


def test_a_query_head_reads_its_own_kv_head(case: oracle.Case) -> None:
    other = case.k0.copy()
    other[:, 0] *= 2
    changed = np.abs(oracle.scores(replace(case, k0=other)) - oracle.scores(case)).max((0, 2)) > 0
    assert changed.tolist() == [True, True, False, False]


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_unrotated_undoes_the_rotation(style: str) -> None:
    rng = np.random.default_rng(0)
    positions, omega = np.array([0, 5, 900000]), rng.random(4)
    k0 = rng.normal(size=(3, 4)) + 1j * rng.normal(size=(3, 4))
    turned = 1.5 * k0 * np.exp(1j * positions[:, None] * omega)
    real = np.concatenate([turned.real, turned.imag], -1)
    if style == "interleaved":
        real = np.stack([turned.real, turned.imag], -1).reshape(3, 8)
    np.testing.assert_allclose(oracle.unrotated(real, positions, omega, style, 1.5), k0)


def test_exact_scores_are_class_a_and_slightly_wrong_ones_are_not(case: oracle.Case) -> None:
    exact = oracle.scores(case)
    assert tolerance.accuracy(exact, case).units == 0
    assert tolerance.accuracy(exact.astype(np.float32), case).accuracy_class == "A"
    unit = tolerance.UNIT * oracle.term_sum(case)
    assert tolerance.accuracy(exact + 7 * unit, case).accuracy_class == "A"
    assert tolerance.accuracy(exact + 9 * unit, case).accuracy_class == "B"
    assert tolerance.accuracy(exact + 1.01 * tolerance.budget_b(case), case).accuracy_class == "C"


def test_a_nan_score_is_class_c_and_named(case: oracle.Case) -> None:
    scores = oracle.scores(case)
    scores[0, 3, 11] = np.nan
    found = tolerance.accuracy(scores, case)
    assert found.accuracy_class == "C"
    assert not found.class_b.ratio <= 1
    assert found.where.startswith("row 0, query head 3, key 11")


def test_nothing_is_allowed_where_there_are_no_terms(case: oracle.Case) -> None:
    zero = replace(case, m=0 * case.m, a=0 * case.a)
    assert tolerance.accuracy(np.zeros_like(oracle.scores(zero)), zero).accuracy_class == "A"
    assert tolerance.accuracy(np.full_like(oracle.scores(zero), 1e-30), zero).accuracy_class == "C"


@pytest.mark.parametrize("strides", ["contiguous", "transposed", "sliced", "spread"])
def test_restride_keeps_the_values(strides: str) -> None:
    import torch

    x = torch.randn(2, 3, 5, 8)
    view = restride(x, strides)
    assert strides_of(view) == strides
    assert torch.equal(view, x)
    assert view.is_contiguous() == (strides == "contiguous")


def test_fp32_phases_land_in_class_b() -> None:
    """The published design: phases formed in fp32. It must pass as B and fail as A, at a long context."""
    import torch

    problem = make(Shape(n=33, t=131072, dtype="float32"), 1, "cpu")
    case = problem.case
    angle = (torch.tensor(float(case.t)) + problem.offsets)[:, None] * problem.omega
    cos, sin = angle.cos().mean(0).double().numpy(), angle.sin().mean(0).double().numpy()
    k = oracle.pairs(problem.keys.numpy(), "half")
    weights = case.w * (case.m * (cos + 1j * sin))
    trig = np.einsum("hf,bhnf->bhn", weights, k.conj()).real
    extra = np.einsum("hf,bhnf->bhn", case.w * (case.a - np.abs(case.m)), np.abs(k))
    assert tolerance.accuracy(trig + extra, case).accuracy_class == "B"


def test_the_worst_element_is_the_one_that_uses_most_of_its_bound_and_nan_comes_first() -> None:
    allowed = np.array([1.0, 1e-6, 2.0])
    assert tolerance.worst(np.array([0.5, 1e-6, 0.1]), allowed) == (1e-6, 1e-6)
    assert tolerance.worst(np.zeros(3), np.array([0.0, 1.0, 1.0])).ratio == 0
    for error, bound in (([1.0, math.nan], [0.0, 2.0]), ([math.inf, 0.0], [math.inf, 1.0])):
        assert math.isnan(tolerance.worst(np.array(error), np.array(bound)).error)


def test_the_place_of_an_accuracy_is_that_of_its_recorded_error(case: oracle.Case) -> None:
    want = oracle.scores(case)
    budget = tolerance.budget_b(case)
    got = want.copy()
    got[0, 0, 3] += 5 * budget[0, 0, 3]
    found = tolerance.accuracy(got, case)
    assert found.where.startswith("row 0, query head 0, key 3 ")
    assert found.class_b.error == pytest.approx(5 * budget[0, 0, 3])
