"""Races, unwritten bytes and stray accesses in shared and local memory are found, and right programs are not blamed."""

from __future__ import annotations

import numpy as np
import pytest

from verify.simulator.launch import Settings
from verify.tests.simulator.small import fault, run, tensor

#: The thread's own word of shared memory, and that of a thread in another warp, or of the neighbour.
_OWN = "st.shared.b32 [%r5], %r1;"
_FAR = "xor.b32 %r10, %r2, 128; add.s32 %r10, %r4, %r10;"
_NEAR = "xor.b32 %r10, %r2, 4; add.s32 %r10, %r4, %r10;"
_READ = "ld.shared.b32 %r11, [%r10]; st.global.b32 [%rd5], %r11;"
_BLOCK, _WARP = "bar.sync 0;", "bar.warp.sync -1;"


def _out() -> list[object]:
    return [tensor([0] * 64)]


@pytest.mark.parametrize(
    ("whose", "between", "right"),
    [
        (_FAR, _BLOCK, True), (_FAR, "barrier.sync.aligned 0;", True), (_FAR, "bar.sync 1;", True),
        (_FAR, "bar.sync 0, 64;", True), (_FAR, "", False), (_FAR, _WARP, False), (_FAR, "membar.cta;", False),
        (_NEAR, _BLOCK, True), (_NEAR, _WARP, True), (_NEAR, "bar.warp.sync 0xffffffff;", True), (_NEAR, "", False),
        (_NEAR, "fence.acq_rel.cta;", False),
    ],
)  # fmt: skip
def test_a_read_of_what_another_thread_wrote_needs_a_barrier_between(whose: str, between: str, right: bool) -> None:
    body = whose + _OWN + between + _READ
    if right:
        found = run(body, _out(), threads=64, shared=256)
        assert found.values() == [one ^ (32 if whose == _FAR else 1) for one in range(64)]
    else:
        wrong = fault("\n\t.loc 1 7 1\n" + body, _out(), threads=64, shared=256)
        other = 32 if whose == _FAR else 1
        assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 0))
        assert f"it reads byte {4 * other} of shared memory, which thread {other} wrote" in str(wrong)
        assert "small.py:7" in str(wrong)
        assert "`ld.shared.b32 %r11, [%r10]`" in str(wrong)


@pytest.mark.parametrize("whose", [_FAR, _NEAR])
@pytest.mark.parametrize("between", ["", _WARP, _BLOCK])
def test_a_store_over_what_another_thread_read_needs_a_barrier_between(whose: str, between: str) -> None:
    body = f"{_OWN} {_BLOCK} {whose} ld.shared.b32 %r11, [%r10]; {between} st.shared.b32 [%r5], 77;"
    if between == _BLOCK or (between == _WARP and whose == _NEAR):
        run(body, _out(), threads=64, shared=256)
    else:
        wrong = fault(body, _out(), threads=64, shared=256)
        assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 0))
        assert f"it writes byte 0 of shared memory, which threads of warp {int(whose == _FAR)} read" in str(wrong)


@pytest.mark.parametrize("whose", [_FAR, _NEAR])
@pytest.mark.parametrize("between", ["", _WARP, _BLOCK])
def test_a_store_over_what_another_thread_stored_needs_a_barrier_between(whose: str, between: str) -> None:
    body = f"{whose} {_OWN} {between} st.shared.b32 [%r10], 77;"
    if between == _BLOCK or (between == _WARP and whose == _NEAR):
        run(body, _out(), threads=64, shared=256)
    else:
        wrong = fault(body, _out(), threads=64, shared=256)
        assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 0))
        assert "it writes byte" in str(wrong)
        assert "wrote" in str(wrong)


def test_a_barrier_of_a_warp_does_not_order_other_warps() -> None:
    body = "setp.lt.s32 %p1, %r1, 32; {} @%p1 st.shared.b32 [%r4], 1; @!%p1 ld.shared.b32 %r10, [%r4];"
    for before in ("", _WARP):
        assert fault(body.format(before), threads=64, shared=64).kind == "race"
    split = body.format("").replace("@!%p1 ld", f"{_WARP} @!%p1 ld")
    assert fault(split, threads=64, shared=64).kind == "race"


def test_threads_that_store_what_is_there_already_do_not_race() -> None:
    run("st.shared.b32 [%r4], 5; st.shared.b32 [%r4], 5;", threads=64, shared=16)
    run(f"st.shared.b32 [%r4], 5; {_BLOCK} ld.shared.b32 %r10, [%r4]; st.shared.b32 [%r4], 5;", threads=64, shared=16)


def test_many_readers_are_no_race_and_a_writer_after_them_is() -> None:
    read = f"{_OWN} {_BLOCK} ld.shared.b32 %r10, [%r4]; ld.shared.b32 %r10, [%r4];"
    run(read, threads=96, shared=384)
    wrong = fault(read + "setp.eq.s32 %p1, %r1, 5; @%p1 st.shared.b32 [%r4], 9;", threads=96, shared=384)
    assert "thread 5" in str(wrong)
    assert "which threads of warps 0, 1, 2 read" in str(wrong)
    own = f"{_OWN} {_BLOCK} ld.shared.b32 %r10, [%r5]; st.shared.b32 [%r5], 9; ld.shared.b32 %r10, [%r5];"
    run(own, threads=96, shared=384)


def test_a_reader_of_the_same_warp_in_an_earlier_instruction_is_remembered() -> None:
    body = f"{_OWN} {_BLOCK} setp.eq.s32 %p1, %r1, 1; setp.eq.s32 %p2, %r1, 0;" + (
        "@%p1 ld.shared.b32 %r10, [%r4]; {} @%p2 ld.shared.b32 %r10, [%r4]; {} @%p2 st.shared.b32 [%r4], 9;"
    )
    assert fault(body.format("", ""), shared=128).kind == "race"
    run(body.format("bar.warp.sync -1;", ""), shared=128)
    run(body.format("", "bar.warp.sync -1;"), shared=128)


@pytest.mark.parametrize("kind", ["b16", "b8"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_neighbours_within_a_word_do_not_race(kind: str, space: str) -> None:
    width = int(kind[1:]) // 8
    body = f"""
    mul.lo.s32 %r10, %r1, {width}; add.s32 %r11, %r4, %r10; xor.b32 %r12, %r10, {width}; add.s32 %r12, %r4, %r12;
    cvt.u16.u32 %rs1, %r1; st.{space}.{kind} [%r11], %rs1; ld.{space}.{kind} %rs2, [%r11];
    cvt.u32.u16 %r13, %rs2; st.global.b32 [%rd5], %r13;"""
    assert run(body, _out(), threads=64, shared=128).values() == [*range(64)]
    wrong = fault(body + f"ld.{space}.{kind} %rs2, [%r12];", _out(), threads=64, shared=128)
    assert wrong.kind == "race"
    assert f"byte {width} of shared memory" in str(wrong)


def test_a_wide_access_is_ordered_with_narrow_ones() -> None:
    body = """
    setp.eq.s32 %p1, %r1, 0; setp.eq.s32 %p2, %r1, 40; cvt.u16.u32 %rs1, %r1;
    @%p1 st.shared.v4.b32 [%r4], {1, 2, 3, 4}; %B @%p2 st.shared.b16 [%r4+14], %rs1;"""
    run(body.replace("%B", _BLOCK), threads=64, shared=64)
    wrong = fault(body.replace("%B", ""), threads=64, shared=64)
    assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 40))
    assert "byte 14" in str(wrong)
    run(body.replace("%B", "").replace("@%p1 st.shared.v4.b32 [%r4], {1, 2, 3, 4}",
                                       "@%p1 st.shared.v2.b32 [%r4], {1, 2}"), threads=64, shared=64)  # fmt: skip


def test_other_blocks_have_memory_of_their_own() -> None:
    body = f"mov.u32 %r10, %ctaid.x; st.shared.b32 [%r5], %r10; {_BLOCK} ld.shared.b32 %r11, [%r4];"
    body += "mul.wide.u32 %rd9, %r10, 4; add.s64 %rd9, %rd1, %rd9; st.global.b32 [%rd9], %r11;"
    assert run(body, [tensor([9] * 8)], grid=(8, 1, 1), shared=128).values() == [*range(8)]
    assert fault(body.replace(_BLOCK, ""), [tensor([9] * 8)], grid=(8, 1, 1), shared=128).kind == "race"


def test_unwritten_bytes_are_not_read() -> None:
    wrong = fault("st.shared.b32 [%r5], 1; ld.shared.v2.b32 {%r10, %r11}, [%r4+128];", shared=256)
    assert (wrong.kind, wrong.thread) == ("uninitialised", ((0, 0, 0), 0))
    assert "reads byte 128 of shared memory" in str(wrong)
    half = "setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [%r4], 1; @%p1 ld.shared.v2.b32 {%r10, %r11}, [%r4];"
    assert "reads byte 4 of shared memory" in str(fault(half, shared=256))
    run(half.replace("st.shared.b32 [%r4], 1", "st.shared.v2.b32 [%r4], {1, 2}"), shared=256)


@pytest.mark.parametrize("access", ["st.shared.b32 [%r5+{}], 1;", "ld.shared.b32 %r10, [%r5+{}];"])
def test_stray_accesses_of_shared_memory_are_found(access: str) -> None:
    filled = "st.shared.b32 [%r5], 1;"
    run(filled + access.format(0), shared=128)
    above = fault(filled + access.format(4), shared=128)
    assert (above.kind, above.thread) == ("bounds", ((0, 0, 0), 31))
    assert "at byte 128 of shared memory, which has 128" in str(above)
    below = fault(filled + access.format(-4), shared=128)
    assert (below.kind, below.thread) == ("bounds", ((0, 0, 0), 0))
    aslant = fault(filled + access.format(2), shared=132)
    assert (aslant.kind, aslant.thread) == ("misaligned", ((0, 0, 0), 0))
    assert "4 bytes at byte 2" in str(aslant)


@pytest.mark.parametrize(("mode", "winner"), [("nearest", 31), ("highest", 31), ("lowest", 0)])
def test_which_lane_of_a_warp_wins_is_left_open(mode: str, winner: int) -> None:
    body = f"st.shared.b32 [%r4], %r1; {_BLOCK} ld.shared.b32 %r10, [%r4]; st.global.b32 [%rd5], %r10;"
    found = run(body, _out(), shared=16, settings=Settings(mode))
    assert found.values()[:32] == [winner] * 32
    assert found.ran.depends_on_mode
    same = run(body.replace("[%r4], %r1", "[%r4], 3"), _out(), shared=16, settings=Settings(mode))
    assert not same.ran.depends_on_mode
    wide = body.replace("st.shared.b32 [%r4], %r1", "st.shared.v2.b32 [%r4], {3, %r1}").replace("[%r4];", "[%r4+4];")
    assert run(wide, _out(), shared=16, settings=Settings(mode)).values()[:32] == [winner] * 32


def test_lanes_of_two_warps_in_one_instruction_race() -> None:
    body = "setp.eq.s32 %p1, %r1, 5; setp.eq.s32 %p2, %r1, 37; or.pred %p3, %p1, %p2; @%p3 st.shared.b32 [%r4+8], %r1;"
    wrong = fault(body, threads=64, shared=16)
    assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 5))
    assert "it writes byte 8 of shared memory, which thread 37 writes" in str(wrong)


_FIXED = ".shared .align 16 .b8 fixed[64];\n.shared .align 4 .b8 more[4];"


def test_variables_of_a_fixed_size_come_before_those_of_the_launch() -> None:
    body = """
    mov.b32 %r10, fixed; mov.b32 %r11, more; st.global.b32 [%rd1], %r10; st.global.b32 [%rd1+4], %r11;
    st.global.b32 [%rd1+8], %r4; setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [more], 5;
    @%p1 st.shared.b32 [fixed+60], 6;
    @%p1 st.shared.b32 [%r4+12], 7;"""
    assert run(body, [tensor([9] * 3)], before=_FIXED, shared=16).values() == [0, 64, 80]
    wrong = fault(body + "@%p1 st.shared.b32 [%r4+16], 7;", [tensor([9] * 3)], before=_FIXED, shared=16)
    assert "byte 96 of shared memory, which has 96" in str(wrong)


_LOCAL = """
    .local .align 16 .b8 __local_depot0[32]; .reg .b64 %SP; .reg .b64 %SPL;
    mov.b64 %SPL, __local_depot0; add.s64 %rd20, %SPL, {place}; st.local.b32 [%rd20], %r1;
    ld.local.b32 %r10, [%SPL+{read}];
    st.global.b32 [%rd5], %r10;"""


def test_local_memory_is_each_threads_own() -> None:
    found = run(_LOCAL.format(place=28, read=28), [tensor([0] * 64)], threads=64)
    assert found.values() == [*range(64)]
    for read, kind in ((24, "uninitialised"), (32, "bounds"), (-4, "bounds"), (26, "misaligned")):
        wrong = fault(_LOCAL.format(place=28, read=read), [tensor([0] * 64)], threads=64)
        assert (wrong.kind, wrong.thread) == (kind, ((0, 0, 0), 0))
        assert "local memory" in str(wrong)


def test_a_vector_in_local_memory_keeps_its_order() -> None:
    body = """
    .local .align 16 .b8 __local_depot0[16]; .local .align 4 .b8 __local_depot1[4];
    mov.b64 %rd20, __local_depot0; mov.b64 %rd21, __local_depot1; st.local.v4.b32 [%rd20], {1, 2, 3, %r1};
    st.local.b32 [%rd21], 9; ld.local.v2.b32 {%r10, %r11}, [%rd20+8]; ld.local.b32 %r12, [%rd21];
    add.s32 %r10, %r10, %r11; add.s32 %r10, %r10, %r12; st.global.b32 [%rd5], %r10;"""
    assert run(body, [tensor([0] * 32)]).values() == [12 + one for one in range(32)]


def test_every_width_is_stored_and_loaded_again() -> None:
    for vector in (1, 2, 4):
        for width, name in ((8, "%rs"), (16, "%rs"), (32, "%r"), (64, "%rd")):
            if vector * width > 256:
                continue
            size, word = vector * width // 8, f"{f'.v{vector}' if vector > 1 else ''}.b{width}"
            low, high = ([f"{name}{first + place}" for place in range(vector)] for first in (12, 16))
            first, second = (f"{{{', '.join(one)}}}" if vector > 1 else one[0] for one in (low, high))
            body = f"""
            mul.lo.s32 %r50, %r1, {size}; add.s32 %r51, %r4, %r50; cvt.u64.u32 %rd50, %r50; add.s64 %rd51, %rd1, %rd50;
            add.s64 %rd52, %rd2, %rd50; ld.global{word} {first}, [%rd51]; st.shared{word} [%r51], {first};
            ld.shared{word} {second}, [%r51]; st.global{word} [%rd52], {second};"""
            content = np.random.default_rng(width + vector).integers(0, 256, 32 * size)
            found = run(body, [tensor(content, kind="u1"), tensor(content * 0, kind="u1")], shared=32 * size)
            assert found.values(1, "u1") == content.tolist(), word
