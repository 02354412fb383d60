"""The PTX that Triton writes is read, and everything else is refused by its name before an instruction runs."""

from __future__ import annotations

import pytest

from verify.simulator.errors import Unsupported
from verify.simulator.program import Program
from verify.simulator.ptx import Instruction, parse
from verify.tests.simulator.small import POINTER, module, run, tensor


def _refusal(text: str) -> str:
    with pytest.raises(Unsupported) as found:
        Program(parse(text))
    assert str(found.value).startswith("the simulator does not execute ")
    return str(found.value).removeprefix("the simulator does not execute ")


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ("call.uni (retval0), __nv_sinf, (param0);", "call.uni"),
        ("{ // callseq 0, 0\n.param .b32 param0;\nst.param.b32 [param0], %r1;\n}", "a call of a function"),
        ("barrier.cluster.arrive.aligned;", "barrier.cluster.arrive.aligned"),
        ("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r1}], [%r3];",
         "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes"),
        ("mbarrier.init.shared::cta.b64 [%r1], 1;", "mbarrier.init.shared::cta.b64"),
        ("wgmma.fence.sync.aligned;", "wgmma.fence.sync.aligned"),
        ("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%r1], 64;", "tcgen05.alloc"),
        ("tex.2d.v4.f32.f32 {%r1, %r2, %r3, %r4}, [table, {%r5, %r6}];", "tex.2d.v4.f32.f32"),
        ("elect.sync %r1|%p1, -1;", "elect.sync"),
        ("setmaxnreg.inc.sync.aligned.u32 240;", "setmaxnreg.inc.sync.aligned.u32"),
        ("bar.sync 0, 64;", "bar.sync 0, 64 (a barrier of a part of the block)"),
        ("bar.sync %r1;", "bar.sync %r1"),
        ("bar.arrive 0, 32;", "bar.arrive 0, 32"),
        ("bar.red.popc.u32 %r1, 0, %p1;", "bar.red.popc.u32"),
        ("bar.sync;", "bar.sync"),
        ("bar.warp.sync %r1;", "the member mask %r1"),
        ("ld.b32 %r1, [%rd1];", "ld.b32"),
        ("ld.const.b32 %r1, [%rd1];", "ld.const.b32"),
        ("ld.volatile.global.b32 %r1, [%rd1];", "ld.volatile.global.b32"),
        ("ld.shared::cluster.b32 %r1, [%r2];", "ld.shared::cluster.b32"),
        ("ld.global.L2::cache_hint.b32 %r1, [%rd1], %rd2;", "ld.global.L2::cache_hint.b32"),
        ("ld.global.v2.b32 %r1, [%rd1];", "ld.global.v2.b32"),
        ("ld.global.v8.b64 {%rd1, %rd2, %rd3, %rd4, %rd5, %rd6, %rd7, %rd8}, [%rd1];", "ld.global.v8.b64"),
        ("ld.global.pred %p1, [%rd1];", "ld.global.pred"),
        ("ld.global.b32 %r1, %rd1;", "the address %rd1"),
        ("ld.global.b32 %r1, [%rd1+%rd2];", "the address [%rd1+%rd2]"),
        ("ld.global.b32 %rs1, [%rd1];", "a result of type uint32 in %rs1"),
        ("ld.param.b32 %r1, [small_param_0+4];", "[small_param_0+4] (a part of a parameter)"),
        ("ld.param.b32 %r1, [small_param_0];", "(a part of a parameter)"),
        ("st.param.b32 [small_param_0], %r1;", "st.param.b32"),
        ("cvta.shared.u64 %rd1, %rd2;", "cvta.shared.u64"),
        ("cvta.to.shared.u64 %rd1, %rd2;", "cvta.to.shared.u64"),
        ("isspacep.shared %p1, %rd1;", "isspacep.shared"),
        ("mov.u32 %r1, %clock;", "the operand %clock"),
        ("mov.u32 %r1, %smid;", "the operand %smid"),
        ("mov.b64 %rd1, elsewhere;", "the operand elsewhere"),
        ("mov.b32 %r1, 0d3FF0000000000000;", "the operand 0d3FF0000000000000 as uint32"),
        ("mov.b32 %r1, 12abc;", "the operand 12abc"),
        ("mov.b32 %r1, 0128;", "mov.b32 %r1, 0128"),
        ("mov.b32 %r1;", "mov.b32"),
        ("mov.b32;", "mov.b32"),
        ("mov.b64 %rd1, {%r1, %r2, %r3};", "mov.b64 %rd1, {%r1, %r2, %r3}"),
        ("mov.b128 %rd1, {%rd1, %rd2};", "mov.b128"),
        ("mov.b32 {%rs1, %rs2}, {%rs3, %rs4};", "mov.b32 {%rs1, %rs2}, {%rs3, %rs4}"),
        ("add.s32 %r1, %r2, %f1;", "the operand %f1"),
        ("add.s32 %r1|%r2, %r2, %r3;", "add.s32 %r1|%r2, %r2, %r3"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1;", "shfl.sync.bfly.b32 %r1, %r2, 1"),
        ("shfl.sync.bfly.b32 %r1, %r2, 1, 31, %r3;", "the member mask %r3"),
        ("vote.ballot.b32 %r1, %p1;", "vote.ballot.b32"),
        ("vote.sync.ballot.b32 %r1, %p1;", "vote.sync.ballot.b32 %r1, %p1"),
        ("nanosleep.u32 100;", "nanosleep.u32"),
        ("trap;", "trap"),
        ("brx.idx %r1, $L__table;", "brx.idx"),
        ("bra $L__nowhere;", "bra $L__nowhere (a branch to no label)"),
        ("bra;", "bra (a branch to no label)"),
        (".shared .align 4 .b8 inside[16];", "the directive .shared"),
        (".callprototype _;", "the directive .callprototype"),
        (".reg .v2 .b32 %v;", "the directive .reg"),
        (".reg .b128 %q<3>; mov.b128 %q1, %q2;", "mov.b128"),
        (".reg .b32 %p<3>;", "the register %p of two types"),
        ("$L__one:\nmov.b32 %r1, 0;\n$L__one:\n", "the label $L__one in two places"),
        ("Mov.b32 %r1, 0;", "the statement 'Mov.b32 %r1, 0'"),
        ("@%p1;", "the statement '@%p1'"),
    ],
)  # fmt: skip
def test_what_is_not_executed_is_refused_by_its_name(body: str, named: str) -> None:
    assert named in _refusal(module(f"\tmov.u32 \t%r1, %tid.x;\n{body}\n\tret;", threads=96))


def test_a_refusal_has_the_line() -> None:
    text = module("\tmov.u32 \t%r1, %tid.x;\n\ttrap;\n\tret;")
    line = text.split("\n").index("\ttrap;") + 1
    assert _refusal(text) == f"trap (PTX line {line})"


_PLAIN = module("\tret;")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("", "a module with 0 entries"),
        (_PLAIN + _PLAIN.split(".address_size 64")[1], "a module with 2 entries"),
        (_PLAIN.replace(".target sm_80\n", ""), "a module without .target"),
        (_PLAIN.replace(".version 8.7\n", ""), "a module without .version"),
        (_PLAIN.replace(".reqntid 32\n", ""), "a kernel without .reqntid"),
        (_PLAIN.replace(".reqntid 32", ".reqntid 32\n.reqnctapercluster 2, 1, 1"), "a cluster of blocks"),
        (_PLAIN.replace(".reqntid 32", ".reqntid 32\n.explicitcluster"), "a cluster of blocks"),
        (_PLAIN[: _PLAIN.index("$L__func_end0")], "a kernel whose closing brace is missing"),
        (module("ret;", before=".visible .func (.param .b32 r) f()\n{\n}"), "a function beside the kernel"),
        (module("ret;", before=".extern .func __assertfail\n(\n.param .b64 a\n);"), "a function beside the kernel"),
        (_PLAIN + "\n.func g()\n{\nret;\n}\n", "a function beside the kernel"),
        (module("ret;", parameters=[".align 64 .b8"]), "the parameter .param .align 64 .b8 small_param_0"),
        (_PLAIN.replace("small_param_0,", "small_param_0[16],"), "small_param_0[16]"),
        (module("ret;", before=".global .align 4 .f32 t[1] = {0f3F800000};"), "the content of t"),
        (module("ret;", before=".global .align 8 .u64 t[1] = {generic(other)};"), "the content of t"),
    ],
)  # fmt: skip
def test_another_kind_of_module_is_refused(text: str, named: str) -> None:
    assert named in _refusal(text)


def test_a_cluster_of_one_block_is_read() -> None:
    kernel = parse(_PLAIN.replace(".reqntid 32", ".maxntid 64, 2, 1\n.reqnctapercluster 1, 1, 1\n.minnctapersm 2"))
    assert kernel.threads == 128


def test_a_kernel_and_its_parts() -> None:
    kernel = parse(module("\t@!%p3 ld.global.v2.b32 \t{%r1, %r2}, [%rd1+8];  // a comment; with a semicolon\n\tret;"))
    assert (kernel.name, kernel.target, kernel.version, kernel.threads) == ("small", "sm_80", "8.7", 32)
    assert kernel.parameters == [(f"small_param_{place}", "u64") for place in range(5)]
    assert kernel.registers == {"%p": "pred", "%rs": "b16", "%r": "b32", "%rd": "b64"}
    load, end = kernel.instructions
    assert load.operands == ("{%r1, %r2}", "[%rd1+8]")
    assert (load.guard, load.negated, load.base, load.modifiers) == ("%p3", True, "ld", ("global", "v2", "b32"))
    assert load.text == "@!%p3 ld.global.v2.b32 {%r1, %r2}, [%rd1+8]"
    assert (end.opcode, end.operands) == ("ret", ())
    assert kernel.labels["$L__func_begin0"] == 0
    assert kernel.labels["$L__tmp1"] == 2


def _second(body: str, files: str = "") -> Instruction:
    return parse(module("\tmov.u32 %r1, %tid.x;\n" + body + "\n\tret;") + files).instructions[1]


@pytest.mark.parametrize(
    ("body", "place"),
    [
        ("\t.loc\t1 33 9\nadd.s32 %r1, %r1, 1;", "small.py:33"),
        ("\t.loc\t2 44 9, function_name $L__info_string0, inlined_at 1 17 4\nadd.s32 %r1, %r1, 1;", "small.py:17"),
        ("\t.loc\t2 44 9                          // other.py:44:9\nadd.s32 %r1, %r1, 1;", "other.py:44"),
        (
            "\t.loc\t2 44 9   // other.py:44:9 @[ /a/b/mid.py:3:4 @[ small.py:21:7 ] ]\nadd.s32 %r1, %r1, 1;",
            "small.py:21",
        ),
        ("\t.loc\t3 44 9\nadd.s32 %r1, %r1, 1;", "third.py:44"),
        ("\t.loc\t7 44 9\nadd.s32 %r1, %r1, 1;", "?:44"),
        ("// begin inline asm\n\nadd.s32\n  %r1,\n  %r1, 1;", "small.py:5"),
    ],
)
def test_the_line_of_the_source(body: str, place: str) -> None:
    found = _second(body, '\n\t.file\t2 "/else/where/other.py"\n\t.file\t3 "/a/folder" "deep/third.py"\n')
    assert found.source == place
    assert found.place == f"PTX line {found.line} ({place})"
    assert found.text == "add.s32 %r1, %r1, 1"


def test_without_line_information_a_place_is_a_line_of_ptx() -> None:
    text = "\n".join(
        line for line in module("\ttrap;\n\tret;").split("\n") if ".loc" not in line and ".file" not in line
    )
    found = parse(text).instructions[0]
    assert found.place == f"PTX line {found.line}"
    assert text.split("\n")[found.line - 1] == "\ttrap;"


def test_registers_of_a_brace_are_its_own() -> None:
    """LLVM drops half of a register into one that it declares in braces, under the same name for every width."""
    body = """
    mov.b32 %r10, 0x12345678; mov.b64 %rd9, 0x1122334455667788;
    { .reg .b16 tmp; mov.b32 {tmp, %rs1}, %r10; }
    { .reg .b32 tmp; mov.b64 {tmp, %r11}, %rd9; { .reg .pred tmp; setp.eq.s32 tmp, %r1, 3;
    @tmp mov.b32 %r11, 5; } mov.b32 %r12, tmp; }
    cvt.u32.u16 %r13, %rs1; st.global.b32 [%rd5], %r11; st.global.b32 [%rd5+128], %r12;
    st.global.b32 [%rd5+256], %r13;"""
    found = run(body, [tensor([0] * 96)]).values()
    assert found == [5 if one == 3 else 0x11223344 for one in range(32)] + [0x55667788] * 32 + [0x1234] * 32


def test_one_line_may_hold_several_statements_and_one_statement_several_lines() -> None:
    body = "mov.b32 %r10, 1; add.s32 %r10,\n\n%r10,   // why\n\t2; st.global.b32 [ %rd5 + 0 ], { %r10 };"
    assert run(body, [tensor([0] * 32)]).values() == [3] * 32


def test_parameters_have_their_types() -> None:
    kernel = parse(module("\tret;", parameters=[POINTER, ".u32", ".f32", ".u64", ".b8"]))
    assert [kind for _, kind in kernel.parameters] == ["u64", "u32", "f32", "u64", "b8", "u64", "u64"]
