"""Small kernels written by hand, in the form in which Triton writes PTX, and what becomes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from verify.simulator.errors import Fault
from verify.simulator.launch import Ran, Settings, run_grid
from verify.simulator.memory import Buffer
from verify.simulator.program import Program
from verify.simulator.ptx import parse

_HEAD = """
.version 8.7
.target sm_80
.address_size 64

\t// .globl\tsmall                   // -- Begin function small
.extern .shared .align 16 .b8 global_smem[];
{before}
.visible .entry small(
{parameters}
)
.reqntid {threads}
{{
\t.reg .pred \t%p<20>;
\t.reg .b16 \t%rs<20>;
\t.reg .b32 \t%r<60>;
\t.reg .b64 \t%rd<60>;
$L__func_begin0:
\t.loc\t1 5 0                           // small.py:5:0

// %bb.0:
"""
_TAIL = """
$L__tmp1:
$L__func_end0:
                                        // -- End function
}
\t.file\t1 "/somewhere/small.py"
\t.section\t.debug_abbrev
\t{
.b8 1                                   // Abbreviation Code
.b8 0                                   // EOM(3)
\t}
"""

#: Pointers to the first three tensors, the number of the thread, and 4 and 8 times it.
START = """
\tld.param.b64 \t%rd1, [small_param_0];
\tld.param.b64 \t%rd2, [small_param_1];
\tld.param.b64 \t%rd3, [small_param_2];
\tmov.u32 \t%r1, %tid.x;
\tshl.b32 \t%r2, %r1, 2;
\tshl.b32 \t%r3, %r1, 3;
\tcvt.u64.u32 \t%rd4, %r2;
\tadd.s64 \t%rd5, %rd1, %rd4;
\tadd.s64 \t%rd6, %rd2, %rd4;
\tmov.b32 \t%r4, global_smem;
\tadd.s32 \t%r5, %r4, %r2;
"""
POINTER = ".u64 .ptr .global .align 1"


def module(body: str, *, parameters: Sequence[str] = (POINTER,) * 3, threads: int = 32, before: str = "") -> str:
    """The text of a module with one kernel. Triton adds two pointers, to scratch memory, to the parameters."""
    kinds = [*parameters, POINTER, POINTER]
    listed = ",\n".join(f"\t.param {kind} small_param_{place}" for place, kind in enumerate(kinds))
    return _HEAD.format(before=before, parameters=listed, threads=threads) + body + _TAIL


def tensor(content: Any, name: str = "x", kind: str = "i4", **view: Any) -> Buffer:
    """A tensor; ``view`` has the shape, strides and offset of one that is not its whole storage."""
    values = np.ascontiguousarray(content, kind)
    if view:
        marks = np.zeros(values.size, bool)
        strides = view["strides"]
        np.lib.stride_tricks.as_strided(marks[view.get("offset", 0) :], view["shape"], strides)[...] = True
        view["elements"] = np.repeat(marks, values.itemsize)
    else:
        view = {"shape": values.shape, "strides": tuple(one // values.itemsize for one in values.strides)}
    return Buffer(name, values.view("u1").ravel(), element_bytes=values.itemsize, **view)


def values(buffer: Buffer, kind: str = "i4") -> list[Any]:
    return buffer.content.view(kind).tolist()


@dataclass
class Outcome:
    ran: Ran
    buffers: list[Buffer]

    def values(self, place: int = 0, kind: str = "i4") -> list[Any]:
        return values(self.buffers[place], kind)


def run(
    body: str,
    buffers: Sequence[Buffer] = (),
    *,
    others: Sequence[int | float] = (),
    grid: tuple[int, int, int] = (1, 1, 1),
    shared: int = 0,
    start: str = START,
    settings: Settings | None = None,
    **about: Any,
) -> Outcome:
    """Run a kernel on some tensors, of which the first three are at hand, and on ``others``, which are numbers."""
    given = [*buffers, *(tensor([0], f"spare{place}") for place in range(len(buffers), 3))]
    about.setdefault("parameters", (POINTER,) * len(given) + (".u32",) * len(others))
    program = Program(parse(module(start + body + "\n\tret;", **about)))
    arguments = [*((place, 0) for place in range(len(given))), *others]
    ran = run_grid(program, given, arguments, grid, shared, settings or Settings())
    return Outcome(ran, given)


def fault(body: str, buffers: Sequence[Buffer] = (), **how: Any) -> Fault:
    """What is wrong with a kernel."""
    with pytest.raises(Fault) as found:
        run(body, buffers, **how)
    return found.value
