"""Which of the published parameters a function of the subject takes, before it is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

from verify.errors import SubjectLacks
from verify.subject.published import Renamed


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` can be given the argument ``name``; True if its signature cannot be read."""
    theirs = function.names.get(name, name) if isinstance(function, Renamed) else name
    found = _parameters(function)
    if found is None:
        return True
    return theirs is not None and (theirs in found or any(p.kind is p.VAR_KEYWORD for p in found.values()))


def options(function: Callable[..., Any], published: Iterable[str]) -> Collection[str]:
    """The names of the options that ``function`` takes: its own, and those of ``published`` by these names.

    One that takes any keyword offers the published ones; it could ignore all others.
    """
    return {*(_parameters(function) or ()), *(name for name in published if takes(function, name))}


def require(function: Callable[..., Any], called: str, *names: str) -> None:
    """Raise SubjectLacks, naming the first argument that ``function`` does not take."""
    for name in names:
        if not takes(function, name):
            raise SubjectLacks(f"the subject's {called} takes no parameter {name}")


def _parameters(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """The parameters by the subject's own names; None if they cannot be read."""
    try:
        return inspect.signature(function.function if isinstance(function, Renamed) else function).parameters
    except (TypeError, ValueError):
        return None
