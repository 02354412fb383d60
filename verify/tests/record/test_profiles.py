"""What an implementation must pass: everything, its profile, or what it offers."""

from __future__ import annotations

import pytest

from verify.architectures import EMULATED, find
from verify.checks import PROFILES, Check, CheckSpec
from verify.record.schema import SubjectInfo, Verdict
from verify.record.verdict import TargetVerdict, assess, must_pass
from verify.tests.samples import record, result

SM120 = find(120)


def _checks() -> list[Check]:
    def family(name: str, capability: str, gate: str = "hard") -> Check:
        spec = CheckSpec(name, gate, "claim", "reason", "remedy", {"x": 0}, capability=capability)
        return Check(f"{name}.x", "x", spec, "phases/x.py::test[x]")

    return [
        family("p1.a", "environment"), family("p2.names", "triton"), family("p4.a", "triton"),
        family("p4.b", "pytorch"), family("p4.c", "compressor"), family("p4.d", "ranking"), family("p6.a", "plan"),
        family("p6.b", "live_model"), family("p7.plugin", "plugin", "soft"), family("p7.leaks", "plugin", "soft"),
    ]  # fmt: skip


def _required(profile: str | None, **verdicts: str) -> list[str]:
    told = {name.replace("_", ".") + ".x": Verdict(word) for name, word in verdicts.items()}
    return [check.id.removesuffix(".x") for check in must_pass(_checks(), SM120, profile, told)]


def test_full_is_every_hard_check_but_what_no_published_name_promises() -> None:
    assert _required("full") == ["p1.a", "p2.names", "p4.a", "p4.b", "p4.c", "p6.a", "p6.b"]
    assert _required("full", p4_a="ABSENT", p4_b="REFUSED") == _required("full")


def test_a_scorer_must_pass_the_paths_that_it_offers_and_offer_one() -> None:
    assert _required("scorer") == ["p1.a", "p2.names", "p4.a", "p4.b"]
    assert _required("scorer", p4_a="ABSENT", p4_b="PASS", p2_names="ABSENT") == ["p1.a", "p4.b"]
    assert _required("scorer", p4_a="FAIL", p4_b="PASS") == ["p1.a", "p2.names", "p4.a", "p4.b"]
    assert _required("scorer", p4_a="ABSENT", p4_b="ABSENT") == ["p1.a", "p2.names", "p4.a", "p4.b"]


def test_serving_must_pass_soft_checks_of_the_plugin() -> None:
    assert {"p7.plugin", "p6.b"} <= {*_required("serving")}
    assert "p7.leaks" not in _required("serving")
    assert "p6.a" not in _required("serving")


def test_without_a_profile_it_must_pass_what_it_offers() -> None:
    assert _required(None, p4_a="ABSENT", p4_b="REFUSED", p4_c="FAIL") == ["p1.a", "p2.names", "p4.c", "p4.d", "p6.b"]


def test_each_profile_asks_for_more_than_the_one_before() -> None:
    asked = [{name for group in groups for name in group} for groups in PROFILES.values()]
    assert asked[0] < asked[1] < asked[2]


def _assessed(profile: str | None, target=SM120, source: str = "checkout:other", **verdicts: str):
    subject = SubjectInfo(
        name="other", version="2", source=source, git_sha="none", dirty=False, content_sha256="ab" * 32, profile=profile
    )
    evidence = "emulated" if target is EMULATED else "hardware"
    results = [
        result(name, verdicts.get(name.removesuffix(".x").replace(".", "_"), "PASS"), evidence, gate=check.spec.gate)
        for check in _checks()
        if (name := check.id)
    ]
    made = record(target.target, results).model_copy(update={"subject": subject})
    return assess(target, [made], _checks())


@pytest.mark.parametrize(("profile", "verdict"), [("full", "VERIFIED"), ("scorer", "CONFORMS"), (None, "CONFORMS")])
def test_only_full_can_verify_a_gpu(profile: str | None, verdict: str) -> None:
    assert _assessed(profile).verdict == verdict
    assert _assessed(profile, EMULATED).verdict is TargetVerdict.EMULATED_PASS


def test_what_is_absent_or_refused_is_no_failure_and_is_told_by_capability() -> None:
    found = _assessed(None, p4_a="ABSENT", p4_b="REFUSED")
    assert found.verdict is TargetVerdict.CONFORMS
    assert found.findings == ()
    assert found.capabilities["compressor"] == "1 of 1"
    assert "judged by what it offers" in found.sentence


def test_a_must_pass_check_that_is_absent_leaves_the_gpu_incomplete_and_is_named() -> None:
    found = _assessed("full", p4_c="ABSENT")
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert "1 of them absent or refused, the first p4.c.x" in found.sentence
    assert found.capabilities["compressor"] == "not offered"


def test_the_bundled_subject_is_full_unless_it_says_otherwise() -> None:
    found = _assessed(None, source="bundled", p4_c="ABSENT")
    assert found.verdict is TargetVerdict.INCOMPLETE
