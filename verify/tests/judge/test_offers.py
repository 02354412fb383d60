"""What a scoring function takes, found by asking it."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from verify.errors import Refused, Wrong
from verify.files import IMPORT_ROOT
from verify.judge.problems import OFFSETS_17, Shape, make
from verify.judge.scoring import GROUPS, draws, grouped, of_shape, scorers
from verify.subject.find import find_subject
from verify.subject.offered import narrowed
from verify.subject.refusal import must_refuse
from verify.subject.subject import Subject

_SCORER = """
import torch

def scores(key_states, cache_positions, head_stats, omega, offsets, freq_scale_sq, config, round_start=None):
    {body}
    rows, _, keys, _ = key_states.shape
    return torch.zeros(rows, freq_scale_sq.shape[0], keys)
"""


@pytest.fixture
def offering(tmp_path: Path):
    """Makes a subject whose only function, a scorer without Triton, begins with the given statements."""
    made = []

    def make(body: str, offers: str = "") -> Subject:
        root = tmp_path / str(len(made))
        package = root / f"taking{len(made)}_{tmp_path.name.replace('-', '_')}"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "code.py").write_text(_SCORER.format(body=body))
        (root / "subject.toml").write_text(
            f'[subject]\npackage = "{package.name}"\n[names]\n'
            f'"vllm.core.scoring.compute_scores_pytorch" = "{package.name}.code:scores"\n{offers}'
        )
        subject = find_subject(str(root), IMPORT_ROOT)
        subject.activate()
        made.append(package.name)
        return subject

    return make


def _values(subject: Subject) -> dict:
    return scorers(subject, "pytorch", "cpu")[0].offers.values


def _drawn(subject: Subject, count: int = 8, **choices) -> list[Shape]:
    judged = []
    for attempt, scorer in draws(subject, "pytorch", "cpu", 0, count, **choices):
        with attempt as shape:
            scorer(make(shape, 0, "cpu"))
            judged.append(shape)
    return judged


_ONLY_17 = 'if len(offsets) != 17: raise ValueError("17 offsets")'


def test_who_refuses_nothing_is_not_asked(offering) -> None:
    subject = offering("pass")
    assert len(_drawn(subject)) == 8
    assert not scorers(subject, "pytorch", "cpu")[0].offers.asked


def test_problems_are_drawn_within_what_is_taken(offering) -> None:
    subject = offering(_ONLY_17)
    judged = _drawn(subject)
    assert len(judged) >= 8
    assert {shape.offsets for shape in judged} == {OFFSETS_17}
    assert _values(subject) == {"offsets": (OFFSETS_17,)}


def test_a_property_that_is_not_tested_is_replaced_and_one_that_is_tested_is_refused(offering) -> None:
    offers = scorers(offering(_ONLY_17, "[offers]\noffsets = [[1, 2, 4]]\n"), "pytorch", "cpu")[0].offers
    near, far = Shape(offsets=(1.0,)), Shape(d=64, offsets=(1.0,))
    (attempt,) = offers.fitted(far, near)
    assert attempt.shape == replace(far, offsets=(1.0, 2.0, 4.0))
    with pytest.raises(Refused, match=r"^1 offset: not offered$"):
        next(offers.fitted(near, Shape()))


def test_a_refusal_names_the_property_and_the_line(offering) -> None:
    subject = offering('if key_states.shape[-1] == 256: raise NotImplementedError("head dims up to 128")')
    with pytest.raises(Refused, match=r"d=256: not offered"):
        _drawn(subject, d=(256,))
    (scorer,) = scorers(subject, "pytorch", "cpu")
    with pytest.raises(Refused, match=r"^d=256: refused at .*code\.py:5 \(NotImplementedError: head dims up to 128\)"):
        scorer(make(Shape(n=3, d=256), 0, "cpu"))


def test_who_refuses_everything_fails_and_is_told_so(offering) -> None:
    subject = offering('raise ValueError(f"no {len(offsets)}")')
    told = r"^no problem was accepted, not even the plainest: ValueError: no 17 \(taking.*/code\.py:5\)$"
    with pytest.raises(Wrong, match=told) as found:
        _drawn(subject)
    assert found.value.cause == "no problem was accepted, not even the plainest"


def test_a_problem_outside_what_is_declared_is_refused_and_never_called(offering) -> None:
    subject = offering("pass", '[offers]\nstyle = ["half"]\naggregation = ["mean"]\nlow_norm = [false]\n')
    (scorer,) = scorers(subject, "pytorch", "cpu")
    plain = Shape(n=3, d=64, dtype="float32")
    assert scorer(make(plain, 0, "cpu")).shape == (1, 2, 3)
    for changed, told in (
        ({"style": "interleaved"}, "style=interleaved"),
        ({"aggregation": "max"}, "aggregation=max"),
        ({"low_norm": True}, "E|q| below |E[q]|"),
    ):
        with pytest.raises(Refused) as refused:
            scorer(make(replace(plain, **changed), 0, "cpu"))
        assert (str(refused.value), refused.value.aspect) == (f"{told}: not offered", told)
    assert not any(shape.low_norm for shape in _drawn(subject))
    assert not scorer.offers.asked


def test_a_scorer_without_weights_is_judged_with_weights_of_one(offering) -> None:
    subject = offering('if not (freq_scale_sq == 1).all(): raise ValueError("no weights")')
    assert {shape.weights for shape in _drawn(subject)} == {"ones"}
    assert _values(subject) == {"weights": ("ones",)}
    with pytest.raises(Refused, match=r"^weights other than 1: not offered$"):
        _drawn(subject, weights=("drawn",))


def test_weights_of_one_change_no_other_number() -> None:
    drawn, ones = (make(Shape(n=5, weights=weights), 3, "cpu") for weights in ("drawn", "ones"))
    assert (ones.freq_weight == 1).all()
    assert not (drawn.freq_weight == 1).any()
    others = [name for name in drawn.tensors() if name != "freq_weight"]
    assert all(torch.equal(drawn.tensors()[name], ones.tensors()[name]) for name in others)
    assert (ones.case.positions == drawn.case.positions).all()
    # those of a seed never change
    assert float(drawn.freq_weight.sum()) == pytest.approx(129.755890)


def test_what_a_ranker_has_no_option_for_is_not_narrowed(offering) -> None:
    subject = offering("pass", '[offers]\naggregation = ["max"]\nstyle = ["interleaved"]\nd = [64]\n')
    assert narrowed(subject, "ranking") == {"d": (64,)}
    assert narrowed(subject, "pytorch") == {"aggregation": ("max",), "style": ("interleaved",), "d": (64,)}


def test_an_inaccurate_scorer_is_told_so_before_what_a_check_tests(offering) -> None:
    (scorer,) = scorers(offering("pass"), "pytorch", "cpu")  # which scores zeros
    measured = []
    scorer.judged_first(make(Shape(n=3), 0, "cpu"), lambda *told, **words: measured.append((*told, words)))
    ((name, error, allowed, words),) = measured
    assert (name, words["cause"]) == ("error before the test", "scores of ordinary keys are not within class B")
    assert error > allowed


def test_a_crash_is_no_refusal(offering) -> None:
    subject = offering("key_states.reshape(7, 11, 13)")
    with pytest.raises(RuntimeError, match="shape"):
        _drawn(subject)


def test_a_combination_that_is_refused_leaves_the_other_problems_judged(offering) -> None:
    subject = offering('if key_states.shape[0] > 1 and key_states.shape[-1] > 64: raise ValueError("rows of 64")')
    judged = _drawn(subject, 24)
    assert judged
    assert all(shape.b == 1 or shape.d == 64 for shape in judged)


def test_what_must_be_refused_needs_a_call_that_is_accepted(offering) -> None:
    subject = offering('if key_states is None: raise ValueError("keys are missing")')
    scores = subject.attribute("vllm.core.scoring", "compute_scores_pytorch")

    def bad() -> None:
        scores(None, None, None, None, (), None, None)

    must_refuse(subject, "a call without keys is", bad, lambda: None)
    with pytest.raises(ValueError, match="keys are missing"):
        must_refuse(subject, "a call without keys is", bad, bad)
    with pytest.raises(AssertionError, match="a good call is accepted"):
        must_refuse(subject, "a good call is", lambda: None, lambda: None)
    with pytest.raises(AttributeError):
        must_refuse(subject, "a crash is", lambda: scores(3, None, None, None, (), None, None), lambda: None)


def test_with_groups_only_another_shape_and_a_crash_have_their_cause(offering) -> None:
    subject = offering("if freq_scale_sq.shape[0] == 6: key_states.reshape(7)")
    (scorer,) = scorers(subject, "pytorch", "cpu")
    grouped_heads = Shape(n=3, d=64, g=2)
    with pytest.raises(Wrong, match="the subject raised RuntimeError at ") as crashed, grouped(subject):
        scorer(make(replace(grouped_heads, g=3), 0, "cpu"))
    with pytest.raises(Wrong, match="the scores have shape") as shaped, grouped(subject):
        of_shape(scorer(make(grouped_heads, 0, "cpu"))[:, :2], grouped_heads)
    assert (crashed.value.cause, shaped.value.cause) == (GROUPS, GROUPS)
    for other in (AssertionError("the scores are NaN"), Wrong("known", "another cause"), ValueError("the suite's")):
        with pytest.raises(type(other)) as kept, grouped(subject):
            raise other
        assert kept.value is other
