"""Whether this machine can simulate a GPU: a kernel of the suite's own, compiled for it and executed.

``python -m verify.simulator.control 120`` prints one line of JSON: ``{"problem": ""}``, or why not in a sentence.
"""

from __future__ import annotations

import json
import subprocess
import sys

from verify.errors import ConfigurationError
from verify.simulator.errors import NotAvailable

#: Importing torch and Triton from a cold disk, and one compilation.
_LIMIT_S = 240


def require(sm: int) -> None:
    """Raise NotAvailable unless a simulated GPU of this SM runs the suite's own kernel; asked in a process of
    its own.
    """
    command = [sys.executable, "-m", "verify.simulator.control", str(sm)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(f"--device sim:sm{sm} did not answer within {_LIMIT_S} s; try again") from error
    lines = done.stdout.strip().splitlines()
    problem = json.loads(lines[-1])["problem"] if lines and not done.returncode else (done.stderr.strip() or "it died")
    if problem:
        raise NotAvailable(
            f"--device sim:sm{sm} is not available: {problem.splitlines()[-1]}; "
            f"`python -m verify compile --sm {sm}` says what this toolchain can build"
        )


def _problem(sm: int) -> str:
    from verify.simulator.driver import install

    try:
        simulation = install(sm)
    except ConfigurationError as error:
        return str(error)
    import torch

    from verify.simulator.kernels import add_kernel

    x, y = torch.arange(128, dtype=torch.float32), torch.full((128,), 0.5)
    out = torch.zeros(128)
    try:
        add_kernel[(1,)](x, y, out, 128)
    except Exception as error:  # whatever Triton raises for a GPU that it does not know
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        told = next((line for line in lines if "fatal" in line.lower()), lines[0])
        return f"its toolchain cannot build for it ({told})"
    if simulation.launches != 1 or not torch.equal(out, x + y):
        return "the suite's own kernel gave a wrong sum, which is a fault of the suite"
    return ""


if __name__ == "__main__":
    print(json.dumps({"problem": _problem(int(sys.argv[1]))}))
