"""The display of a run in progress: a live line per phase on a terminal; elsewhere plain lines and a heartbeat."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING

from verify.checks import PHASES
from verify.heartbeat import Heartbeat, about, bar
from verify.record.schema import BLOCKING, CheckResult, Verdict
from verify.run.manifest import Selected

if TYPE_CHECKING:
    from rich.console import Console

#: The order and wording of a phase's summary.
_WORDS = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "failed",
    Verdict.ERROR: "in error",
    Verdict.CRASH: "crashed",
    Verdict.TIMEOUT: "timed out",
    Verdict.INFRA: "not judged",
    Verdict.WAIVED: "waived",
    Verdict.BLOCKED: "blocked",
    Verdict.SKIP: "skipped",
    Verdict.REFUSED: "refused",
    Verdict.ABSENT: "absent",
}


class RunProgress:
    """The display of a run, as a context manager; its phases may run in several threads.

    ``lanes`` are lists of the remaining checks; the lists run in parallel. ``durations_s`` are the durations by check
    in an earlier run on this machine, from which the remaining time is estimated; None without such a run.
    """

    def __init__(
        self, console: Console, lanes: Sequence[Sequence[Selected]], durations_s: Mapping[str, float] | None
    ) -> None:
        self.console, self._lanes, self._durations_s = console, lanes, durations_s
        #: The ids of the checks that have ended.
        self.finished: set[str] = set()
        self._running: dict[int, PhaseProgress] = {}
        self.bar = bar(console, "check")
        self._heartbeat = Heartbeat(console, self._told)

    def __enter__(self) -> RunProgress:
        self.bar.start()
        self._heartbeat.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._heartbeat.__exit__(kind, error, at)
        self.bar.stop()

    @contextmanager
    def phase(self, phase: int, total: int) -> Iterator[PhaseProgress]:
        """The display of one phase: failures are printed as they happen, a summary at the end."""
        shown = self._running[phase] = PhaseProgress(self, phase, total)
        try:
            yield shown
        finally:
            del self._running[phase]
            shown.end()

    def say(self, line: str) -> None:
        # a message is not markup, and the lines of a log must not be wrapped
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def left_s(self) -> float | None:
        """Seconds until the slowest lane ends, if every check takes as long as the last time."""
        if self._durations_s is None:
            return None
        left = (
            sum(self._durations_s.get(check.id, 0.0) for check in lane if check.id not in self.finished)
            for lane in self._lanes
        )
        return max(left, default=0.0)

    def _told(self) -> str:
        left = self.left_s()
        parts = [phase.told() for _, phase in sorted(self._running.items())]
        return "; ".join([*parts, *([about(left)] if left is not None else [])]) or "between two phases"


class PhaseProgress:
    """The display of one phase of ``run``, which has ``total`` checks."""

    def __init__(self, run: RunProgress, phase: int, total: int) -> None:
        self._run, self._total = run, total
        self._title = f"phase {phase} {PHASES[phase]}"
        self._counts: Counter[Verdict] = Counter()
        self._begun = self._since = time.monotonic()
        self._current = "starting"
        self._task = run.bar.add_task(self._title, total=total, check=self._current)
        if not run.console.is_terminal:
            run.say(f"{self._title}: {total} {'check' if total == 1 else 'checks'}")

    def started(self, check_id: str) -> None:
        self._current, self._since = check_id, time.monotonic()
        self._run.bar.update(self._task, check=check_id)

    def finished(self, result: CheckResult) -> None:
        self._counts[result.verdict] += 1
        self._run.finished.add(result.id)
        self._run.bar.update(self._task, advance=1)
        if result.verdict in BLOCKING:
            gate = "" if result.gate == "hard" else " (soft)"
            self._run.say(f"  {result.verdict} {result.id}{gate}: {result.message.splitlines()[0]}")

    def note(self, sentence: str) -> None:
        self._run.say(f"  note: {sentence}")

    def told(self) -> str:
        """The progress of the phase, as part of a sentence."""
        where = f"{self._title} {self._counts.total()} of {self._total}"
        return f"{where}, {self._current} for {time.monotonic() - self._since:.0f} s"

    def end(self) -> None:
        self._run.bar.remove_task(self._task)
        counts = [f"{self._counts[verdict]} {word}" for verdict, word in _WORDS.items() if self._counts[verdict]]
        self._run.say(f"{self._title}: {', '.join(counts) or 'no results'} ({time.monotonic() - self._begun:.1f} s)")
