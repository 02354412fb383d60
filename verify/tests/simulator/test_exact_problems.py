"""Where every rounding is exact, the simulator and Triton's interpreter give the same bits."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from verify.tests.simulator.exact_problems import problems

_LIMIT_S = 1800


def _scores(device: str, count: int) -> dict[str, str]:
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "verify.tests.simulator.exact_problems", device, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, env=clean)
    assert not done.returncode, done.stderr
    return {one["problem"]: one["sha256"] for one in map(json.loads, done.stdout.splitlines())}


def test_a_few_exact_problems_have_the_bits_of_the_interpreter() -> None:
    wanted = _scores("cpu", 6)
    assert len(wanted) == 6
    assert _scores("sim:sm120", 6) == wanted


@pytest.mark.slow
def test_all_exact_problems_have_the_bits_of_the_interpreter() -> None:
    wanted = _scores("cpu", 0)
    found = {sm: _scores(f"sim:sm{sm}", 0) for sm in (80, 90, 120)}
    assert len(wanted) == len(problems()) == 116
    assert sum(len(one) for one in found.values()) >= 348
    assert [name for one in found.values() for name, digest in one.items() if digest != wanted[name]] == []
