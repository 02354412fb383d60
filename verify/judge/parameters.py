"""Which of the published parameters a function of the subject takes, before it is called with them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from verify.errors import SubjectLacks
from verify.subject.published import Renamed


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether ``function`` can be given the argument ``name``; True if its signature cannot be read."""
    theirs: str | None = name
    if isinstance(function, Renamed):
        theirs = function.names.get(name, name)
        function = function.function
    try:
        found = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return True
    return theirs is not None and (theirs in found or any(p.kind is p.VAR_KEYWORD for p in found.values()))


def require(function: Callable[..., Any], called: str, *names: str) -> None:
    """Raise SubjectLacks, naming the first argument that ``function`` does not take."""
    for name in names:
        if not takes(function, name):
            raise SubjectLacks(f"the subject's {called} takes no parameter {name}")
