"""Failures of a run, grouped by cause."""

from verify.record.findings import Trail, findings
from verify.record.schema import CheckResult


def _result(name: str, verdict: str = "FAIL", **fields: object) -> CheckResult:
    usual = {"gate": "hard", "evidence": "emulated", "seed": 0, "duration_s": 0.1, "repeat": "pytest"}
    usual |= {"message": "" if verdict == "PASS" else "it is wrong", "by": "p4.a.x" if verdict == "BLOCKED" else None}
    return CheckResult(id=name, verdict=verdict, **usual | fields)


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


def test_what_no_property_explains_is_told_by_family() -> None:
    call = {"path": "Triton"}
    trails = {name: Trail(call, [call]) for name in ("p4.a.x", "p4.a.y", "p4.b.z")}
    results = [_result(name) for name in trails] + [_result("p4.c.z", "ERROR")]
    assert _told(results, trails) == {
        "FAIL: p4.a": ["p4.a.x", "p4.a.y"], "FAIL: p4.b": ["p4.b.z"], "ERROR: p4.c": ["p4.c.z"]
    }  # fmt: skip


def test_neither_absent_nor_refused_is_a_finding() -> None:
    assert _told([_result("p4.a.x", "ABSENT"), _result("p4.b.x", "REFUSED", aspect="d=64")]) == {}
