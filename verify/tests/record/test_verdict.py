from __future__ import annotations

import re

import pytest
from pydantic import ValidationError

from verify.architectures import EMULATED, find
from verify.checks import Check, CheckSpec
from verify.record.grounds import Checkout
from verify.record.schema import CheckResult, Record
from verify.record.staleness import stale_because
from verify.record.verdict import TargetVerdict, assess, describe_subject, fill_command, must_pass, subject_option
from verify.tests import samples
from verify.tests.samples import HARD, checks, passing, record, result

SM120 = find(120)


def verdict_of(*records, target=SM120) -> TargetVerdict:
    return assess(target, records, checks()).verdict


def replaced(check_id: str, verdict: str, **fields):
    return [*(r for r in passing() if r.id != check_id), result(check_id, verdict, **fields)]


def test_must_pass_is_every_hard_check_that_applies() -> None:
    assert [check.id for check in must_pass(checks(), SM120)] == list(HARD)
    assert "p1.torch_sees.gpu" not in [check.id for check in must_pass(checks(), EMULATED)]


def test_verified_needs_every_must_pass_check_on_hardware() -> None:
    found = assess(SM120, [record("sm120", passing())], checks())
    assert found.verdict is TargetVerdict.VERIFIED
    assert "All 6 must-pass checks passed on Sample GPU 120 for sample 1.0 (1234567)" in found.sentence
    assert found.missing == ()


@pytest.mark.parametrize("verdict", ["FAIL", "ERROR", "CRASH", "TIMEOUT"])
def test_one_failure_fails_the_gpu(verdict: str) -> None:
    found = assess(SM120, [record("sm120", replaced("p4.oracle.n33", verdict))], checks())
    assert found.verdict is TargetVerdict.FAILED
    assert "p4.oracle.n33" in found.sentence
    assert "5 passed, 0 without a valid result" in found.sentence


@pytest.mark.parametrize(
    ("known", "others", "told"),
    [
        (
            ["p4.oracle.n1"],
            [],
            "1 of 6 must-pass checks failed on .*, a known deviation, the first p4.oracle.n1; 5 passed",
        ),
        (["p4.oracle.n1", "p4.oracle.n33"], [], "2 of 6 .*, all of them known deviations, the first p4.oracle.n1; 4 "),
        (["p4.oracle.n1"], ["p4.oracle.n33"], "1 of them a known deviation, the first of the others p4.oracle.n33; 4"),
    ],
)
def test_a_known_deviation_fails_the_gpu_too(known: list[str], others: list[str], told: str) -> None:
    failed = [*map(samples.known, known), *(result(name, "FAIL") for name in others)]
    left = [one for one in passing() if one.id not in (*known, *others)]
    found = assess(SM120, [record("sm120", [*failed, *left])], checks())
    assert found.verdict is TargetVerdict.FAILED
    assert re.search(told, found.sentence), found.sentence


def test_another_subject_is_named_with_its_source_and_chosen_again() -> None:
    made = record("sm120", passing()[1:])
    other = made.subject.model_copy(update={"source": "checkout:theirs"})
    found = assess(SM120, [made.model_copy(update={"subject": other, "findings": []})], checks())
    assert describe_subject(other) == "sample 1.0 (checkout:theirs, 1234567)"
    assert describe_subject(made.subject) == "sample 1.0 (1234567)"
    assert fill_command(found) == "python -m verify run --expect sm120 --subject=PATH --phases 1"
    assert subject_option(other.model_copy(update={"source": "module:theirs"})) == " --subject=module:theirs"


@pytest.mark.parametrize("verdict", ["SKIP", "BLOCKED"])
def test_what_taught_nothing_leaves_the_gpu_incomplete(verdict: str) -> None:
    assert verdict_of(record("sm120", replaced("p4.oracle.n33", verdict))) is TargetVerdict.INCOMPLETE


def test_an_absent_result_leaves_the_gpu_incomplete() -> None:
    found = assess(SM120, [record("sm120", passing()[:-1])], checks())
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert [cell.check.id for cell in found.missing] == ["p4.triton_pytorch.max"]
    assert fill_command(found) == "python -m verify run --expect sm120 --phases 4"


def test_infra_is_told_from_failure_and_does_not_hide_one() -> None:
    infra = replaced("p1.bf16.matmul", "INFRA")
    assert verdict_of(record("sm120", infra)) is TargetVerdict.INFRA
    both = [*(r for r in infra if r.id != "p4.oracle.n1"), result("p4.oracle.n1", "FAIL")]
    assert verdict_of(record("sm120", both)) is TargetVerdict.FAILED


def test_a_soft_failure_does_not_change_the_verdict() -> None:
    found = assess(SM120, [record("sm120", [*passing(), result("p8.kernel.ms", "FAIL")])], checks())
    assert found.verdict is TargetVerdict.VERIFIED
    assert "of 2 soft checks 0 passed, 1 failed, 1 without a result" in found.sentence


def test_a_waived_failure_is_neither_a_pass_nor_a_failure() -> None:
    own, soft = samples.waived("p4.oracle.n1"), samples.waived("p8.kernel.ms")
    rest = [one for one in passing() if one.id != own.id]
    found = assess(SM120, [record("sm120", [own, *rest, soft])], checks())
    assert (found.verdict, found.missing, len(found.waived)) == (TargetVerdict.INCOMPLETE, (), 2)
    assert "5 of 6 must-pass checks passed on Sample GPU 120" in found.sentence
    assert found.sentence.endswith("no other failed, so sm120 is INCOMPLETE (waived: p4.oracle.n1).")
    found = assess(SM120, [record("sm120", [own, *rest[:-1], result("p4.triton_pytorch.max", "FAIL")])], checks())
    assert found.verdict is TargetVerdict.FAILED
    assert found.sentence.endswith("; 4 passed, 1 waived, 0 without a valid result.")
    found = assess(SM120, [record("sm120", [*passing(), soft])], checks())
    assert found.verdict is TargetVerdict.VERIFIED
    assert "of 2 soft checks 0 passed, 0 failed, 1 waived, 1 without a result" in found.sentence


def test_no_record_is_incomplete_and_says_so() -> None:
    found = assess(SM120, [record("sm90", passing())], checks())
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert found.sentence.startswith("There is no record of an sm120 GPU")
    assert fill_command(found) == "python -m verify run --expect sm120"


@pytest.mark.parametrize("evidence", ["simulated", "compiled", "emulated"])
def test_other_evidence_never_fills_a_hardware_cell(evidence: str) -> None:
    made = samples.compiled if evidence == "compiled" else samples.simulated
    other = made("sm120", [result("p4.triton_pytorch.max", evidence=evidence)], day=2)
    found = assess(SM120, [record("sm120", passing()[:-1]), other], checks())
    assert found.verdict is TargetVerdict.INCOMPLETE
    (cell,) = found.missing
    assert not cell.passed
    # what was simulated or compiled is shown as such; what was emulated says nothing about a GPU
    assert (cell.result is not None) is (evidence != "emulated")


def test_a_compiled_failure_does_not_fail_the_gpu() -> None:
    results = [*passing()[:-1], result("p4.triton_pytorch.max", "FAIL", evidence="compiled")]
    assert verdict_of(record("sm120", results)) is TargetVerdict.INCOMPLETE


def test_emulated_can_pass_and_verifies_no_gpu() -> None:
    found = assess(EMULATED, [record("emulated", passing("emulated"))], checks())
    assert found.verdict is TargetVerdict.EMULATED_PASS
    assert found.sentence.endswith("this verifies no GPU.")
    assert verdict_of(record("emulated", passing("emulated"))) is TargetVerdict.INCOMPLETE


def test_emulated_fails_and_is_incomplete_in_its_own_words() -> None:
    results = passing("emulated")
    assert verdict_of(record("emulated", results[:-1]), target=EMULATED) is TargetVerdict.EMULATED_INCOMPLETE
    failed = [*results[:-1], result("p4.triton_pytorch.max", "FAIL", "emulated")]
    assert verdict_of(record("emulated", failed), target=EMULATED) is TargetVerdict.EMULATED_FAIL


def test_the_newest_result_counts_for_better_and_for_worse() -> None:
    old, new = record("sm120", passing(), day=1), record("sm120", [result("p4.oracle.n1", "FAIL")], day=2)
    assert verdict_of(old, new) is verdict_of(new, old) is TargetVerdict.FAILED
    mended = record("sm120", [result("p4.oracle.n1")], day=3)
    assert verdict_of(old, new, mended) is TargetVerdict.VERIFIED


def test_time_and_not_text_decides_what_is_newest() -> None:
    first = record("sm120", passing(), run_id="a", time_utc="2026-11-01T00:00:00Z")
    later = record("sm120", [result("p4.oracle.n1", "FAIL")], run_id="b", time_utc="2026-11-01T00:00:00.5Z")
    assert verdict_of(first, later) is TargetVerdict.FAILED


@pytest.mark.parametrize("change", [{"content_sha256": "1" * 64, "source": "checkout:other"}, {"name": "another"}])
def test_records_of_another_subject_are_stale_and_not_mixed(change: dict) -> None:
    old = record("sm120", passing(), day=1)
    new = record("sm120", passing()[:1], day=2)
    new = new.model_copy(update={"subject": new.subject.model_copy(update=change)})
    found = assess(SM120, [old, new], checks())
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert found.used == (new,)
    assert found.stale == (old,)


def here(**digests: str) -> Checkout:
    """The checkout, as if some of its files had other contents."""
    found = Checkout(samples.REPOSITORY, samples.REPOSITORY, samples.REPOSITORY / "triattention")
    found._known.update(digests)
    return found


def test_a_result_counts_as_long_as_what_it_rests_on_is_as_it_was() -> None:
    made = record("sm120", passing())
    assert assess(SM120, [made], checks(), here()).verdict is TargetVerdict.VERIFIED
    found = assess(SM120, [made], checks(), here(**{samples.ORACLE: "1" * 64}))
    assert (found.verdict, found.used, found.stale) == (TargetVerdict.INCOMPLETE, (), (made,))
    assert found.why_stale(made) == "verify/judge/oracle.py changed"
    assert {why: len(cells) for why, cells in found.outdated.items()} == {"verify/judge/oracle.py changed": len(HARD)}
    assert "No result in the record of an sm120 GPU is still valid (verify/judge/oracle.py changed)" in found.sentence
    # without a checkout to compare with, it is what it was
    assert assess(SM120, [made], checks()).verdict is TargetVerdict.VERIFIED


def test_only_the_results_that_rest_on_a_file_are_stale_with_it() -> None:
    half = [one.model_copy(update={"rests_on": number % 2}) for number, one in enumerate(passing())]
    sources = {samples.ORACLE: samples.ORACLE_SHA256, "verify/gone.py": "2" * 64}
    made = record("sm120", [], sources=sources, rests_on=[[samples.ORACLE], [samples.ORACLE, "verify/gone.py"]])
    made = made.model_copy(update={"results": half})
    found = assess(SM120, [made], checks(), here())
    assert (found.used, found.stale, found.why_stale(made)) == ((made,), (), None)
    assert [cell.because for cell in found.must_pass] == ["", "verify/gone.py is gone"] * 3
    assert len(found.missing) == 3


def test_an_older_result_counts_again_where_the_newer_one_is_stale() -> None:
    old = record("sm120", passing(), day=1)
    new = record("sm120", replaced("p4.oracle.n1", "FAIL"), day=2, sources={samples.ORACLE: "1" * 64})
    found = assess(SM120, [old, new], checks(), here())
    assert (found.verdict, found.used, found.stale) == (TargetVerdict.VERIFIED, (old,), (new,))


def test_results_that_name_nothing_are_shown_as_stale() -> None:
    made = record("sm120", [], rests_on=[], sources={}).model_copy(update={"results": passing()})
    found = assess(SM120, [made], checks(), here())
    assert found.why_stale(made) == "recorded before results listed the files they rest on"
    assert {*found.outdated} == {"recorded before results listed the files they rest on"}
    assert found.verdict is TargetVerdict.INCOMPLETE


def test_another_subject_is_compared_with_its_newest_record() -> None:
    theirs = {"source": "checkout:theirs", "content_sha256": "1" * 64}
    kernel, other = "subject/triattention/kernels.py", "subject/triattention/other.py"

    def made(day: int, content: str, sources: dict[str, str], results: list[CheckResult]) -> Record:
        one = record("sm120", results, day=day, sources=sources, rests_on=[[*sources]])
        subject = one.subject.model_copy(update=theirs | {"content_sha256": content * 64})
        return one.model_copy(update={"subject": subject})

    old = made(1, "1", {kernel: "1" * 64}, passing())
    for sources, because in (
        ({kernel: "1" * 64}, None),
        ({kernel: "2" * 64}, f"{kernel} changed"),
        ({other: "2" * 64}, "the subject changed"),
    ):
        new = made(2, "2", sources, passing()[:1])
        assert assess(SM120, [old, new], checks(), here()).why_stale(old) == because


def test_the_content_and_not_the_commit_makes_the_subject() -> None:
    old, new = record("sm120", passing(), day=1), record("sm120", passing()[:1], day=2)
    subject = new.subject.model_copy(update={"git_sha": "other", "dirty": True})
    found = assess(SM120, [old, new.model_copy(update={"subject": subject})], checks())
    assert (found.verdict, found.stale) == (TargetVerdict.VERIFIED, ())


@pytest.mark.parametrize(
    ("where", "change", "because"),
    [
        ("environment", {"torch": "2.14.0"}, "another torch"),
        ("environment", {"triton": "3.8.0"}, "another triton"),
        ("gpu", {"driver": "590.1"}, "another driver"),
        ("gpu", {"uuid_sha256": "1" * 64}, "another GPU"),
    ],
)
def test_records_of_other_surroundings_are_stale_and_say_why(where: str, change: dict, because: str) -> None:
    old, new = record("sm120", passing(), day=1), record("sm120", passing()[:1], day=2)
    if where == "gpu":
        where, change = "environment", {"gpu": new.environment.gpu.model_copy(update=change)}
    if where == "environment":
        change = {"environment": new.environment.model_copy(update=change)}
    new = new.model_copy(update=change)
    found = assess(SM120, [old, new], checks())
    assert (found.verdict, found.used, found.stale) == (TargetVerdict.INCOMPLETE, (new,), (old,))
    assert stale_because(old, new) == because


def test_a_result_with_another_gate_is_of_a_check_the_suite_does_not_have() -> None:
    found = assess(SM120, [record("sm120", replaced("p4.oracle.n33", "PASS", gate="soft"))], checks())
    assert (found.verdict, found.unknown_ids) == (TargetVerdict.INCOMPLETE, ("p4.oracle.n33",))


@pytest.mark.parametrize(("model", "verdict"), [("embedded", "VERIFIED"), ("other/model", "INCOMPLETE")])
def test_phase_6_counts_with_the_embedded_model_only(model: str, verdict: str) -> None:
    spec = CheckSpec("p6.eviction", "hard", "claim", "reason", "remedy", {"one": None})
    inference = Check("p6.eviction.one", "one", spec, "phases/x.py::test[one]")
    made = record("sm120", [result("p6.eviction.one", gate="hard")], model=model)
    assert assess(SM120, [record("sm120", passing()), made], [*checks(), inference]).verdict == verdict


def test_hardware_evidence_from_the_interpreter_is_no_record() -> None:
    whole = record("sm120", passing()).model_dump()
    whole["environment"]["variables"]["TRITON_INTERPRET"] = "1"
    with pytest.raises(ValidationError, match="claims hardware evidence, but TRITON_INTERPRET emulated the kernels"):
        Record.model_validate(whole)


def test_a_skip_without_a_gpu_is_not_hardware_evidence() -> None:
    assert result("p1.torch_sees.gpu", "SKIP", "emulated", code="NO_GPU").code == "NO_GPU"
    with pytest.raises(ValidationError, match=r"SKIP\(NO_GPU\) contradicts its hardware evidence"):
        result("p1.torch_sees.gpu", "SKIP", "hardware", code="NO_GPU")


def test_a_result_of_no_known_check_is_listed_and_counts_for_nothing() -> None:
    found = assess(SM120, [record("sm120", [*passing(), result("p4.gone.x", "FAIL")])], checks())
    assert found.verdict is TargetVerdict.VERIFIED
    assert found.unknown_ids == ("p4.gone.x",)


def test_a_suite_without_checks_verifies_nothing() -> None:
    assert assess(SM120, [record("sm120", passing())], []).verdict is TargetVerdict.INCOMPLETE
