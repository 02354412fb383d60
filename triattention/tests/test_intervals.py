from __future__ import annotations

import pytest

from triattention.cli.intervals import Z_95, effective_samples, paired_difference, pass_at_1, wilson


def test_wilson_by_hand() -> None:
    # 8 of 10: z^2 = 3.841459, centre 0.8 + 0.192073, half 1.959964 sqrt(0.016 + 0.009604), scale 1.384146
    interval = wilson(0.8, 10)
    assert interval.low == pytest.approx((0.992073 - 1.959964 * 0.160011) / 1.384146, abs=1e-5)
    assert (interval.low, interval.high) == pytest.approx((0.490162, 0.943318), abs=1e-6)


def test_none_and_all_correct_have_a_width() -> None:
    # the far end is z^2 / (n + z^2) from the near one
    far = Z_95**2 / (10 + Z_95**2)
    assert far == pytest.approx(0.277533, abs=1e-6)
    none, every = pass_at_1([0.0] * 10, 10), pass_at_1([1.0] * 10, 10)
    assert (none.estimate, none.low, none.high) == pytest.approx((0, 0, far))
    assert (every.estimate, every.low, every.high) == pytest.approx((1, 1 - far, 1))
    assert none.low == 0.0
    assert every.high == 1.0


def test_one_sample_per_question_is_plain_wilson() -> None:
    shares = [1.0] * 7 + [0.0] * 13
    assert effective_samples(shares, 20) == pytest.approx(20)
    plain, clustered = wilson(0.35, 20), pass_at_1(shares, 20)
    assert (clustered.low, clustered.high) == pytest.approx((plain.low, plain.high))


def test_the_effective_size_lies_between_questions_and_samples() -> None:
    # shares 1, 1/2, 0: P = 1/2, s2 = (1/4 + 0 + 1/4) / 3 = 1/6, N_eff = 3 * 1/4 / (1/6) = 4.5 of 6 samples
    assert effective_samples([1.0, 0.5, 0.0], 6) == pytest.approx(4.5)
    # samples that fall together count once per question, however many there are
    assert effective_samples([1.0, 0.0, 0.0, 1.0], 400) == pytest.approx(4)
    # less spread than chance allows is chance
    assert effective_samples([0.5] * 4, 8) == 8
    # nothing is known about the spread inside a question that is always wrong
    assert effective_samples([0.0] * 5, 40) == 5


def test_the_paired_difference_by_hand() -> None:
    # ten questions, B right on three where A is wrong, A right on one where B is wrong: sum(d) = 2, sum(d^2) = 4
    a = [0, 0, 0, 1] + [1] * 4 + [0] * 2
    b = [1, 1, 1, 0] + [1] * 4 + [0] * 2
    # D = 2/12, Var = (5/12 - 4/144) / 12 = 0.0324074, half = 1.959964 * 0.180021
    difference = paired_difference(a, b)
    assert difference.estimate == pytest.approx(0.2)
    assert (difference.low, difference.high) == pytest.approx((1 / 6 - 0.352834, 1 / 6 + 0.352834), abs=1e-6)


def test_runs_that_agree_everywhere_still_leave_a_doubt() -> None:
    same = paired_difference([1.0, 0.0] * 5, [1.0, 0.0] * 5)
    # 1.959964 sqrt(1/12 / 12)
    assert (same.estimate, same.low, same.high) == pytest.approx((0, -0.163330, 0.163330), abs=1e-6)


def test_swapping_the_runs_turns_the_difference_around() -> None:
    a, b = [0.25, 1.0, 0.0, 0.5], [0.5, 0.75, 0.0, 1.0]
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert (there.estimate, there.low, there.high) == pytest.approx((-back.estimate, -back.high, -back.low))
    assert paired_difference([0.0] * 3, [1.0] * 3).high == 1.0
