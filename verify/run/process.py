"""The process that runs one phase: started in its own session, watched, and cleaned up however it ends."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

from verify.files import IMPORT_ROOT, INSTALLED, REPORTS_VARIABLE, default_out, end_of
from verify.machine import processors
from verify.machine.environment import localise
from verify.record import grounds
from verify.record.schema import Verdict
from verify.run import events
from verify.run.manifest import Manifest, Selected
from verify.run.progress import PhaseProgress
from verify.subject.find import find_subject

#: Added to a check's own limit, at which pytest-timeout stops it unless it hangs in native code.
GRACE_S = 15.0

#: The limit before the first check, between two checks, and after the last one.
IDLE_LIMIT_S = 180.0

_POLL_S = 0.1
#: Enough for the stacks of a dozen threads; only the last lines of it are kept.
_TAIL_BYTES = 32_000
_TAIL_LINES = 20
_FRAME_OF_PYTEST = re.compile(r'^\s+File ".*(/_pytest/|/pluggy/|/pytest/|<frozen runpy>)')


class PhaseProcess:
    """One phase of a run, in its own process.

    ``held`` is the file descriptor of the run's lock: while the process lives, no other process can resume the run.
    ``stopping`` returns how often the user has asked the run to stop.
    """

    def __init__(
        self,
        run_dir: Path,
        root: Path,
        manifest: Manifest,
        checks: Sequence[Selected],
        *,
        stopping: Callable[[], int],
        held: int,
    ) -> None:
        self._run_dir, self._root, self._manifest, self._checks = run_dir, root, manifest, checks
        self._stopping = stopping
        self._phase = checks[0].phase
        self._log = run_dir / f"p{self._phase}.log"
        self._events = events.Follower(run_dir)
        self._limits = {check.id: check.timeout_s for check in checks}
        self._current: str | None = None
        self._current_since = 0.0
        self._watch: processors.Watch | None = None
        self._busy: str | None = None
        self._finished: set[str] = set()
        self._deadline = time.monotonic() + IDLE_LIMIT_S
        events.append_machine(run_dir, self._phase, "start", processors.state())
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                self._command(), cwd=root, env=self._environment(),
                pass_fds=(held,), start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip

    def _command(self) -> list[str]:
        files = dict.fromkeys(check.node.partition("::")[0] for check in self._checks)
        # without capture, so that output of a library that aborts reaches the log
        options = [f"--run-dir={self._run_dir}", "--capture=no", "-v", "--tb=short"]
        return [*pytest_command(self._root), *files, *options]

    def _environment(self) -> dict[str, str]:
        inherited = pytest_environment()
        log = self._run_dir / f"p{self._phase}.opened"
        noting = grounds.environment(
            log, self._root, find_subject(self._manifest.subject, self._root).folder, inherited
        )
        return {**inherited, **noting, processors.RUN_VARIABLE: self._manifest.run_id}

    def run(self, progress: PhaseProgress) -> None:
        """Wait for the end of the phase; then each of its checks has a result, unless the user stopped the run."""
        hung = False
        try:
            while self._process.poll() is None:
                self._follow(progress)
                if self._stopping():
                    self._end((signal.SIGINT, 5.0), (signal.SIGTERM, 3.0))
                elif time.monotonic() > self._deadline:
                    hung = True
                    # asked while every process of the run still exists
                    self._busy = self._watch.busy() if self._current and self._watch is not None else None
                    # the first signal makes the child write every thread's stack into its log
                    self._end((signal.SIGUSR1, 1.0), (signal.SIGTERM, 3.0))
                else:
                    time.sleep(_POLL_S)
        finally:
            self._kill_group()
            events.append_machine(self._run_dir, self._phase, "end", processors.state())
        self._follow(progress)
        if not self._stopping():
            self._settle(hung, progress)

    def _follow(self, progress: PhaseProgress) -> None:
        for event in self._events.new():
            # events of phases that run at the same time are followed by other PhaseProcesses
            if event["event"] == "start" and event["id"] in self._limits:
                self._current, self._current_since = event["id"], time.monotonic()
                self._watch = processors.Watch.begin(os.getpid(), self._manifest.run_id)
                self._deadline = self._current_since + self._limits[event["id"]] + GRACE_S
                progress.started(event["id"])
            elif event["event"] == "result" and event["result"].id in self._limits:
                self._current = None
                self._finished.add(event["result"].id)
                self._deadline = time.monotonic() + IDLE_LIMIT_S
                progress.finished(event["result"])

    def _end(self, *steps: tuple[signal.Signals, float]) -> None:
        """Send ever harder signals to the process; if the user asks again, the wait for the gentler ones ends."""
        for number, patience_s in steps:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)
            asked, until = self._stopping(), time.monotonic() + patience_s
            while self._process.poll() is None and time.monotonic() < until and self._stopping() == asked:
                time.sleep(_POLL_S)
        self._kill_group()

    def _kill_group(self) -> None:
        """Kill the rest of the process group: a server that a check started must not keep the GPU."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _settle(self, hung: bool, progress: PhaseProgress) -> None:
        """Record, for each check without a result, the result that the end of the process implies."""
        missing = [check for check in self._checks if check.id not in self._finished]
        how = "was killed because it hung" if hung else _ending(self._process.returncode)
        culprit = self._current
        if not missing:
            if hung or self._process.returncode not in (0, 1):
                progress.note(f"the process of phase {self._phase} {how} after its last check; see {self._log.name}")
            return
        for check in missing:
            if check.id == culprit:
                verdict, by = (Verdict.TIMEOUT if hung else Verdict.CRASH), None
                message = f"the process {how} during this check; {self._log.name} ends: {self._tail()}"
                if hung:
                    message = f"not finished within {check.timeout_s:g} s + {GRACE_S:g} s; {message}"
                if self._busy:
                    verdict, message = Verdict.INFRA, f"{self._busy}; {message}"
            elif culprit:
                verdict, by, message = Verdict.BLOCKED, culprit, f"blocked by {culprit}, which ended the process"
            else:
                verdict, by = Verdict.ERROR, None
                message = f"the process {how} without running this check; {self._log.name} ends: {self._tail()}"
            result = self._manifest.result(
                check,
                verdict,
                self._root,
                by=by,
                duration_s=time.monotonic() - self._current_since if check.id == culprit else 0.0,
                message=localise(message, self._root, self._manifest.places),
            )
            events.append_result(self._run_dir, result)
            progress.finished(result)

    def _tail(self) -> str:
        """The last lines of the log, without the frames of pytest and of the interpreter's own start."""
        lines = end_of(self._log, _TAIL_BYTES).decode(errors="replace").splitlines()
        telling = [line for line in lines if line.strip() and not _FRAME_OF_PYTEST.search(line)]
        return "\n".join(telling[-_TAIL_LINES:])


def pytest_command(root: Path) -> list[str]:
    """The start of every pytest child's command line: without pytest's cache, and only with the needed plugins.

    It reads no configuration: above an installed suite there may be that of another project.
    """
    own = ["verify.plugin", "verify.fixtures", "pytest_timeout", "no:cacheprovider"]
    alone = ["-c", os.devnull, f"--rootdir={root}", f"--confcutdir={root}", "--strict-markers", "--color=no"]
    return [sys.executable, "-m", "pytest", *alone, *(word for name in own for word in ("-p", name))]


def pytest_environment() -> dict[str, str]:
    """The environment of a pytest child: without the user's options and plugins, which could retry checks."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTEST_ADDOPTS", "PYTEST_PLUGINS")}
    # children can import what `python -m verify` could in the directory where it was started, as module:NAME
    own = str(IMPORT_ROOT) if INSTALLED else None  # first, where that directory has another package of our names
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), own, os.getcwd()]))
    reports = {REPORTS_VARIABLE: str(default_out().parent)} if INSTALLED else {}
    return {**inherited, "PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", **reports}


def _ending(returncode: int) -> str:
    if returncode < 0:
        return f"died of signal {-returncode} ({signal.strsignal(-returncode)})"
    return f"ended with exit code {returncode}"
