"""Counting Triton launches, so that a check can tell a kernel that ran from a path that went round it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the kernels launched inside the block, compiled or interpreted, in order."""
    from triton.runtime.interpreter import InterpretedFunction
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def spy(owner: type) -> Any:
        run = owner.run

        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
            if not kwargs.get("warmup", False):
                names.append(getattr(self.fn, "__name__", "kernel"))
            return run(self, *args, **kwargs)

        return mock.patch.object(owner, "run", counting)

    with spy(JITFunction), spy(InterpretedFunction):
        yield names
