"""A heartbeat for readers of a log: the current progress every 30 s if the output is not a terminal."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

#: A log that does not grow for a minute looks dead to its reader.
EVERY_S = 30.0


class Heartbeat:
    """A context manager that prints the result of ``tell`` to ``console`` every EVERY_S seconds, if not a terminal."""

    def __init__(self, console: Console, tell: Callable[[], str]) -> None:
        self._console, self._tell = console, tell
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Heartbeat:
        if not self._console.is_terminal:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def _beat(self) -> None:
        # signals belong to the main thread: one that it blocks must not be delivered to this one
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while not self._ended.wait(EVERY_S):
            self._console.print(f"  ... {self._tell()}", markup=False, highlight=False, soft_wrap=True)


def bar(console: Console, field: str = "") -> Progress:
    """A progress bar that is only shown on a terminal and erased at its end; tasks may have a text ``field``."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn(), TimeElapsedColumn()]
    columns += [TextColumn(f"{{task.fields[{field}]}}", style="dim")] if field else []
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)


def about(seconds: float) -> str:
    """A rounded remaining time: ``about 4 min left``."""
    return f"about {max(round(seconds / 10), 1) * 10} s left" if seconds < 100 else f"about {seconds / 60:.0f} min left"
