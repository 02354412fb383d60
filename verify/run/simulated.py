"""Checks on a simulated GPU: each runs once for every way in which approximate instructions may round.

A result is ``simulated`` only if the simulator executed a launch of its check. A finding of the simulator counts even
where the subject, or the check, catches the exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from verify.judge.problems import UNWRITTEN
from verify.record.schema import Measurement
from verify.record.simulation import MODES, UNSUPPORTED, Census, SimulatedKernel
from verify.run import events
from verify.run.recorder import CURVES, EVIDENCE, MEASUREMENTS, spec_of
from verify.simulator.census import kept_census
from verify.simulator.errors import Unsupported

if TYPE_CHECKING:
    from verify.simulator.driver import Launched, SimulatedGpu

#: What ``-m brief`` selects: some must-pass checks, which between them launch every kind of variant of the scoring
#: kernel: head dims, layouts, types and strides of the keys, mean and maximum.
BRIEF = frozenset(
    f"p4.triton_oracle.{case}"
    for case in (
        *("n33", "d64", "d96", "d256", "d128-interleaved", "d256-interleaved", "float16", "float32"),
        *("max-d64", "max-d128", "max-interleaved", "transposed", "spread", "spread-interleaved", "offsets17-max"),
    )
)
#: What a simulated run does not select, in one sentence.
LEFT_OUT = "a simulated GPU has phases 3 to 5, but for what needs a card or its tools, and a few rounds of phase 6"


def _worst(measurements: Iterable[Measurement]) -> list[Measurement]:
    """Of each number that was measured in several modes the one with the least headroom."""
    found: dict[tuple[str, str], Measurement] = {}
    for one in measurements:
        before = found.setdefault((one.name, one.where), one)
        if one.headroom < before.headroom:
            found[one.name, one.where] = one
    return [*found.values()]


class Simulated:
    """The pytest plugin of a simulated run."""

    def __init__(self, simulation: SimulatedGpu, run_dir: Path) -> None:
        self._simulation, self._run_dir = simulation, run_dir
        simulation.unwritten = (UNWRITTEN << 16) + UNWRITTEN  # with which verify/judge/guarded.py fills memory
        self._counted: dict[str, tuple[Census | None, str]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem: pytest.Function) -> bool | None:
        if spec_of(pyfuncitem) is None:
            return None
        names = pyfuncitem._fixtureinfo.argnames
        arguments = {name: pyfuncitem.funcargs[name] for name in names}
        for mode in MODES:
            self._simulation.begin(mode)
            pyfuncitem.stash[CURVES].clear()
            self._run_once(pyfuncitem, arguments, mode)
            if not self._simulation.depends_on_mode:
                break
        taken = pyfuncitem.stash[MEASUREMENTS]
        taken[:] = _worst(taken)
        return True

    def _run_once(self, item: pytest.Function, arguments: Mapping[str, Any], mode: str) -> None:
        simulation = self._simulation
        try:
            item.obj(**arguments)
        except Unsupported:
            pass  # noted by the simulation, and told below
        except AssertionError as error:
            if not (simulation.faults or simulation.unsupported):
                if mode != MODES[0]:
                    told = f"where approximate instructions give the {mode} value that their error allows: {error}"
                    error.args = (told, *error.args[1:])
                raise
        finally:
            if launched := simulation.executed():
                item.stash[EVIDENCE] = "simulated"
                if simulation.alter is None:  # otherwise it was not what Triton compiled
                    events.append_launched(self._run_dir, [self._described(one) for one in launched])
        if simulation.unsupported:
            item.stash[EVIDENCE] = "simulated"
            skipped = pytest.skip.Exception(str(simulation.unsupported[0]))
            skipped.code = UNSUPPORTED  # type: ignore[attr-defined]  # pytest's exception carries it to the recorder
            raise skipped
        if simulation.faults:
            raise simulation.faults[0]

    def _described(self, one: Launched) -> SimulatedKernel:
        if one.ptx_sha256 not in self._counted:
            self._counted[one.ptx_sha256] = kept_census(one.ptx, one.cubin)
        counted, why_not = self._counted[one.ptx_sha256]
        return SimulatedKernel(
            kernel=one.name, ptx_sha256=one.ptx_sha256, launches=one.launches,
            thread_instructions=one.thread_instructions, census=counted, uncounted=why_not,
        )  # fmt: skip
