"""Failures of a run, grouped by cause."""

import pytest

from verify.record import causes
from verify.record.findings import STEPS, Trail, findings, next_step, title
from verify.record.schema import CheckResult, Measurement


def _result(name: str, verdict: str = "FAIL", **fields: object) -> CheckResult:
    usual = {"gate": "hard", "evidence": "emulated", "seed": 0, "duration_s": 0.1, "repeat": "pytest"}
    usual |= {"message": "" if verdict == "PASS" else "it is wrong", "by": "p4.a.x" if verdict == "BLOCKED" else None}
    return CheckResult(id=name, verdict=verdict, **usual | fields)


def _wrong(name: str, what: str, allowed: float = 1.0) -> CheckResult:
    return _result(name, measurements=[Measurement(name=what, measured=3.0, allowed=allowed)])


def _right(name: str, what: str) -> CheckResult:
    return _result(name, "PASS", measurements=[Measurement(name=what, measured=0.0, allowed=1.0)])


def _told(results, trails=None) -> dict[str, list[str]]:
    return {one.cause: one.checks for one in findings(results, trails or {})}


def test_the_same_line_is_one_finding_and_names_what_it_blocks() -> None:
    failed = [_result(name, cause="TypeError at a.py:3") for name in ("p4.a.x", "p4.b.y")]
    (found,) = findings([*failed, _result("p4.c.z", "BLOCKED"), _result("p4.d.z", "PASS")], {})
    assert (found.cause, found.checks, found.blocks) == ("TypeError at a.py:3", ["p4.a.x", "p4.b.y"], ["p4.c.z"])


def test_the_property_that_all_failing_calls_have_and_no_passing_one_is_the_cause() -> None:
    call = {"path": "Triton", "strides": "contiguous", "d": "128"}
    trails = {
        "p4.a.x": Trail({**call, "strides": "spread"}, [call]),
        "p4.b.y": Trail({**call, "strides": "spread", "d": "64"}, []),
        "p4.c.z": Trail(None, [{**call, "path": "PyTorch", "strides": "spread"}, {**call, "d": "64"}]),
    }
    assert _told([_result("p4.a.x"), _result("p4.b.y"), _result("p4.c.z", "PASS")], trails) == {
        "only on the Triton path with strides=spread": ["p4.a.x", "p4.b.y"]
    }


def test_a_value_that_is_missing_may_be_the_cause() -> None:
    call = {"path": "PyTorch", "dtype": "bfloat16"}
    trails = {
        "p4.a.x": Trail(call, []),
        "p4.b.y": Trail({**call, "dtype": "float16"}, [{**call, "dtype": "float32"}]),
        "p4.c.z": Trail(None, [{"path": "Triton", "dtype": name} for name in ("bfloat16", "float16", "float32")]),
    }
    assert _told([_result("p4.a.x"), _result("p4.b.y")], trails) == {
        "only on the PyTorch path with dtype of keys other than float32": ["p4.a.x", "p4.b.y"]
    }


def test_a_pass_that_is_far_from_exact_excuses_nothing() -> None:
    call = {"path": "PyTorch", "dtype": "bfloat16"}
    passed = [{**call, "class": "B"}, {**call, "dtype": "float32", "class": "A"}]
    trails = {name: Trail(call, passed) for name in ("p4.a.x", "p4.b.y")}
    assert list(_told([_result("p4.a.x"), _result("p4.b.y")], trails)) == ["only with dtype of keys=bfloat16"]


def test_where_no_score_is_exact_class_b_is_right() -> None:
    call = {"path": "C", "n": "several", "low_norm": "False", "class": "B"}
    low = {**call, "low_norm": "True", "class": "C"}
    trails = {"p4.a.x": Trail(low, [{**call, "n": "1"}]), "p4.b.y": Trail({**low, "n": "1"}, [call])}
    results = [_wrong("p4.a.x", "error"), _wrong("p4.b.y", "error of the others")]
    assert _told(results, trails) == {"only with E|q| below |E[q]|": ["p4.a.x", "p4.b.y"]}
    exact = {**low, "class": "A"}
    trails["p4.c.z"] = Trail(None, [exact | {"n": str(number)} for number in range(2, 5)])
    assert list(_told(results, trails)) == ["FAIL: p4.a", "FAIL: p4.b"]


@pytest.mark.parametrize("one", ["float32", "bfloat16"])
def test_a_property_is_no_cause_where_the_same_fails_without_it(one: str) -> None:
    call = {"kind": "compressor", "rows": "1", "dtype": "float32"}
    trails = {
        "p4.a.x": Trail({**call, "dtype": "bfloat16"}, []),
        "p4.a.y": Trail({**call, "dtype": one, "rows": "2"}, []),
        "p4.b.z": Trail(None, [call]),
    }
    results = [*(_wrong(name, "gap") for name in ("p4.a.x", "p4.a.y")), _right("p4.b.z", "gap")]
    cause = "FAIL: p4.a" if one == "float32" else "only with dtype of keys=bfloat16"
    assert _told(results, trails) == {cause: ["p4.a.x", "p4.a.y"]}


def test_a_crash_and_what_shows_something_else_are_findings_of_their_own() -> None:
    call = {"kind": "live", "kv_budget": "64"}
    trails = {name: Trail({**call, "kv_budget": "16"}, []) for name in ("p6.a.x", "p6.b.x", "p6.c.x")}
    trails["p6.d.x"] = Trail(None, [call])
    results = [_wrong("p6.a.x", "gap"), _result("p6.b.x", cause="TypeError at a.py:3"), _wrong("p6.c.x", "tokens")]
    both = [Measurement(name=name, measured=0.0, allowed=1.0) for name in ("gap", "tokens")]
    results.append(_result("p6.d.x", "PASS", measurements=both))
    assert _told(results, trails) == {
        "gap: only with kv_budget=16": ["p6.a.x"],
        "TypeError at a.py:3": ["p6.b.x"],
        "tokens: only with kv_budget=16": ["p6.c.x"],
    }


def test_a_pass_that_was_judged_by_something_else_is_no_contrast() -> None:
    trails = {name: Trail({"kind": "live", "kv_budget": "16"}, []) for name in ("p6.a.x", "p6.a.y")}
    trails["p6.b.z"] = Trail(None, [{"kind": "live", "kv_budget": "64"}])
    results = [*(_wrong(name, "gap") for name in ("p6.a.x", "p6.a.y")), _right("p6.b.z", "tokens")]
    assert list(_told(results, trails)) == ["FAIL: p6.a"]


def test_what_a_failed_check_asked_for_before_is_not_known_to_be_right() -> None:
    call = {"kind": "live", "kv_budget": "16"}
    trails = {"p6.a.x": Trail(call, [{**call, "kv_budget": "64"}])}
    assert list(_told([_wrong("p6.a.x", "gap")], trails)) == ["FAIL: p6.a"]


def test_each_path_has_its_own_cause() -> None:
    plain = {"dtype": "float32", "trig": "True"}
    both = [{"path": path, **plain} for path in ("PyTorch", "Triton")]
    failed = {"p4.a.x": {**both[0], "dtype": "bfloat16"}, "p4.a.y": {**both[1], "trig": "False"}}
    trails = {name: Trail(call, both) for name, call in failed.items()}
    assert _told([_wrong(name, "error") for name in failed], trails) == {
        "only on the PyTorch path with dtype of keys=bfloat16": ["p4.a.x"],
        "only on the Triton path with trig=False": ["p4.a.y"],
    }


def test_two_properties_that_come_together_are_both_named_and_three_explain_nothing() -> None:
    call = {"path": "C", "d": "64", "n": "1"}
    failed = {**call, "d": "96", "n": "9"}
    assert list(_told([_result("p4.a.x")], {"p4.a.x": Trail(failed, [call])})) == ["only with head dim=96 and keys=9"]
    trails = {"p4.a.x": Trail({**failed, "b": "3"}, [{**call, "b": "1"}])}
    assert list(_told([_result("p4.a.x")], trails)) == ["FAIL: p4.a"]


def test_two_pairs_of_properties_that_fit_alike_explain_nothing() -> None:
    call = {"path": "C", "d": "96", "n": "9", "b": "3"}
    passed = [{**call, "d": "64"}, {**call, "n": "1", "b": "1"}]
    trails = {name: Trail(call, passed) for name in ("p4.a.x", "p4.b.y")}
    assert list(_told([_result(name) for name in trails], trails)) == ["FAIL: p4.a", "FAIL: p4.b"]


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (_wrong("p4.a.x", "error"), "p4.a: error: measured 3, allowed 1"),
        (_result("p4.a.x"), "p4.a did not hold: Scores are right."),
        (_result("p4.a.x", "ERROR"), "p4.a: a fault of this suite, not of the implementation"),
        (_result("p4.a.x", "TIMEOUT"), "p4.a: the check did not end within its time limit"),
        (_result("p4.a.x", cause="TypeError at a.py:3"), "TypeError at a.py:3"),
    ],
)
def test_a_title_states_no_claim_that_was_not_judged(result: CheckResult, told: str) -> None:
    (found,) = findings([result], {})
    assert title(found, result, "Scores are right.") == told


def test_a_title_without_a_claim() -> None:
    (found,) = findings([_result("p4.a.x")], {})
    assert title(found, _result("p4.a.x"), None) == "p4.a did not hold"


@pytest.mark.parametrize(
    ("result", "told"),
    [
        (_result("p4.a.x"), "Check the dims."),
        (_result("p4.a.x", cause="the mean is taken"), "Check the dims."),
        (_result("p4.a.x", cause="TypeError at b/a.py:3"), "Look at b/a.py:3 first, which raised."),
        (_result("p4.a.x", cause="no patch: TypeError at a.py:3"), "Look at a.py:3 first, which raised."),
        (
            _result("p4.a.x", "ERROR"),
            "Report the message as a fault of this suite; it says nothing about the implementation.",
        ),
        (_result("p4.a.x", "CRASH"), "Repeat the check, and see at which call the process dies."),
    ],
)
def test_the_remedy_of_a_check_is_for_what_it_judged(result: CheckResult, told: str) -> None:
    assert next_step(result, "Check the dims.") == told


def test_what_no_property_explains_is_told_by_family() -> None:
    call = {"path": "Triton"}
    trails = {name: Trail(call, [call]) for name in ("p4.a.x", "p4.a.y", "p4.b.z")}
    results = [_result(name) for name in trails] + [_result("p4.c.z", "ERROR")]
    assert _told(results, trails) == {
        "FAIL: p4.a": ["p4.a.x", "p4.a.y"], "FAIL: p4.b": ["p4.b.z"], "ERROR: p4.c": ["p4.c.z"]
    }  # fmt: skip


def test_neither_absent_nor_refused_is_a_finding() -> None:
    assert _told([_result("p4.a.x", "ABSENT"), _result("p4.b.x", "REFUSED", aspect="d=64")]) == {}


def test_a_cause_that_lies_before_the_test_has_a_step_of_its_own() -> None:
    assert {*STEPS} == {cause for name, cause in vars(causes).items() if name.isupper()}
