"""Faults planted in a copy of the bundled subject: the suite must fail, and name the path that is wrong."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verify.files import repository_root
from verify.record.grounds import PACKAGE


def _subject_with(tmp_path: Path, file: str, before: str, after: str) -> Path:
    root = repository_root()
    shutil.copytree(root / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("tests", "__pycache__"))
    source = tmp_path / PACKAGE / file
    text = source.read_text("utf-8")
    assert before in text, f"{file} no longer contains {before!r}; plant the fault elsewhere"
    source.write_text(text.replace(before, after), "utf-8")
    return tmp_path


@pytest.mark.parametrize(
    ("file", "before", "after", "failing", "passing"),
    [
        pytest.param(
            "scoring.py",
            "torch.hypot(real, imag) @",
            "torch.hypot(real.to(torch.bfloat16), imag.to(torch.bfloat16)).to(torch.float64) @",
            "PyTorch path",
            "Triton path",
            id="norms-in-bf16",
        ),
        pytest.param(
            "kernels.py", "b_re * b_re + b_im * b_im)", "b_re * b_re)", "Triton path", "PyTorch path", id="norm-of-re"
        ),
    ],
)
def test_the_oracle_names_the_path_that_is_wrong(
    tmp_path: Path, file: str, before: str, after: str, failing: str, passing: str
) -> None:
    subject = _subject_with(tmp_path, file, before, after)
    child = subprocess.run(
        [
            sys.executable, "-m", "pytest", "-q", "--phase", "4", f"--subject={subject}", "--device", "cpu",
            "-k", "triton_oracle and n255 or pytorch_oracle and n255 or triton_vs_pytorch", "-p", "no:cacheprovider",
        ],
        capture_output=True, text=True, timeout=120, cwd=repository_root(),
    )  # fmt: skip
    if record := re.search(r"^record: (\S+)/record\.json$", child.stdout, re.MULTILINE):
        shutil.rmtree(repository_root() / record[1])  # it is no run of this checkout
    assert child.returncode == 1, child.stdout[-2000:]
    assert "2 failed, 1 passed" in child.stdout
    assert f"{failing}: error: measured" in child.stdout
    assert f"{passing}: error: measured" not in child.stdout
    said = " ".join(child.stdout.split())
    assert re.search(
        rf"max \|Triton - PyTorch\|: measured \S+, allowed 0.01 at the plan's inputs: the {failing} is wrong "
        rf"\(\S+x its class B budget from the float64 oracle\), the {passing} is right \(class A\)",
        said,
    )
    words = {"Triton path": "scoring with Triton", "PyTorch path": "scoring without Triton"}
    assert re.search(rf"{words[failing]}: class C, \d of \d", said)
    assert f"{words[passing]}: class A, " in said
