"""What the running check has asked of its subject so far, so that failures with one cause can be told together."""

from __future__ import annotations

#: The properties of each call, oldest first; the last one is that of a check which has failed.
CALLS: list[dict[str, str]] = []


def note(**properties: object) -> None:
    """Note one call of the subject."""
    CALLS.append({name: str(value) for name, value in properties.items()})
