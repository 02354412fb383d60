"""How many instructions one warp executes.

The control flow of one warp of program (0, 0, 0) is followed through the machine code with the launch's own arguments:
integers that all of its threads share are computed where they can be known, everything else is unknown. So a loop
counts with its trip count, whatever the compilers unrolled, and a branch that depends on data, or that the threads of
the warp may take differently, ends in ``Undetermined`` instead of in a guess.
"""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import product, takewhile, zip_longest
from typing import NamedTuple

from verify.sass import Instruction, Program

#: Far above any kernel that scores a block of keys; below it the count takes seconds.
_STEPS = 2_000_000

_REGISTER = re.compile(r"(?P<minus>-?)(?P<not>~?)(?P<file>U?R)(?P<number>\d+|Z)(?P<suffix>(?:\.\w+)*)")
_PREDICATE = re.compile(r"(?P<not>!?)(?P<name>U?P(?:\d|T))")
_IMMEDIATE = re.compile(r"(-?)(0x[0-9a-f]+|\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")

_WORD = 0xFFFFFFFF

_JUMPS = ("BRA", "BRX", "BRXU", "JMP", "JMX", "JMXU", "CALL", "RET", "BREAK")


class Undetermined(Exception):
    """The instructions that a warp executes cannot be counted; the message says at which one and why."""


def executed(program: Program, constants: Mapping[int, int], warp: int = 0) -> int:
    """How many instructions the warp of that number in a program executes, predicated-off ones included.

    ``constants`` has the known 32-bit words of constant bank 0 by their byte offset. Raises Undetermined.
    """
    places = {instruction.address: index for index, instruction in enumerate(program.instructions)}
    thread, index, steps = _Thread(constants, warp), 0, 0
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
                thread.execute(instruction, taken)
            except (LookupError, ValueError) as error:
                raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} is not as expected") from error


def _target(instruction: Instruction, thread: _Thread, taken: bool | None) -> int | None:
    """Where a branch goes; None where it is not taken."""
    if ".DIV" in instruction.opcode:
        return None  # for a warp whose threads have parted; the one that is followed has not
    if not instruction.operands:
        raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} does not say where it goes")
    *conditions, target = instruction.operands
    # BRA.U UP0, 0x80: the condition may be an operand
    for condition in filter(_PREDICATE.fullmatch, conditions):
        taken = _combined(("AND",), taken, thread.predicate(condition))
    if taken is None:
        raise _unknown(instruction)
    if not taken:
        return None
    if instruction.base != "BRA" or not _IMMEDIATE.fullmatch(target):
        raise Undetermined(f"{instruction.opcode} at {instruction.address:#x} goes to a place that is computed")
    return int(target, 16)


def _unknown(instruction: Instruction) -> Undetermined:
    return Undetermined(f"{instruction.opcode} at {instruction.address:#x} depends on a value that is not known")


class Partly(NamedTuple):
    """A word of which the bits in ``unknown`` are not known, as the number of a thread in its warp is not."""

    value: int
    unknown: int

    @property
    def ends(self) -> tuple[int, int]:
        """The least and the greatest word that it may be, unsigned."""
        return self.value & ~self.unknown, self.value | self.unknown


#: A word as far as it is known.
Word = int | Partly | None


class _Thread:
    """Registers and predicates that all threads of a warp have alike; what is not known is None."""

    def __init__(self, constants: Mapping[int, int], warp: int) -> None:
        self._constants, self.warp = constants, warp
        # code for Jetson Orin begins with a test of UR2, which the hardware sets; 0 goes the longer way
        self._words: dict[str, Word] = {"UR2": 0}
        self._predicates: dict[str, bool | None] = {}

    def predicate(self, text: str) -> bool | None:
        found = _PREDICATE.fullmatch(text)
        if found is None:
            return None
        value = True if found["name"].endswith("T") else self._predicates.get(found["name"])
        return value if value is None or not found["not"] else not value

    def word(self, text: str, part: int = 0) -> int | None:
        """The 32-bit word that an operand names, or the word ``part`` words after it; None unless it is known."""
        known = self.partly(text, part)
        return known if isinstance(known, int) else None

    def bits(self, text: str, words: int = 1) -> Partly:
        """What is known of one word, or of two in a row."""
        value = unknown = 0
        for part in range(words):
            known = self.partly(text, part)
            known = Partly(0, _WORD) if known is None else Partly(known, 0) if isinstance(known, int) else known
            value, unknown = value | known.value << 32 * part, unknown | known.unknown << 32 * part
        return Partly(value, unknown)

    def partly(self, text: str, part: int = 0) -> Word:
        """``word``, or what is known of it."""
        if found := _IMMEDIATE.fullmatch(text):
            value = int(found[2], 0) * (-1 if found[1] else 1)
            return (value >> 32 * part) & _WORD
        if found := _CONSTANT.fullmatch(text):
            return self._constants.get(int(found[1], 16) + 4 * part)
        found = _REGISTER.fullmatch(text)
        if found is None or found["suffix"].replace(".reuse", "") not in ("", ".64"):
            return None
        value = 0 if found["number"] == "Z" else self._words.get(f"{found['file']}{int(found['number']) + part}")
        if value is None or (found["minus"] and (part or isinstance(value, Partly))):
            return None
        if isinstance(value, Partly):
            return Partly(~value.value & _WORD, value.unknown) if found["not"] else value
        value = ~value if found["not"] else value
        return (-value if found["minus"] else value) & _WORD

    def double(self, text: str) -> int | None:
        low, high = self.word(text), self.word(text, 1)
        return None if low is None or high is None else low | high << 32

    def execute(self, instruction: Instruction, taken: bool | None) -> None:
        """Write what the instruction writes: its value where that is known, else that it is not."""
        if taken is False:
            return
        operands = list(instruction.operands)
        targets = _leading_predicates(operands)
        place = None
        if instruction.base not in _PREDICATES_ONLY and operands and _REGISTER.fullmatch(operands[0]):
            place = operands.pop(0)
        if instruction.base in _CARRYING:
            targets += _leading_predicates(operands)
        words, answers = None, ()
        meaning = _MEANINGS.get(instruction.base) if taken else None
        if meaning is not None:
            words, answers = meaning(self, instruction, operands)
        if place and words is None:
            # what is not understood may write whatever stands at its front
            targets += _leading_predicates(operands)
        if {"PR", "UPR"} & {*instruction.operands}:
            self._predicates.clear()
        if "GMMA" in instruction.base or instruction.base.startswith("LDT"):
            self._words.clear()  # a tile
        for target, answer in zip_longest(targets, answers[: len(targets)]):
            self._predicates[target] = answer
        if place:
            unknown = [None] * _words_written(instruction)
            self._set(place, words + unknown[len(words) :] if words else unknown)
            if instruction.base.startswith("LD") and operands and _REGISTER.fullmatch(operands[0]):
                self._set(operands[0], unknown)  # the widest loads fill two runs of registers

    def _set(self, place: str, words: list[Word]) -> None:
        found = _REGISTER.fullmatch(place)
        if found["number"] != "Z":
            for part, value in enumerate(words):
                self._words[f"{found['file']}{int(found['number']) + part}"] = value


def _leading_predicates(operands: list[str]) -> list[str]:
    """Take the predicates off the front of ``operands``: the ones that an instruction writes, two at most."""
    found = list(takewhile(_PREDICATE.fullmatch, operands[:2]))
    del operands[: len(found)]
    return found


def _words_written(instruction: Instruction) -> int:
    """How many registers an instruction of unknown meaning may write; rather one too many than one too few."""
    if "MMA" in instruction.base or instruction.base.startswith(("LDSM", "LDTM", "LDT")):
        return 8
    wide = ".WIDE" in instruction.opcode or instruction.base in _PAIRS
    return max(2 if wide else 1, instruction.width_bits // 32)


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _split(value: int) -> list[int | None]:
    return [value & _WORD, (value >> 32) & _WORD]


def _read_operands(operands: list[str]) -> tuple[list[str], list[str]]:
    """The registers and numbers, then the predicates among the operands that are read."""
    predicates = [operand for operand in operands if _PREDICATE.fullmatch(operand)]
    return [operand for operand in operands if operand not in predicates], predicates


#: The words and the predicates that an instruction writes; no words where they are not known.
Outcome = tuple["list[Word] | None", "Sequence[bool | None]"]
Meaning = Callable[["_Thread", Instruction, list[str]], Outcome]

_UNKNOWN: Outcome = (None, ())


def _special(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    lanes = 31
    if operands[0] in ("SR_TID.X", "SR_LANEID"):  # Triton's blocks of threads have one dimension
        return [Partly(32 * thread.warp if operands[0] == "SR_TID.X" else 0, lanes)], ()
    known = operands[0].startswith(("SR_CTAID", "SR_TID", "SRZ"))
    wide = instruction.base == "CS2R" and ".32" not in instruction.opcode
    return ([0] * (2 if wide else 1), ()) if known else _UNKNOWN


def _move(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    if instruction.width_bits < 32:  # a part of a word
        return _UNKNOWN
    return [thread.partly(operands[0], part) for part in range(max(1, instruction.width_bits // 32))], ()


def _halves(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """A product with RZ plus two half-precision numbers: how a constant gets into a register by another pipe."""
    if len(operands) != 4 or not any(re.fullmatch(r"-?RZ", operand) for operand in operands[:2]):
        return _UNKNOWN
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in operands[2:])
    except (ValueError, OverflowError):
        return _UNKNOWN
    return [high << 16 | low], ()


def _add(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    terms, carries = _read_operands(operands)
    bits = 64 if ".64" in instruction.opcode else 32
    values = [thread.double(x) if bits == 64 else thread.word(x) for x in terms]
    values += [thread.predicate(x) for x in carries]
    # a negated register would carry as its complement plus one, and beside a carry it is the complement alone
    negated = any(_REGISTER.fullmatch(x) and x.startswith("-") for x in terms)
    if None in values or (negated and ".X" in instruction.opcode):
        return _UNKNOWN
    total = sum(values)
    carry = None if negated else total >> bits > 0
    return (_split(total) if bits == 64 else [total & _WORD]), (carry,)


def _multiply_add(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    terms, _ = _read_operands(operands)
    wide, high = ".WIDE" in instruction.opcode, ".HI" in instruction.opcode
    a, b = thread.word(terms[0]), thread.word(terms[1])
    c = thread.double(terms[2]) if wide or high else thread.word(terms[2])
    if 0 in (a, b):  # a product with RZ is a move
        if not (wide or high or ".X" in instruction.opcode):
            return [thread.partly(terms[2])], ()
        a = b = 0
    if None in (a, b, c) or ".X" in instruction.opcode:
        return _UNKNOWN
    if (wide or high) and ".U32" not in instruction.opcode:
        a, b = _signed(a), _signed(b)
    words = _split(a * b + c)
    return (words[1:] if high else words if wide else words[:1]), ()


def _shift(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """A funnel shift, where one word is enough to know the result."""
    low, by, high = thread.partly(operands[0]), thread.word(operands[1]), thread.partly(operands[2])
    if by is None:
        return _UNKNOWN
    parts = instruction.opcode.split(".")
    # a shift by more than there is shifts everything out, unless it is told to wrap
    by = by % (64 if {"U64", "S64"} & set(parts) else 32) if "W" in parts else min(by, 32)
    if "L" in parts and "HI" not in parts and low is not None:
        return [_each(low, lambda bits: (bits << by) & _WORD)], ()
    if "R" in parts and "HI" in parts and high is not None and low == 0:
        return [_each(high, lambda bits: ((_signed(bits) if "S32" in parts else bits) >> by) & _WORD)], ()
    return _UNKNOWN


def _each(word: int | Partly, move: Callable[[int], int]) -> Word:
    """What becomes of a word whose bits are moved, and of the knowledge of them."""
    return Partly(move(word.value), move(word.unknown)) if isinstance(word, Partly) else move(word)


def _logic(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """Three words through a truth table; an unknown bit that the table does not look at does not matter."""
    terms, predicates = _read_operands(operands)
    words, table = [thread.bits(term) for term in terms[:3]], thread.word(terms[3])
    result = unknown = 0
    for bit in range(32):
        read = [None if word.unknown >> bit & 1 else bool(word.value >> bit & 1) for word in words]
        answer = _looked_up(table, read)
        unknown |= (answer is None) << bit
        result |= bool(answer) << bit
    if unknown == _WORD:
        return _UNKNOWN
    # a predicate that is read takes part in the one that is written
    alone = not set(predicates) - {"PT", "!PT", "UPT", "!UPT"}
    some = (result != 0 if result or not unknown else None) if alone else None
    return [Partly(result, unknown) if unknown else result], (some,)


def _predicate_logic(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    values = [thread.predicate(operand) for operand in operands[:3]]
    return None, [_looked_up(thread.word(table), values) for table in operands[3:5]]


def _looked_up(table: int | None, values: Sequence[bool | None]) -> bool | None:
    """The bit of a truth table at three values; None where the unknown ones among them decide."""
    if table is None:
        return None
    choices = product(*((False, True) if value is None else (value,) for value in values))
    answers = {bool(table >> (a << 2 | b << 1 | c) & 1) for a, b, c in choices}
    return answers.pop() if len(answers) == 1 else None


def _select(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    chosen = thread.predicate(operands[2])
    return ([thread.partly(operands[0 if chosen else 1])], ()) if chosen is not None else _UNKNOWN


def _extend(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    value, bits = thread.word(operands[0]), thread.word(operands[1])
    if value is None or not bits:
        return _UNKNOWN
    value &= (1 << bits) - 1
    return [(value if ".U32" in instruction.opcode else _signed(value, bits)) & _WORD], ()


_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _compare(thread: _Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    parts = instruction.opcode.split(".")
    bits = 64 if {"S64", "U64"} & set(parts) else 32
    one, other = (thread.bits(x, bits // 32) for x in operands[:2])
    others = [thread.predicate(x) for x in operands[2:]]
    if parts[1] not in _COMPARISONS or ("EX" in parts and one.unknown | other.unknown):
        return _UNKNOWN
    if "EX" in parts and one == other:  # the high words are equal: the comparison of the low ones decides
        outcome = others[1]
    else:
        outcome = _compared(parts[1], one, other, 0 if {"U32", "U64"} & set(parts) else bits)
    opposite = None if outcome is None else not outcome
    return None, (_combined(parts, outcome, others[0]), _combined(parts, opposite, others[0]))


def _compared(how: str, one: Partly, other: Partly, signed_bits: int) -> bool | None:
    """A comparison of words that are partly known; None where the rest decides."""
    unknown = one.unknown | other.unknown
    if how in ("EQ", "NE") and unknown:
        return how == "NE" if (one.value ^ other.value) & ~unknown else None
    if signed_bits and unknown >> (signed_bits - 1):
        return None
    ends = product(one.ends, other.ends)
    answers = {_COMPARISONS[how](*(_signed(end, signed_bits) if signed_bits else end for end in pair)) for pair in ends}
    return answers.pop() if len(answers) == 1 else None


def _combined(parts: Sequence[str], one: bool | None, other: bool | None) -> bool | None:
    if "AND" in parts:
        return False if False in (one, other) else None if None in (one, other) else True
    if "OR" in parts:
        return True if True in (one, other) else None if None in (one, other) else False
    return None


#: Instructions that name the predicates that they write behind the register.
_CARRYING = ("IADD3", "UIADD3", "LEA", "ULEA", "IMAD", "UIMAD")

#: Instructions of unknown meaning that write two registers, whatever their name says of it.
_PAIRS = ("CS2R", "DADD", "DMUL", "DFMA", "F2F", "I2F", "F2I", "FADD2", "FMUL2", "FFMA2", "LEPC")

#: Instructions whose first register is read.
_PREDICATES_ONLY = ("ISETP", "UISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "UPLOP3")

_MEANINGS: Mapping[str, Meaning] = {
    **dict.fromkeys(("S2R", "S2UR", "CS2R"), _special),
    **dict.fromkeys(("MOV", "UMOV", "R2UR", "LDC", "LDCU", "ULDC"), _move),
    "HFMA2": _halves,
    **dict.fromkeys(("IADD3", "UIADD3", "IADD", "UIADD", "VIADD"), _add),
    **dict.fromkeys(("IMAD", "UIMAD"), _multiply_add),
    **dict.fromkeys(("SHF", "USHF"), _shift),
    **dict.fromkeys(("LOP3", "ULOP3"), _logic),
    **dict.fromkeys(("PLOP3", "UPLOP3"), _predicate_logic),
    **dict.fromkeys(("SEL", "USEL"), _select),
    **dict.fromkeys(("SGXT", "USGXT"), _extend),
    **dict.fromkeys(("ISETP", "UISETP"), _compare),
}
