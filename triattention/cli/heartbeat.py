"""A sign of life on stderr every half minute for readers of a log, if stderr is not a terminal."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

EVERY_S = 30.0


@contextmanager
def signs_of_life(what: str) -> Iterator[None]:
    """In this context a line every EVERY_S seconds says how long ``what`` has been running."""
    if sys.stderr.isatty():
        yield
        return
    ended, began = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(EVERY_S):
            print(f"note: {what} has been running for {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
