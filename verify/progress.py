"""What a run shows while it happens: a live line per phase on a terminal, one plain line per phase elsewhere."""

from __future__ import annotations

import time
from collections import Counter
from types import TracebackType
from typing import TYPE_CHECKING

from verify.checks import PHASES
from verify.record import FAILING, CheckResult, Verdict

if TYPE_CHECKING:
    from rich.console import Console

#: The order and the words of a phase's summary.
_WORDS = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "failed",
    Verdict.ERROR: "in error",
    Verdict.CRASH: "crashed",
    Verdict.TIMEOUT: "timed out",
    Verdict.INFRA: "not judged",
    Verdict.BLOCKED: "blocked",
    Verdict.SKIP: "skipped",
    Verdict.XFAIL: "failed as known",
    Verdict.XPASS: "passed unexpectedly",
}


class PhaseProgress:
    """The display of one phase, as a context: failures are printed as they happen, a summary at the end."""

    def __init__(self, console: Console, phase: int, total: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

        self._console = console
        self._title = f"phase {phase} {PHASES[phase]}"
        self._counts: Counter[Verdict] = Counter()
        self._begun = time.monotonic()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[check]}", style="dim"),
        )
        self._bar = Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
        self._task = self._bar.add_task(self._title, total=total, check="starting")

    def __enter__(self) -> PhaseProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
        counts = [f"{self._counts[verdict]} {word}" for verdict, word in _WORDS.items() if self._counts[verdict]]
        self._say(f"{self._title}: {', '.join(counts) or 'no results'} ({time.monotonic() - self._begun:.1f} s)")

    def started(self, check_id: str) -> None:
        self._bar.update(self._task, check=check_id)

    def finished(self, result: CheckResult) -> None:
        self._counts[result.verdict] += 1
        self._bar.update(self._task, advance=1)
        if result.verdict in FAILING:
            gate = "" if result.gate == "hard" else " (soft)"
            self._say(f"  {result.verdict} {result.id}{gate}: {result.message.splitlines()[0]}")

    def note(self, sentence: str) -> None:
        self._say(f"  note: {sentence}")

    def _say(self, line: str) -> None:
        # a message is text, not markup, and a line of a log is not to be wrapped
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
