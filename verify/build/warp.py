"""Counts the instructions that one warp executes.

The control flow of one warp of program (0, 0, 0) is followed through the machine code with the launch's own arguments.
Integers that all of its threads share are computed where possible; everything else is unknown. So a loop counts with
its trip count, however it was unrolled. A branch that depends on data, or that may diverge within the warp, raises
``Undetermined`` instead of being guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import takewhile, zip_longest

from verify.build.meanings import MEANINGS, combined
from verify.build.registers import IMMEDIATE, PREDICATE, REGISTER, Thread
from verify.build.sass import Instruction, Program

#: Far more than any kernel that scores a block of keys executes; counting that far takes seconds.
_STEPS = 2_000_000


#: Instructions whose written predicates follow the destination register.
_CARRYING = ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD")

#: Instructions that may write two registers without .WIDE in their name.
_PAIRS = ("CS2R", "DADD", "DMUL", "DFMA", "F2F", "I2F", "F2I", "FADD2", "FMUL2", "FFMA2", "LEPC")

#: Instructions that write predicates only: their first register is read.
_PREDICATES_ONLY = ("ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3")

_JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "BREAK")


class Undetermined(Exception):
    """The instructions that a warp executes cannot be counted; the message says at which one and why."""


def executed(program: Program, constants: Mapping[int, int], warp: int = 0) -> int:
    """The number of instructions that warp number ``warp`` of a program executes, predicated-off ones included.

    ``constants`` has the known 32-bit words of constant bank 0 by their byte offset. Raises Undetermined.
    """
    places = {instruction.address: index for index, instruction in enumerate(program.instructions)}
    thread, index, steps = Thread(constants, warp), 0, 0
    while True:
        if index >= len(program.instructions):
            raise Undetermined("the code runs past its end")
        if steps == _STEPS:
            raise Undetermined(f"no end within {_STEPS} instructions")
        steps += 1
        instruction = program.instructions[index]
        taken = thread.predicate(instruction.guard) if instruction.guard else True
        index += 1
        if instruction.base in _JUMPS:
            target = _target(instruction, thread, taken)
            if target is not None and target not in places:
                raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} leaves the kernel")
            index = index if target is None else places[target]
        elif instruction.base == "EXIT":
            if taken is None:
                raise _unknown(instruction)
            if taken:
                return steps
        else:
            try:
                _execute(thread, instruction, taken)
            except (LookupError, ValueError) as error:
                raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} is not as expected") from error


def _target(instruction: Instruction, thread: Thread, taken: bool | None) -> int | None:
    """The target of a branch; None if it is not taken."""
    if ".DIV" in instruction.opcode:
        return None  # taken only by a diverged warp; this one is not
    if not instruction.operands:
        raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} has no target")
    *conditions, target = instruction.operands
    # BRA.U UP0, 0x80: the condition may be an operand
    for condition in filter(PREDICATE.fullmatch, conditions):
        taken = combined(("AND",), taken, thread.predicate(condition))
    if taken is None:
        raise _unknown(instruction)
    if not taken:
        return None
    if instruction.base != "BRA" or not IMMEDIATE.fullmatch(target):
        raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} goes to a computed address")
    return int(target, 16)


def _unknown(instruction: Instruction) -> Undetermined:
    return Undetermined(f"{instruction.opcode} at {instruction.address:#x} depends on an unknown value")


def _execute(thread: Thread, instruction: Instruction, taken: bool | None) -> None:
    """Write the results of an instruction; those that cannot be computed become unknown."""
    if taken is False:
        return
    operands = list(instruction.operands)
    targets = _leading_predicates(operands)
    place = None
    if instruction.base not in _PREDICATES_ONLY and operands and REGISTER.fullmatch(operands[0]):
        place = operands.pop(0)
    if instruction.base in _CARRYING:
        targets += _leading_predicates(operands)
    words, answers = None, ()
    meaning = MEANINGS.get(instruction.base) if taken else None
    if meaning is not None:
        words, answers = meaning(thread, instruction, operands)
    if place and words is None:
        # an instruction that is not understood may write any of its leading operands
        targets += _leading_predicates(operands)
    if {"PR", "UPR"} & {*instruction.operands}:
        thread.predicates.clear()
    if "GMMA" in instruction.base or instruction.base.startswith("LDT"):
        thread.words.clear()  # a tile
    for target, answer in zip_longest(targets, answers[: len(targets)]):
        thread.predicates[target] = answer
    if place:
        unknown = [None] * _words_written(instruction)
        thread.write(place, words + unknown[len(words) :] if words else unknown)
        if instruction.base.startswith("LD") and operands and REGISTER.fullmatch(operands[0]):
            thread.write(operands[0], unknown)  # the widest loads fill two ranges of registers


def _leading_predicates(operands: list[str]) -> list[str]:
    """Take the predicates off the front of ``operands``, at most two: those that an instruction writes."""
    found = list(takewhile(PREDICATE.fullmatch, operands[:2]))
    del operands[: len(found)]
    return found


def _words_written(instruction: Instruction) -> int:
    """An upper bound of the registers that an instruction of unknown meaning writes."""
    if "MMA" in instruction.base or instruction.base.startswith(("LDSM", "LDTM", "LDT")):
        return 8
    wide = ".WIDE" in instruction.opcode or instruction.base in _PAIRS
    return max(2 if wide else 1, instruction.width_bits // 32)
