"""Fleet runs on a real Ray cluster of three raylets on this machine, one of which dies."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import pytest

from verify.fleet.many import FleetRequest, run
from verify.record.archive import load
from verify.run.request import RunRequest
from verify.tests.samples import REPOSITORY

pytestmark = pytest.mark.slow

#: What each raylet offers. The second one's GPU is one that only Ray believes in.
_NODES = [{"emulated": 1}, {"sm90": 1, "sm120": 1}, {"sm90": 1, "sm89": 1, "GPU": 1}]

#: The variable by which every process of the cluster is found.
_MARK = "TRIATTENTION_TEST_CLUSTER"

_START_LIMIT_S, _LIMIT_S = 90, 120


class Raylets(NamedTuple):
    address: str
    raylets: list[int]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Raylets]:
    """A cluster of ``_NODES``; at the end none of its processes is left, whatever the tests did."""
    if importlib.util.find_spec("ray") is None:
        pytest.fail("ray is not installed; run make setup")
    mark = uuid.uuid4().hex
    folder = tempfile.mkdtemp(prefix="rays-")  # not tmp_path, which is too long for the name of a socket
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", _MARK: mark}
    environment |= {"TMPDIR": folder, "RAY_TMPDIR": folder}
    child = subprocess.Popen(
        [sys.executable, "-m", "verify.tests.fleet.raylets", json.dumps(_NODES)], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd=REPOSITORY,
    )  # fmt: skip
    try:
        timer = threading.Timer(_START_LIMIT_S, child.kill)
        timer.start()
        line = child.stdout.readline()
        timer.cancel()
        yield Raylets(**json.loads(line))
    finally:
        child.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            child.wait(30)
        for process in _marked(mark):
            with suppress(psutil.Error):
                process.kill()
        child.kill()
        child.wait()
        psutil.wait_procs(_marked(mark), timeout=10)
        shutil.rmtree(folder, ignore_errors=True)
    assert _marked(mark) == []


def _marked(mark: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get(_MARK) == mark and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_for(what: Callable[[], Any], limit_s: float = 60) -> Any:
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen")


def _fleet(*words: str) -> list[str]:
    return [sys.executable, "-m", "verify", "fleet", *words]


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout + done.stderr


def test_a_run_outlives_its_command_and_is_collected(cluster: Raylets, tmp_path: Path) -> None:
    command = _fleet("run", f"--address={cluster.address}", "--gpus=emulated", "--phases=1,2", f"--out={tmp_path}")
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as child:
        name = child.stdout.readline().split()[1].rstrip(":")
        for line in child.stdout:
            if "phase" in line:
                break
        child.kill()
    options: dict[str, Any] = {"cwd": REPOSITORY, "capture_output": True, "text": True, "timeout": _LIMIT_S}
    status = subprocess.run(_fleet("status", "--address", cluster.address), **options)
    assert f"run {name}:\n  emulated: node " in status.stdout, _said(status)
    assert "alive, 1 sm120, 1 sm90\n" in status.stdout
    done = subprocess.run(_fleet("collect", "--address", cluster.address, "--out", str(tmp_path), name), **options)
    assert done.returncode == 0, _said(done)
    assert "emulated: exit code 0, " in done.stdout
    (record,) = load([tmp_path]).records
    assert (record.target, record.state, record.selection) == ("emulated", "complete", "--phases 1,2 -m 'not slow'")
    again = subprocess.run(_fleet("collect", "--address", cluster.address, "--out", str(tmp_path), name), **options)
    assert again.returncode == 3
    assert f"there is no fleet run {name} of the cluster" in again.stderr


def test_a_node_without_the_gpu_that_it_offers_is_not_asked_again(cluster: Raylets, tmp_path: Path) -> None:
    words = ["--address", cluster.address, "--gpus", "sm89", "--wait", "0", "--out", str(tmp_path)]
    done = subprocess.run(_fleet("run", *words), cwd=REPOSITORY, capture_output=True, text=True, timeout=_LIMIT_S)
    assert done.returncode == 3, _said(done)
    assert "sm89: NO_RECORD, " in done.stdout
    assert "offers sm89, but it shows no GPU (" in done.stdout
    assert "; no other node with the resource sm89" in done.stdout
    assert [path.name for path in tmp_path.glob("*/*")] == ["absence.json"]


def test_an_interrupted_run_leaves_nothing_running(cluster: Raylets, tmp_path: Path) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    threading.Thread(target=_interrupt_when, args=(pids,)).start()
    assert run(_request(cluster, out, "sm120"), job=lambda request, target: _pretended(request, target, 60, pids)) == 2
    (pid,) = (int(path.name.partition("-")[2]) for path in pids.iterdir())
    _wait_for(lambda: not psutil.pid_exists(pid))
    assert not out.exists() or [*out.iterdir()] == []


def _interrupt_when(pids: Path) -> None:
    _wait_for(lambda: [*pids.iterdir()])
    os.kill(os.getpid(), signal.SIGINT)


def test_a_lost_node_is_replaced_and_costs_the_others_nothing(
    cluster: Raylets, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, pids = tmp_path / "out", tmp_path / "pids"
    pids.mkdir()
    killer = threading.Thread(target=_kill_when, args=(pids, cluster.raylets[2]))
    killer.start()
    asked = _request(cluster, out, "sm120", "sm90", "sm80")
    code = run(asked, job=lambda request, target: _pretended(request, target, 6, pids))
    killer.join()
    printed = capsys.readouterr().out
    assert code == 3, printed
    assert "note: sm90: node " in printed
    assert " was lost (" in printed
    assert "sm80: NO_RUNNER, no runner took the job: no node with the resource sm80 within 5 s" in printed
    assert "sm90: exit code 0, " in printed
    assert {one.target for one in load([out]).records} == {"sm120", "sm90"}
    assert [path.parent.name.partition("Z-")[2] for path in out.glob("*/absence.json")] == ["sm80-no-runner"]
    # on the lost node as well, the run ended with its task
    begun = [int(path.name.partition("-")[2]) for path in pids.iterdir()]
    assert len(begun) == 3
    _wait_for(lambda: not any(map(psutil.pid_exists, begun)))


def _kill_when(pids: Path, raylet: int) -> None:
    """Kill a raylet and its workers, but not what they run, when a run on an sm90 has begun."""
    _wait_for(lambda: [*pids.glob("sm90-*")])
    top = psutil.Process(raylet)
    workers = [one for one in top.children(recursive=True) if one.name().startswith("ray::")]
    for process in (top, *workers):
        process.kill()


def _request(cluster: Raylets, out: Path, *targets: str) -> FleetRequest:
    return FleetRequest(cluster.address, RunRequest(out=out), targets, wait_s=5)


def _pretended(request: FleetRequest, target: str, seconds: float, pids: Path) -> dict[str, Any]:
    """The job of a run on a GPU that is not there; the node says that it has it."""
    job = request.job(target)
    found = {"instrument": job["instrument"], "gpus": [target], "why": ""}
    command = ["-m", "verify.tests.fleet.pretended", target, str(seconds), str(pids)]
    return {**job, "gpus": 0, "arrival": ["-c", f"print({json.dumps(json.dumps(found))})"], "command": command}
