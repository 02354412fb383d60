"""The files of the plugin's counters: whose they are, and when they go."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_SERVER = (
    "import os; from triattention.vllm.runtime import metrics; metrics.expose();"
    "print(os.environ[metrics.DIRECTORY], flush=True); input()"
)


def _server(folder: Path) -> tuple[subprocess.Popen[str], Path]:
    child = subprocess.Popen(
        [sys.executable, "-c", _SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(folder)},
    )  # fmt: skip
    return child, Path(child.stdout.readline().strip())


def test_a_server_clears_away_what_a_killed_one_left_and_nothing_of_a_live_one(tmp_path: Path) -> None:
    killed, left = _server(tmp_path)
    killed.kill()
    killed.communicate()
    first, ours = _server(tmp_path)
    assert (left.exists(), ours.is_dir()) == (False, True)
    second, theirs = _server(tmp_path)
    assert ours.is_dir()
    assert theirs.is_dir()
    for server in (first, second):
        server.communicate("\n", timeout=30)
    assert not list(tmp_path.iterdir())
