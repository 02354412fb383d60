"""compute-sanitizer around the kernel checks, with a stand-in for the tool."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from phases import p4_sanitizer
from verify.checks import catalogue
from verify.run import sanitizer

_HEADER = "========= COMPUTE-SANITIZER\n"
_CLEAN = f"{_HEADER}========= ERROR SUMMARY: 0 errors\n"
_INVALID = """========= Invalid __global__ read of size 4 bytes
=========     at score_kernel+0x5f0
=========     by thread (3,0,0) in block (1,0,0)
=========     Address 0x7f2c00000204 is out of bounds
=========
========= ERROR SUMMARY: 2 errors
"""
_RACE = """========= Warning: Race reported between Write access at kernel+0x80 and Read access at kernel+0x90
=========
========= RACECHECK SUMMARY: 1 hazard displayed (0 errors, 1 warning)
"""
_NODE = "phases/p3_compile.py::test_kernel_launches[bfloat16-half-mean]"


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Put a compute-sanitizer on PATH that writes ``log`` and ends as ``ending``, an expression, says."""

    def place(log: str, ending: str = "subprocess.call(command)") -> None:
        program = tmp_path / sanitizer.PROGRAM
        program.write_text(
            f"#!{sys.executable}\nimport os, pathlib, subprocess, sys, time\n"
            "at = sys.argv.index('--log-file')\ncommand = sys.argv[at + 2:]\n"
            f"pathlib.Path(sys.argv[at + 1]).write_text({log!r})\nsys.exit({ending})\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")

    return place


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (_CLEAN, sanitizer.Finding(0, "")),
        (_HEADER + _INVALID, sanitizer.Finding(2, "Invalid __global__ read of size 4 bytes")),
        (_HEADER + _RACE, sanitizer.Finding(1, _RACE.splitlines()[0].removeprefix("========= "))),
        (
            f"{_HEADER}========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            sanitizer.Finding(0, ""),
        ),
        (f"{_HEADER}========= Error: process didn't terminate successfully\n", None),
        ("", None),
    ],
)
def test_the_log_of_a_tool_is_read(log: str, found: sanitizer.Finding | None) -> None:
    assert sanitizer.read(log) == found


def test_a_clean_tool_around_a_check_that_passes_finds_nothing(tool) -> None:
    tool(_CLEAN)
    assert sanitizer.sanitize("memcheck", _NODE, device="cpu") == sanitizer.Finding(0, "")


def test_what_a_tool_finds_counts_whatever_became_of_the_checks(tool) -> None:
    tool(_HEADER + _INVALID, "1")
    assert sanitizer.sanitize("memcheck", _NODE, device="cpu").errors == 2


@pytest.mark.parametrize(
    ("log", "ending", "complaint"),
    [
        (_HEADER, "255", "racecheck ended with exit code 255 and no summary: there was no output"),
        (_HEADER, "time.sleep(60)", "racecheck did not finish within 2 s, after 0 checks"),
        (_CLEAN, "0", "racecheck saw 0 of 1 checks"),
        (_CLEAN, "subprocess.call([*command, '-k', 'nothing'])", "racecheck saw 0 of 1 checks"),
    ],
)
def test_a_tool_that_crashed_or_did_not_finish_is_a_failure(tool, log: str, ending: str, complaint: str) -> None:
    tool(log, ending)
    limit_s = 2 if "sleep" in ending else 60
    with pytest.raises(AssertionError, match=complaint):
        sanitizer.sanitize("racecheck", _NODE, device="cpu", limit_s=limit_s)


def test_nothing_is_left_of_a_tool_whose_caller_was_killed(tool, tmp_path: Path) -> None:
    tool(_CLEAN, f"pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid())) and time.sleep(60)")
    program = f"from verify.run.sanitizer import sanitize; sanitize('memcheck', {_NODE!r}, device='cpu')"
    caller = subprocess.Popen([sys.executable, "-c", program])
    until = time.monotonic() + 60
    while not any(path.stat().st_size for path in tmp_path.glob("pid")) and time.monotonic() < until:
        time.sleep(0.05)
    caller.kill()
    caller.wait()
    running = Path("/proc", (tmp_path / "pid").read_text(), "stat")
    while running.exists() and running.read_text().split()[2] != "Z" and time.monotonic() < until:
        time.sleep(0.05)
    assert not running.exists() or running.read_text().split()[2] == "Z"


def test_a_machine_without_the_tool_skips_the_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(pytest.skip.Exception, match="compute-sanitizer is not on PATH") as skipped:
        p4_sanitizer.test_sanitizer("memcheck", None, "cuda", None)
    assert skipped.value.code == "PKG_MISSING"


def test_the_kernel_checks_are_those_of_phase_3_and_the_triton_path() -> None:
    chosen = {check.spec.family for check in catalogue() if check.node in sanitizer.nodes()}
    assert chosen == {"p3.scoring", "p3.plan", "p4.triton_oracle"}
