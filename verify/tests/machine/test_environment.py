from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from verify.errors import ConfigurationError
from verify.machine import nvml
from verify.machine.environment import at_least, capture, cuda_toolkit, ptxas_versions, variables, version_of
from verify.tests.samples import REPOSITORY


def test_a_cpu_run_has_versions_and_no_gpu() -> None:
    environment = capture("cpu")
    assert environment.gpu is None
    assert environment.torch == version_of("torch")
    assert re.match(r"\d+\.\d+", environment.triton)
    assert all(re.fullmatch(r"\d+\.\d+\.\d+", version) for version in environment.ptxas.values())
    assert "ptxas" in environment.ptxas


def test_capturing_imports_neither_torch_nor_triton() -> None:
    program = (
        "import sys; from verify.machine.environment import capture; "
        "capture('cpu'); print({'torch', 'triton'} & {*sys.modules})"
    )
    child = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "set()"


def test_a_gpu_run_without_a_driver_is_refused() -> None:
    try:
        gpus = nvml.query().gpus
    except nvml.NvmlUnavailable as error:
        with pytest.raises(ConfigurationError, match=re.escape(str(error))):
            capture("cuda")
    else:
        assert capture("cuda").gpu == gpus[0]


def test_no_visible_gpu_is_refused_on_a_gpu_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigurationError, match=r"device cuda needs"):
        capture("cuda")


def test_the_fusion_default_is_always_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_DEFAULT_FP_FUSION", raising=False)
    assert variables()["TRITON_DEFAULT_FP_FUSION"] == "unset"
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert variables()["TRITON_DEFAULT_FP_FUSION"] == "0"


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("TRITON_INTERPRET", "1", "1"),
        ("NVIDIA_TF32_OVERRIDE", "0", "0"),
        ("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True", "expandable_segments:True"),
        ("TRITON_CACHE_DIR", "/home/somebody/.triton", "set"),
        ("CUDA_HOME", "~/cuda", "set"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "0,1"),
        ("CUDA_VISIBLE_DEVICES", "GPU-12ab", "sha256:" + hashlib.sha256(b"GPU-12ab").hexdigest()),
    ],
)
def test_a_variable_is_kept_without_what_identifies_the_machine(
    name: str, value: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert variables()[name] == kept


def test_variables_that_change_nothing_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "secret")
    for name in ("TORCHELASTIC_HOST", "TRITON_REMOTE_HOST", "CUDA_LICENSE_KEY"):
        monkeypatch.setenv(name, "secret")
    assert "secret" not in variables().values()
    assert "PATH" not in variables()


def test_nvcc_is_found_through_its_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 12.8, V12.8.93'\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("PATH", os.defpath)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert cuda_toolkit() == "12.8.93"


def test_an_assembler_put_in_the_place_of_tritons_is_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "ptxas"
    broken.write_text("#!/bin/sh\nexit 7\n")
    broken.chmod(0o755)
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(broken))
    assert ptxas_versions()["TRITON_PTXAS_PATH"] == "unknown (exit code 7)"
    monkeypatch.setenv("TRITON_PTXAS_PATH", str(tmp_path / "absent"))
    assert ptxas_versions()["TRITON_PTXAS_PATH"] == "does not run (FileNotFoundError)"


@pytest.mark.parametrize(
    ("found", "minimum", "enough"),
    [
        ("0.19.0", "0.19", True),
        ("0.20.0rc1+cpu", "0.20", True),
        ("580.95", "570", True),
        ("0.18.9", "0.19", False),
        ("dev", "0.19", False),
    ],
)
def test_versions_are_compared_as_releases(found: str, minimum: str, enough: bool) -> None:
    assert at_least(found, minimum) is enough
