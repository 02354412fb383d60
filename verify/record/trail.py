"""What the running check has asked of its subject so far, so that failures with one cause can be told together."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

#: The properties of each call, oldest first; the last one is that of a check which has failed.
CALLS: list[dict[str, str]] = []


def judged(accuracy_class: str) -> None:
    """Note how accurate the scores of the last call are: a pass that is far from exact, or that compares no score with
    the oracle, excuses nothing.
    """
    if CALLS:
        CALLS[-1]["class"] = accuracy_class


def note(**properties: object) -> None:
    """Note one call of the subject."""
    CALLS.append({name: str(value) for name, value in properties.items()})


@contextmanager
def aside() -> Iterator[None]:
    """Inside, calls are made to understand a failure, and are not noted."""
    before = len(CALLS)
    try:
        yield
    finally:
        del CALLS[before:]
