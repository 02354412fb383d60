"""How long the tests of a session take: a heartbeat while they run, the slowest at the end, and all in a file."""

from __future__ import annotations

import json
import os
import time
import tomllib
from functools import cached_property
from pathlib import Path

import pytest

from verify.files import IMPORT_ROOT, RUNS, write_atomic
from verify.heartbeat import Heartbeat
from verify.record.archive import newest_runs

#: How many of the slowest are printed.
_NAMED = 10

#: The limit of one of the suite's own tests, on a machine of usual speed; a longer one needs a reason in the list.
LONG_S = 10.0
_LONG_TESTS = IMPORT_ROOT / "verify" / "tests" / "long_tests.toml"


class Timekeeper:
    """The pytest plugin of a session that a person or CI waits for; ``out`` is the file to write at its end, if any.

    The file also has the checks of the newest run, which ``make test`` makes before the tests.
    """

    def __init__(self, root: Path, out: Path | None) -> None:
        self._root, self._out = root, out
        self._durations_s: dict[str, float] = {}
        self._running: dict[str, float] = {}
        self._count = 0
        # a copy: while a test runs, pytest captures the original
        self._stream = os.fdopen(os.dup(1), "w")
        self._heartbeat: Heartbeat | None = None

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        if not self._stream.isatty():
            from rich.console import Console

            self._heartbeat = Heartbeat(Console(file=self._stream), lambda: self._told(session.testscollected))
            self._heartbeat.__enter__()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self) -> None:
        if self._heartbeat is not None:
            self._heartbeat.__exit__(None, None, None)
        if self._out is not None:
            found = {"tests": self._durations_s, "checks": self._checks_s}
            write_atomic(self._out, json.dumps(found, indent=1) + "\n")

    def pytest_unconfigure(self) -> None:
        self._stream.close()

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._running[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self._durations_s[report.nodeid] = self._durations_s.get(report.nodeid, 0.0) + report.duration

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._running.pop(nodeid, None)
        self._count += 1

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        if self._out is None:
            return
        everything, place = self._durations_s | self._checks_s, os.path.relpath(self._out)
        terminalreporter.write_line(f"the slowest of {len(everything)} tests and checks; all are in {place}:")
        for name, seconds in sorted(everything.items(), key=lambda one: -one[1])[:_NAMED]:
            terminalreporter.write_line(f"{seconds:7.1f} s  {name}")
        for name in too_long(self._durations_s):
            terminalreporter.write_line(
                f"{name} took more than {LONG_S:g} s: make it faster, or give the reason in {_LONG_TESTS.name}"
            )

    @cached_property
    def _checks_s(self) -> dict[str, float]:
        newest = next(newest_runs(self._root / RUNS), None)
        return {result.id: result.duration_s for result in newest.results} if newest else {}

    def _told(self, total: int) -> str:
        now = time.monotonic()
        running = sorted(self._running.items(), key=lambda one: one[1])
        told = f"{self._count} of {total} tests"
        return f"{told}, {running[0][0]} for {now - running[0][1]:.0f} s" if running else told


def long_tests() -> dict[str, str]:
    """The tests that may take longer than LONG_S, each with its reason."""
    # a wheel is without tests
    return tomllib.loads(_LONG_TESTS.read_text("utf-8")) if _LONG_TESTS.is_file() else {}


def long_files() -> dict[str, int]:
    """The files with such tests, which start first, each with its place in that order."""
    files = dict.fromkeys(name.partition("::")[0] for name in long_tests())
    return {file: place for place, file in enumerate(files)}


def too_long(durations_s: dict[str, float]) -> list[str]:
    """The tests that take longer than LONG_S without a reason in the list; the cases of a test share one entry."""
    listed = long_tests()
    slow = (name for name, seconds in durations_s.items() if seconds > LONG_S)
    return [name for name in slow if name.partition("[")[0] not in listed]
