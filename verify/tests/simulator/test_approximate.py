"""Approximate instructions: the nearest result, and the lowest and highest that the documented error allows."""

from __future__ import annotations

import numpy as np
import pytest

from verify.record.simulation import MODES
from verify.simulator.errors import Unsupported
from verify.simulator.opcodes import operation
from verify.tests.simulator import approximations, exact
from verify.tests.simulator.exact import F32

_RANDOM = 100


def _results(opcode: str, mode: str, rows: list[tuple[int, ...]]) -> np.ndarray:
    found = operation(opcode, approximations.FORMS[opcode][1])
    assert found.approximate
    assert {found.result, *found.inputs} == {np.dtype("f4")}
    columns = [np.array(column, "u4").view("f4") for column in zip(*rows, strict=True)]
    with np.errstate(all="ignore"):
        return found.compute(mode, *columns)


def test_there_are_three_modes() -> None:
    assert MODES == approximations.MODES


@pytest.mark.parametrize("opcode", approximations.FORMS)
def test_a_result_is_the_nearest_or_the_last_within_the_documented_error(opcode: str) -> None:
    rows = approximations.operands(approximations.FORMS[opcode][0], _RANDOM)
    wrong = []
    for mode in approximations.MODES:
        for row, got in zip(rows, _results(opcode, mode, rows).view("u4").tolist(), strict=True):
            expected = approximations.references(opcode, mode, *row)
            if got not in expected:
                wrong.append((mode, [*map(hex, row)], hex(got), [*map(hex, expected)]))
    assert wrong == []


@pytest.mark.parametrize("opcode", approximations.FORMS)
def test_the_modes_are_in_order_and_differ_wherever_there_is_an_error(opcode: str) -> None:
    name, _ = approximations.FORMS[opcode]
    rows = approximations.operands(name, _RANDOM)
    near, low, high = (_results(opcode, mode, rows) for mode in approximations.MODES)
    number = ~np.isnan(near)
    assert (np.isnan(low) == ~number).all()
    assert (np.isnan(high) == ~number).all()
    assert ((low <= near) & (near <= high))[number].all()
    passed = np.array([all(2.0**-126 <= abs(exact.number(F32, one)) < np.inf for one in row) for row in rows])
    inexact = number & passed & np.isfinite(near) & (near != 0) & (np.abs(near) >= 2.0**-126)
    assert inexact.sum() >= len(rows) // 4
    assert (low < high)[inexact].mean() > 0.95


@pytest.mark.parametrize("name", ["sin", "cos"])
@pytest.mark.parametrize("mode", approximations.MODES)
def test_what_has_no_documented_error_is_refused(name: str, mode: str) -> None:
    inside, outside = (np.array([1.0, x], "f4") for x in (314.15924, -314.2))
    compute = operation(f"{name}.approx.f32", 1).compute
    assert np.isfinite(compute(mode, inside)).all()
    with pytest.raises(Unsupported, match="beyond 100 pi, where no error is documented"):
        compute(mode, outside)
    with np.errstate(all="ignore"):
        assert np.isnan(compute(mode, np.array([np.inf, -np.inf, np.nan], "f4"))).all()


@pytest.mark.parametrize("mode", approximations.MODES)
def test_a_quotient_by_a_subnormal_number_is_refused_unless_it_is_flushed(mode: str) -> None:
    one, tiny = np.array([1.0], "f4"), np.array([2.0**-127], "f4")
    with pytest.raises(Unsupported, match=r"div\.approx by a subnormal number"):
        operation("div.approx.f32", 2).compute(mode, one, tiny)
    with np.errstate(all="ignore"):
        assert operation("div.approx.ftz.f32", 2).compute(mode, one, tiny).tolist() == [np.inf]
        assert operation("div.full.f32", 2).compute(mode, tiny, tiny)[0] == pytest.approx(1.0, rel=2.0**-22)


_TABLES = {
    "sqrt": [(-np.inf, np.nan), (-1.0, np.nan), (-0.0, -0.0), (0.0, 0.0), (np.inf, np.inf)],
    "rsqrt": [(-np.inf, np.nan), (-1.0, np.nan), (-0.0, -np.inf), (0.0, np.inf), (np.inf, 0.0)],
    "rcp": [(-np.inf, -0.0), (-0.0, -np.inf), (0.0, np.inf), (np.inf, 0.0)],
    "sin": [(-np.inf, np.nan), (-0.0, -0.0), (0.0, 0.0), (np.inf, np.nan)],
    "cos": [(-np.inf, np.nan), (-0.0, 1.0), (0.0, 1.0), (np.inf, np.nan)],
    "lg2": [(-np.inf, np.nan), (-1.0, np.nan), (-0.0, -np.inf), (0.0, -np.inf), (np.inf, np.inf)],
    "ex2": [(-np.inf, 0.0), (-0.0, 1.0), (0.0, 1.0), (np.inf, np.inf), (-2000.0, 0.0), (128.0, np.inf)],
    "tanh": [(-np.inf, -1.0), (-0.0, -0.0), (0.0, 0.0), (np.inf, 1.0), (2.0**-130, 2.0**-130)],
}


@pytest.mark.parametrize("name", _TABLES)
@pytest.mark.parametrize("mode", approximations.MODES)
def test_results_that_the_tables_of_the_isa_give_are_the_same_in_every_mode(name: str, mode: str) -> None:
    values, results = (np.array(column, "f4") for column in zip(*_TABLES[name], (np.nan, np.nan), strict=True))
    found = _results(f"{name}.approx.f32", mode, [(bits,) for bits in values.view("u4").tolist()])
    expected = np.where(np.isnan(results), np.uint32(F32.a_nan), results.view("u4"))
    assert found.view("u4").tolist() == expected.tolist()
