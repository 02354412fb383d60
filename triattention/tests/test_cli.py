from __future__ import annotations

import os
import re
import subprocess
import sys
import time

import pytest

from triattention.cli import heartbeat, main

VERBS = ("run-one", "run-default", "run-sweep", "compare", "build-stats", "calibrate", "download-models")


def test_usage_errors_exit_with_two_and_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run-one", "--method", "banana"])
    assert stop.value.code == 2
    assert main([]) == 0
    printed = capsys.readouterr().out
    assert all(verb in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([verb, "--help"])
    assert stop.value.code == 0
    assert f"python -m triattention {verb}" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "from triattention.cli import main\n"
        "try: main(['run-one', '--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'sympy', 'vllm', 'yaml', 'tqdm'} & set(sys.modules)))"
    )
    printed, seconds = _processor_s(script)
    assert printed.endswith("[]\n")
    assert seconds < 0.5 * _processor_s("import torch")[1]


def _processor_s(script: str) -> tuple[str, float]:
    """What a new interpreter prints, and the processor seconds that it takes."""
    script = f"import atexit, sys, time; atexit.register(lambda: print(time.process_time(), file=sys.stderr)); {script}"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return done.stdout, float(done.stderr.splitlines()[-1])


def test_a_command_whose_output_is_no_terminal_shows_signs_of_life(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    with heartbeat.signs_of_life("calibrate"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 1
    assert all(re.fullmatch(r"note: calibrate has been running for \d s", line) for line in lines)


def test_the_command_line_computes_with_one_thread_unless_told_otherwise() -> None:
    script = "import os; from triattention.cli import main; main([]); print(os.environ['OMP_NUM_THREADS'])"
    without = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    for environment, threads in ((without, "1"), (without | {"OMP_NUM_THREADS": "3"}, "3")):
        printed = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True
        ).stdout
        assert printed.splitlines()[-1] == threads
