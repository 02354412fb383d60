"""``verify gate`` with a GPU that is made up here: the command line has no way to give one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from verify.cli import main
from verify.fleet.gate import gate
from verify.tests.samples import REPOSITORY


def _trial(folder: Path, body: str) -> list[str]:
    """A child that answers as ``body`` says, instead of looking at a GPU."""
    script = folder / "trial.py"
    head = """
import json, os, signal, subprocess, sys, time
from pathlib import Path
from verify.fleet.contracts import Answer, Outcome
from verify.fleet.trial import SEVERAL, write_answer
folder = Path(sys.argv[1])
noted = Path(__file__).with_name("noted")

def hang():
    program = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)"
    child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
    with noted.open("a") as stream:
        stream.write(f"{child.pid} ")
"""
    script.write_text(head + textwrap.dedent(body))
    return [sys.executable, str(script)]


_PASSES = """
print("a line of the log")
write_answer(folder, Answer(Outcome.PASS, f"passed with {os.environ.get('CUDA_VISIBLE_DEVICES')} {sys.argv[2:]}"))
"""

#: A run whose check hangs in a process of its own session that ignores every polite signal.
_HANGS = """
run = folder / "run"
run.mkdir()
events = [{"event": "start"}, {"event": "start", "id": "p4.triton_oracle.n1024"}]
(run / "events.jsonl").write_text("".join(json.dumps(one) + "\\n" for one in events) + '{"event": "st')
signal.signal(signal.SIGTERM, signal.SIG_IGN)
with noted.open("a") as stream:
    stream.write(f"{os.getpid()} ")
hang()
time.sleep(600)
"""

_SURVIVES = """
hang()
write_answer(folder, Answer(Outcome.PASS, "all passed"))
"""

#: The command as it is called, with another child.
_CALLED = """
import sys
from verify.cli import main
from verify.fleet import gate
gate.gate.__kwdefaults__.update(trial={trial!r})
sys.exit(main({words!r}))
"""


def _called(folder: Path, body: str, *words: str, **options: Any) -> subprocess.Popen[str]:
    program = _CALLED.format(trial=_trial(folder, body), words=["gate", *words])
    usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": REPOSITORY}
    return subprocess.Popen([sys.executable, "-c", program], **usual | options)


def _left(folder: Path) -> list[int]:
    """The processes of a trial that still run, after a moment for the system."""
    pids = [int(pid) for pid in (folder / "noted").read_text().split()]
    until = time.monotonic() + 10
    while left := [pid for pid in pids if _runs(pid)]:
        if time.monotonic() > until:
            return left
        time.sleep(0.05)
    return []


def _runs(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


#: Longer than pytest has been running, because a gate counts from the start of its process.
_FOREVER_S = 3600.0


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A gate that has answered heeds no signal any more; pytest must."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


def test_the_line_is_on_stdout_and_the_log_on_stderr(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    ended = gate(None, "GPU-1a2b", "sm90", _FOREVER_S, trial=_trial(tmp_path, _PASSES), termination=message)
    said = capfd.readouterr()
    assert (ended, said.out) == (0, "OK triattention: passed with GPU-1a2b ['90', 'one']\n")
    assert said.err.strip() == "a line of the log"
    assert message.read_text() == ""


def test_a_termination_message_is_cut_between_letters(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    body = "write_answer(folder, Answer(Outcome.HARD, 'ä' * 5000))"
    assert gate("aicr", None, None, _FOREVER_S, trial=_trial(tmp_path, body), termination=message) == 1
    assert 4094 <= message.stat().st_size <= 4096
    assert message.read_text("utf-8").startswith("HARD failure: ä")
    assert len(capfd.readouterr().out) == 81


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ("sys.exit('it broke')", "exit code 1: it broke"),
        ("(folder / 'answer.json').write_text('{\"outcome\": \"pa')", "exit code 0: it printed nothing"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "exit code -9: it printed nothing"),
    ],
    ids=["fails", "answers_half", "killed"],
)
def test_a_child_that_does_not_answer_is_no_verdict(
    tmp_path: Path, body: str, told: str, capfd: pytest.CaptureFixture[str]
) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    assert gate("aicr", None, None, _FOREVER_S, trial=_trial(tmp_path, body), termination=message) == 2
    assert told in message.read_text()


def test_a_fault_of_the_gate_itself_is_no_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken(*given: object) -> None:
        raise KeyError("id")

    monkeypatch.setattr("verify.fleet.gate._answered", broken)
    assert gate("npd", None, None, _FOREVER_S) == 3
    said = capfd.readouterr()
    assert said.out == "UNKNOWN triattention: the gate itself failed (KeyError: 'id')\n"
    assert "Traceback" in said.err


@pytest.mark.parametrize("wanted", ["timeout", "interrupted"])
def test_a_hanging_check_ends_in_time_with_everything_it_started(tmp_path: Path, wanted: str) -> None:
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import verify.fleet.gate"], cwd=REPOSITORY, check=True, timeout=60)
    started_s = time.monotonic() - begun  # as busy as this machine is now
    begun = time.monotonic()
    child = _called(tmp_path, _HANGS, "--contract", "nagios", "--within", "8")
    if wanted == "interrupted":
        while len((tmp_path / "noted").read_text().split() if (tmp_path / "noted").is_file() else []) < 2:
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
        time.sleep(0.002)
        child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    took_s = time.monotonic() - begun
    assert child.returncode == 3
    if wanted == "timeout":
        assert out == "TRIATTENTION UNKNOWN - p4.triton_oracle.n1024 was still running after 8 s\n"
        assert took_s < 8.0 + started_s
    else:
        assert out == "TRIATTENTION UNKNOWN - the gate was interrupted; run it again\n"
    assert _left(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "code"), [(_SURVIVES, 0), ("hang()\nos.kill(os.getpid(), signal.SIGKILL)", 3)], ids=["passes", "dies"]
)
def test_nothing_that_a_child_started_survives_the_gate(tmp_path: Path, body: str, code: int) -> None:
    child = _called(tmp_path, body)
    child.communicate(timeout=60)
    assert child.returncode == code
    assert _left(tmp_path) == []


def test_a_gate_that_is_killed_leaves_no_process_and_no_folder(tmp_path: Path) -> None:
    body = """
    from verify.fleet import trial
    def main(words):
        with noted.open("a") as stream:
            stream.write(f"{os.getpid()} ")
        time.sleep(600)
    trial.main = main
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit())
    trial.alone(sys.argv[1:])
    """
    child = _called(tmp_path, body, env={**os.environ, "TMPDIR": str(tmp_path)})
    while not ((tmp_path / "noted").is_file() and (tmp_path / "noted").read_text()):
        time.sleep(0.05)
    child.kill()
    child.communicate(timeout=60)
    assert _left(tmp_path) == []
    assert list(tmp_path.glob("triattention-gate-*")) == []


_FAILS = "print('x' * 100_000)\nwrite_answer(folder, Answer(Outcome.HARD, 'the scores are wrong'))"


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
@pytest.mark.parametrize("reader", ["gone", "asleep"])
def test_a_failure_stays_one_if_nobody_reads_it(tmp_path: Path, stream: str, reader: str) -> None:
    reading, writing = os.pipe()
    if reader == "gone":
        os.close(reading)
    else:
        os.set_blocking(writing, False)
        with suppress(BlockingIOError):
            while True:
                os.write(writing, b"x" * 4096)
        os.set_blocking(writing, True)
    other = {"stdout": "stderr", "stderr": "stdout"}[stream]
    child = _called(tmp_path, _FAILS, "--contract", "nagios", **{stream: writing, other: subprocess.DEVNULL})
    os.close(writing)
    try:
        assert child.wait(30) == 2
    finally:
        child.kill()
        if reader == "asleep":
            os.close(reading)


@pytest.mark.parametrize("redirected", [">&-", ">/dev/full", "2>&-", "2>/dev/full", ">&- 2>&-"])
def test_a_failure_stays_one_where_nothing_can_be_written(tmp_path: Path, redirected: str) -> None:
    program = _CALLED.format(trial=_trial(tmp_path, _FAILS), words=["gate", "--contract", "nagios"])
    (tmp_path / "called.py").write_text(program)
    command = f'"{sys.executable}" "{tmp_path / "called.py"}" {redirected}'
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(["bash", "-c", command], env=environment, capture_output=True, timeout=60).returncode == 2


_SEVERAL = """
if sys.argv[2:] == ["any"]:
    (folder / SEVERAL).write_text('["0", "GPU-b", "2"]')
else:
    name = os.environ["CUDA_VISIBLE_DEVICES"]
    print("log of", name)
    wrong = {WRONG}
    outcome = Outcome(wrong.get(name, "pass"))
    write_answer(folder, Answer(outcome, f"7 checks {outcome}"))
"""


@pytest.mark.parametrize(
    ("wrong", "code", "line"),
    [
        ({}, 0, "OK triattention: 3 GPUs, on each: 7 checks pass"),
        ({"GPU-b": "HARD failure"}, 1, "CRITICAL triattention: GPU GPU-b: 7 checks HARD failure"),
        ({"0": "SOFT failure"}, 0, "WARNING triattention: GPU 0: 7 checks SOFT failure"),
        ({"0": "SOFT failure", "2": "no GPU"}, 3, "UNKNOWN triattention: GPU 2: 7 checks no GPU"),
        ({"0": "GPU in use", "2": "GPU in use"}, 3, "UNKNOWN triattention: GPU 0 (and 1 more): 7 checks GPU in use"),
        ({"0": "no GPU", "2": "HARD failure"}, 1, "CRITICAL triattention: GPU 2: 7 checks HARD failure"),
    ],
)
def test_of_several_gpus_the_worst_counts(
    tmp_path: Path, wrong: dict[str, str], code: int, line: str, capfd: pytest.CaptureFixture[str]
) -> None:
    body = _SEVERAL.replace("{WRONG}", repr(wrong))
    assert gate(None, None, None, _FOREVER_S, trial=_trial(tmp_path, body)) == code
    said = capfd.readouterr()
    assert said.out == f"{line}\n"
    assert sorted(filter(None, said.err.splitlines())) == ["log of 0", "log of 2", "log of GPU-b"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--contract", "aicr", "--gpu", "first"], 2),
        (["--contract=hv", "--expect", "sm999"], 2),
        (["--contract", "npd", "--within", "1"], 3),
        (["--contract", "aicr", "--nonsense"], 2),
        (["--contract", "none"], 3),
        (["--within", "soon", "--contract=hv"], 2),
    ],
)
def test_a_wrong_option_ends_as_its_contract_says(
    words: list[str], code: int, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", *words]) == code
    said = capfd.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err.startswith("verify: ")


def test_without_a_gpu_the_installed_command_says_so(tmp_path: Path) -> None:
    (tmp_path / "verify").mkdir()
    (tmp_path / "verify" / "__init__.py").write_text("raise SystemExit(0)\n")  # not ours, and no matter
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    child = subprocess.run(
        [sys.executable, "-P", "-m", "verify", "gate", "--contract", "hv"], cwd=tmp_path, env=environment,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert child.returncode == 1, child.stderr
    assert json.loads(child.stdout)["overall_severity"] == "UNKNOWN"
