"""How long tests take: all in a file, the slowest named, and a reason for each that takes long."""

from __future__ import annotations

import io
import json
import re
import time
from pathlib import Path

import pytest
from rich.console import Console

from verify import heartbeat
from verify.heartbeat import Heartbeat, about
from verify.run import durations
from verify.tests.tree import REPOSITORY, make_tree

_TESTS = """
import time
def test_quick(): pass
def test_slow(): time.sleep(1.2)
"""

_CHECK = """
@check("p1.fine", gate="hard", cases="one", **WORDS)
def test_fine(case): pass
"""


def test_a_session_keeps_how_long_everything_took_and_names_the_slowest(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _CHECK)
    (tmp_path / "test_own.py").write_text(_TESTS)
    assert tree.verify("run", "--device", "cpu").returncode == 0
    done = tree.pytest("test_own.py", "--durations-to=kept/durations.json", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads((tmp_path / "kept" / "durations.json").read_text())
    assert kept["tests"].keys() == {"test_own.py::test_quick", "test_own.py::test_slow"}
    assert kept["tests"]["test_own.py::test_slow"] >= 1.2
    assert kept["checks"].keys() == {"p1.fine.one"}
    said = done.stdout.splitlines()
    start = said.index("the slowest of 3 tests and checks; all are in kept/durations.json:")
    assert re.fullmatch(r"    1\.\d s  test_own\.py::test_slow", said[start + 1])


def test_what_takes_long_needs_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(durations, "long_tests", lambda: {"a.py::known": "It starts a server."})
    taken = {"a.py::known[case]": 30.0, "a.py::unknown[case]": 30.0, "a.py::quick": 9.0}
    assert durations.too_long(taken) == ["a.py::unknown[case]"]


def test_every_test_that_may_take_long_exists_and_says_why() -> None:
    for name, reason in durations.long_tests().items():
        file, _, test = name.partition("::")
        assert f"def {test}(" in (REPOSITORY / file).read_text("utf-8"), name
        assert len(reason.split()) > 3, name


def test_a_heartbeat_is_a_line_where_there_is_no_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "EVERY_S", 0.05)
    log, terminal = io.StringIO(), io.StringIO()
    for stream, is_terminal in ((log, False), (terminal, True)):
        with Heartbeat(Console(file=stream, force_terminal=is_terminal), lambda: "3 of 7, [bold] for 2 s"):
            time.sleep(0.3)
    assert set(log.getvalue().splitlines()) == {"  ... 3 of 7, [bold] for 2 s"}
    assert terminal.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(0, "about 10 s left"), (42, "about 40 s left"), (99, "about 100 s left"), (100, "about 2 min left"),
     (250, "about 4 min left")],
)  # fmt: skip
def test_what_is_left(seconds: float, told: str) -> None:
    assert about(seconds) == told


def test_a_session_in_a_log_shows_signs_of_life(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    with (tmp_path / "conftest.py").open("a") as conftest:
        conftest.write("\nimport verify.heartbeat\nverify.heartbeat.EVERY_S = 0.3\n")
    (tmp_path / "test_own.py").write_text(_TESTS)
    done = tree.pytest("test_own.py", "--device", "cpu")
    assert re.search(r"  \.\.\. 1 of 2 tests, test_own\.py::test_slow for \d s$", done.stdout, re.MULTILINE)
