"""The kernel checks under NVIDIA's compute-sanitizer, which sees what a right result can hide.

It finds accesses outside an allocation, races in shared memory and reads of memory that nothing wrote, at ten to a
hundred times the usual time, and so it runs only when asked for: ``python -m verify run --sanitize``.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from verify.checks import catalogue
from verify.record.schema import Verdict
from verify.run.scratch import scratch_run

PROGRAM = "compute-sanitizer"

TOOLS = ("memcheck", "racecheck", "initcheck")

#: The tool's own, beside the time that checks of the kernels take with it.
LIMIT_S = 3600.0

#: Python may take its time to reach the GPU; processes that build kernels have nothing to check; and libraries ask the
#: driver for what it may not have, which is an error of the call and none of a kernel.
_OPTIONS = ("--launch-timeout", "0", "--target-processes", "application-only", "--report-api-errors", "no")

#: One allocation for each tensor, or an access outside one lands in its neighbour's cached block unseen.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

#: ``ERROR SUMMARY: 2 errors``, and of racecheck ``RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)``.
_SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\))")

_LINE = re.compile(r"^=+ +(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)")


@dataclass(frozen=True)
class Finding:
    """How many errors a tool counted, and the first that it described, or nothing."""

    errors: int
    first: str


def nodes() -> list[str]:
    """The HARD checks that launch the scoring kernel: those of phase 3, and the Triton path of phase 4."""
    return [
        check.node
        for check in catalogue()
        if (check.phase == 3 and check.spec.gate == "hard") or check.spec.family == "p4.triton_oracle"
    ]


def sanitize(
    tool: str, *checks: str, subject: str = "bundled", device: str = "cuda", limit_s: float = LIMIT_S
) -> Finding:
    """What ``tool`` finds in the checks with these nodes, in a process of its own.

    Raises AssertionError when they did not come to their end, or one of them does not pass there; FileNotFoundError
    where there is no compute-sanitizer.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run = scratch_run(
            *checks, subject=subject, device=device, limit_s=limit_s, environment=_ENVIRONMENT,
            under=[PROGRAM, "--tool", tool, *_OPTIONS, "--log-file", str(log)],
        )  # fmt: skip
        found = read(log.read_text("utf-8", "replace") if log.is_file() else "")
    if found is not None and found.errors:
        return found
    assert run.exit_code is not None, f"{tool} was not finished within {limit_s:g} s, after {len(run.results)} checks"
    assert found is not None, f"{tool} ended with exit code {run.exit_code} and no summary: {run.last_line}"
    wrong = [result for result in run.results.values() if result.verdict is not Verdict.PASS]
    assert not wrong, f"under {tool} {wrong[0].id} is {wrong[0].verdict}: {wrong[0].message}"
    assert len(run.results) == len(checks), f"{tool} saw {len(run.results)} of {len(checks)} checks: {run.last_line}"
    return found


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def read(log: str) -> Finding | None:
    """What the log of a tool says; None where it has no summary, because the process or the tool ended early."""
    counts = [match for line in log.splitlines() if (match := _SUMMARY.match(line))]
    if not counts:
        return None
    errors = sum(int(number) for match in counts for number in match.groups(default="0"))
    described = (match[1] for line in log.splitlines() if (match := _LINE.match(line)))
    return Finding(errors, next(described, "") if errors else "")
