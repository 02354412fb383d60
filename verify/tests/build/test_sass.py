"""Counting what a warp executes: loops by their trip count, and nothing where the code does not tell."""

from __future__ import annotations

import pytest

from verify.build.sass import Program
from verify.build.warp import Undetermined, executed

_USAGE = " Function k:\n  REG:40 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:600 TEXTURE:0 SURFACE:0 SAMPLER:0\n"


def program(*lines: str) -> Program:
    code = [f"        /*{16 * place:04x}*/  {line} ;   /* 0x0000000000007918 */" for place, line in enumerate(lines)]
    return Program.parse(_USAGE + "\t\tFunction : k\n" + "\n".join(code), "k")


def test_what_the_code_has_is_counted_without_its_padding() -> None:
    found = program(
        "LDG.E.128 R4, desc[UR4][R2.64]", "@!P0 LDG.E.U16 R8, desc[UR4][R2.64+0x80]", "STL.64 [R1], R4",
        "LDL R4, [R1]", "MUFU.SQRT R6, R6", "EXIT", "BRA 0x60", "NOP",
    )  # fmt: skip
    assert (found.registers, found.stack_bytes, len(found.instructions)) == (40, 0, 6)
    assert found.loads_by_width == {"128": 1, "16": 1}
    assert (found.local_bytes("STL"), found.local_bytes("LDL"), found.count("MUFU")) == (8, 4, 1)
    assert executed(found, {}) == 6


@pytest.mark.parametrize(
    "loop",
    [
        # as ptxas writes it for sm_90: a 64-bit counter in two words, compared with the product of an argument
        ("ULDC UR9, c[0x0][0x240]", "UIMAD.WIDE.U32 UR6, UR9, 0x80, URZ", "CS2R R34, SRZ", "MOV R58, UR6",
         "MOV R59, UR7", "IADD3 R34, P0, R34, 0x80, RZ", "IADD3.X R35, RZ, R35, RZ, P0, !PT",
         "ISETP.NE.U32.AND P0, PT, R58, R34, PT", "ISETP.NE.U32.AND.EX P0, PT, R59, R35, PT, P0", "@P0 BRA 0x50",
         "EXIT"),
        # for sm_120: whole 64-bit instructions of the uniform path
        ("LDCU UR11, c[0x0][0x240]", "UIMAD.WIDE.U32 UR6, UR11, 0x80, URZ", "UMOV.64 UR4, URZ", "NOP", "NOP",
         "UIADD3.64 UR4, UPT, UPT, UR4, 0x80, URZ", "NOP", "NOP", "UISETP.NE.U64.AND UP0, UPT, UR6, UR4, UPT",
         "BRA.U UP0, 0x50", "EXIT"),
        # counting down, with an exit in the middle
        ("ULDC UR19, c[0x0][0x240]", "UMOV UR4, URZ", "NOP", "NOP", "NOP", "UIADD3 UR19, UP0, UR19, -0x1, URZ",
         "UIADD3.X UR4, UR4, -0x1, URZ, UP0, !UPT", "ISETP.EQ.U32.AND P1, PT, RZ, UR19, PT", "@P1 EXIT", "BRA 0x50",
         "EXIT"),
    ],
    ids=["sm90", "sm120", "down"],
)  # fmt: skip
@pytest.mark.parametrize("trips", [1, 3, 17])
def test_a_loop_counts_with_its_trip_count(loop: tuple[str, ...], trips: int) -> None:
    steps = executed(program(*loop), {0x240: trips})
    last = 0 if loop[8] == "@P1 EXIT" else 1
    # five instructions before the loop and five in it; counting down, the last trip ends one short of them
    assert steps == 5 + 5 * trips - (1 - last) + last


def test_a_constant_made_by_another_pipe_and_a_masked_exit_are_known() -> None:
    found = program(
        "HFMA2 R5, -RZ, RZ, 0, 1.78813934326171875e-07", "S2R R7, SR_TID.X", "LOP3.LUT P0, RZ, R7, 0x60, RZ, 0xc0, !PT",
        "IADD3 R5, PT, PT, R5, -0x1, RZ", "ISETP.NE.AND P1, PT, R5, RZ, PT", "@P1 BRA 0x30",
        "PLOP3.LUT P2, PT, PT, PT, P0, 0x80, 0x8", "@P2 EXIT", "EXIT",
    )  # fmt: skip
    assert executed(found, {}) == 3 + 3 * 3 + 3
    # the bits of 0x60 are the number of the warp, the same for all its threads
    assert executed(found, {}, warp=1) == executed(found, {}) - 1


@pytest.mark.parametrize(("warp", "steps"), [(0, 8), (1, 8), (2, 7)])
def test_a_bound_that_whole_warps_pass_or_miss_is_counted_for_each(warp: int, steps: int) -> None:
    # as ptxas writes it for sm_120: the number of the key out of the thread's, compared in 64 bits
    found = program(
        "UMOV UR14, 0x40", "UMOV UR15, URZ", "S2R R2, SR_TID.X", "LOP3.LUT R62, R2, 0x7f, RZ, 0xc0, !PT",
        "MOV R63, RZ", "ISETP.LT.S64.AND P0, PT, R62, UR14, PT", "@!P0 EXIT", "EXIT",
    )  # fmt: skip
    assert executed(found, {}, warp) == steps


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        (("LDG.E R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x0", "EXIT"), "BRA at 0x20"),
        (("LDG.E R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 EXIT", "EXIT"), "EXIT at 0x20"),
        (("BRX R4 -0x10", "EXIT"), "BRX at 0x0 goes to a computed address"),
        (("RET", "EXIT"), "RET at 0x0 has no target"),
        # what differs between the threads of a warp
        (("S2R R4, SR_TID.X", "ISETP.NE.AND P0, PT, R4, RZ, PT", "@P0 BRA 0x30", "EXIT"), "BRA at 0x20"),
        (("S2R R4, SR_LANEID", "LOP3.LUT P0, RZ, R4, 0x10, RZ, 0xc0, !PT", "@P0 EXIT", "EXIT"), "EXIT at 0x20"),
        (("FADD R1, R1, R1", "BRA 0x0", "EXIT"), "no end within"),
        (("FADD R1, R1, R1",), "runs past its end"),
    ],
)
def test_what_cannot_be_known_is_said_and_not_guessed(lines: tuple[str, ...], reason: str) -> None:
    with pytest.raises(Undetermined, match=reason):
        executed(program(*lines), {0x240: 3})


@pytest.mark.parametrize(
    "line",
    [
        "LDG.E.ENL2.256 R8, R4, desc[UR4][R2.64]",
        "HGMMA.64x64x16.F32 R24, gdesc[UR4], R24",
        "VOTE.ANY R2, P0, P1",
        "LOP3.LUT P0, R9, R6, 0x0, RZ, 0xc0, P2",
        "R2P PR, R3, 0x7f",
        "FFMA2 R5, R2, R3, R4",
        "FADD2 R5, R2, R3",
        "FMUL2 R5, R2, R3",
        "LEPC R5",
        "SEL R6, R2",
    ],
)
def test_what_is_not_understood_leaves_nothing_known_that_it_may_have_written(line: str) -> None:
    lines = ("MOV R6, 0x1", "ISETP.NE.AND P0, PT, R6, R6, PT", line, "ISETP.NE.AND P1, PT, R6, 0x1, PT", "@P0 EXIT")
    with pytest.raises(Undetermined):
        executed(program(*lines, "@P1 EXIT", "EXIT"), {})


def test_a_loaded_value_replaces_what_was_known_of_every_word_it_fills() -> None:
    lines = ("MOV R6, 0x1", "LDG.E.128 R4, desc[UR4][R2.64]", "ISETP.NE.AND P0, PT, R6, RZ, PT", "@P0 EXIT", "EXIT")
    with pytest.raises(Undetermined, match="EXIT at 0x30"):
        executed(program(*lines), {})


@pytest.mark.parametrize(("shift", "left"), [("SHF.L.U32", 0), ("SHF.L.W.U32", 2)])
def test_a_shift_by_more_than_a_word_wraps_only_where_it_is_told_to(shift: str, left: int) -> None:
    lines = ("MOV R4, 0x1", f"{shift} R5, R4, 0x21, RZ", f"ISETP.EQ.U32.AND P0, PT, R5, {left:#x}, PT", "@P0 EXIT")
    assert executed(program(*lines, "EXIT"), {}) == 4


def test_scheduling_notes_of_older_disassemblers_are_no_operands() -> None:
    text = "        /*0000*/  BRA.U UP0, 0x40                            &req={1} ?trans6;  /* 0x0 */\n"
    assert Program.parse(_USAGE + "\t\tFunction : k\n" + text, "k").instructions[0].operands == ("UP0", "0x40")


def test_an_architecture_that_the_disassembler_does_not_know_has_registers_and_no_code() -> None:
    found = Program.parse(_USAGE + "\n\tcode for sm_107a\n", "k")
    assert (found.registers, found.instructions) == (40, ())


def test_another_function_of_the_cubin_is_not_the_kernels() -> None:
    other = _USAGE.replace("k:", "helper:").replace("40", "99")
    code = "        /*0000*/  {} ;\n        /*0010*/  EXIT ;\n"
    sections = f"\t\tFunction : helper\n{code.format('NOP')}\t\tFunction : k\n{code.format('CALL.REL.NOINC 0x80')}"
    found = Program.parse(other + _USAGE + sections, "k")
    assert (found.registers, [one.base for one in found.instructions]) == (40, ["CALL", "EXIT"])
    with pytest.raises(Undetermined, match="CALL"):
        executed(found, {})
    with pytest.raises(ValueError, match="no resource usage of absent"):
        Program.parse(other, "absent")
