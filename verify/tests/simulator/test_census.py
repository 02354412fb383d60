"""Instructions that round are counted alike in PTX and in machine code."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest

from verify.simulator import census
from verify.simulator.ptx import parse
from verify.tests.simulator.small import module

_SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                 /* 0x00000a00ff017b82 */
        /*0010*/                   FADD R5, R2, R3 ;                      /* 0x0000000302057221 */
        /*0020*/              @P0  FFMA.FTZ R5, R2, R3, R5 ;              /* 0x0000000302057221 */
        /*0030*/             @!P0  FMUL R5, R2, 1.4426950216293334961 ;   /* 0x0000000302057221 */
        /*0040*/             @UP0  FADD2 R4, R4.F32x2.HI_LO, R6 ;         /* 0x0000000302057221 */
        /*0050*/                   HFMA2.BF16_V2 R5, R2, R3, R5 ;         /* 0x0000000302057221 */
        /*0060*/                   HFMA2 R5, -RZ, RZ, 0, 0 ;              /* 0x0000000302057221 */
        /*0070*/                   HADD2.F32 R5, -RZ, R2.H0_H0 ;          /* 0x0000000302057221 */
        /*0080*/                   DFMA R4, R2, R6, R8 ;                  /* 0x0000000302057221 */
        /*0090*/                   IMAD R4, R2, R6, R8 ;                  /* 0x0000000302057221 */
        /*00a0*/                   FADDX R4, R2, R6, R8 ;                 /* 0x0000000302057221 */
"""


def test_machine_code_is_counted_by_family() -> None:
    assert census.of_sass(_SASS) == {"add": 3, "fma": 4, "mul": 1}
    assert census.of_sass("") == {}


def test_ptx_is_counted_by_family() -> None:
    body = """
    add.f32 %r1, %r2, %r3; sub.rn.f32 %r1, %r2, %r3; add.s32 %r1, %r2, %r3; fma.rn.f32 %r1, %r2, %r3, %r4;
    fma.rn.bf16x2 %r1, %r2, %r3, %r4; mul.ftz.f32 %r1, %r2, %r3; mul.lo.s32 %r1, %r2, %r3; max.f32 %r1, %r2, %r3;
    fma.rn.bf16 %rs1, %rs2, %rs3, %rs4; add.f64 %rd1, %rd2, %rd3; ret;"""
    assert census.of_ptx(parse(module(body)).instructions) == {"add": 3, "fma": 4, "mul": 1}


@pytest.mark.parametrize(
    ("answer", "why"),
    [
        (FileNotFoundError("no such tool"), "cuobjdump does not run (FileNotFoundError)"),
        (subprocess.TimeoutExpired("cuobjdump", 1), "cuobjdump does not run (TimeoutExpired)"),
        ("cuobjdump fatal: Unknown architecture", "cuobjdump does not know this architecture"),
        (_SASS, ""),
    ],
)
def test_a_kernel_without_a_census_says_why(answer: Exception | str, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(command: list[str], **how: object) -> subprocess.CompletedProcess[str]:
        assert command[1] == "-sass"
        if isinstance(answer, Exception):
            raise answer
        return subprocess.CompletedProcess(command, 0, stdout=answer)

    tool = SimpleNamespace(path="cuobjdump")
    fake = SimpleNamespace(knobs=SimpleNamespace(nvidia=SimpleNamespace(cuobjdump=tool)))
    monkeypatch.setitem(sys.modules, "triton", fake)  # which the tests of this process do without
    monkeypatch.setattr(census.subprocess, "run", answered)
    found, told = census.census(module("add.f32 %r1, %r2, %r3; ret;"), b"machine code")
    assert told == why
    assert (found is None) == bool(why)
    if found is not None:
        assert (found.ptx, found.equal) == ({"add": 1}, False)
