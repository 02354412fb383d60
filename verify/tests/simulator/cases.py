"""One opcode with all its modifiers, the reference of what it computes, and the values that both are tried on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from math import prod
from random import Random
from typing import Any

import numpy as np

from verify.simulator.opcodes import operation
from verify.tests.simulator import exact
from verify.tests.simulator.exact import FORMATS, Format, Function

#: The element type of packed ones.
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
#: What is not a PTX type: a distance to shift by, a place or length of a field of bits, and the table of lop3.
_SPECIAL = {
    "distance": [0, 1, 7, 8, 15, 16, 17, 30, 31, 32, 33, 62, 63, 64, 65, 255, 256, 1 << 31, (1 << 32) - 1],
    "field": [0, 1, 5, 15, 16, 30, 31, 32, 33, 62, 63, 64, 65, 128, 254, 255, 256, 261, (1 << 32) - 1],
    "table": [0x00, 0x01, 0x80, 0x88, 0x96, 0xCA, 0xE8, 0xF0, 0xCC, 0xAA, 0xFE, 0xFF],
}
_MOST_ROWS = 1600
_RANDOM_ROWS = 150


@dataclass(frozen=True)
class Case:
    """``reference`` makes the bits of the result, of type ``result``, from those of operands of the types ``inputs``.

    ``any_nan``: PTX leaves open which NaN the result is, and so does the test.
    """

    opcode: str
    inputs: tuple[str, ...]
    result: str
    reference: Function
    any_nan: bool = False


@cache
def width(kind: str) -> int:
    """The bits of a type."""
    if kind in _SPECIAL:
        return 32
    return {"pred": 1, "bf16": 16, "f16x2": 32, "bf16x2": 32, "f32x2": 64}.get(kind) or int(kind[1:])


def dtype(kind: str) -> np.dtype[Any]:
    """The NumPy type in which the simulator holds a type; bfloat16 and what is packed are bits."""
    if kind == "pred":
        return np.dtype(bool)
    letter = {"s": "i", "f": "f"}.get(kind[0], "u") if kind not in PACKED and kind not in _SPECIAL else "u"
    return np.dtype(f"{letter}{width(kind) // 8}")


def signed(kind: str, bits: int) -> int:
    """The value of the bits of an integer type."""
    return bits - (1 << width(kind)) if kind[0] == "s" and bits >> (width(kind) - 1) else bits


def flags(*names: str) -> list[str]:
    """Every choice of some modifiers, in their order: "", ".ftz", ".sat", ".ftz.sat"."""
    return ["".join(chosen) for chosen in product(*(("", f".{name}") for name in names))]


def halves(element: Format, reference: Function) -> Function:
    """A function of packed registers from one of their elements."""

    def both(*packed: int) -> int:
        low = reference(*(one & ((1 << element.width) - 1) for one in packed))
        return low | reference(*(one >> element.width for one in packed)) << element.width

    return both


@cache
def _edges(kind: str) -> Sequence[int]:
    if kind in _SPECIAL:
        return _SPECIAL[kind]
    if kind in FORMATS:
        return exact.edges(FORMATS[kind])
    if kind == "pred":
        return (0, 1)
    bits = width(kind)
    top = 1 << (bits - 1)
    found = {0, 1, 2, 3, 7, bits - 1, bits, 0x5A, top - 2, top - 1, top, top + 1, 2 * top - 2, 2 * top - 1, top // 3}
    return sorted(found | {1 << (bits // 2), (1 << (bits // 2)) - 1, 3 << (bits // 2 - 1)})


def _drawn(kind: str, random: Random) -> int:
    """The bits of a random value; of two floating-point numbers one is near 1, so that sums of them are no copies."""
    if kind in PACKED:
        element = PACKED[kind]
        return _drawn(element, random) | _drawn(element, random) << width(element)
    if kind in _SPECIAL:
        return random.choice(_SPECIAL[kind]) if random.random() < 0.5 else random.randrange(256)
    if kind in FORMATS:
        form, choice = FORMATS[kind], random.random()
        if choice < 0.2:
            return random.choice(_edges(kind))
        if choice < 0.6:
            near = form.one + random.randrange(-4 << form.fraction, 4 << form.fraction)
            return near | (form.sign if random.random() < 0.5 else 0)
    if kind != "pred" and random.random() < 0.3:  # small integers are as common in programs as others
        return random.randrange(1 << (width(kind) // 2))
    return random.randrange(1 << width(kind))


@cache
def rows(inputs: tuple[str, ...]) -> list[tuple[int, ...]]:
    """Operands of some types: all combinations of edges, or many where there are too many, and random ones."""
    random = Random(" ".join(inputs))
    found: Iterable[tuple[int, ...]] = []
    if not PACKED.keys() & {*inputs}:
        columns = [_edges(kind) for kind in inputs]
        if prod(map(len, columns)) <= _MOST_ROWS:
            found = product(*columns)
        else:
            found = (tuple(random.choice(column) for column in columns) for _ in range(_MOST_ROWS // 4))
    return [*found, *(tuple(_drawn(kind, random) for kind in inputs) for _ in range(_RANDOM_ROWS))]


def arrays(case: Case, operands: Sequence[tuple[int, ...]]) -> list[np.ndarray]:
    """The operands as the simulator takes them, one array for each input."""
    found = []
    for kind, column in zip(case.inputs, zip(*operands, strict=True), strict=True):
        bits = np.array(column, f"u{max(width(kind), 8) // 8}")
        found.append(bits.astype(bool) if kind == "pred" else bits.view(dtype(kind)))
    return found


def bits_of(values: np.ndarray) -> list[int]:
    return (values.astype("u1") if values.dtype == bool else values.view(f"u{values.dtype.itemsize}")).tolist()


def differences(case: Case, operands: Sequence[tuple[int, ...]]) -> list[str]:
    """The operands on which the simulator and the reference differ, and what each says."""
    found = operation(case.opcode, len(case.inputs))
    assert found.inputs == tuple(dtype(kind) for kind in case.inputs), case.opcode
    assert found.result == dtype(case.result), case.opcode
    with np.errstate(all="ignore"):
        result = found.compute(*arrays(case, operands))
    assert (result.dtype, result.shape) == (found.result, (len(operands),)), case.opcode
    same = _same(case)
    return [
        f"{case.opcode} {' '.join(map(hex, row))}: {got:#x}, not {expected:#x}"
        for row, got in zip(operands, bits_of(result), strict=True)
        if not same(got, expected := case.reference(*row))
    ]


def _same(case: Case) -> Callable[[int, int], bool]:
    if not case.any_nan:
        return lambda got, expected: got == expected
    form = FORMATS[case.result]
    return lambda got, expected: got == expected or (exact.is_nan(form, got) and exact.is_nan(form, expected))
