from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from triattention.cli.children import Job, run_jobs, slots_on

HERE = "triattention.tests.test_children"


def sleep(pid_file: str) -> None:
    Path(pid_file).write_text(str(os.getpid()))
    time.sleep(60)


def say(words: str, path: str) -> None:
    print(words, file=sys.stderr)
    with open(path, "a") as stream:
        stream.write(f"{os.environ.get('SLOT')}\n")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_a_child_that_dies_is_told_by_exit_code_and_last_line_and_the_others_go_on(tmp_path: Path) -> None:
    notes: list[str] = []
    jobs = [
        Job("first", "os:_exit", {"status": 3}),
        Job("second", "os:abort", {}),
        Job("third", f"{HERE}:say", {"words": "hello", "path": str(tmp_path / "said")}),
        Job("fourth", f"{HERE}:no_such_function", {}),
    ]
    failures = run_jobs(jobs, [{"SLOT": "a"}, {"SLOT": "b"}], note=notes.append)
    assert len(failures) == 3
    assert "first ended with exit code 3: no output" in failures
    assert any(failure.startswith("second ended with exit code -6 (SIGABRT)") for failure in failures)
    assert any("fourth ended with exit code 1: AttributeError" in failure for failure in failures)
    assert "third: hello" in notes
    assert (tmp_path / "said").read_text().strip() in ("a", "b")


def test_an_interrupt_stops_every_child(tmp_path: Path) -> None:
    files = [tmp_path / name for name in "ab"]

    def tick() -> None:
        if all(file.exists() and file.read_text() for file in files):
            raise KeyboardInterrupt

    jobs = [Job(file.name, f"{HERE}:sleep", {"pid_file": str(file)}) for file in files]
    with pytest.raises(KeyboardInterrupt):
        run_jobs(jobs, [{}, {}], note=lambda line: None, tick=tick)
    assert not any(_alive(int(file.read_text())) for file in files)


def test_a_child_ends_when_its_parent_has_gone(tmp_path: Path) -> None:
    call = json.dumps({"function": f"{HERE}:sleep", "arguments": {"pid_file": str(tmp_path / "pid")}}) + "\n"
    command: dict[str, Any] = {"args": [sys.executable, "-m", "triattention.cli.child"], "stdin": subprocess.PIPE}
    root = str(Path(__file__).parents[2])
    with subprocess.Popen(**command, env={**os.environ, "PYTHONPATH": root}) as child:
        child.stdin.write(call.encode())
        child.stdin.close()
        assert child.wait(30) == 1


def test_each_worker_sees_one_gpu_and_on_a_cpu_none_spins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    assert [slot["CUDA_VISIBLE_DEVICES"] for slot in slots_on(["2", "5"], 3)] == ["2", "5", "2"]
    assert slots_on([], 2) == [{"OMP_WAIT_POLICY": "passive"}] * 2
    assert slots_on([], 1) == [{}]
