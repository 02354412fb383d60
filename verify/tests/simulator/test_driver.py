"""Triton kernels launched through the driver, in child processes, because a simulated GPU replaces Triton's driver."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from verify.tests.tree import REPOSITORY

_LIMIT_S = 300
_SM = 80


def cases(module: str) -> list[str]:
    """The names of the cases of a module, which needs a process of its own."""
    return re.findall(r"^def (case_\w+)", (Path(__file__).parent / f"{module}.py").read_text("utf-8"), re.M)


def _environment() -> dict[str, str]:
    """That of this process, in which other tests may have asked for Triton's interpreter."""
    return {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}


@cache
def told(module: str, sm: int, *some: str) -> dict[str, str]:
    """What went wrong with each case of a module, or with some, on a simulated GPU."""
    command = [sys.executable, "-m", f"verify.tests.simulator.{module}", str(sm), *some]
    done = subprocess.run(command, cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=_LIMIT_S)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", cases("launches"))
def test_a_launch(case: str) -> None:
    wrong = told("launches", _SM)[case]
    assert not wrong, wrong


def _answer(program: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=_environment(), capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_process_whose_triton_interprets_cannot_simulate() -> None:
    program = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import triton
from verify.errors import ConfigurationError
from verify.simulator.driver import install
try:
    install(80)
except ConfigurationError as error:
    print(error)
"""
    assert _answer(program) == "--device sim:sm80 needs a process in which Triton does not interpret its kernels"


def test_a_process_without_triton_cannot_simulate() -> None:
    program = """
import sys
sys.modules["triton"] = None
from verify.errors import ConfigurationError
from verify.simulator.driver import install
try:
    install(120)
except ConfigurationError as error:
    print(error)
"""
    assert _answer(program).startswith("--device sim:sm120 needs Triton, which does not import (")
