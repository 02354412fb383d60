"""Threads that part and meet, barriers, grids, undefined registers and loops without an end."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from verify.simulator import POISONS
from verify.simulator.errors import Fault
from verify.simulator.launch import Settings, require_same
from verify.tests.simulator.small import Outcome, fault, run, tensor

_STORE = "st.global.b32 [%rd5], %r10;"
#: The order of warps, and a machine that runs all of them together.
_ORDERS = (None, 1, 2)


def _out(count: int = 96) -> list[object]:
    return [tensor([0] * count)]


def _nested(thread: int) -> int:
    value = 0
    if thread & 1:
        value += 1
        if thread & 2:
            value += 10
        else:
            value += 20 + (300 if thread > 40 else 0)
    elif thread > 70:
        value += 5000
    return value + thread


_NESTED = """
    mov.b32 %r10, 0; and.b32 %r11, %r1, 1; and.b32 %r12, %r1, 2;
    setp.eq.s32 %p1, %r11, 0; setp.eq.s32 %p2, %r12, 0; setp.gt.s32 %p3, %r1, 40; setp.gt.s32 %p4, %r1, 70;
    @%p1 bra $L__even;
    add.s32 %r10, %r10, 1;
    @%p2 bra $L__low;
    add.s32 %r10, %r10, 10;
    bra.uni $L__odd;
$L__low:
    add.s32 %r10, %r10, 20;
    @!%p3 bra $L__odd;
    add.s32 %r10, %r10, 300;
$L__odd:
    bra $L__all;
$L__even:
    @!%p4 bra $L__all;
    add.s32 %r10, %r10, 5000;
$L__all:
    add.s32 %r10, %r10, %r1;
"""


def _collatz(thread: int) -> int:
    steps = 0
    while thread > 1:
        thread = thread // 2 if thread % 2 == 0 else 3 * thread + 1
        steps += 1
    return steps


_COLLATZ = """
    mov.b32 %r10, 0; mov.b32 %r11, %r1;
    setp.lt.s32 %p1, %r11, 2;
    @%p1 bra $L__done;
$L__loop:
    and.b32 %r12, %r11, 1; setp.eq.s32 %p2, %r12, 0;
    @%p2 bra $L__halve;
    mad.lo.s32 %r11, %r11, 3, 1;
    bra $L__next;
$L__halve:
    shr.u32 %r11, %r11, 1;
$L__next:
    add.s32 %r10, %r10, 1;
    setp.gt.s32 %p1, %r11, 1;
    @%p1 bra $L__loop;
$L__done:
"""


def _triangle(thread: int) -> int:
    return sum(inner for outer in range(thread % 7) for inner in range(outer, thread % 5 + 2))


_TRIANGLE = """
    mov.b32 %r10, 0; mov.b32 %r11, 0; rem.u32 %r20, %r1, 7; rem.u32 %r21, %r1, 5; add.s32 %r21, %r21, 2;
$L__outer:
    setp.ge.s32 %p1, %r11, %r20;
    @%p1 bra $L__end;
    mov.b32 %r12, %r11;
$L__inner:
    setp.ge.s32 %p2, %r12, %r21;
    @%p2 bra $L__after;
    add.s32 %r10, %r10, %r12;
    add.s32 %r12, %r12, 1;
    bra $L__inner;
$L__after:
    add.s32 %r11, %r11, 1;
    bra $L__outer;
$L__end:
"""


@pytest.mark.parametrize("seed", _ORDERS)
@pytest.mark.parametrize(
    ("body", "reference"),
    [
        (_NESTED, _nested), (_COLLATZ, _collatz), (_TRIANGLE, _triangle),
        ("setp.gt.s32 %p1, %r1, 50; mov.b32 %r10, 3; @%p1 add.s32 %r10, %r10, %r1; @!%p1 sub.s32 %r10, %r10, %r1;",
         lambda thread: 3 + thread if thread > 50 else 3 - thread),
        ("setp.gt.s32 %p1|%p2, %r1, 50; selp.b32 %r10, 1, 2, %p2;", lambda thread: 1 if thread <= 50 else 2),
        ("setp.eq.s32 %p1, %r1, 70; mov.b32 %r10, 9; @%p1 ret; mov.b32 %r10, 4;",
         lambda thread: 0 if thread == 70 else 4),
        ("setp.ne.s32 %p1, %r1, 70; mov.b32 %r10, 9; @%p1 exit;", lambda thread: 9 if thread == 70 else 0),
    ],
)  # fmt: skip
def test_threads_part_and_meet(body: str, reference: Callable[[int], int], seed: int | None) -> None:
    found = run(body + _STORE, _out(), threads=96, settings=Settings(order_seed=seed))
    assert found.values() == [reference(one) for one in range(96)]


def test_every_instruction_of_a_thread_is_counted_once() -> None:
    start = "ld.param.b64 %rd1, [small_param_0]; mov.u32 %r1, %tid.x;"
    assert run("", start=start).ran.thread_instructions == 3 * 32
    body = "setp.lt.s32 %p1, %r1, 8; @%p1 bra $L__few; add.s32 %r2, %r1, 1; add.s32 %r2, %r1, 2;\n$L__few:\n"
    assert run(body, start=start, grid=(3, 1, 1)).ran.thread_instructions == 3 * (5 * 32 + 2 * 24)


@pytest.mark.parametrize("seed", _ORDERS)
def test_some_threads_end_before_a_barrier(seed: int | None) -> None:
    """Threads that have ended are not waited for."""
    body = "setp.{}.s32 %p1, %r1, 40; @%p1 {}; bar.sync 0; mov.b32 %r10, 7;" + _STORE
    for how in ("ret", "exit"):
        found = run(body.format("gt", how), _out(), threads=96, settings=Settings(order_seed=seed))
        assert found.values() == [7] * 41 + [0] * 55
    found = run(body.format("lt", "ret"), _out(), threads=96, settings=Settings(order_seed=seed))
    assert found.values() == [0] * 40 + [7] * 56


def test_a_warp_that_is_not_whole_needs_no_more_threads_than_it_has() -> None:
    body = "st.shared.b32 [%r5], %r1; bar.sync 0; ld.shared.b32 %r10, [%r4+156]; vote.sync.ballot.b32 %r11, %p1, -1;"
    body = "setp.lt.s32 %p1, %r1, 999;" + body + _STORE + "st.global.b32 [%rd6], %r11;"
    found = run(body, [tensor([0] * 40), tensor([0] * 40, kind="u4")], threads=40, shared=160)
    assert found.values() == [39] * 40
    assert found.values(1, "u4") == [0xFFFFFFFF] * 32 + [0xFF] * 8


@pytest.mark.parametrize("seed", _ORDERS)
def test_a_barrier_in_a_branch_of_some_lanes_is_found(seed: int | None) -> None:
    body = "setp.{} %p1, %r1, {}; @%p1 bra $L__end;\n\t.loc 1 12 1\nbar.sync 0;\n$L__end:\nmov.b32 %r10, 1;" + _STORE
    wrong = fault(body.format("lt.s32", 70), _out(), threads=96, settings=Settings(order_seed=seed))
    assert (wrong.kind, wrong.thread) == ("barrier", ((0, 0, 0), 70))
    assert "26 threads of a warp reach it without the others" in str(wrong)
    assert "small.py:12" in str(wrong)
    run(body.format("lt.s32", 64), _out(), threads=96, settings=Settings(order_seed=seed))


@pytest.mark.parametrize("seed", _ORDERS)
def test_an_exchange_waits_for_lanes_in_code_further_down(seed: int | None) -> None:
    """A compiler puts code that runs rarely behind the kernel's end, from where it comes back."""
    body = (
        "setp.lt.s32 %p1, %r1, 7; mov.b32 %r10, 1; @%p1 bra $L__rare;\n$L__back:\n"
        "shfl.sync.bfly.b32 %r11, %r10, 1, 31, -1; add.s32 %r10, %r10, %r11; bar.sync 0;"
        + _STORE
        + "ret;\n$L__rare:\nmov.b32 %r10, 5; bra $L__back;"
    )
    found = run(body, _out(), threads=96, settings=Settings(order_seed=seed))
    assert found.values() == [10] * 6 + [6] * 2 + [2] * 88


@pytest.mark.parametrize("seed", _ORDERS)
def test_warps_at_different_barriers_are_found(seed: int | None) -> None:
    body = (
        """
    mov.u32 %r11, %ctaid.x; setp.lt.s32 %p1, %r1, 32; setp.eq.and.s32 %p1, %r11, 1, %p1;
    @%p1 bra $L__other;\nbar.sync 0;\nbra $L__end;\n$L__other:\n\t.loc 1 14 1\nbar.sync {};\n$L__end:\nmov.b32 %r10, 1;
    """
        + _STORE
    )
    settings = Settings(order_seed=seed)
    wrong = fault(body.format(1), _out(), threads=96, grid=(3, 1, 1), settings=settings)
    assert (wrong.kind, wrong.thread and wrong.thread[0]) == ("barrier", (1, 0, 0))
    assert "some threads wait here, and others at barrier" in str(wrong)
    assert "small.py:14" in str(wrong)
    assert run(body.format(0), _out(), threads=96, grid=(3, 1, 1), settings=settings).values() == [1] * 96


@pytest.mark.parametrize("seed", _ORDERS)
def test_blocks_pass_different_numbers_of_barriers(seed: int | None) -> None:
    body = """
    mov.u32 %r11, %ctaid.x; mov.b32 %r12, 0; st.shared.b32 [%r5], 0; xor.b32 %r13, %r2, 128; add.s32 %r13, %r4, %r13;
$L__loop:
    bar.sync 0; ld.shared.b32 %r14, [%r13]; bar.sync 0; add.s32 %r14, %r14, 1; st.shared.b32 [%r5], %r14;
    add.s32 %r12, %r12, 1; setp.le.s32 %p1, %r12, %r11;
    @%p1 bra $L__loop;
    mad.lo.s32 %r15, %r11, 256, %r2; cvt.u64.u32 %rd9, %r15; add.s64 %rd9, %rd1, %rd9; st.global.b32 [%rd9], %r14;"""
    found = run(body, _out(64 * 5), threads=64, shared=256, grid=(5, 1, 1), settings=Settings(order_seed=seed))
    assert found.values() == [block + 1 for block in range(5) for _ in range(64)]


def test_a_loop_without_an_end_is_found() -> None:
    body = "\n$L__loop:\nadd.s32 %r10, %r10, 1; setp.lt.s32 %p1, %r1, {};\n\t.loc 1 21 1\n@%p1 bra $L__loop;"
    wrong = fault("mov.b32 %r10, 0;" + body.format(5), settings=Settings(step_limit=1000))
    assert (wrong.kind, wrong.thread) == ("endless", ((0, 0, 0), 0))
    assert "no end within 1000 steps" in str(wrong)
    run("mov.b32 %r10, 0;" + body.format(0), settings=Settings(step_limit=1000))
    counted = "mov.b32 %r10, 0;" + body.replace("%r1, {}", "%r10, 200")
    run(counted, settings=Settings(step_limit=1000))


def test_a_program_that_runs_past_its_end_is_found() -> None:
    from verify.simulator.launch import run_grid
    from verify.simulator.program import Program
    from verify.simulator.ptx import parse
    from verify.tests.simulator.small import module

    program = Program(parse(module("mov.u32 %r1, %tid.x;")))
    with pytest.raises(Fault, match="runs past its end"):
        run_grid(program, [], [0, 0, 0], (1, 1, 1), 0, Settings())


def _twice(body: str, **how: object) -> list[Outcome]:
    return [run(body, _out(32), settings=Settings(poison=word), **how) for word in POISONS]


@pytest.mark.parametrize(
    "body",
    [
        "add.s32 %r10, %r40, 1;",
        "cvt.u32.u16 %r10, %rs7;",
        "cvt.u32.u64 %r10, %rd40;",
        "and.b32 %r10, %r40, 1;",
        "shr.u32 %r10, %r40, 31;",
        "selp.b32 %r10, 1, 2, %p9;",
        "mov.b32 %r10, 1; @%p9 mov.b32 %r10, 2;",
        "mov.b32 %r10, 1; @%p9 bra $L__x; mov.b32 %r10, 2;\n$L__x:\n",
        "setp.lt.s32 %p1, %r1, 8; @%p1 mov.b32 %r10, 5;",
        "setp.lt.s32 %p1, %r1, 8; @%p1 bra $L__x; mov.b32 %r10, 2;\n$L__x:\n",
        "mov.b32 %r40, 0f3F800000; add.f32 %r10, %r40, %r41;",
        "mov.b64 {%r10, %r11}, %rd40;",
        "max.s32 %r10, %r40, 0;",
        "shfl.sync.bfly.b32 %r10, %r40, 1, 31, -1;",
        "add.cc.u32 %r11, %r40, %r40; addc.u32 %r10, 0, 0;",
        "vote.sync.ballot.b32 %r10, %p9, -1;",
    ],
)
def test_an_undefined_register_that_changes_a_result_is_found(body: str) -> None:
    first, second = _twice(body + _STORE)
    assert first.ran.read_undefined
    with pytest.raises(Fault, match=r"x\[\d+\] depends on it") as found:
        require_same(first.buffers, second.buffers, "undefined", "depends on it")
    assert found.value.kind == "undefined"


@pytest.mark.parametrize(
    "body",
    [
        "mov.b32 {%rs1, %rs2}, %r1; mov.b32 %r10, {%rs1, %rs9}; and.b32 %r10, %r10, 65535;",
        "mov.b64 %rd10, {%r1, %r40}; mov.b64 {%r10, %r11}, %rd10;",
        "mul.lo.s32 %r10, %r40, 0;",
        "setp.lt.s32 %p1, %r1, 64; selp.b32 %r10, 5, %r40, %p1;",
        "setp.lt.s32 %p1, %r1, 8; mov.b32 %r10, 1; @%p1 mov.b32 %r11, 5; @%p1 add.s32 %r10, %r11, 1;",
        "sub.s32 %r10, %r40, %r40;",
    ],
)
def test_an_undefined_register_that_changes_nothing_is_no_fault(body: str) -> None:
    first, second = _twice(body + _STORE)
    assert first.ran.read_undefined
    require_same(first.buffers, second.buffers, "undefined", "depends on it")


def test_a_program_that_defines_what_it_reads_is_not_run_twice() -> None:
    assert not run(_NESTED + _STORE, _out(), threads=96).ran.read_undefined


@pytest.mark.parametrize("grid", [(1, 1, 1), (5, 1, 1), (3, 4, 2), (1, 1, 7), (2, 3, 11)])
@pytest.mark.parametrize("threads", [32, 1024])
def test_blocks_of_a_grid_have_their_coordinates(grid: tuple[int, int, int], threads: int) -> None:
    """A set of blocks that run together has 16 of 1024 threads."""
    body = """
    mov.u32 %r10, %ctaid.x; mov.u32 %r11, %ctaid.y; mov.u32 %r12, %ctaid.z; mov.u32 %r13, %nctaid.x;
    mov.u32 %r14, %nctaid.y; mov.u32 %r15, %nctaid.z; mad.lo.s32 %r16, %r12, %r14, %r11;
    mad.lo.s32 %r16, %r16, %r13, %r10;
    mul.wide.u32 %rd9, %r16, 4; add.s64 %rd9, %rd1, %rd9; shl.b32 %r11, %r11, 8; shl.b32 %r12, %r12, 16;
    shl.b32 %r15, %r15, 24; or.b32 %r10, %r10, %r11; or.b32 %r10, %r10, %r12; or.b32 %r10, %r10, %r15;
    st.global.b32 [%rd9], %r10;"""
    blocks = grid[0] * grid[1] * grid[2]
    found = run(body, [tensor([0] * blocks)], grid=grid, threads=threads)
    expected = [
        x | y << 8 | z << 16 | grid[2] << 24 for z in range(grid[2]) for y in range(grid[1]) for x in range(grid[0])
    ]
    assert found.values() == expected


def test_a_fault_names_the_block_by_its_coordinates() -> None:
    body = "mov.u32 %r10, %ctaid.z; setp.eq.s32 %p1, %r10, 3; setp.eq.and.s32 %p1, %r1, 9, %p1;"
    body += "@%p1 ld.global.b32 %r11, [%rd1+4];"
    wrong = fault(body, [tensor([0])], grid=(2, 3, 4), threads=1024)
    assert wrong.thread == ((0, 0, 3), 9)
    assert "block (0, 0, 3), thread 9" in str(wrong)


def test_special_registers() -> None:
    names = ["tid.x", "ntid.x", "laneid", "warpid", "tid.y", "ntid.z", "ctaid.x", "nctaid.y"]
    body = "".join(
        f"mov.u32 %r10, %{name}; st.global.b32 [%rd5+{96 * 4 * place}], %r10;" for place, name in enumerate(names)
    )
    found = np.array(run(body, _out(96 * len(names)), threads=96).values()).reshape(-1, 96)
    threads = np.arange(96)
    expected = [threads, threads * 0 + 96, threads % 32, threads // 32, threads * 0, threads * 0 + 1, threads * 0]
    for got, wanted in zip(found, [*expected, threads * 0 + 1], strict=True):
        assert got.tolist() == wanted.tolist()
