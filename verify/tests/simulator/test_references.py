"""What an opcode computes, compared with its reference bit by bit, at every edge of its types and on random values."""

from __future__ import annotations

import numpy as np
import pytest

from verify.simulator.opcodes import operation
from verify.tests.simulator import conversions, floating, integers
from verify.tests.simulator.cases import Case, arrays, bits_of, differences, rows

CASES = (*integers.CASES, *floating.CASES, *conversions.CASES)
_NAMES = sorted({case.opcode.partition(".")[0] for case in CASES})


def _of(name: str) -> list[Case]:
    return [case for case in CASES if case.opcode.partition(".")[0] == name]


@pytest.mark.parametrize("name", _NAMES)
def test_every_form_computes_what_its_reference_says(name: str) -> None:
    found = {case.opcode: differences(case, rows(case.inputs)) for case in _of(name)}
    wrong = {opcode: (len(told), told[:3]) for opcode, told in found.items() if told}
    assert wrong == {}


@pytest.mark.parametrize("name", _NAMES)
def test_a_result_depends_neither_on_its_place_nor_on_the_shape(name: str) -> None:
    for case in _of(name):
        compute = operation(case.opcode, len(case.inputs)).compute
        columns = arrays(case, rows(case.inputs)[-120:])
        with np.errstate(all="ignore"):
            expected = bits_of(compute(*columns))
            square = compute(*(one.reshape(6, 20) for one in columns))
            alone = [compute(*(one[n : n + 1] for one in columns)) for n in range(0, 120, 10)]
        assert square.shape == (6, 20), case.opcode
        assert bits_of(square.ravel()) == expected, case.opcode
        assert [bits_of(one)[0] for one in alone] == expected[::10], case.opcode


@pytest.mark.parametrize("opcode", ["max.f32", "min.f32", "max.f16", "max.bf16", "min.bf16x2", "min.f16x2"])
@pytest.mark.parametrize("length", [*range(1, 18), 33])
def test_a_signalling_nan_is_dropped_in_every_place_of_an_array(opcode: str, length: int) -> None:
    found = operation(opcode, 2)
    name = opcode.partition(".")[2]
    nan, number = {"f32": (0x7F800001, 0x40000000), "f16": (0x7C01, 0x4000), "bf16": (0x7F81, 0x4000)}[
        name.removesuffix("x2")
    ]
    if name.endswith("x2"):
        nan, number = nan << 16 | nan, number << 16 | number
    unsigned = f"u{found.result.itemsize}"
    nans, numbers = (np.full(length, bits, unsigned).view(found.result) for bits in (nan, number))
    with np.errstate(all="ignore"):
        assert {*bits_of(found.compute(nans, numbers)), *bits_of(found.compute(numbers, nans))} == {number}
