"""One GPU's job: verifies the card, tries HARD failures a second time, and says how it ended.

The checks are those of ``verify run`` with the row's options. ``outcome.json``, next to the runs, has the row's name,
the exit code and the last line that was said, so that a job without a record can be explained.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from verify.files import write_atomic
from verify.machine.environment import at_least

OUTCOME = "outcome.json"

_RUNS = Path("reports/runs")
_QUERY = ("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
_QUERY_LIMIT_S = 60


@dataclass(frozen=True, slots=True)
class Outcome:
    """How the job of a row ended; ``confirmed`` is the exit code of the second run, None if there was none."""

    row: str
    exit_code: int
    said: str
    confirmed: int | None = None


#: Runs a command, shows what it prints, and returns its exit code and its last line.
Runner = Callable[[Sequence[str]], tuple[int, str]]


def drivers() -> list[str]:
    """The driver's version of every GPU that the machine has; empty if the driver cannot be asked."""
    try:
        done = subprocess.run(_QUERY, capture_output=True, text=True, timeout=_QUERY_LIMIT_S)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()] if done.returncode == 0 else []


def unfit(row: Mapping[str, Any], found: Sequence[str]) -> str:
    """Why the machine is not the one that the row describes; empty if it is. ``found`` are the drivers of its GPUs."""
    if len(found) != row["gpus"]:
        return f"the machine has {len(found)} GPUs, and ci/gpus.toml expects {row['gpus']}"
    if row["driver"] and (old := [one for one in found if not at_least(one, row["driver"])]):
        return f"the driver is {old[0]}, and ci/gpus.toml expects {row['driver']} or newer"
    return ""


def carry_out(row: Mapping[str, Any], found: Sequence[str], runs: Path, run: Runner) -> Outcome:
    """Verify the GPU of a row and, if HARD checks fail, try those a second time. ``runs`` has the records."""
    if why := unfit(row, found):
        return Outcome(row["name"], 3, why)
    before = {path.parent.name for path in runs.glob("*/record.json")}
    verify = (sys.executable, "-m", "verify", "run")
    code, said = run([*verify, *row["options"]])
    made = [path.parent.name for path in runs.glob("*/record.json") if path.parent.name not in before]
    if code != 1 or not made:
        return Outcome(row["name"], code, said)
    return Outcome(row["name"], code, said, run([*verify, "--confirm", max(made)])[0])


def _shown(command: Sequence[str]) -> tuple[int, str]:
    last = ""
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return child.returncode, last


def main() -> int:
    """Carry out the row in the environment's ROW (JSON); the exit code of the first run."""
    _RUNS.mkdir(parents=True, exist_ok=True)
    ended = carry_out(json.loads(os.environ["ROW"]), drivers(), _RUNS, _shown)
    write_atomic(_RUNS / OUTCOME, json.dumps(asdict(ended)) + "\n")
    if ended.exit_code:
        print(f"nightly: {ended.row}: exit code {ended.exit_code}: {ended.said}", file=sys.stderr)
    return ended.exit_code


if __name__ == "__main__":
    sys.exit(main())
