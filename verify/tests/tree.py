"""A tiny repository with phases of its own, on which the tests run the real instrument in real processes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from verify.record.reading import read_record
from verify.record.schema import CheckResult, Record
from verify.run.events import read_events

REPOSITORY = Path(__file__).resolve().parents[2]

_HEADER = """
import os, signal, subprocess, time
from pathlib import Path
import pytest
from verify import check, skip
from verify.errors import InfraError

WORDS = dict(claim="It holds.", reason="It matters.", remedy="Mend it.")
"""

#: Other tests run beside this one: only where one says so is the machine ever busy.
_NEVER_BUSY = """
import os, verify.machine.processors
verify.machine.processors.BUSY_SHARE = float(os.environ.get("TREE_BUSY_SHARE", "inf"))
"""

#: Starts the CLI with a watchdog that does not wait as long as it does for real checks, and with a quick heartbeat.
_IMPATIENT = f"""{_NEVER_BUSY}
import sys, verify.run.process, verify.cli, verify.heartbeat
verify.run.process.GRACE_S = 0.5
verify.heartbeat.EVERY_S = float(os.environ.get("TREE_HEARTBEAT_S", 30))
sys.exit(verify.cli.main(sys.argv[1:]))
"""


@dataclass(frozen=True, slots=True)
class Tree:
    root: Path

    def write_phase(self, phase: int, body: str) -> None:
        (self.root / "phases" / f"p{phase}_tiny.py").write_text(_HEADER + body)

    def verify(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return self._run([sys.executable, "-c", _IMPATIENT, *arguments], environment)

    def pytest(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        options = ["-p", "pytest_timeout", "-p", "no:cacheprovider", "--color=no"]
        return self._run([sys.executable, "-m", "pytest", *options, *arguments], environment)

    def start_verify(self, *arguments: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", _IMPATIENT, *arguments],
            cwd=self.root, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    def environment(self) -> dict[str, str]:
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "TRITON_"))}
        # the plugins that happen to be installed take most of a child's start
        own = {"PYTHONPATH": str(REPOSITORY), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "COLUMNS": "120"}
        return {**clean, **own}

    def records(self) -> list[Record]:
        """The records of all runs, oldest first."""
        paths = self.root.glob("reports/runs/*/record.json")
        return [read_record(path) for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns)]

    def results(self) -> dict[str, CheckResult]:
        """The results of the newest run, by id."""
        return {result.id: result for result in self.records()[-1].results}

    def events(self) -> list[dict]:
        """The events of the newest run, none if there is no run yet."""
        runs = sorted(self.root.glob("reports/runs/*"))
        return read_events(runs[-1]) if runs else []

    def _run(self, command: list[str], environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        merged = {**self.environment(), **environment}
        return subprocess.run(command, cwd=self.root, env=merged, capture_output=True, text=True, timeout=120)


def make_tree(root: Path) -> Tree:
    """A repository with this one's configuration, an importable subject and no phases yet."""
    for name in ("conftest.py", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, root / name)
    with (root / "conftest.py").open("a") as conftest:
        conftest.write(_NEVER_BUSY)
    subject = '__version__ = "9.9"\nimport json\ndef parse(text): return json.loads(text)\ndef call(back): back()\n'
    subject += 'def late(): raise TimeoutError("the subject gave up")\n'
    for package, text in (("phases", ""), ("triattention", subject)):
        (root / package).mkdir()
        (root / package / "__init__.py").write_text(text)
    return Tree(root)
