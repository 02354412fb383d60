"""What a node does with a job, here in this process: the job's commands are small programs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from verify.files import repository_root
from verify.fleet import node
from verify.record.digest import instrument_sha256
from verify.tests.samples import REPOSITORY

INSTRUMENT = "0123456789abcdef" * 4

#: A run that logs two events, and leaves a record next to a file that nobody asked for.
RUN = """
import pathlib, sys, time
run = pathlib.Path(sys.argv[-1]) / "20261201T000000Z-sm90-beef"
run.mkdir(parents=True)
(run / "run.json").write_text('{"selected": [1, 2, 3]}')
(run / "p4.log").write_text("noise")
events = ['{"event": "start", "id": "p4.gqa.8"}', '{"event": "result", "result": {"id": "a"}}', '{"ev']
(run / "events.jsonl").write_text("\\n".join(events))
time.sleep(1.5)
(run / "record.json").write_text("{}")
print(f"the record is in {run}")
"""


def _job(command: str, **fields: Any) -> dict[str, Any]:
    found = {"instrument": INSTRUMENT, "gpus": ["sm90"], "why": "", **fields.pop("found", {})}
    job = {"target": "sm90", "instrument": INSTRUMENT, "limit_s": 60.0, "command": ["-c", textwrap.dedent(command)]}
    return {**job, "arrival": ["-c", f"print({json.dumps(json.dumps(found))})"], **fields}


def test_a_run_is_followed_and_its_files_are_handed_over() -> None:
    told: list[str] = []
    result = node.carry_out(_job(RUN), told.append)
    assert told == ["", "phase 4, 1 of 3"]
    assert result["code"] == 0
    names = ["events.jsonl", "record.json", "run.json"]
    assert list(result["files"]) == [f"20261201T000000Z-sm90-beef/{name}" for name in names]
    assert result["tail"] == "the record is in <tmp>/runs/20261201T000000Z-sm90-beef"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"found": {"gpus": ["sm86", "sm90"]}}, "offers sm90, but its GPU is an sm86"),
        ({"found": {"gpus": [], "why": "no driver"}}, "offers sm90, but it shows no GPU (no driver)"),
        (
            {"found": {"instrument": "f" * 64}},
            "has another version of the suite: its instrument is ffffffffffff, and this one's is 0123456789ab",
        ),
        (
            {"arrival": ["-c", "import verify_which_is_not_there"]},
            "cannot run the suite with the Python of its Ray "
            "(ModuleNotFoundError: No module named 'verify_which_is_not_there')",
        ),
    ],
)
def test_a_node_that_is_not_fit_says_why_and_runs_nothing(fields: dict[str, Any], words: str, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    assert node.carry_out(_job(f"open({str(begun)!r}, 'w')", **fields), lambda _: None) == {"refused": words}
    assert not begun.exists()


def test_a_run_without_a_gpu_needs_none() -> None:
    result = node.carry_out(_job("print('done')", target="emulated", found={"gpus": []}), lambda _: None)
    assert (result["code"], result["files"], result["tail"]) == (0, {}, "done")


def test_a_node_says_truly_what_it_is() -> None:
    done = subprocess.run(
        [sys.executable, "-c", node.ARRIVAL], cwd=REPOSITORY, capture_output=True, text=True, timeout=60
    )
    found = json.loads(done.stdout)
    assert found["instrument"] == instrument_sha256(repository_root())
    assert found.keys() == {"instrument", "gpus", "why"}


def test_a_run_over_its_limit_is_ended_with_all_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node, "_STOP_LIMIT_S", 0.5)
    pids = tmp_path / "pids"
    command = f"""
        import os, signal, subprocess, sys, time
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
        open({str(pids)!r}, "w").write(f"{{os.getpid()}} {{child.pid}}")
        time.sleep(600)
    """
    assert node.carry_out(_job(command, limit_s=1.5), lambda _: None)["code"] is None
    assert all(map(_ends, map(int, pids.read_text().split())))


def _ends(pid: int) -> bool:
    """Whether a process is gone within moments; one that nobody waits for stays as a zombie."""
    until = time.monotonic() + 20
    while time.monotonic() < until:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.05)
    return False


def test_a_run_ends_with_the_process_of_its_task(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    command = f"import os, time; open({str(pid)!r}, 'w').write(str(os.getpid())); time.sleep(600)"
    job = json.dumps(_job(command))
    program = f"import json; from verify.fleet import node; node.carry_out(json.loads({job!r}), print)"
    with subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.DEVNULL) as task:
        until = time.monotonic() + 30
        while not (pid.exists() and pid.read_text()) and time.monotonic() < until:
            time.sleep(0.05)
        os.kill(task.pid, signal.SIGKILL)
    assert _ends(int(pid.read_text()))
