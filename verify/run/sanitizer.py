"""The kernel checks under NVIDIA's compute-sanitizer, which finds errors that a correct result can hide.

It finds accesses outside an allocation, races in shared memory and reads of uninitialised memory, but takes ten to a
hundred times as long, so it runs only when asked for: ``python -m verify run --sanitize``.
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

#: The limit of one tool over the checks that it runs.
LIMIT_S = 3600.0

#: No limit for Python to reach the GPU; child processes, which only build kernels, are not checked; nor are API errors,
#: because libraries probe the driver for optional features, which is not a kernel error.
_OPTIONS = ("--launch-timeout", "0", "--target-processes", "application-only", "--report-api-errors", "no")

#: One allocation per tensor; otherwise an access outside one could land unnoticed in a neighbour's cached block.
_ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

#: ``ERROR SUMMARY: 2 errors``; for racecheck ``RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)``.
_SUMMARY = re.compile(r"^=+ (?:ERROR SUMMARY: (\d+) errors?|RACECHECK SUMMARY: .*\((\d+) errors?, (\d+) warnings?\))")

_LINE = re.compile(r"^=+ +(?!COMPUTE-SANITIZER|ERROR SUMMARY|RACECHECK SUMMARY)(\S.*)")


@dataclass(frozen=True)
class Finding:
    """The number of errors that a tool found, and its description of the first one; empty without any."""

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
    """Run the checks with these nodes under ``tool``, in a separate process, and return its finding.

    Raises AssertionError if the checks did not finish, or one of them does not pass there; FileNotFoundError if
    compute-sanitizer is not installed.
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
    assert run.exit_code is not None, f"{tool} did not finish within {limit_s:g} s, after {len(run.results)} checks"
    assert found is not None, f"{tool} ended with exit code {run.exit_code} and no summary: {run.last_line}"
    wrong = [result for result in run.results.values() if result.verdict is not Verdict.PASS]
    assert not wrong, f"under {tool} {wrong[0].id} is {wrong[0].verdict}: {wrong[0].message}"
    assert len(run.results) == len(checks), f"{tool} saw {len(run.results)} of {len(checks)} checks: {run.last_line}"
    return found


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def read(log: str) -> Finding | None:
    """The finding in the log of a tool; None if it has no summary, because the process or the tool ended early."""
    counts = [match for line in log.splitlines() if (match := _SUMMARY.match(line))]
    if not counts:
        return None
    errors = sum(int(number) for match in counts for number in match.groups(default="0"))
    described = (match[1] for line in log.splitlines() if (match := _LINE.match(line)))
    return Finding(errors, next(described, "") if errors else "")
