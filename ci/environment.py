"""The virtual environment that ``bootstrap.py`` makes, and the commands it runs. Standard library only."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any


@dataclass(frozen=True)
class Outcome:
    """How a command ended: its exit status and everything it printed."""

    code: int
    output: str

    @property
    def reason(self) -> str:
        """Why it failed, in one line taken from pip's output."""
        conflict = re.search(r"The conflict is caused by:\n((?: {4}.*\n)+)", self.output)
        missing = conflict or "No matching distribution found" in self.output
        if missing and (broken := re.search(r"connection broken by '(\w+)", self.output)):
            return f"the package index cannot be reached ({broken[1]})"
        if conflict:
            causes = ", ".join(line.strip() for line in conflict[1].splitlines())
            return f"the package index has no version that satisfies this: {causes}"
        lines = [line.strip() for line in self.output.splitlines() if line.strip()]
        errors = [line[len("ERROR: ") :] for line in lines if line.upper().startswith("ERROR: ")]
        return (errors or lines or ["it printed nothing"])[-1].rstrip(".")


Runner = Callable[[Sequence[str]], Outcome]


@dataclass(frozen=True)
class LoggedRunner:
    """Runs commands and appends their output to ``log``; child processes inherit the open ``lock``.

    So a pip that outlives a killed set-up still holds the lock, and the next set-up waits for it.
    """

    log: Path
    lock: IO[str]

    def __call__(self, command: Sequence[str]) -> Outcome:
        with self.log.open("a+b") as stream:
            stream.write(f"\n$ {' '.join(command)}\n".encode())
            stream.flush()
            start = stream.tell()
            finished = subprocess.run(
                command,
                stdin=subprocess.DEVNULL,
                stdout=stream,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock.fileno(),),
                env={**os.environ, "PIP_USER": "0"},
                check=False,
            )
            stream.seek(start)
            return Outcome(finished.returncode, stream.read().decode(errors="replace"))


@dataclass(frozen=True)
class Venv:
    """The virtual environment at ``path``, made by the Python that runs this file."""

    path: Path

    @property
    def python(self) -> Path:
        return self.path / "bin" / "python"

    @property
    def site_packages(self) -> Path:
        return self.path / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"

    @property
    def log(self) -> Path:
        return self.path / "bootstrap.log"

    @property
    def stamp(self) -> Path:
        return self.path / "bootstrap.json"

    def is_ours(self) -> bool:
        """Whether its interpreter is the one running now: false when Python was replaced, moved or removed."""
        return os.path.realpath(self.python) == os.path.realpath(sys.executable) and self.site_packages.is_dir()

    def distributions(self) -> list[str]:
        return sorted(path.parent.name for path in self.site_packages.glob("*.dist-info/RECORD"))

    def drop_torn_distributions(self) -> None:
        """Remove what a killed pip left behind, because pip takes any ``dist-info`` folder for an installed package."""
        for leftover in self.site_packages.glob("~*"):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        for info in self.site_packages.glob("*.dist-info"):
            if not _is_whole(info):
                shutil.rmtree(info)

    def read_stamp(self) -> dict[str, Any]:
        """The stamp; empty if it is missing or unreadable."""
        try:
            stamp = json.loads(self.stamp.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return stamp if isinstance(stamp, dict) else {}

    def write_stamp(self, stamp: dict[str, Any]) -> None:
        handle, temporary = tempfile.mkstemp(dir=self.path, prefix=".stamp.")
        with os.fdopen(handle, "w", encoding="utf-8") as stream:
            json.dump(stamp, stream, indent=1)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, self.stamp)


def _is_whole(info: Path) -> bool:
    """Whether pip finished this distribution (it writes INSTALLER after the files) and all recorded files exist."""
    if not (info / "INSTALLER").is_file() or not (info / "RECORD").is_file():
        return False
    with (info / "RECORD").open(newline="", encoding="utf-8") as stream:
        names = [row[0] for row in csv.reader(stream) if row and not row[0].endswith(".pyc")]
    return all((info.parent / name).exists() for name in names)
