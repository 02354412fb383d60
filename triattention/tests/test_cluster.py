"""A sweep on a real Ray cluster of two raylets on this machine: the files are those of a sweep without one."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from triattention import cluster
from triattention.cli import main
from triattention.tests.command_line import MEASURED_TIMES, lines_of, without_times, write_questions

pytest_plugins = ["triattention.tests.fixtures"]

#: Starts two nodes on loopback, says where they are, and ends them when its input ends.
_RAYLETS = """
import json, sys
from ray.cluster_utils import Cluster
cluster = Cluster()
try:
    place = {"node_ip_address": "127.0.0.1", "num_gpus": 0, "object_store_memory": 80 * 2**20}
    head = cluster.add_node(num_cpus=1, include_dashboard=False, **place)
    other = cluster.add_node(num_cpus=1, **place)
    raylet = other.all_processes["raylet"][0].process.pid
    print(json.dumps({"address": cluster.address, "raylet": raylet}), flush=True)
    sys.stdin.read()
finally:
    cluster.shutdown()
"""

_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3", "RAY_health_check_initial_delay_ms": "1000",
}  # fmt: skip


@pytest.fixture(scope="module")
def raylets() -> Iterator[dict[str, Any]]:
    """The cluster's address, and the process of the raylet that is not on its head; nothing is left of it."""
    if importlib.util.find_spec("ray") is None:
        pytest.fail("ray is not installed; run make setup")
    folder = tempfile.mkdtemp(prefix="rays-")  # not tmp_path, which is too long for the name of a socket
    mark = {"TRIATTENTION_TEST_CLUSTER": folder}
    path = {"PYTHONPATH": str(Path(cluster.__file__).parents[1]), "TMPDIR": folder, "RAY_TMPDIR": folder}
    with subprocess.Popen(
        [sys.executable, "-c", _RAYLETS], env={**os.environ, **_SETTINGS, **mark, **path}, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
    ) as child:  # fmt: skip
        timer = threading.Timer(90, child.kill)
        timer.start()
        try:
            said = next(line for line in child.stdout if line.startswith("{"))
            timer.cancel()
            yield json.loads(said)
        finally:
            timer.cancel()
            child.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                child.wait(30)
            left = _of(folder)
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            psutil.wait_procs(left, timeout=10)
            shutil.rmtree(folder, ignore_errors=True)
    assert _of(folder) == []


def _of(folder: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if process.environ().get("TRIATTENTION_TEST_CLUSTER") == folder:
                found.append(process)
    return found


@pytest.mark.slow
def test_a_sweep_on_a_cluster_writes_the_files_of_one_without_also_when_a_node_is_lost(
    raylets: dict[str, Any], tiny_model: str, tiny_statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "some.jsonl", 6)
    sweep = [
        "run-sweep", "--model", tiny_model, "--datasets", questions, "--methods", "full,triattention",
        "--budgets", "16", "--device", "cpu", "--divide-length", "8", "--window-size", "4", "--max-new-tokens", "300",
        "--stats-path", tiny_statistics, "--out",
    ]  # fmt: skip
    assert main([*sweep, str(tmp_path / "local")]) == 0
    capsys.readouterr()
    there = tmp_path / "there"
    killer = threading.Thread(target=_kill_when, args=(there, raylets["raylet"]))
    killer.start()
    # in a process of its own, as Ray changes the one that it is in
    command = [sys.executable, "-m", "triattention.cluster", "--address", raylets["address"], *sweep, str(there)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    killer.join()
    assert done.returncode == 0, done.stderr
    assert "its node was lost (" in done.stderr
    assert sorted(os.listdir(there)) == sorted(os.listdir(tmp_path / "local"))
    for path in (tmp_path / "local").glob("*.jsonl"):
        assert without_times(lines_of(there / path.name)) == without_times(lines_of(path))
    for path in (tmp_path / "local").glob("*.summary.json"):
        ours, theirs = (_without_times(one / path.name) for one in (there, tmp_path / "local"))
        assert ours == theirs
    # nothing is left to do, with the cluster or without
    assert cluster.main(["--address", "127.0.0.1:1", *sweep, str(there)]) == 0
    assert main([*sweep, str(there)]) == 0
    assert not any(line.startswith("[") for line in capsys.readouterr().out.splitlines())


def _without_times(path: Path) -> dict[str, Any]:
    return {name: value for name, value in json.loads(path.read_text()).items() if name not in MEASURED_TIMES}


def _kill_when(out: Path, raylet: int) -> None:
    """Kill a raylet with its workers when both combinations have a batch."""
    until = time.monotonic() + 90
    while len([*out.glob("*.jsonl")]) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    top = psutil.Process(raylet)
    for process in (top, *top.children(recursive=True)):
        with suppress(psutil.Error):
            process.kill()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--device", "auto"], "--device auto could mean another one on each node; give --device cuda or cpu"),
        (["--workers", "2"], "--workers 2 shares one machine, and the cluster has many; drop it"),
        (["--device", "cpu"], "--address 127.0.0.1:1: no Ray cluster can be used there"),
    ],
)
def test_what_a_cluster_cannot_do_is_one_sentence(
    words: list[str], sentence: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "two.jsonl", 2)
    sweep = ["run-sweep", "--model", tiny_model, "--datasets", questions, "--methods", "full", *words]
    assert cluster.main(["--address", "127.0.0.1:1", *sweep, "--out", str(tmp_path / "out")]) == 1
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_gpu_sweep_is_planned_where_there_is_no_gpu(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    questions = write_questions(tmp_path / "two.jsonl", 2)
    sweep = ["run-sweep", "--model", tiny_model, "--datasets", questions, "--methods", "full", "--device", "cuda"]
    assert cluster.main(["--address", "127.0.0.1:1", *sweep, "--out", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "device                     cuda\n" in capsys.readouterr().out
