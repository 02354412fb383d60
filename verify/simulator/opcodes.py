"""Every opcode that computes a value from values, by its name without modifiers."""

from __future__ import annotations

from functools import cache

from verify.simulator import conversions, floating, integers
from verify.simulator.errors import Unsupported
from verify.simulator.operation import Modifiers, Operation

_MAKERS = {**integers.MAKERS, **floating.MAKERS, **conversions.MAKERS}

#: The names of the opcodes that are executed here, without modifiers.
NAMES = tuple(_MAKERS)


@cache
def operation(opcode: str, count: int) -> Operation:
    """What ``opcode``, with its modifiers, computes from ``count`` inputs. Raises Unsupported for an unknown one."""
    maker = _MAKERS.get(opcode.partition(".")[0])
    if maker is None:
        raise Unsupported(opcode)
    try:
        found = maker(Modifiers(opcode), count)
    except (KeyError, TypeError) as error:  # a type that this opcode does not have
        raise Unsupported(opcode) from error
    if len(found.inputs) != count:
        raise Unsupported(f"{opcode} with {count} inputs")
    return found
