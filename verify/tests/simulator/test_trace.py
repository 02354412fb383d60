"""The values that pass from line to line, and where two runs of a kernel first hold different ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from verify.errors import ConfigurationError
from verify.simulator.launch import Settings, run_grid
from verify.simulator.program import Program
from verify.simulator.ptx import parse
from verify.simulator.trace import Trace, differences, read_trace
from verify.tests.simulator.small import START, module, tensor

#: Line 6 loads x, line 7 doubles it, line 8 adds 1, line 9 stores.
_LOAD = "\t.loc 1 6 0\n\tld.global.b32 %r10, [%rd5];\n"
_DOUBLE = "\t.loc 1 7 0\n\tadd.f32 %r11, %r10, %r10;\n"
_MORE = "\t.loc 1 8 0\n\tadd.f32 %r12, %r11, 0f3F800000;\n"
_STORE = "\t.loc 1 9 0\n\tst.global.b32 [%rd6], %r12;\n\tret;\n"
#: The same as _MORE for two values in one register, as for SM 100 and later.
_PACKED = (
    "\t.loc 1 8 0\n\tmov.b64 %rd9, {%r11, %r11};\n\tmov.b32 %r13, 0f3F800000;\n\tmov.b64 %rd10, {%r13, %r13};\n"
    "\tadd.rn.f32x2 %rd11, %rd9, %rd10;\n\tmov.b64 {%r12, %r14}, %rd11;\n"
)


def _traced(body: str, values: list[float]) -> Trace:
    found, program = Trace(), Program(parse(module(START + body)))
    found.watch(program)
    buffers = [tensor(values, kind="f4"), tensor([0.0] * len(values), "out", "f4")]
    run_grid(program, buffers, [(0, 0), (1, 0)], (1, 1, 1), 0, Settings())
    return found


_VALUES = [float(value) for value in range(32)]


def test_values_are_those_that_pass_out_of_a_line() -> None:
    found = _traced(_LOAD + _DOUBLE + _MORE + _STORE, _VALUES)
    assert [*found.values] == [("small.py:6", "f32"), ("small.py:7", "f32"), ("small.py:8", "b32")]
    held = {line: sorted(bits.view("f4").tolist()) for (line, _), bits in found.values.items()}
    assert held["small.py:6"] == _VALUES
    assert held["small.py:7"] == [2 * value for value in _VALUES]
    assert held["small.py:8"] == [2 * value + 1 for value in _VALUES]


def test_the_first_line_with_other_values_is_told_with_the_nearest_pair() -> None:
    one = _traced(_LOAD + _DOUBLE + _MORE + _STORE, _VALUES)
    other = _traced(
        _LOAD + _DOUBLE.replace("add.f32 %r11, %r10, %r10", "mul.f32 %r11, %r10, 0f40000001") + _MORE + _STORE, _VALUES
    )
    first, *_ = differences(one, other)
    assert first.place == ("small.py:7", "f32")
    assert first.counts == (32, 32)
    assert first.pair == ("32 (0x42000000)", "32.0000038 (0x42000001)")
    assert not [*differences(one, one)]


def test_packed_arithmetic_holds_the_same_values() -> None:
    assert not [
        *differences(
            _traced(_LOAD + _DOUBLE + _MORE + _STORE, _VALUES), _traced(_LOAD + _DOUBLE + _PACKED + _STORE, _VALUES)
        )
    ]


def test_work_on_another_line_is_no_difference() -> None:
    moved = _LOAD + _DOUBLE.replace("1 7 0", "1 6 0") + _MORE + _STORE
    assert not [*differences(_traced(_LOAD + _DOUBLE + _MORE + _STORE, _VALUES), _traced(moved, _VALUES))]


def test_a_value_that_a_loop_hands_on_belongs_to_the_line_that_made_it() -> None:
    loop = (
        "\t.loc 1 5 0\n\tmov.b32 %r11, 0f00000000;\n\tmov.b32 %r20, 0;\n$L__BB0_1:\n"
        + "\t.loc 1 7 0\n\tadd.f32 %r11, %r11, %r10;\n"
        + "\t.loc 1 6 0\n\tadd.s32 %r20, %r20, 1;\n\tsetp.lt.s32 %p1, %r20, 3;\n\t@%p1 bra $L__BB0_1;\n"
    )
    found = _traced(_LOAD + loop + _MORE + _STORE, _VALUES)
    assert sorted(found.values["small.py:7", "f32"].view("f4").tolist()) == [3 * value for value in _VALUES]


def test_a_trace_is_written_and_read(tmp_path: Path) -> None:
    one = _traced(_LOAD + _DOUBLE + _MORE + _STORE, _VALUES)
    one.write(tmp_path / "deep" / "trace.npz", "sm80 (Triton 3.7.1)")
    about, again = read_trace(tmp_path / "deep" / "trace.npz")
    assert about == "sm80 (Triton 3.7.1)"
    assert [*again.values] == [*one.values]
    assert all(np.array_equal(again.values[place], bits) for place, bits in one.values.items())


@pytest.mark.parametrize("content", [b"", b"text", b"PK\x03\x04"])
def test_another_file_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "x.npz").write_bytes(content)
    with pytest.raises(ConfigurationError, match=r"x\.npz is not a trace that this suite wrote"):
        read_trace(tmp_path / "x.npz")
    with pytest.raises(ConfigurationError, match="is not a trace"):
        read_trace(tmp_path / "absent.npz")
    for name, parts in {"one.npy": None, "two.npz": {"about": "x", "line": [1]}, "three.npz": {"other": [1]}}.items():
        np.save(tmp_path / name, [1]) if parts is None else np.savez(tmp_path / name, **parts)
        with pytest.raises(ConfigurationError, match="is not a trace"):
            read_trace(tmp_path / name)
