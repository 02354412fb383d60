"""Ahead of time, a variant that a subject does not offer is absent, not wrong."""

from verify.build.builder import failed
from verify.build.capture import capture
from verify.files import IMPORT_ROOT
from verify.judge.variants import DEFAULT
from verify.record.builds import NOT_OFFERED, Compilation
from verify.subject.find import find_subject


def test_a_subject_without_the_kernel_s_function_has_no_failed_build() -> None:
    subject = find_subject(str(IMPORT_ROOT / "verify" / "tests" / "strangers" / "fixed"), IMPORT_ROOT)
    subject.activate()
    name, shape = next(iter(DEFAULT.items()))
    found = capture(subject, name, shape)
    assert found.problem.startswith(f"{NOT_OFFERED}the subject has no module ")
    compilation = {"sm": 90, "triton": "3", "ptxas": "13", "builds": [], "full": False}
    known = {name: value for name, value in compilation.items() if name in Compilation.model_fields}
    absent = Compilation.model_construct(**known, unlaunched={name: found.problem}, gap="")
    assert not failed([absent])
    assert failed([absent.model_copy(update={"unlaunched": {name: "the subject's call launched no Triton kernel"}})])
