"""Atomic operations and reductions of a warp, compared with loops in Python, and their races."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from verify.simulator.errors import Unsupported
from verify.simulator.launch import Settings
from verify.tests.simulator.small import Outcome, fault, run, tensor

_M32 = 0xFFFFFFFF


def _signed(word: int, bits: int = 32) -> int:
    return word - (word >> (bits - 1) << bits)


_CHANGES: dict[str, Callable[[int, int], int]] = {
    "add.u32": lambda old, b: old + b & _M32,
    "add.s32": lambda old, b: old + b & _M32,
    "min.u32": min,
    "max.u32": max,
    "min.s32": lambda old, b: min(old, b, key=_signed),
    "max.s32": lambda old, b: max(old, b, key=_signed),
    "and.b32": lambda old, b: old & b,
    "or.b32": lambda old, b: old | b,
    "xor.b32": lambda old, b: old ^ b,
    "exch.b32": lambda old, b: b,
    "inc.u32": lambda old, b: 0 if old >= b else old + 1,
    "dec.u32": lambda old, b: b if old == 0 or old > b else old - 1,
    "cas.b32": lambda old, b: b if old == 7 else old,
}


def _expected(change: Callable[[int, int], int], words: list[int], values: np.ndarray, backwards: bool) -> list[int]:
    """What each thread finds, and then the four places, which threads share by their number."""
    places, found = [*words], [0] * len(values)
    for thread in range(len(values))[:: -1 if backwards else 1]:
        found[thread] = places[thread % 4]
        places[thread % 4] = change(places[thread % 4], int(values[thread]))
    return found + places


@pytest.mark.parametrize("name", _CHANGES)
@pytest.mark.parametrize("mode", ["nearest", "lowest"])
@pytest.mark.parametrize("space", ["global", "shared"])
def test_threads_take_turns_at_one_place(name: str, mode: str, space: str) -> None:
    how, kind = name.split(".")
    words = [5, _M32, 7, 1 << 31]
    values = np.random.default_rng(len(name)).integers(0, 1 << 32, 64).astype("u4")
    values[::3] = values[::3] % 9
    operands = "7, %r10" if how == "cas" else "%r10"
    opcode = f"atom.{space}.{how}.{kind}" if space == "shared" else f"atom.global.gpu.relaxed.{how}.{kind}"
    setup = """
    ld.global.b32 %r10, [%rd6]; and.b32 %r11, %r2, 12; cvt.u64.u32 %rd9, %r11; add.s64 %rd10, %rd3, %rd9;"""
    body = f"{opcode} %r12, [ %rd10 + 0 ], {operands};"
    if space == "shared":
        setup += "ld.global.b32 %r13, [%rd10]; add.s32 %r14, %r4, %r11; st.shared.b32 [%r14], %r13; bar.sync 0;"
        body = (
            f"{opcode} %r12, [%r14], {operands}; bar.sync 0; ld.shared.b32 %r15, [%r14]; st.global.b32 [%rd10], %r15;"
        )
    buffers = [tensor([0] * 64, kind="u4"), tensor(values, kind="u4"), tensor(words, kind="u4")]
    found = run(setup + body + "st.global.b32 [%rd5], %r12;", buffers, threads=64, shared=16, settings=Settings(mode))
    assert found.values(0, "u4") + found.values(2, "u4") == _expected(_CHANGES[name], words, values, mode == "lowest")
    assert found.ran.order_left_open
    assert found.ran.depends_on_mode


@pytest.mark.parametrize("name", [one for one in _CHANGES if not one.startswith(("exch", "cas"))])
def test_a_result_that_no_order_changes_is_not_left_open(name: str) -> None:
    for opcode in (f"red.global.gpu.acq_rel.{name} ", f"atom.global.{name} %r12,"):
        found = run(f"{opcode} [%rd1], 3;", [tensor([7])], threads=64, grid=(2, 1, 1))
        assert not found.ran.order_left_open
    own = run(
        f"atom.global.{name} %r12, [%rd5], 3; st.global.b32 [%rd6], %r12;", [tensor(range(32)), tensor(range(32))]
    )
    assert own.values(1) == [*range(32)]
    assert not own.ran.order_left_open


@pytest.mark.parametrize("kind", ["u64", "b64"])
def test_places_of_64_bits(kind: str) -> None:
    how, reference = ("add", lambda old, b: old + b) if kind == "u64" else ("or", lambda old, b: old | b)
    body = f"mul.wide.u32 %rd9, %r1, -1; red.global.{how}.{kind} [%rd1], %rd9;"
    wanted = 1 << 63
    for thread in range(32):
        wanted = reference(wanted, thread * _M32) & (1 << 64) - 1
    assert run(body, [tensor([1 << 63], kind="u8")]).values(kind="u8") == [wanted]


def _sums(kind: str, mode: str) -> Outcome:
    opcode = {"f32": "add.f32", "f16": "add.noftz.f16", "bf16": "add.noftz.bf16"}[kind]
    values = np.random.default_rng(2).standard_normal(64).astype("f4")
    if kind == "f32":
        load, held, name = "ld.global.b32 %r10, [%rd6];", values, "%r10"
        content, start = held, tensor([1.0], kind="f4")
    else:
        load, name = "ld.global.b32 %r10, [%rd6]; cvt.u16.u32 %rs1, %r10;", "%rs1"
        bits = values.astype("f2").view("u2") if kind == "f16" else values.view("u4") >> 16
        content, start = bits.astype("u4"), tensor([0x3C00 if kind == "f16" else 0x3F80], kind="u2")
    buffers = [start, tensor(content, kind=content.dtype.str)]
    return run(f"{load} red.global.gpu.{opcode} [%rd1], {name};", buffers, threads=64, settings=Settings(mode))


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16"])
def test_sums_round_one_after_the_other(kind: str) -> None:
    values = np.random.default_rng(2).standard_normal(64).astype("f4")
    results = {}
    for mode in ("nearest", "lowest"):
        found = _sums(kind, mode)
        assert found.ran.order_left_open
        total = np.float32(1)
        for value in values[:: -1 if mode == "lowest" else 1]:
            if kind == "f16":
                total = np.float32(np.float16(total + np.float32(np.float16(value))))
            elif kind == "bf16":
                wide = np.float64(total) + np.float64((value.view("u4") & 0xFFFF0000).view("f4"))
                bits = int(np.float32(wide).view("u4"))
                total = np.uint32(bits + 0x7FFF + (bits >> 16 & 1) & 0xFFFF0000).view("f4")
            else:
                total = total + value
        got = found.buffers[0].content
        wide = got.view("f4") if kind == "f32" else got.view("f2") if kind == "f16" else (
            got.view("u2").astype("u4") << 16).view("f4")  # fmt: skip
        assert float(wide[0]) == float(total)
        results[mode] = float(total)
    assert results["nearest"] != results["lowest"]


def test_float32_flushes_subnormal_numbers_in_global_memory_only() -> None:
    tiny = np.array([1e-40], "f4")
    body = "{}.add.f32 [{}], 0f00000001;"
    assert run(body.format("red.global", "%rd1"), [tensor(tiny, kind="f4")]).values(kind="f4") == [0.0]
    shared = "setp.eq.s32 %p1, %r1, 0; @%p1 st.shared.b32 [%r4], 5; bar.sync 0;" + body.format("red.shared", "%r4")
    shared += "bar.sync 0; ld.shared.b32 %r10, [%r4]; st.global.b32 [%rd1], %r10;"
    assert run(shared, [tensor([0])], shared=16).values() == [37]


def test_two_halves_of_a_word() -> None:
    body = "red.global.gpu.acq_rel.add.noftz.f16x2 [%rd1], 0x40003C00;"
    assert run(body, [tensor([0.5, 1], kind="f2")]).values(kind="f2") == [32.5, 65]
    narrow = "st.global.b16 [%rd2], 1;" + body
    assert run(narrow, [tensor([0.5, 1], kind="f2"), tensor([0], kind="u2")]).values(kind="f2") == [32.5, 65]


_SHARED = "setp.eq.s32 %p1, %r1, 40; setp.eq.s32 %p2, %r1, 0; @%p2 st.shared.b32 [%r4], 1; bar.sync 0;"
_ORDERED = ("", "bar.warp.sync -1;", "bar.sync 0;")


@pytest.mark.parametrize("between", _ORDERED)
@pytest.mark.parametrize(
    ("plain", "space", "first"),
    [
        (plain, space, first)
        for plain in ("ld.{} %r10, [{}];", "st.{} [{}], 3;")
        for space in ("shared", "global")
        for first in ("atomic", "plain")
        if (plain[:2], space, first) != ("ld", "global", "plain")  # reads of global memory are not noted
    ],
)
@pytest.mark.parametrize("other", [0, 40])
def test_an_atomic_and_a_plain_access_need_a_barrier_between(
    between: str, plain: str, space: str, first: str, other: int
) -> None:
    """Threads 1 to 31 add; thread 0 or 40 reads or stores."""
    place = "%r4" if space == "shared" else "%rd1"
    add = f"setp.lt.u32 %p3, %r1, 32; setp.ne.and.s32 %p3, %r1, 0, %p3; @%p3 red.{space}.add.u32 [{place}], 1;"
    access = f"@%p{1 if other == 40 else 2} {plain.format(f'{space}.b32', place)}"
    parts = [add, access] if first == "atomic" else [access, add]
    body = (_SHARED if space == "shared" else _SHARED.split("@%p2")[0]) + between.join(parts)
    right = between == _ORDERED[2] or (between == _ORDERED[1] and other == 0)
    if right:
        run(body, [tensor([1])], threads=64, shared=16)
    else:
        wrong = fault(body, [tensor([1], "counter")], threads=64, shared=16)
        assert wrong.kind == "race"
        assert wrong.thread == ((0, 0, 0), other if first == "atomic" else 1)
        assert "counter[0]" in str(wrong) or "byte 0 of shared memory" in str(wrong)
        assert "atomic operation" in str(wrong) or first == "plain"


def test_a_thread_may_read_and_store_what_it_changed_itself() -> None:
    body = "red.{0}.add.u32 [{1}], 1; ld.{0}.b32 %r10, [{1}]; st.{0}.b32 [{1}], 3; red.{0}.add.u32 [{1}], 1;"
    run(body.format("global", "%rd5"), [tensor([1] * 32)])
    run("st.shared.b32 [%r5], 3;" + body.format("shared", "%r5"), shared=128)


def test_unwritten_shared_memory_is_not_changed() -> None:
    assert fault("red.shared.add.u32 [%r5], 1;", shared=128).kind == "uninitialised"


def test_stray_atomic_operations_are_found() -> None:
    assert fault("red.global.add.u32 [%rd5+4], 1;", [tensor([1] * 32)]).kind == "bounds"
    assert fault("red.global.add.u32 [%rd5+2], 1;", [tensor([1] * 32)]).kind == "misaligned"
    assert fault("red.global.add.u32 [%rd1+4], 1;", [tensor([1] * 4, shape=(2,), strides=(2,))]).kind == "elements"
    table = ".global .align 4 .b32 table[1] = {1};"
    assert fault("red.global.add.u32 [table], 1;", before=table).kind == "read_only"
    assert fault("red.shared.add.u32 [%r5+4], 1;", shared=128).kind == "bounds"


def test_blocks_count_together_and_their_stores_are_judged_only_where_nothing_orders_them() -> None:
    count = "red.global.gpu.{}.add.u32 [%rd1], 1;"
    assert run(count.format("relaxed"), [tensor([0])], grid=(40, 1, 1), threads=1024).values() == [40960]
    store = "mov.u32 %r10, %ctaid.x; {} st.global.b32 [%rd2], %r10;"
    buffers = [tensor([0]), tensor([0])]
    wrong = fault(store.format(count.format("relaxed")), buffers, grid=(2, 1, 1))
    assert wrong.kind == "conflict"
    apart = "mov.u32 %r10, %ctaid.x; setp.eq.s32 %p1, %r10, 0; @%p1 st.global.b32 [%rd2], 1; {} bar.sync 0; @!%p1 {}"
    for second in ("st.global.b32 [%rd2], 2;", "ld.global.b32 %r11, [%rd2];", "st.global.b32 [%rd1], 2;"):
        assert fault(apart.format(count.format("relaxed"), second), buffers, grid=(2, 1, 1)).kind in (
            "conflict",
            "race",
        )
        with pytest.raises(Unsupported, match="the order of blocks by atomic operations"):
            run(apart.format(count.format("acq_rel"), second), buffers, grid=(2, 1, 1))
    plain = "setp.eq.s32 %p1, %r1, 0; @%p1 st.global.b32 [%rd1], 0; bar.sync 0;" + count.format("acq_rel")
    wrong = fault(plain, [tensor([0], "counter")], grid=(2, 1, 1))
    assert wrong.kind == "race"
    assert "changes counter[0], which another thread of this launch wrote" in str(wrong)


def test_a_lock_is_passed_on() -> None:
    """Every block waits until it has the lock, which one that waits further down in the program has."""
    body = """
    setp.ne.s32 %p1, %r1, 0; @%p1 bra $L__end;
$L__wait:
    atom.global.acq_rel.gpu.cas.b32 %r10, [%rd1], 0, 1; setp.ne.s32 %p2, %r10, 0;
    @%p2 bra $L__wait;
    red.global.gpu.acq_rel.add.u32 [%rd2], 1; atom.global.gpu.acq_rel.exch.b32 %r11, [%rd1], 0;
$L__end:
"""
    assert run(body, [tensor([0]), tensor([0])], grid=(4, 1, 1)).values(1) == [4]
    held = fault(body, [tensor([1]), tensor([0])], grid=(4, 1, 1), settings=Settings(step_limit=4000))
    assert held.kind == "endless"


@pytest.mark.parametrize(
    "opcode",
    ["atom.add.u32", "atom.global.add.s64", "atom.global.add.f16", "atom.global.add.noftz.f32", "atom.global.max.f32",
     "atom.global.cas.b128", "atom.shared::cluster.add.u32", "red.global.v2.f32.add", "atom.global.sub.u32"],
)  # fmt: skip
def test_other_atomic_operations_are_refused_by_name(opcode: str) -> None:
    with pytest.raises(Unsupported, match=opcode.replace(".", r"\.")):
        run(f"{opcode} %r10, [%rd1], %r11;", [tensor([1])])


_REDUCTIONS: dict[str, Callable[[int, int], int]] = {
    name: one for name, one in _CHANGES.items() if name.partition(".")[0] in ("add", "min", "max", "and", "or", "xor")
}


@pytest.mark.parametrize("name", _REDUCTIONS)
@pytest.mark.parametrize("lanes", [32, 11])
@pytest.mark.parametrize("member", ["{}", "%r20"])
def test_a_warp_reduces_its_values(name: str, lanes: int, member: str) -> None:
    values = np.random.default_rng(len(name)).integers(0, 1 << 32, 96).astype("u4")
    body = f"""
    ld.global.b32 %r10, [%rd6]; mov.b32 %r20, {(1 << lanes) - 1}; mov.b32 %r11, 0; and.b32 %r21, %r1, 31;
    setp.ge.s32 %p1, %r21, {lanes}; @%p1 bra $L__end;
    redux.sync.{name} %r11, %r10, {member.format((1 << lanes) - 1)};
$L__end:
    st.global.b32 [%rd5], %r11;"""
    found = run(body, [tensor([0] * 96, kind="u4"), tensor(values, kind="u4")], threads=96).values(kind="u4")
    for warp in range(3):
        first, *others = (int(one) for one in values[32 * warp : 32 * warp + lanes])
        for one in others:
            first = _REDUCTIONS[name](first, one)
        assert found[32 * warp : 32 * warp + 32] == [first] * lanes + [0] * (32 - lanes)


def test_a_warp_reduces_floats_and_nan() -> None:
    values = np.linspace(-3, 5, 32).astype("f4")
    values[7] = np.nan
    body = "ld.global.b32 %r10, [%rd6]; redux.sync.{}.f32 %r11, %r10, -1; st.global.b32 [%rd5], %r11;"
    for how, wanted in (("min", -3), ("max", 5), ("max.NaN", np.nan), ("min.NaN", np.nan)):
        found = run(body.format(how), [tensor([0] * 32), tensor(values, kind="f4")]).values(kind="f4")
        np.testing.assert_array_equal(found, [wanted] * 32)


def test_a_reduction_with_lanes_that_are_not_there_is_found() -> None:
    body = "mov.b32 %r20, -1; setp.lt.s32 %p1, %r1, 40; @%p1 redux.sync.add.s32 %r10, %r1, %r20;"
    wrong = fault(body, threads=64)
    assert (wrong.kind, wrong.thread) == ("shuffle", ((0, 0, 0), 40))
    wrong = fault("redux.sync.add.s32 %r10, %r1, %r1;", threads=64)
    assert "the threads of a warp name different members" in str(wrong)
