"""Logs which files of some directories a process opens: the interpreter of every child of a run imports this first.

``verify/record/grounds.py`` puts this directory on PYTHONPATH, and sets two variables to the log file and the watched
directories. Each file is logged at once, because a server that is killed cannot write a list at its end.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress

LOG, PLACES = "VERIFY_GROUNDS_LOG", "VERIFY_GROUNDS_PLACES"


def follow(log: str, places: tuple[str, ...]) -> None:
    """Append to ``log`` the path of every file below ``places`` that this process opens, once, from now on."""
    seen: set[object] = set()

    def opened(event: str, arguments: tuple[object, ...]) -> None:
        if event != "open" or arguments[0] in seen or threading.get_ident() in _unnoticed():
            return
        path = arguments[0]
        if not isinstance(path, str) or not os.path.abspath(path).startswith(places):
            return
        seen.add(path)
        # opened each time: a descriptor kept open could meanwhile refer to another file
        with suppress(OSError):
            descriptor = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            os.write(descriptor, f"{os.path.abspath(path)}\n".encode())
            os.close(descriptor)

    sys.addaudithook(opened)


def _unnoticed() -> set[int]:
    """The threads that read for a digest; stored in ``sys``, which all copies of this module in a process share."""
    threads: set[int] = vars(sys).setdefault("_verify_unnoticed", set())
    return threads


@contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, files that this thread opens are not logged: a file that is only digested changes no result."""
    _unnoticed().add(threading.get_ident())
    try:
        yield
    finally:
        _unnoticed().discard(threading.get_ident())


def _next() -> None:
    """Import the sitecustomize that this one hides, if there is one."""
    from importlib.machinery import PathFinder
    from importlib.util import module_from_spec

    here = os.path.dirname(os.path.abspath(__file__))
    others = [place for place in sys.path if os.path.abspath(place or ".") != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(module_from_spec(spec))


if __name__ == "sitecustomize":
    if LOG in os.environ:
        follow(os.environ[LOG], tuple(os.environ[PLACES].split(os.pathsep)))
    _next()
