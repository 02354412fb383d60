"""Exchanges within a warp and carries, compared with references written from the PTX ISA."""

from __future__ import annotations

from itertools import product
from random import Random

import numpy as np
import pytest

from verify.tests.simulator.small import fault, run, tensor


def _shuffled(how: str, lane: int, b: int, c: int) -> tuple[int, bool]:
    """The lane that a lane reads, and the predicate (PTX ISA, shfl.sync)."""
    distance, clamp, mask = b & 31, c & 31, c >> 8 & 31
    last = lane & mask | clamp & ~mask & 31
    if how == "up":
        source, inside = lane - distance, lane - distance >= last
    elif how == "down":
        source, inside = lane + distance, lane + distance <= last
    elif how == "bfly":
        source, inside = lane ^ distance, lane ^ distance <= last
    else:
        source = lane & mask | distance & ~mask & 31
        inside = source <= last
    return (source if inside else lane), inside


_CLAMPS = [0x1F, 0, 0x1C1F, 0x1800, 0x101F, 0x1E1F, 0x7, 0x1807, 0x1F1F, 0xFFFF]


@pytest.mark.parametrize("how", ["up", "down", "bfly", "idx"])
def test_shuffles_read_the_lane_that_the_isa_says(how: str) -> None:
    body = "add.s32 %r10, %r1, 1000;"
    wanted: list[int] = []
    for place, (distance, control) in enumerate(product([0, 1, 2, 5, 8, 16, 31, 33], _CLAMPS)):
        body += f"""
        shfl.sync.{how}.b32 %r11|%p1, %r10, {distance}, {control}, -1; selp.b32 %r12, 5000, 0, %p1;
        add.s32 %r11, %r11, %r12;
        st.global.b32 [%rd5+{256 * place}], %r11;"""
        for thread in range(64):
            source, inside = _shuffled(how, thread % 32, distance, control)
            wanted.append(1000 + thread // 32 * 32 + source + 5000 * inside)
    found = run(body, [tensor([0] * len(wanted))], threads=64)
    assert found.values() == wanted


@pytest.mark.parametrize("how", ["up", "down", "bfly", "idx"])
def test_each_lane_may_name_another_distance(how: str) -> None:
    body = f"""
    mov.u32 %r20, %ctaid.x; mad.lo.s32 %r20, %r20, 64, %r1; mul.lo.s32 %r11, %r20, 7; and.b32 %r11, %r11, 31;
    shfl.sync.{how}.b32 %r12, %r20, %r11, 0x181f, 0xffffffff; mul.wide.u32 %rd9, %r20, 4; add.s64 %rd9, %rd1, %rd9;
    st.global.b32 [%rd9], %r12;"""
    wanted = [
        one // 32 * 32 + _shuffled(how, one % 32, one * 7 % 32, 0x181F)[0] if how != "x" else 0 for one in range(192)
    ]
    assert run(body, [tensor([0] * 192)], threads=64, grid=(3, 1, 1)).values() == wanted


def test_a_shuffle_of_a_value_that_is_alike_everywhere() -> None:
    body = "mov.b32 %r10, 7; shfl.sync.down.b32 %r11|%p1, %r10, 4, 31, -1; selp.b32 %r11, %r11, -7, %p1;"
    assert run(body + "st.global.b32 [%rd5], %r11;", [tensor([0] * 32)]).values() == [7] * 28 + [-7] * 4


_EXCHANGES = [
    "shfl.sync.bfly.b32 %r11, %r1, 1, 31, {};", "vote.sync.ballot.b32 %r11, %p9, {};", "bar.warp.sync {};",
    "vote.sync.any.pred %p3, %p9, {};",
]  # fmt: skip


@pytest.mark.parametrize("exchange", _EXCHANGES)
def test_an_exchange_with_threads_that_are_not_there_is_found(exchange: str) -> None:
    define = "setp.lt.s32 %p9, %r1, 99; setp.lt.s32 %p1, %r1, 40; @!%p1 bra $L__end;\n\t.loc 1 31 1\n"
    body = define + exchange.format(-1) + "\n$L__end:\nmov.b32 %r12, 1;"
    wrong = fault(body, threads=96, grid=(2, 1, 1))
    assert (wrong.kind, wrong.thread) == ("shuffle", ((0, 0, 0), 40))
    assert "lane 8 is not there" in str(wrong)
    assert "small.py:31" in str(wrong)
    run(body.replace("40", "64"), threads=96)
    run("setp.lt.s32 %p9, %r1, 99;" + exchange.format(-1), threads=96)
    half = "setp.lt.s32 %p9, %r1, 99; and.b32 %r20, %r1, 31; setp.lt.s32 %p1, %r20, 16; @!%p1 bra $L__end;"
    run(half + exchange.format("0xffff") + "\n$L__end:\n", threads=96)
    wrong = fault("setp.lt.s32 %p9, %r1, 99;" + exchange.format("65535"), threads=96)
    assert wrong.thread == ((0, 0, 0), 16)
    assert "lane 16 is there and not in the member mask" in str(wrong)


def test_threads_that_have_ended_are_not_waited_for_and_cannot_be_read() -> None:
    ended = "setp.lt.s32 %p9, %r1, 99; and.b32 %r20, %r1, 31; setp.ge.s32 %p1, %r20, 8; @%p1 ret;"
    for exchange in _EXCHANGES:
        run(ended + exchange.format(-1), threads=64)
    assert fault(ended + "shfl.sync.bfly.b32 %r11, %r1, 4, 31, -1; shfl.sync.bfly.b32 %r11, %r1, 8, 31, -1;").told == (
        "lane 0 takes the value of lane 8, which is not there"
    )


@pytest.mark.parametrize("lanes", [32, 20])
def test_votes(lanes: int) -> None:
    members = (1 << lanes) - 1
    random = Random(lanes)
    for words in ([0, 0, 0], [-1, -1, -1], [1 << 31, 1 << 19, 1], [random.getrandbits(32) for _ in range(3)]):
        body = f"""
        shr.u32 %r20, %r1, 5; mul.wide.u32 %rd9, %r20, 4; add.s64 %rd9, %rd2, %rd9; ld.global.b32 %r21, [%rd9];
        and.b32 %r22, %r1, 31; shr.u32 %r21, %r21, %r22; and.b32 %r21, %r21, 1; setp.ne.s32 %p9, %r21, 0;
        mov.b32 %r10, 0; setp.lt.u32 %p1, %r22, {lanes}; @!%p1 bra $L__end;
        vote.sync.ballot.b32 %r10, %p9, {members}; st.global.b32 [%rd5], %r10;
        vote.sync.all.pred %p2, %p9, {members}; vote.sync.any.pred %p3, %p9, {members};
        vote.sync.uni.pred %p4, !%p9, {members};
        selp.b32 %r11, 1, 0, %p2; selp.b32 %r12, 2, 0, %p3; selp.b32 %r13, 4, 0, %p4;
        or.b32 %r11, %r11, %r12; or.b32 %r11, %r11, %r13; st.global.b32 [%rd5+384], %r11;\n$L__end:\n"""
        found = run(body, [tensor([0] * 192, kind="u4"), tensor(np.array(words).astype("u4"), kind="u4")], threads=96)
        got = found.values(kind="u4")
        for thread in range(96):
            word = words[thread // 32] & members
            inside = thread % 32 < lanes
            every, some = word == members, word != 0
            assert got[thread] == (word if inside else 0)
            assert got[96 + thread] == ((every | some << 1 | (every or not some) << 2) if inside else 0)


def _words(value: int, count: int) -> list[int]:
    return [value >> 32 * place & 0xFFFFFFFF for place in range(count)]


def test_sums_carry_from_word_to_word() -> None:
    random = Random(3)
    edges = [0, 1, (1 << 96) - 1, (1 << 64) - 1, 1 << 95, (1 << 32) - 1, 0xFFFFFFFF << 32]
    pairs = [*product(edges, edges), *((random.getrandbits(96), random.getrandbits(96)) for _ in range(15))]
    body = "".join(
        f"ld.global.b32 %r{10 + place}, [%rd6+{256 * place}]; ld.global.b32 %r{20 + place}, [%rd6+{256 * (3 + place)}];"
        for place in range(3)
    )
    body += (
        "add.cc.u32 %r30, %r10, %r20; addc.cc.s32 %r31, %r11, %r21; addc.cc.u32 %r32, %r12, %r22; addc.u32 %r33, 0, 0;"
    )
    body += "".join(f"st.global.b32 [%rd5+{256 * place}], %r{30 + place};" for place in range(4))
    columns = [[_words(a, 3)[place] for a, _ in pairs] for place in range(3)]
    columns += [[_words(b, 3)[place] for _, b in pairs] for place in range(3)]
    assert len(pairs) == 64
    found = run(body, [tensor([[0] * 64] * 4, kind="u4"), tensor(columns, kind="u4")], threads=64)
    got = np.array(found.values(kind="u4")).reshape(4, 64)
    for place, (a, b) in enumerate(pairs):
        assert got[:, place].tolist() == _words(a + b, 4)


@pytest.mark.parametrize("kind", ["u32", "s32"])
def test_products_carry_from_word_to_word(kind: str) -> None:
    """A product of 64 bits and a sum of 96, as LLVM writes them; the high part of signed factors is signed."""
    random = Random(4)
    edges = [0, 1, (1 << 32) - 1, 1 << 31, (1 << 31) - 1]
    rows = [*product(edges, edges, edges[:2]), *([random.getrandbits(32) for _ in range(3)] for _ in range(14))]
    body = f"""
    ld.global.b32 %r10, [%rd6]; ld.global.b32 %r11, [%rd6+256]; ld.global.b32 %r12, [%rd6+512];
    mad.lo.cc.{kind} %r20, %r10, %r11, %r12; madc.hi.cc.{kind} %r21, %r10, %r11, %r12;
    madc.lo.{kind} %r22, %r10, %r11, %r12;
    st.global.b32 [%rd5], %r20; st.global.b32 [%rd5+256], %r21; st.global.b32 [%rd5+512], %r22;"""
    columns = np.array(rows, "u8").T
    found = run(body, [tensor(columns * 0, kind="u4"), tensor(columns, kind="u4")], threads=64)
    got = np.array(found.values(kind="u4")).reshape(3, 64)
    for place, (a, b, c) in enumerate(rows):
        x, y = (one - (one >> 31 << 32) if kind == "s32" else one for one in (a, b))
        low = (x * y & 0xFFFFFFFF) + c
        high = (x * y >> 32 & 0xFFFFFFFF) + c + (low >> 32)
        last = (x * y & 0xFFFFFFFF) + c + (high >> 32)
        assert got[:, place].tolist() == [one & 0xFFFFFFFF for one in (low, high, last)]


def test_a_carry_is_each_threads_own() -> None:
    body = """
    setp.lt.s32 %p1, %r1, 8; mov.b32 %r10, -1; add.cc.u32 %r11, %r10, %r1; @%p1 bra $L__few; add.cc.u32 %r11, 0, 0;
$L__few:
    addc.u32 %r12, 0, 0; st.global.b32 [%rd5], %r12;"""
    assert run(body, [tensor([9] * 32)]).values() == [0] + [1] * 7 + [0] * 24
    guarded = body.replace("@%p1 bra $L__few; add.cc", "@!%p1 add.cc")
    assert run(guarded, [tensor([9] * 32)]).values() == [0] + [1] * 7 + [0] * 24
    plain = (
        "add.cc.u32 %r11, -1, 1; add.u32 %r11, 1, 1; mov.b32 %r9, 3; addc.u32 %r12, 4, 5; st.global.b32 [%rd5], %r12;"
    )
    assert run(plain, [tensor([9] * 32)]).values() == [10] * 32


def test_tables_of_the_module_are_read() -> None:
    before = """
.global .align 4 .u32 table[4] = {1, 0x20, 4294967295, -4};
.global .align 8 .b64 one = {5};
.global .align 2 .b8 zeros[4];
"""
    body = """
    and.b32 %r10, %r2, 12; cvt.u64.u32 %rd9, %r10; mov.b64 %rd10, table; add.s64 %rd10, %rd10, %rd9;
    ld.global.nc.b32 %r11, [%rd10]; st.global.b32 [%rd5], %r11; ld.global.b32 %r12, [table+4];
    ld.global.b32 %r13, [zeros];
    add.s32 %r12, %r12, %r13; ld.global.b64 %rd11, [one]; cvt.u32.u64 %r14, %rd11; add.s32 %r12, %r12, %r14;
    st.global.b32 [%rd6], %r12;"""
    found = run(body, [tensor([0] * 32), tensor([0] * 32)], before=before)
    assert found.values(0) == [1, 32, -1, -4] * 8
    assert found.values(1) == [37] * 32
    wrong = fault(body.replace("table+4", "table+16"), [tensor([0] * 32), tensor([0] * 32)], before=before)
    assert "byte 16 of the storage of table, which has 16" in str(wrong)
