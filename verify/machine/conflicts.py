"""Installed versions that are known not to work together, so that nobody else is blamed for it."""

from __future__ import annotations

from verify.machine.environment import NOT_INSTALLED, at_least, version_of

#: From numpy 2.4 on, an array with one element in several dimensions is no integer; Triton's interpreter took it for
#: one before 3.7.
_NUMPY, _TRITON = "2.4", "3.7"


def interpreter_conflict(numpy: str | None = None, triton: str | None = None) -> str:
    """Why Triton's interpreter, and so a run without a GPU, cannot work with numpy; empty if it can.

    The versions are those that are installed, unless they are given.
    """
    numpy, triton = numpy or version_of("numpy"), triton or version_of("triton")
    if NOT_INSTALLED in (numpy, triton) or not at_least(numpy, _NUMPY) or at_least(triton, _TRITON):
        return ""
    return (
        f"the interpreter of Triton {triton} does not work with numpy {numpy}; install numpy<{_NUMPY}, or Triton "
        f"{_TRITON} or newer"
    )
