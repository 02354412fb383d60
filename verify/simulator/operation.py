"""What an opcode computes: a pure function of the values of its operands, or Unsupported."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from verify.simulator.errors import Unsupported

_WIDTHS = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype_of(name: str) -> np.dtype:
    """The NumPy type of a PTX type (``u32``, ``pred``); bfloat16 is its 16 bits. Raises KeyError for any other."""
    if name in ("pred", "bf16"):
        return np.dtype(bool if name == "pred" else np.uint16)
    if name[:1] not in _WIDTHS or name[1:] not in ("8", "16", "32", "64") or name == "f8":
        raise KeyError(name)
    return np.dtype(f"{_WIDTHS[name[0]]}{int(name[1:]) // 8}")


@dataclass(frozen=True, slots=True)
class Operation:
    """``compute`` makes the result, of type ``result``, from arrays of the types ``inputs``.

    If ``approximate``, it takes the mode in which approximate instructions round (``floats.MODES``) as first argument.
    """

    result: np.dtype
    inputs: tuple[np.dtype, ...]
    compute: Callable[..., Any]
    approximate: bool = False


class Modifiers:
    """The modifiers of an opcode, taken one by one; whatever is left at the end is Unsupported."""

    def __init__(self, opcode: str) -> None:
        self.opcode = opcode
        self._left = opcode.replace("::", "__").split(".")[1:]

    def flag(self, name: str) -> bool:
        """Whether the modifier is there; it is taken."""
        if name in self._left:
            self._left.remove(name)
            return True
        return False

    def choice(self, names: Iterable[str], default: str | None = None) -> str:
        """The first of ``names`` that is there, taken; ``default`` without any. Raises Unsupported without either."""
        for name in names:
            if self.flag(name):
                return name
        if default is None:
            raise Unsupported(self.opcode)
        return default

    def kind(self, *allowed: str) -> str:
        """The last modifier, which must be one of the types ``allowed``; it is taken."""
        if not self._left or (allowed and self._left[-1] not in allowed):
            raise Unsupported(self.opcode)
        return self._left.pop()

    def end(self) -> None:
        """Raise Unsupported if a modifier was not taken."""
        if self._left:
            raise Unsupported(self.opcode)


#: Makes the operation of an opcode from its modifiers and the number of its inputs.
Maker = Callable[[Modifiers, int], Operation]


def alike(kind: str, count: int, compute: Callable[..., Any], *, approximate: bool = False) -> Operation:
    """An operation whose inputs and result all have the type ``kind``."""
    dtype = dtype_of(kind)
    return Operation(dtype, (dtype,) * count, compute, approximate)
