"""Ahead of time, a variant that a subject does not offer is absent, not wrong."""

import re
import sys
from pathlib import Path

import pytest

from verify.build.builder import failed
from verify.build.capture import capture
from verify.files import IMPORT_ROOT
from verify.judge.variants import DEFAULT, SCORING
from verify.record.builds import NOT_OFFERED, Compilation
from verify.subject.find import find_subject
from verify.subject.subject import Subject


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


_KERNEL = """
def triattention_scoring(K_rot, offsets, aggregation, **others):
    {body}
"""


@pytest.fixture
def launching(tmp_path: Path):
    """Makes a subject with only the kernel's function, which launches the suite's own kernel after ``body``."""

    def make(body: str, offers: str = "") -> Subject:
        package = f"launching_{len(sys.modules)}"
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(
            "import torch\nfrom verify.build.control import add_kernel\n"
            + _KERNEL.format(
                body=f"{body}\n    x = torch.zeros(128)\n    add_kernel[(1,)](x, x, x, n=128)\n    return x"
            )
        )
        (tmp_path / "subject.toml").write_text(
            f'[subject]\npackage = "{package}"\n[names]\n'
            f'"vllm.core.kernels.triton_scoring.triattention_scoring" = "{package}:triattention_scoring"\n{offers}'
        )
        subject = find_subject(str(tmp_path), IMPORT_ROOT)
        subject.activate()
        return subject

    return make


def test_a_variant_is_captured_within_what_is_offered(launching) -> None:
    body = "if len(offsets) != 5 or aggregation != 'mean': raise RuntimeError('never')"
    subject = launching(body, '[offers]\noffsets = [[1, 2, 4, 8, 16]]\naggregation = ["mean"]\n')
    assert capture(subject, "usual", SCORING["bfloat16-half-mean"]).launches
    assert capture(subject, "max", SCORING["bfloat16-half-max"]).problem == f"{NOT_OFFERED}aggregation=max"


def test_a_variant_that_is_refused_is_not_offered_and_one_that_crashes_is_wrong(launching) -> None:
    subject = launching("if aggregation == 'max': raise ValueError('no max')\n    if K_rot.shape[-1] == 64: 1 / 0")
    assert capture(subject, "usual", SCORING["bfloat16-half-mean"]).launches
    refused = capture(subject, "max", SCORING["bfloat16-half-max"]).problem
    assert re.fullmatch(rf"{NOT_OFFERED}refused at .*__init__.py:\d+ \(ValueError: no max\)", refused)
    crash = capture(subject, "d64", SCORING["bfloat16-half-mean-d64-o17"]).problem
    assert crash == "the subject's call raised ZeroDivisionError: division by zero"


def test_a_subject_that_refuses_every_variant_offers_none_and_is_wrong(launching) -> None:
    problem = capture(launching("raise ValueError('never')"), "usual", SCORING["bfloat16-half-mean"]).problem
    assert problem == "the subject's call raised ValueError: never"
