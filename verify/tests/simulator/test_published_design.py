"""A kernel of the published design on a simulated GPU, in the slow path of the cosine too."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from verify.tests.simulator.published_design import POSITIONS


@pytest.mark.parametrize("sm", [90, 120])
def test_it_computes_what_its_formula_says(sm: int) -> None:
    command = [sys.executable, "-m", "verify.tests.simulator.published_design", str(sm)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [one["position"] for one in found] == [*POSITIONS]
    assert all(one["error"] <= 1 for one in found)
    assert found[-1]["launches"] == 2
    # the slow path reduces the phase with a table in local memory and a chain of carries
    assert {"ld.local.b32", "st.local.b32", "mad.lo.cc.u32", "madc.hi.u32"} <= {*found[-1]["opcodes"]}
