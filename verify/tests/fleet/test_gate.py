"""``verify gate`` with a GPU that is made up here: the command line has no way to give one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from verify.cli import main
from verify.errors import Exit
from verify.fleet.contracts import Answer, Outcome
from verify.fleet.gate import gate
from verify.fleet.trial import examine, judged
from verify.machine.nvml import Driver, NvmlUnavailable
from verify.record.schema import CheckResult, Gpu, Record
from verify.run.levels import GATE
from verify.tests.samples import REPOSITORY, record, result, waived

H200 = Gpu(name="NVIDIA H200", uuid_sha256="0" * 64, sm=90, memory_gib=139.8, driver="580.1")

Carried = tuple[int, Record | None]


def _driver(*gpus: Gpu, notes: tuple[str, ...] = ()) -> Callable[[], Driver]:
    return lambda: Driver("580.1", "13.0", gpus, notes)


def _examined(carry_out: Callable[[int | None, Path], Carried], **fields: Any) -> Answer:
    given: dict[str, Any] = {"driver": _driver(H200), "users": lambda gpu: 0, "expect": None, **fields}
    return examine(given.pop("expect"), Path("/nowhere"), carry_out=carry_out, **given)


def _never(expect: int | None, folder: Path) -> Carried:
    raise AssertionError("no check may run")


def _level_one(target: str = "sm90", **verdicts: Any) -> Record:
    """A record of the checks of the gate, all passed except those in ``verdicts`` (with ``__`` for a dot)."""
    other = {name.replace("__", "."): fields for name, fields in verdicts.items()}
    evidence = "emulated" if target == "emulated" else "hardware"
    results = [result(name, evidence=evidence, gate="hard") for name in sorted(GATE - other.keys())]
    return record(target, [*results, *filter(None, other.values())])


def _oracle(verdict: str, **fields: Any) -> CheckResult:
    return result("p4.triton_oracle.n1024", verdict, gate="hard", **fields)


def test_all_checks_passed_on_the_gpu() -> None:
    answer = _examined(lambda expect, folder: (Exit.OK, _level_one()), expect=90)
    assert answer.outcome is Outcome.PASS
    assert answer.words.startswith("7 checks passed on sm90 (")
    assert answer.details["checks"].keys() == GATE


def test_a_gpu_that_does_not_answer_is_no_gpu() -> None:
    def unavailable() -> Driver:
        raise NvmlUnavailable("driver/library version mismatch")

    assert _examined(_never, driver=unavailable).outcome is Outcome.NO_GPU
    answer = _examined(_never, driver=_driver(notes=("card 0 cannot be asked (GPU is lost)",)))
    assert (answer.outcome, answer.words) == (Outcome.NO_GPU, "no GPU: card 0 cannot be asked (GPU is lost)")


def test_another_gpu_than_expected_is_named() -> None:
    answer = _examined(_never, expect=120)
    assert (answer.outcome, answer.words) == (Outcome.WRONG_GPU, "sm120 was expected, this is sm90 (NVIDIA H200)")


def test_a_gpu_that_others_use_is_left_alone() -> None:
    assert _examined(_never, users=lambda gpu: 2).outcome is Outcome.BUSY


def test_an_interrupted_run_is_no_verdict_on_the_gpu() -> None:
    assert _examined(lambda expect, folder: (Exit.INTERRUPTED, None)).outcome is Outcome.INTERRUPTED


@pytest.mark.parametrize(
    ("other", "outcome", "words"),
    [
        (_oracle("FAIL", message="too far off"), Outcome.HARD, "n1024 FAIL: too far off"),
        (_oracle("CRASH", message="signal 11"), Outcome.HARD, "n1024 CRASH: signal 11"),
        (_oracle("ERROR", message="a defect"), Outcome.UNJUDGED, "n1024 ERROR: a defect"),
        (_oracle("INFRA", message="ECC"), Outcome.UNJUDGED, "n1024 INFRA: ECC"),
        (_oracle("SKIP", code="PKG_MISSING"), Outcome.UNJUDGED, "n1024 PKG_MISSING"),
        (waived("p4.triton_oracle.n1024", gate="hard"), Outcome.UNJUDGED, "n1024 WAIVED"),
        (None, Outcome.UNJUDGED, "n1024 has no result"),
    ],
    ids=["fail", "crash", "error", "infra", "skip", "waived", "absent"],
)
def test_a_check_that_did_not_pass_decides(other: Any, outcome: Outcome, words: str) -> None:
    answer = judged(_level_one(p4__triton_oracle__n1024=other))
    assert answer.outcome is outcome
    assert words in answer.words


def test_a_soft_failure_is_a_warning() -> None:
    soft = result("p1.toolkit.nvcc", "FAIL", gate="soft", message="nvcc is 12.0")
    whole = _level_one()
    assert judged(whole.model_copy(update={"results": [*whole.results, soft]})).outcome is Outcome.SOFT


def test_an_emulated_run_is_never_a_pass() -> None:
    assert judged(_level_one("emulated")).outcome is Outcome.NO_GPU


def _trial(folder: Path, body: str) -> list[str]:
    """A child that answers as ``body`` says, instead of looking at a GPU."""
    script = folder / "trial.py"
    head = "import json, os, signal, subprocess, sys, time\nfrom pathlib import Path\nfolder = Path(sys.argv[1])\n"
    script.write_text(head + textwrap.dedent(body))
    return [sys.executable, str(script)]


_PASSES = """
from verify.fleet.contracts import Answer, Outcome
from verify.fleet.trial import write_answer
print("a line of the log")
write_answer(folder, Answer(Outcome.PASS, f"passed with {os.environ.get('CUDA_VISIBLE_DEVICES')} {sys.argv[2:]}"))
"""

#: A run whose check hangs in a process of its own session that ignores every polite signal.
_HANGS = """
run = folder / "run"
run.mkdir()
start = {"event": "start", "id": "p4.triton_oracle.n1024"}
(run / "events.jsonl").write_text(json.dumps(start) + "\\n")
program = "import signal, time; [signal.signal(n, signal.SIG_IGN) for n in (2, 15)]; time.sleep(600)"
child = subprocess.Popen([sys.executable, "-c", program], start_new_session=True)
Path(os.environ["NOTED"]).write_text(f"{os.getpid()} {child.pid}")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


def test_the_line_is_on_stdout_and_the_log_on_stderr(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    ended = gate(None, "GPU-1a2b", "sm90", _FOREVER_S, trial=_trial(tmp_path, _PASSES), termination=message)
    said = capsys.readouterr()
    assert (ended, said.out) == (0, "OK triattention: passed with GPU-1a2b ['90']\n")
    assert said.err.strip() == "a line of the log"
    assert message.read_text() == ""


#: Longer than pytest has been running, because a gate counts from the start of its process.
_FOREVER_S = 3600.0


def test_a_child_that_dies_is_no_verdict(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = tmp_path / "termination-log"
    message.touch()
    ended = gate("aicr", None, None, _FOREVER_S, trial=_trial(tmp_path, "sys.exit('it broke')"), termination=message)
    assert ended == 2
    assert "exit code 1: it broke" in message.read_text()
    assert len(capsys.readouterr().out) <= 81


@pytest.mark.parametrize("wanted", ["timeout", "interrupted"])
def test_a_hanging_check_ends_in_time_with_everything_it_started(tmp_path: Path, wanted: str) -> None:
    program = f"""
    import sys
    from verify.fleet.gate import gate
    sys.exit(gate("nagios", None, None, 8.0, trial={_trial(tmp_path, _HANGS)!r}))
    """
    noted = tmp_path / "noted"
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import verify.fleet.gate"], cwd=REPOSITORY, check=True, timeout=60)
    started_s = time.monotonic() - begun  # as busy as this machine is now
    begun = time.monotonic()
    child = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program)], cwd=REPOSITORY, env={**os.environ, "NOTED": str(noted)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    if wanted == "interrupted":
        while not (noted.is_file() and noted.read_text()):
            time.sleep(0.05)
        child.send_signal(signal.SIGTERM)
    out, _ = child.communicate(timeout=60)
    took_s = time.monotonic() - begun
    assert child.returncode == 3
    if wanted == "timeout":
        assert out == "TRIATTENTION UNKNOWN - p4.triton_oracle.n1024 was still running after 8 s\n"
        assert took_s < 8.0 + started_s
    else:
        assert out == "TRIATTENTION UNKNOWN - the gate was interrupted; run it again\n"
    pids = [int(pid) for pid in noted.read_text().split()]
    gone = [not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE for pid in pids]
    assert gone == [True, True]


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
    words: list[str], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["gate", *words]) == code
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == 1
    assert said.err.startswith("verify: ")


def test_without_a_gpu_the_installed_command_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    if Path("/proc/driver/nvidia").exists():
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    child = subprocess.run(
        [sys.executable, "-m", "verify", "gate", "--contract", "hv"], cwd=REPOSITORY,
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert child.returncode == 1
    assert json.loads(child.stdout)["overall_severity"] == "UNKNOWN"
