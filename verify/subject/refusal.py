"""What counts as a refusal: the subject's own words, never an accident."""

from __future__ import annotations

import dis
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb
from typing import Any

from verify.errors import Refused, Wrong
from verify.subject.subject import Subject

#: The exceptions by which an implementation says that it does not take an input.
REFUSALS = (ValueError, TypeError, NotImplementedError)

_SUITE = Path(__file__).parents[1]
_RAISE = dis.opmap["RAISE_VARARGS"]


def refusal(error: BaseException, subject: Subject) -> str:
    """The line of the subject that refuses, as ``package/module.py:12``; empty if ``error`` is not a refusal.

    It is one if its type is in ``REFUSALS`` and the instruction that raised it is a ``raise`` statement in the
    subject's own source. What Python or torch raises by itself in the same line is a crash.
    """
    if not isinstance(error, REFUSALS):
        return ""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    if trace is None:
        return ""
    file, code = Path(trace.tb_frame.f_code.co_filename), trace.tb_frame.f_code.co_code
    if not subject.owns(file) or code[trace.tb_lasti] != _RAISE:
        return ""
    return f"{_short(file, subject)}:{trace.tb_lineno}"


@contextmanager
def refusable(subject: Subject, aspect: str, control: Callable[[], Any]) -> Iterator[None]:
    """Inside, a refusal raises Refused with this ``aspect`` if ``control()``, a plainer call, is accepted."""
    try:
        yield
    except REFUSALS as error:
        at = refusal(error, subject)
        if at and accepted(control):
            raise Refused(f"{aspect}: refused at {at} ({type(error).__name__}: {error})", aspect) from error
        raise


def accepted(control: Callable[[], Any]) -> bool:
    """Whether a call returns."""
    try:
        control()
    except Exception:  # a subject may refuse or crash in any way; then it accepts nothing
        return False
    return True


def must_refuse(
    subject: Subject, what: str, bad: Callable[[], Any], good: Callable[[], Any] | None = None, cause: str = ""
) -> None:
    """``good`` must be accepted, and ``bad`` be refused by a ``raise`` of the subject's own.

    Without ``good``, the caller has seen a call that is accepted. Raises Wrong with the ``cause`` if ``bad`` is
    accepted or, where a cause is given, crashes in the subject. Passes every other error on: a crash is no refusal.
    """
    if good is not None:
        good()
    try:
        bad()
    except Refused:
        return
    except Exception as error:  # a subject may crash in any way
        if refusal(error, subject):
            return
        if cause and (told := crash(error, subject)):
            raise Wrong(told, cause) from error
        raise
    raise Wrong(f"{what} accepted, and must be refused with ValueError", cause)


def crash(error: BaseException, subject: Subject) -> str:
    """What the subject raised and where, in words; empty for a refusal, a failure, or an error of the suite."""
    if isinstance(error, Wrong) or refusal(error, subject):
        return ""
    at = raised_in(error, subject, (_SUITE,))
    return at and f"the subject raised {type(error).__name__} at {at}: {error}"


def raised_in(error: BaseException, subject: Subject, suite: tuple[Path, ...]) -> str:
    """The line of the subject that raised ``error``; empty if the code in the folders ``suite`` did.

    An exception from a library counts as its caller's. The subject may call back into the suite, whose frames then
    count; those that only watch the subject's calls do not (``__torch_function__`` of the guards).
    """
    found = ""
    for frame, line in walk_tb(error.__traceback__):
        file = Path(frame.f_code.co_filename)
        if subject.owns(file):
            found = f"{_short(file, subject)}:{line}"
        elif any(file.is_relative_to(folder) for folder in suite) and frame.f_code.co_name not in _WATCHING:
            found = ""
    return found


#: Functions of the suite through which the subject's own calls pass, unchanged.
_WATCHING = frozenset({"__torch_function__", "launch", "noting"})


def _short(file: Path, subject: Subject) -> str:
    for folder in (subject.folder, subject.folder.resolve()):
        if file.is_relative_to(folder):
            return str(file.relative_to(folder.parent))
    return "/".join(file.parts[-2:])
