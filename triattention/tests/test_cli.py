from __future__ import annotations

import subprocess
import sys
import time

import pytest

from triattention.cli import main

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
        "import sys; from triattention.cli import main\n"
        "try: main(['run-one', '--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'sympy', 'vllm', 'yaml', 'tqdm'} & set(sys.modules)))"
    )
    started = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("[]\n")
    assert time.monotonic() - started < 5  # 0.2 s alone; torch takes longer than this on a busy machine
