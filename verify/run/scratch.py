"""A run of some checks that proves nothing about the machine, so it leaves no record and only returns its results."""

from __future__ import annotations

import os
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.machine.workers import end_with_parent
from verify.record.schema import CheckResult
from verify.run import events
from verify.run.probe import Probed, read_probed
from verify.run.process import pytest_command, pytest_environment


@dataclass(frozen=True)
class Scratch:
    """The results and findings by id, even if pytest died, and the names of the files that they rest on; ``exit_code``
    is pytest's, or None after the time limit.
    """

    results: dict[str, CheckResult]
    probed: dict[str, Probed]
    rests_on: set[str]
    exit_code: int | None
    last_line: str

    def finished(self) -> Scratch:
        """Return self. Raises ConfigurationError if pytest did not finish."""
        if self.exit_code not in (0, 1):
            how = "did not finish in time" if self.exit_code is None else f"ended with exit code {self.exit_code}"
            raise ConfigurationError(f"the scratch run {how}: {self.last_line}")
        return self


def scratch_run(
    *options: str,
    subject: str,
    device: str,
    limit_s: float,
    under: Sequence[str] = (),
    environment: Mapping[str, str] | None = None,
) -> Scratch:
    """Run the checks that pytest's ``options`` select, as a child of the command ``under`` if given."""
    root = repository_root()
    with tempfile.TemporaryDirectory() as folder:
        scratch, log = Path(folder) / "run", Path(folder) / "log"
        command = [*under, *pytest_command(root), "-q", f"--scratch={scratch}", f"--subject={subject}"]
        with log.open("wb") as stream:
            child = subprocess.Popen(
                [*command, f"--device={device}", *options],
                cwd=root, env=pytest_environment() | dict(environment or {}), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT, preexec_fn=end_with_parent,
            )  # fmt: skip
        try:
            exit_code = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            exit_code = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()
        said = log.read_text("utf-8", "replace").strip().splitlines()
        ran = scratch.is_dir()
        return Scratch(
            events.read_results(scratch) if ran else {},
            read_probed(scratch) if ran else {},
            events.read_grounds(scratch) if ran else set(),
            exit_code,
            said[-1] if said else "there was no output",
        )
