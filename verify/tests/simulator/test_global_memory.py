"""Accesses of tensors that no kernel may make are found and named, and those beside them are not."""

from __future__ import annotations

import numpy as np
import pytest

from verify.simulator.errors import Fault
from verify.simulator.launch import Settings, require_same, run_grid
from verify.simulator.memory import Buffer
from verify.simulator.program import Program
from verify.simulator.ptx import parse
from verify.tests.simulator.small import POINTER, START, fault, module, run, tensor

#: Loads the element at a distance from the thread's own.
_LOAD = "ld.global.b32 %r10, [%rd5+{}];"
_COPY = "ld.global.b32 %r10, [%rd5]; st.global.b32 [%rd6], %r10;"


@pytest.mark.parametrize(
    ("offset", "thread", "byte"), [(-4, 0, "byte -4"), (4, 31, "byte 128"), (1 << 20, 0, "byte 1048576")]
)
@pytest.mark.parametrize("access", ["ld.global.b32 %r10, [%rd5+{}];", "st.global.b32 [%rd5+{}], %r1;"])
def test_one_element_beyond_either_end_is_found(access: str, offset: int, thread: int, byte: str) -> None:
    found = fault(f"\n\t.loc 1 9 3\n{access.format(offset)}", [tensor(range(32), "keys")], grid=(3, 1, 1))
    assert (found.kind, found.thread) == ("bounds", ((0, 0, 0), thread))
    assert f"{byte} of the storage of keys, which has 128" in str(found)
    assert "small.py:9" in str(found)
    assert f"`{access.format(offset)[:-1]}`" in str(found)


def test_the_line_of_ptx_is_the_one_that_an_editor_shows() -> None:
    from verify.tests.simulator.small import module

    body = START + "\tld.global.b32 %r10, [%rd5+4];"
    found = fault("\tld.global.b32 %r10, [%rd5+4];", [tensor(range(32))])
    line = next(number for number, one in enumerate(module(body).split("\n"), 1) if "%rd5+4" in one)
    assert f"PTX line {line} (small.py:5)" in str(found)


def test_an_access_in_a_launch_without_tensors_is_found() -> None:
    program = Program(parse(module(START + "\tld.global.b32 %r10, [%rd1];\n\tret;")))
    with pytest.raises(Fault, match="address 0x0, which belongs to no tensor of the launch"):
        run_grid(program, [], [0, 0, 0], (1, 1, 1), 0, Settings())


def test_an_access_of_no_tensor_is_found() -> None:
    found = fault("mov.u64 %rd9, 16; ld.global.b32 %r10, [%rd9];", [tensor(range(32))])
    assert found.kind == "bounds"
    assert "address 0x10, which belongs to no tensor of the launch" in str(found)


@pytest.mark.parametrize("width", [1, 2, 4, 8, 16, 32])
def test_the_last_element_that_fits_is_read_and_the_next_is_not(width: int) -> None:
    vector, kind = {16: (".v2", "b64"), 32: (".v4", "b64")}.get(width, ("", f"b{8 * width}"))
    names = ["%rd10", "%rd11", "%rd12", "%rd13"][: max(1, width // 8)]
    target = f"{{{', '.join(names)}}}" if vector else {4: "%r10", 8: "%rd10"}.get(width, "%rs1")
    body = f"ld.global{vector}.{kind} {target}, [%rd1+PLACE];"
    content = tensor(np.arange(64), kind="u1")
    run(body.replace("PLACE", f"{64 - width}"), [content])
    found = fault(body.replace("PLACE", "64"), [content])
    assert found.kind == "bounds"
    if width > 1:
        found = fault(body.replace("PLACE", f"{width // 2}"), [content])
        assert (found.kind, found.thread) == ("misaligned", ((0, 0, 0), 0))
        assert f"an access of {width} bytes at x[{width // 2}]" in str(found)


def test_a_tensor_that_begins_at_an_odd_address_is_misaligned_in_it() -> None:
    skewed = Buffer("odd", np.zeros(64, "u1"), address=2)
    assert fault("ld.global.b32 %r10, [%rd1];", [skewed]).kind == "misaligned"
    run("ld.global.b32 %r10, [%rd1+2];", [skewed])


def test_what_lies_between_the_elements_of_a_view_is_not_touched() -> None:
    view = {"shape": (4, 3), "strides": (8, 2), "offset": 1}
    load = "mov.u64 %rd9, {}; add.s64 %rd9, %rd1, %rd9; ld.global.b32 %r10, [%rd9];"
    for row, column in np.ndindex(4, 3):
        run(load.format(4 * (1 + 8 * row + 2 * column)), [tensor(range(32), **view)])
    for element in (0, 2, 4, 6, 7, 8, 30, 31):
        found = fault(load.format(4 * element), [tensor(range(32), "rows", **view)])
        assert (found.kind, found.thread) == ("elements", ((0, 0, 0), 0))
        assert "rows" in str(found)
        assert "not all of which are elements of the view" in str(found)
    found = fault("ld.global.v2.b32 {%r10, %r11}, [%rd1+8];", [tensor(range(32), **view | {"offset": 2})])
    assert "reads 8 bytes at x[0, 0], not all" in str(found)
    found = fault("st.global.b32 [%rd1], %r1;", [tensor(range(32), **view)])
    assert "writes 4 bytes at byte 0 of the storage of x" in str(found)


def test_two_views_of_one_storage_may_both_be_touched() -> None:
    both = tensor(range(8), shape=(4,), strides=(2,))
    both.restrict(np.repeat(np.array([0, 1, 0, 0, 0, 0, 0, 0], bool), 4))
    run("ld.global.v2.b32 {%r10, %r11}, [%rd1];", [both])
    assert fault("ld.global.b32 %r10, [%rd1+12];", [both]).kind == "elements"


def test_an_element_is_named_by_its_index() -> None:
    one = tensor(np.zeros((3, 4, 5), "f4"), "scores", "f4")
    assert one.described(4 * (20 * 2 + 5 * 1 + 3)) == "scores[2, 1, 3]"
    assert one.described(4 * 7 + 2) == "scores[0, 1, 2] + 2 bytes"
    turned = tensor(range(12), "t", shape=(3, 4), strides=(1, 3))
    assert turned.described(4 * 7) == "t[1, 2]"
    same = tensor(range(4), "s", shape=(3, 4), strides=(0, 1))
    assert same.described(8) == "s[0, 2]"
    assert tensor(range(8), "v", shape=(2,), strides=(4,), offset=1).described(4 * 2) == (
        "byte 8 of the storage of v, which has 32"
    )


def test_stores_into_constants_are_found() -> None:
    table = ".global .align 4 .b8 table[8] = {1, 2, 3, 4, 5, 6, 7, 8};"
    body = "mov.b64 %rd9, table; {}"
    found = fault(body.format("st.global.b32 [%rd9], %r1;"), before=table)
    assert (found.kind, found.thread) == ("read_only", ((0, 0, 0), 0))
    assert "stores into table" in str(found)
    read = run(
        body.format("ld.global.b32 %r10, [%rd9+4]; st.global.b32 [%rd5], %r10;"), [tensor([0] * 32)], before=table
    )
    assert read.values() == [0x08070605] * 32
    assert fault(body.format("ld.global.b32 %r10, [%rd9+8];"), before=table).kind == "bounds"


_ONE_PLACE = "st.global.b32 [%rd1+4], {};"


def test_two_threads_may_store_one_value_and_not_two() -> None:
    assert run(_ONE_PLACE.format(7), [tensor([0, 0])]).values() == [0, 7]
    found = fault(_ONE_PLACE.format("%r1"), [tensor([0, 0], "out")])
    assert (found.kind, found.thread) == ("conflict", ((0, 0, 0), 0))
    assert "another thread stored another value to out[1]" in str(found)


@pytest.mark.parametrize(
    ("between", "right"),
    [("", False), ("bar.sync 0;", True), ("bar.warp.sync -1;", False), ("membar.gl;", False)],
)
def test_another_thread_may_store_after_a_barrier_of_the_block(between: str, right: bool) -> None:
    body = f"""
    setp.eq.s32 %p1, %r1, 3; setp.eq.s32 %p2, %r1, 40;
    @%p1 st.global.b32 [%rd1], 1;
    {between}
    @%p2 st.global.b32 [%rd1], 2;"""
    if right:
        assert run(body, [tensor([0])], threads=64).values() == [2]
    else:
        found = fault(body, [tensor([0])], threads=64)
        assert (found.kind, found.thread) == ("conflict", ((0, 0, 0), 40))


def test_one_thread_may_store_twice_and_another_block_may_not() -> None:
    twice = (
        "st.global.b32 [%rd5], 1; st.global.b32 [%rd5], %r1; ld.global.b32 %r10, [%rd5]; st.global.b32 [%rd6], %r10;"
    )
    assert run(twice, [tensor([0] * 32), tensor([0] * 32)]).values(1) == [*range(32)]
    body = "mov.u32 %r10, %ctaid.y; {} st.global.b32 [%rd1], %r10;"
    for before in ("", "bar.sync 0;"):
        found = fault(body.format(before), [tensor([5])], grid=(1, 2, 1))
        assert (found.kind, found.thread) == ("conflict", ((0, 0, 0), 0))
    run(body.format("and.b32 %r10, %r10, 2;"), [tensor([5])], grid=(1, 2, 1))


def test_blocks_that_do_not_run_together_conflict_too() -> None:
    body = (
        "mov.u32 %r10, %ctaid.x; setp.lt.u32 %p1, %r10, {}; @%p1 bra $L__end; st.global.b32 [%rd1], %r10;\n$L__end:\n"
    )
    found = fault(body.format(40), [tensor([5], "out")], grid=(42, 1, 1), threads=1024)
    assert (found.kind, found.thread) == ("conflict", ((40, 0, 0), 0))
    assert "to out[0]" in str(found)
    run(body.format(41), [tensor([5])], grid=(42, 1, 1), threads=1024)


def test_a_part_of_a_wide_store_conflicts_with_a_narrow_one() -> None:
    body = """
    setp.eq.s32 %p1, %r1, 3; setp.eq.s32 %p2, %r1, 4;
    @%p1 st.global.b32 [%rd1+4], {};
    @%p2 st.global.v2.b32 [%rd1], {{9, 7}};
    @%p2 st.global.b64 [%rd1], 0x700000009;"""
    assert run(body.format(7), [tensor([0, 0])]).values() == [9, 7]
    found = fault(body.format(8), [tensor([0, 0])])
    assert (found.kind, found.thread) == ("conflict", ((0, 0, 0), 4))
    assert "x[1]" in str(found)
    wide = "setp.eq.s32 %p1, %r1, 3; @%p1 st.global.b32 [%rd1+4], 8; @!%p1 st.global.b64 [%rd1], 0x700000009;"
    assert fault(wide, [tensor([0, 0])]).kind == "conflict"


@pytest.mark.parametrize(("between", "right"), [("", False), ("bar.sync 0;", True)])
def test_a_read_of_what_another_thread_stored_needs_a_barrier(between: str, right: bool) -> None:
    body = f"""
    xor.b32 %r10, %r2, 252; cvt.u64.u32 %rd9, %r10; add.s64 %rd9, %rd1, %rd9;
    st.global.b32 [%rd5], %r1; {between} ld.global.b32 %r11, [%rd9]; st.global.b32 [%rd6], %r11;"""
    buffers = [tensor([0] * 64, "shared"), tensor([0] * 64)]
    if right:
        assert run(body, buffers, threads=64).values(1) == [*range(63, -1, -1)]
    else:
        found = fault(body, buffers, threads=64)
        assert (found.kind, found.thread) == ("race", ((0, 0, 0), 0))
        assert "reads shared[63], which another thread of this launch wrote" in str(found)


def test_a_read_of_what_another_block_stored_is_a_race_even_after_a_barrier() -> None:
    body = """
    mov.u32 %r10, %ctaid.x; mul.wide.u32 %rd9, %r10, 4; add.s64 %rd10, %rd1, %rd9; sub.s64 %rd9, %rd1, %rd9;
    st.global.b32 [%rd10], 5; bar.sync 0; ld.global.b32 %r11, [%rd9+4];"""
    found = fault(body, [tensor([0] * 2)], grid=(2, 1, 1))
    assert (found.kind, found.thread) == ("race", ((0, 0, 0), 0))


def test_neighbours_within_a_word_do_not_conflict() -> None:
    body = "shl.b32 %r10, %r1, 1; cvt.u64.u32 %rd9, %r10; add.s64 %rd9, %rd1, %rd9; cvt.u16.u32 %rs1, %r1;"
    body += "st.global.b16 [%rd9], %rs1;"
    assert run(body, [tensor([0] * 32, kind="u2")]).values(kind="u2") == [*range(32)]
    body = "cvt.u64.u32 %rd9, %r1; add.s64 %rd9, %rd1, %rd9; cvt.u16.u32 %rs1, %r1; st.global.b8 [%rd9], %rs1;"
    assert run(body, [tensor([0] * 32, kind="u1")]).values(kind="u1") == [*range(32)]


def test_one_instruction_may_reach_several_tensors() -> None:
    body = """
    and.b32 %r10, %r1, 1; setp.eq.s32 %p1, %r10, 0; selp.b64 %rd9, %rd1, %rd2, %p1; add.s64 %rd9, %rd9, %rd4;
    ld.global.b32 %r11, [%rd9]; add.s32 %r11, %r11, 1000; st.global.b32 [%rd9], %r11;"""
    found = run(body, [tensor(range(32)), tensor(range(100, 132))])
    assert found.values(0) == [one if one % 2 else one + 1000 for one in range(32)]
    assert found.values(1) == [one + 1000 if one % 2 else one for one in range(100, 132)]
    outside = fault(body, [tensor(range(32)), tensor(range(20), "short")])
    assert (outside.kind, outside.thread) == ("bounds", ((0, 0, 0), 21))
    assert "byte 84 of the storage of short" in str(outside)


def test_offsets_beyond_two_to_the_31_are_found_where_they_point() -> None:
    body = "mov.u32 %r10, 1500000000; mul.wide.s32 %rd9, %r10, 2; add.s64 %rd9, %rd1, %rd9; ld.global.b32 %r11, [%rd9];"
    found = fault(body, [tensor(range(32))])
    assert "byte 3000000000 of the storage of x" in str(found)
    wrapped = "mov.u32 %r10, 1500000000; mul.lo.s32 %r10, %r10, 2; cvt.s64.s32 %rd9, %r10; add.s64 %rd9, %rd1, %rd9;"
    found = fault(wrapped + "ld.global.b32 %r11, [%rd9];", [tensor(range(32))])
    assert f"byte {3_000_000_000 - 2**32} of the storage of x" in str(found)


def test_what_was_stored_is_known() -> None:
    found = run("setp.gt.s32 %p1, %r1, 2; @%p1 st.global.b32 [%rd5], 1;", [tensor([9] * 32), tensor([1])])
    written = found.buffers[0].written
    assert written is not None
    assert written.view("u1").tolist() == [0] * 12 + [1] * 116
    assert found.buffers[1].written is None


def test_two_runs_that_store_different_bits_are_told_apart() -> None:
    one, other = tensor([1, 2, 3], "y"), tensor([1, 2, 4], "y")
    require_same([one], [tensor([1, 2, 3])], "order", "depends on it")
    with pytest.raises(Fault, match=r"y\[2\] depends on it") as found:
        require_same([one], [other], "order", "depends on it")
    assert found.value.kind == "order"


def test_a_kernel_of_several_scalars_reads_each() -> None:
    body = """
    ld.param.b32 %r10, [small_param_3]; ld.param.b64 %rd10, [small_param_4]; ld.param.b32 %r11, [small_param_5];
    ld.param.b16 %rs1, [small_param_6]; ld.param.s8 %rs2, [small_param_7]; ld.param.b64 %rd11, [small_param_8];
    st.global.b32 [%rd1], %r10; st.global.b64 [%rd1+8], %rd10; st.global.b32 [%rd1+16], %r11;
    cvt.s32.s16 %r12, %rs1; st.global.b32 [%rd1+20], %r12; cvt.s32.s16 %r12, %rs2; st.global.b32 [%rd1+24], %r12;
    st.global.b64 [%rd1+32], %rd11;"""
    kinds = [*[POINTER] * 3, ".u32", ".u64", ".f32", ".u16", ".u8", ".f64"]
    numbers = [-5, 1 << 40, 1.5, -7, -3, 0.1]
    found = run(body, [tensor([0] * 10)], others=numbers, parameters=kinds).buffers[0].content
    assert found[:4].view("i4")[0] == -5
    assert found[8:16].view("i8")[0] == 1 << 40
    assert found[16:20].view("f4")[0] == 1.5
    assert found[20:28].view("i4").tolist() == [-7, -3]
    assert found[32:40].view("f8")[0] == 0.1
