"""Matrix instructions and asynchronous copies, compared with references written from the PTX ISA, and ``tl.dot``."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from verify.record.simulation import MODES
from verify.simulator.errors import Unsupported
from verify.simulator.launch import Settings
from verify.simulator.tensor_cores import end_of_interval, sums
from verify.tests.simulator import exact
from verify.tests.simulator.small import fault, run, tensor
from verify.tests.simulator.test_driver import cases, told

#: What is compiled alike for every architecture is only tried on one.
_EVERYWHERE = ("case_products_are_within_their_bound", "case_small_integers_are_exact_in_every_mode",
               "case_loops_in_stages")  # fmt: skip


@pytest.mark.parametrize("case", cases("dots"))
def test_products_of_matrices(case: str) -> None:
    wrong = told("dots", 80)[case]
    assert not wrong, wrong


@pytest.mark.parametrize("sm", [89, 120])
@pytest.mark.parametrize("case", _EVERYWHERE)
def test_products_of_matrices_on_other_architectures(sm: int, case: str) -> None:
    wrong = told("dots", sm, *_EVERYWHERE)[case]
    assert not wrong, wrong


def _element(kind: str, depth: int, fragment: str, lane: int, number: int) -> tuple[int, int]:
    """Row and column of one element of a fragment (PTX ISA, matrix fragments for mma.m16n8kK)."""
    group, inner = lane >> 2, lane & 3
    if fragment == "C":
        return group + (8 if number >= 2 else 0), inner * 2 + (number & 1)
    if kind == "tf32":
        if fragment == "A":
            return group + (8 if number in (1, 3) else 0), inner + (4 if number >= 2 else 0)
        return inner + 4 * number, group
    if fragment == "A":
        row = group if number < 2 or 4 <= number < 6 else group + 8
        return row, inner * 2 + (number & 1) + (8 if number >= 4 else 0)
    return inner * 2 + (number & 1) + (8 if number >= 2 else 0), group


@pytest.mark.parametrize(
    ("kind", "depth"), [("f16", 16), ("bf16", 16), ("f16", 8), ("bf16", 8), ("tf32", 8), ("tf32", 4)]
)
def test_fragments_are_where_the_isa_says(kind: str, depth: int) -> None:
    """Two warps multiply random matrices of small numbers, laid out in registers by hand."""
    random = np.random.default_rng(depth)
    packed = 1 if kind == "tf32" else 2
    registers = {"A": depth // (2 * packed), "B": depth // (4 * packed)}
    matrices, words = [], np.zeros((registers["A"] + registers["B"] + 4, 64), "u4")
    for warp in range(2):
        shapes = {"A": (16, depth), "B": (depth, 8), "C": (16, 8)}
        three = {name: random.integers(-9, 9, shape).astype("f4") for name, shape in shapes.items()}
        matrices.append(three["A"] @ three["B"] + three["C"])
        for lane in range(32):
            begin = 0
            for fragment in "ABC":
                each = 1 if fragment == "C" else packed
                count = 4 if fragment == "C" else registers[fragment]
                for number in range(count * each):
                    value = three[fragment][_element(kind, depth, fragment, lane, number)]
                    bits = int(np.float32(value).view("u4"))
                    if each == 2:
                        bits = int(np.float16(value).view("u2")) if kind == "f16" else bits >> 16
                    elif fragment != "C":
                        bits |= 0x1ABC if value else 0  # below the bits that a tf32 has
                    words[begin + number // each, 32 * warp + lane] |= np.uint32(bits << 16 * (number % each))
                begin += count
    body = "".join(f"ld.global.b32 %r{10 + place}, [%rd6+{256 * place}];" for place in range(len(words)))
    names = [f"%r{10 + place}" for place in range(len(words))]
    a, b, c = (f"{{ {', '.join(some)} }}" for some in (
        names[: registers["A"]], names[registers["A"] : -4], names[-4:]))  # fmt: skip
    body += f"mma.sync.aligned.m16n8k{depth}.row.col.f32.{kind}.{kind}.f32 {{%r40, %r41, %r42, %r43}}, {a}, {b}, {c};"
    body += "".join(f"st.global.b32 [%rd5+{256 * place}], %r{40 + place};" for place in range(4))
    found = run(body, [tensor(np.zeros((4, 64)), kind="f4"), tensor(words, kind="u4")], threads=64)
    got = np.array(found.values(kind="f4")).reshape(4, 2, 32)
    for warp, lane, number in np.ndindex(2, 32, 4):
        assert got[number, warp, lane] == matrices[warp][_element(kind, depth, "C", lane, number)]
    assert not found.ran.depends_on_mode


def _rounded(value: Fraction) -> float:
    """The nearest float32 of a number whose denominator is a power of two."""
    bits = exact.rounded(exact.F32, value.numerator, 1 - value.denominator.bit_length())
    return exact.number(exact.F32, bits)


@pytest.mark.parametrize("depth", [4, 8, 16])
@pytest.mark.parametrize("spread", [0, 8, 40, 120])
def test_sums_are_exact_and_their_bounds_hold_what_truncation_gives(depth: int, spread: int) -> None:
    """``nearest`` rounds the exact sum; a simulated tensor core that truncates stays within the interval."""
    random = np.random.default_rng(depth + spread)
    count = 100
    numbers = random.integers(-(1 << 11), 1 << 11, (count, depth, 2)).astype("f8")
    products = numbers.prod(-1) * np.ldexp(1.0, random.integers(-spread, spread + 1, (count, depth)))
    start = random.standard_normal((count, 1)).astype("f4").astype("f8") * 1000
    addends = np.concatenate([start, products], axis=-1)
    addends[::7, 1] = -addends[::7, 0]  # cancellation
    with np.errstate(all="ignore"):  # as where a grid runs
        nearest, bound, total = sums(addends)
        low, high = (end_of_interval(nearest, total, bound, mode) for mode in MODES[1:])
    for place, row in enumerate(addends):
        assert float(nearest[place]) == _rounded(sum(map(Fraction, row), Fraction(0)))
        assert low[place] <= nearest[place] <= high[place]
        for step in (4, 8, 16):
            for bits in (24, 26):
                assert low[place] <= _truncated(row, step, bits) <= high[place]


def _truncated(row: np.ndarray, step: int, bits: int) -> np.float32:
    """A tensor core that takes ``step`` products at a time and keeps ``bits`` of each addend and of each sum."""
    total = Fraction(row[0])
    for begin in range(1, len(row), step):
        some = [total, *map(Fraction, row[begin : begin + step])]
        size = max(map(abs, some))
        if size:
            total = sum((_cut(one, _exponent(size) - bits + 1) for one in some), Fraction(0))
            total = _cut(total, _exponent(abs(total)) - 23) if total else total
    with np.errstate(over="ignore"):
        return np.float32(float(total))


def _exponent(size: Fraction) -> int:
    return int(np.frexp(float(size))[1]) - 1


def _cut(value: Fraction, exponent: int) -> Fraction:
    unit = Fraction(2) ** exponent
    return int(value / unit) * unit


def test_special_values_of_sums() -> None:
    rows = [
        [np.inf, 1, 2], [np.inf, -np.inf, 1], [np.nan, 1, 1], [1, np.nan, np.inf], [-0.0, -0.0, -0.0], [0.0, -0.0, 0],
        [3e38, 3e38, 0], [1e-46, 1e-46, 0], [2.0**-149, 2.0**-150, 0],
    ]  # fmt: skip
    with np.errstate(all="ignore"):
        nearest, bound, _ = sums(np.array(rows, "f8"))
    expected = [np.inf, np.nan, np.nan, np.nan, -0.0, 0.0, np.inf, 0.0, 2.0**-148]
    np.testing.assert_array_equal(nearest, np.array(expected, "f4"))
    assert np.signbit(nearest).tolist() == [False] * 4 + [True] + [False] * 4
    assert (bound[:6] == 0).all()
    assert nearest.view("u4")[1] == 0x7FFFFFFF


def test_a_sum_whose_errors_do_not_add_exactly() -> None:
    rows = np.array([[1e30, 1, 1e-30, -1e30, 1e-60], [2.0**100, 2.0**40, 2.0**-30, 2.0**-100, -(2.0**100)]])
    nearest, _, _ = sums(rows)
    assert nearest.tolist() == [1.0, 2.0**40]
    half = np.array([[1.0, 2.0**-24, 2.0**-90, 0.0, 0.0], [1.0, 2.0**-24, -(2.0**-90), 2.0**-140, 0.0]])
    assert sums(half)[0].tolist() == [1 + 2.0**-23, 1.0]


_FILL = """
    mul.lo.s32 %r10, %r1, 16; add.s32 %r11, %r4, %r10; shl.b32 %r12, %r1, 3;
    add.s32 %r20, %r12, 0x10000; shl.b32 %r21, %r12, 16; or.b32 %r20, %r21, %r12; add.s32 %r20, %r20, 0x10000;
    add.s32 %r21, %r20, 0x20002; add.s32 %r22, %r20, 0x40004; add.s32 %r23, %r20, 0x60006;
    st.shared.v4.b32 [%r11], {%r20, %r21, %r22, %r23}; bar.sync 0;
"""


def _pair(matrix: int, row: int, column: int, transposed: bool, warp: int) -> int:
    """Two elements of a matrix whose element (r, c) of matrix m is 64 m + 8 r + c."""
    first, second = ((column, row), (column + 1, row)) if transposed else ((row, column), (row, column + 1))
    values = [256 * warp + 64 * matrix + 8 * one + other for one, other in (first, second)]
    return values[0] | values[1] << 16


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
@pytest.mark.parametrize("space", ["shared", "shared::cta"])
def test_matrices_are_loaded_by_rows(count: int, trans: str, space: str) -> None:
    """Lanes that name no row may name nothing at all."""
    names = [f"%r{30 + place}" for place in range(count)]
    body = (
        _FILL
        + f"""
    and.b32 %r13, %r1, 31; setp.lt.s32 %p1, %r13, {8 * count}; selp.b32 %r14, %r11, 3, %p1;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.{space}.b16 {{{", ".join(names)}}}, [%r14];"""
    )
    body += "".join(f"st.global.b32 [%rd5+{256 * place}], {name};" for place, name in enumerate(names))
    found = run(body, [tensor([0] * 64 * count, kind="u4")], threads=64, shared=1024).values(kind="u4")
    for matrix, thread in np.ndindex(count, 64):
        lane = thread % 32
        wanted = _pair(matrix, lane // 4, 2 * (lane % 4), bool(trans), thread // 32)
        assert found[64 * matrix + thread] == wanted


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("trans", ["", ".trans"])
def test_matrices_are_stored_as_they_are_loaded(count: int, trans: str) -> None:
    names = [f"%r{30 + place}" for place in range(count)]
    body = (
        _FILL
        + f"""
    and.b32 %r13, %r1, 31; shr.u32 %r14, %r1, 5; mad.lo.s32 %r15, %r14, {128 * count}, 1024;
    mad.lo.s32 %r15, %r13, 16, %r15;
    add.s32 %r15, %r4, %r15;
    ldmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 {{{", ".join(names)}}}, [%r11];
    stmatrix.sync.aligned.m8n8.x{count}{trans}.shared.b16 [%r15], {{{", ".join(names)}}};
    bar.sync 0; setp.lt.s32 %p1, %r13, {8 * count}; @!%p1 bra $L__end;
    ld.shared.v4.b32 {{%r40, %r41, %r42, %r43}}, [%r15]; mul.wide.s32 %rd9, %r1, 16; add.s64 %rd9, %rd1, %rd9;
    st.global.v4.b32 [%rd9], {{%r40, %r41, %r42, %r43}};
$L__end:
"""
    )
    found = run(body, [tensor([0] * 512, kind="u2")], threads=64, shared=1024 + 256 * count).values(kind="u2")
    for thread in range(64):
        row = [thread * 8 + place for place in range(8)] if thread % 32 < 8 * count else [0] * 8
        assert found[8 * thread : 8 * thread + 8] == row


@pytest.mark.parametrize(("between", "right"), [("bar.sync 0;", True), ("bar.warp.sync -1;", True), ("", False)])
def test_matrices_are_ordered_with_loads_and_stores(between: str, right: bool) -> None:
    """A lane gets elements of rows that others stored, and others get those of its own."""
    load = "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r30, %r31, %r32, %r33}, [%r11];"
    store = "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r11], {%r1, %r20, %r21, %r22};"
    plain = "ld.shared.b32 %r40, [%r11];"
    for body in (
        _FILL.replace("bar.sync 0;", between) + load,
        f"{_FILL} {store} {between} {plain}",
        f"{_FILL} {load} {between} st.shared.b32 [%r11], 5;",
        f"{_FILL} {plain} {between} {store}",
        f"{_FILL} {store} {between} {load}",
    ):
        if right:
            run(body, threads=64, shared=1024)
        elif body.endswith(f"{store} {between} {load}"):
            run(body, threads=64, shared=1024)  # the same lanes hold the same rows
        else:
            assert fault(body, threads=64, shared=1024).kind == "race"


def test_stray_matrices_are_found() -> None:
    load = "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r30, %r31}, [%r11+PLACE];"
    for place, kind in ((1024, "bounds"), (-16, "bounds"), (8, "misaligned")):
        wrong = fault(_FILL + load.replace("PLACE", str(place)), threads=64, shared=1024)
        assert (wrong.kind, wrong.thread) == (kind, ((0, 0, 0), 47 if place == 1024 else 0))
    unwritten = "mul.lo.s32 %r10, %r1, 16; add.s32 %r11, %r4, %r10;" + load.replace("PLACE", "0")
    assert fault(unwritten, threads=64, shared=1024).kind == "uninitialised"


@pytest.mark.parametrize(
    "instruction",
    [
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r30}, [%r11];",
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r11], {%r1};",
        "mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 "
        "{%r30, %r31, %r32, %r33}, {%r1, %r1}, {%r1}, {%r1, %r1, %r1, %r1};",
    ],
)  # fmt: skip
def test_a_matrix_instruction_needs_every_lane(instruction: str) -> None:
    wrong = fault(f"{_FILL} setp.lt.s32 %p1, %r1, 40; @%p1 {instruction}", threads=64, shared=1024)
    assert (wrong.kind, wrong.thread) == ("shuffle", ((0, 0, 0), 40))
    run(f"{_FILL} setp.lt.s32 %p1, %r1, 32; @%p1 {instruction}", threads=64, shared=1024)


@pytest.mark.parametrize(
    "opcode",
    ["ldmatrix.sync.aligned.m16n16.x1.trans.shared.b8", "ldmatrix.sync.aligned.m8n8.x4.shared.b8",
     "stmatrix.sync.aligned.m8n8.x3.shared.b16", "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32",
     "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32", "mma.sync.aligned.m16n8k16.row.col.f16.f16.f16.f16",
     "mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64", "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32",
     "mma.sync.aligned.m16n8k16.row.col.f32.tf32.tf32.f32", "mma.sp.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32"],
)  # fmt: skip
def test_other_matrix_instructions_are_refused_by_name(opcode: str) -> None:
    operands = "{%r1, %r1, %r1, %r1}, [%r4]" if opcode[0] == "l" else "[%r4], {%r1}" if opcode[0] == "s" else ", ".join(
        f"{{{', '.join(['%r1'] * count)}}}" for count in (4, 4, 2, 4))  # fmt: skip
    with pytest.raises(Unsupported) as refusal:
        run(f"{opcode} {operands};")
    assert opcode in refusal.value.what


#: Each thread copies 16 bytes, and reads those of a thread of the other warp.
_COPY = """
    mul.lo.s32 %r10, %r1, 16; add.s32 %r11, %r4, %r10; xor.b32 %r12, %r10, 512; add.s32 %r12, %r4, %r12;
    mul.wide.s32 %rd9, %r1, 16; add.s64 %rd10, %rd2, %rd9; add.s64 %rd11, %rd1, %rd9;
    cp.async.cg.shared.global [ %r11 + 0 ], [ %rd10 + 0 ], 0x10;
"""
_TAKE = "ld.shared.v4.b32 {%r20, %r21, %r22, %r23}, [%r12]; st.global.v4.b32 [%rd11], {%r20, %r21, %r22, %r23};"
_COMMIT, _WAIT = "cp.async.commit_group;", "cp.async.wait_group 0;"


def _buffers() -> list[object]:
    return [tensor([0] * 256), tensor(range(256), "source")]


@pytest.mark.parametrize("wait", [_COMMIT + _WAIT, "cp.async.wait_all;", _COMMIT + "cp.async.wait_all;"])
def test_a_copy_arrives_where_its_thread_waits(wait: str) -> None:
    found = run(_COPY + wait + "bar.sync 0;" + _TAKE, _buffers(), threads=64, shared=1024)
    assert found.values() == [*range(128, 256), *range(128)]
    own = run(_COPY + wait + _TAKE.replace("%r12", "%r11"), _buffers(), threads=64, shared=1024)
    assert own.values() == [*range(256)]


@pytest.mark.parametrize(
    ("between", "told_"),
    [
        (_COMMIT + "bar.sync 0;", "is still copying to"),
        (_COMMIT + "cp.async.wait_group 1; bar.sync 0;", "is still copying to"),
        (_WAIT + "bar.sync 0;", "is still copying to"),
        (_COMMIT + _WAIT, "which thread 32 wrote"),
        (_COMMIT + _WAIT + "bar.warp.sync -1;", "which thread 32 wrote"),
        ("bar.sync 0;" + _COMMIT + _WAIT, "which thread 32 wrote"),
    ],
)
def test_a_copy_that_nobody_waited_for_is_found(between: str, told_: str) -> None:
    wrong = fault(_COPY + between + _TAKE, _buffers(), threads=64, shared=1024)
    assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 0))
    assert told_ in str(wrong)
    assert "byte 512 of shared memory" in str(wrong)


@pytest.mark.parametrize(
    "access", ["ld.shared.b32 %r20, [%r11];", "st.shared.b32 [%r11], 1;", "red.shared.add.u32 [%r11], 1;",
               "cp.async.ca.shared.global [%r11], [%rd10], 4;",
               "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r30}, [%r11];"],
)  # fmt: skip
def test_nobody_touches_what_is_being_copied(access: str) -> None:
    filled = "mul.lo.s32 %r10, %r1, 16; add.s32 %r11, %r4, %r10; st.shared.v4.b32 [%r11], {1, 1, 1, 1}; bar.sync 0;"
    wrong = fault(filled + _COPY + access, _buffers(), threads=64, shared=1024)
    assert (wrong.kind, wrong.thread) == ("race", ((0, 0, 0), 0))
    assert "byte 0 of shared memory, which thread 0 is still copying to" in str(wrong)
    run(filled + _COPY + _COMMIT + _WAIT + "bar.sync 0;" + access, _buffers(), threads=64, shared=1024)


def test_a_copy_over_what_others_still_read_is_found() -> None:
    body = _COPY + _COMMIT + _WAIT + "bar.sync 0;" + _TAKE + "{} cp.async.cg.shared.global [%r11], [%rd10], 16;"
    run(body.replace("{}", "bar.sync 0;"), _buffers(), threads=64, shared=1024)
    wrong = fault(body.replace("{}", ""), _buffers(), threads=64, shared=1024)
    assert wrong.kind == "race"
    assert "it copies to byte 0 of shared memory, which threads of warp 1 read" in str(wrong)
    same = _COPY.replace("[ %r11 + 0 ]", "[ %r4 + 0 ]")
    assert fault(same, _buffers(), threads=64, shared=1024).kind == "race"


def test_groups_arrive_in_their_order() -> None:
    body = """
    mul.lo.s32 %r10, %r1, 4; add.s32 %r11, %r4, %r10;
    cp.async.ca.shared.global [%r11], [%rd6], 4; cp.async.commit_group;
    cp.async.ca.shared.global [%r11+128], [%rd6+128], 4; cp.async.commit_group;
    cp.async.commit_group;
    cp.async.ca.shared.global [%r11+256], [%rd6+256], 4; cp.async.commit_group;
    cp.async.wait_group LEFT; ld.shared.b32 %r20, [%r11+PLACE]; st.global.b32 [%rd5], %r20;"""
    for left in range(5):
        for place in range(3):
            text = body.replace("LEFT", str(left)).replace("PLACE", str(128 * place))
            buffers = [tensor([0] * 32), tensor(range(96))]
            if (0, 1, 3)[place] < 4 - left:
                assert run(text, buffers, shared=384).values() == [*range(32 * place, 32 * place + 32)]
            else:
                assert "is still copying to" in str(fault(text, buffers, shared=384))


@pytest.mark.parametrize("width", [4, 8, 16])
def test_the_rest_of_a_short_copy_is_zero_and_is_not_read(width: int) -> None:
    """A thread that reads nothing may name an address that does not exist."""
    body = f"""
    mul.lo.s32 %r10, %r1, {width}; add.s32 %r11, %r4, %r10; mul.wide.s32 %rd9, %r1, {width}; add.s64 %rd10, %rd2, %rd9;
    setp.lt.s32 %p1, %r1, 20; selp.b32 %r12, {width}, 0, %p1; selp.b64 %rd10, %rd10, 12345, %p1;
    setp.eq.s32 %p2, %r1, 7; selp.b32 %r12, {width // 2}, %r12, %p2;
    cp.async.ca.shared.global [ %r11 + 0 ], [ %rd10 + 0 ], {width}, %r12; cp.async.wait_all; bar.sync 0;
    add.s32 %r13, %r4, %r2; """
    body += "".join(
        f"ld.shared.b32 %r20, [%r13+{128 * part}]; st.global.b32 [%rd5+{128 * part}], %r20;"
        for part in range(width // 4)
    )
    content = np.random.default_rng(width).integers(1, 255, 20 * width)
    found = run(body, [tensor([0] * 8 * width), tensor(content, kind="u1")], shared=32 * width).values(kind="u1")
    wanted = [*content.tolist(), *[0] * 12 * width]
    wanted[7 * width + width // 2 : 8 * width] = [0] * (width - width // 2)
    assert found == wanted
    beyond = fault(body.replace("%r1, 20", "%r1, 21"), [tensor([0] * 8 * width), tensor(content, "s", "u1")],
                   shared=32 * width)  # fmt: skip
    assert (beyond.kind, beyond.thread) == ("bounds", ((0, 0, 0), 20))


def test_stray_copies_are_found() -> None:
    buffers = [tensor([0] * 256), tensor(range(256), "narrow", shape=(32,), strides=(8,))]
    assert fault(_COPY, buffers, threads=64, shared=1024).kind == "elements"
    assert fault(_COPY, _buffers(), threads=64, shared=1008).kind == "bounds"
    aslant = _COPY.replace("%r11 + 0", "%r11 + 8")
    assert fault(aslant, _buffers(), threads=64, shared=1040).kind == "misaligned"
    aslant = _COPY.replace("%rd10 + 0", "%rd10 + 8")
    assert fault(aslant, _buffers(), threads=64, shared=1024).kind == "misaligned"
    stored = "mul.wide.s32 %rd9, %r1, 16; add.s64 %rd10, %rd2, %rd9; xor.b32 %r13, %r2, 128; cvt.u64.u32 %rd12, %r13;"
    stored += "add.s64 %rd12, %rd2, %rd12; st.global.b32 [%rd12], 3;"
    assert fault(stored + _COPY, _buffers(), threads=64, shared=1024).kind == "race"


@pytest.mark.parametrize(
    "text",
    ["cp.async.cg.shared.global [%r4], [%rd1], 8", "cp.async.ca.shared.global [%r4], [%rd1], 12",
     "cp.async.ca.shared.global.L2::cache_hint [%r4], [%rd1], 4, %rd2", "cp.async.wait_group",
     "cp.async.bulk.commit_group", "cp.async.mbarrier.arrive.shared.b64 [%r4]"],
)  # fmt: skip
def test_other_copies_are_refused_by_name(text: str) -> None:
    with pytest.raises(Unsupported, match=text.split()[0].replace(".", r"\.")):
        run(f"{text};", [tensor([1] * 32)], shared=128)


def test_modes_give_the_ends_of_the_interval() -> None:
    body = "ld.global.b32 %r10, [%rd6]; mov.b32 %r11, 0;"
    body += "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%r20, %r21, %r22, %r23}, {%r10, %r10, %r10, %r10}, "
    body += "{%r10, %r10}, {%r11, %r11, %r11, %r11}; st.global.b32 [%rd5], %r20;"
    values = np.random.default_rng(1).standard_normal(32).astype("f4")
    found = []
    for mode in ("lowest", "nearest", "highest"):
        one = run(body, [tensor([0] * 32), tensor(values, kind="f4")], settings=Settings(mode))
        assert one.ran.depends_on_mode
        found.append(np.array(one.values(kind="f4")))
    assert (found[0] <= found[1]).all()
    assert (found[1] <= found[2]).all()
    assert (found[0] < found[2]).mean() > 0.8
