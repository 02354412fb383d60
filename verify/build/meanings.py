"""The effect of SASS instructions on registers and predicates, for integers only."""

from __future__ import annotations

import operator
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from itertools import product

from verify.build.registers import PREDICATE, REGISTER, WORD, Partly, Thread, Word
from verify.build.sass import Instruction


def _signed(value: int, bits: int = 32) -> int:
    return value - (1 << bits) if value >> (bits - 1) else value


def _split(value: int) -> list[int | None]:
    return [value & WORD, (value >> 32) & WORD]


def _read_operands(operands: list[str]) -> tuple[list[str], list[str]]:
    """The source operands, split into registers and numbers, and predicates."""
    predicates = [operand for operand in operands if PREDICATE.fullmatch(operand)]
    return [operand for operand in operands if operand not in predicates], predicates


#: The words and the predicates that an instruction writes; None if the words are not known.
Outcome = tuple["list[Word] | None", "Sequence[bool | None]"]


Meaning = Callable[[Thread, Instruction, list[str]], Outcome]


_UNKNOWN: Outcome = (None, ())


def _special(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    lanes = 31
    if operands[0] in ("SR_TID.X", "SR_LANEID"):  # Triton's thread blocks are one-dimensional
        return [Partly(32 * thread.warp if operands[0] == "SR_TID.X" else 0, lanes)], ()
    known = operands[0].startswith(("SR_CTAID", "SR_TID", "SRZ"))
    wide = instruction.base == "CS2R" and ".32" not in instruction.opcode
    return ([0] * (2 if wide else 1), ()) if known else _UNKNOWN


def _move(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    if instruction.width_bits < 32:  # a part of a word
        return _UNKNOWN
    return [thread.partly(operands[0], part) for part in range(max(1, instruction.width_bits // 32))], ()


def _halves(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """A product with RZ plus two half-precision numbers: a way to load a constant through another pipe."""
    if len(operands) != 4 or not any(re.fullmatch(r"-?RZ", operand) for operand in operands[:2]):
        return _UNKNOWN
    try:
        high, low = (struct.unpack("<H", struct.pack("<e", float(text)))[0] for text in operands[2:])
    except (ValueError, OverflowError):
        return _UNKNOWN
    return [high << 16 | low], ()


def _add(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    terms, carries = _read_operands(operands)
    bits = 64 if ".64" in instruction.opcode else 32
    values = [thread.double(x) if bits == 64 else thread.word(x) for x in terms]
    values += [thread.predicate(x) for x in carries]
    # a negated register carries as its complement plus one, and next to a carry it is the complement alone
    negated = any(REGISTER.fullmatch(x) and x.startswith("-") for x in terms)
    if None in values or (negated and ".X" in instruction.opcode):
        return _UNKNOWN
    total = sum(values)
    carry = None if negated else total >> bits > 0
    return (_split(total) if bits == 64 else [total & WORD]), (carry,)


def _multiply_add(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
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


def _shift(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """A funnel shift whose result depends on one word only."""
    low, by, high = thread.partly(operands[0]), thread.word(operands[1]), thread.partly(operands[2])
    if by is None:
        return _UNKNOWN
    parts = instruction.opcode.split(".")
    # a shift beyond the width shifts everything out, unless the instruction wraps
    by = by % (64 if {"U64", "S64"} & set(parts) else 32) if "W" in parts else min(by, 32)
    if "L" in parts and "HI" not in parts and low is not None:
        return [_each(low, lambda bits: (bits << by) & WORD)], ()
    if "R" in parts and "HI" in parts and high is not None and low == 0:
        return [_each(high, lambda bits: ((_signed(bits) if "S32" in parts else bits) >> by) & WORD)], ()
    return _UNKNOWN


def _each(word: int | Partly, move: Callable[[int], int]) -> Word:
    """Move the bits of a word; a mask of unknown bits moves with them."""
    return Partly(move(word.value), move(word.unknown)) if isinstance(word, Partly) else move(word)


def _logic(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    """Three words through a truth table; an unknown bit that the table ignores does not matter."""
    terms, predicates = _read_operands(operands)
    words, table = [thread.bits(term) for term in terms[:3]], thread.word(terms[3])
    result = unknown = 0
    for bit in range(32):
        read = [None if word.unknown >> bit & 1 else bool(word.value >> bit & 1) for word in words]
        answer = _looked_up(table, read)
        unknown |= (answer is None) << bit
        result |= bool(answer) << bit
    if unknown == WORD:
        return _UNKNOWN
    # a source predicate takes part in the predicate that is written
    alone = not set(predicates) - {"PT", "!PT", "UPT", "!UPT"}
    some = (result != 0 if result or not unknown else None) if alone else None
    return [Partly(result, unknown) if unknown else result], (some,)


def _predicate_logic(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    values = [thread.predicate(operand) for operand in operands[:3]]
    return None, [_looked_up(thread.word(table), values) for table in operands[3:5]]


def _looked_up(table: int | None, values: Sequence[bool | None]) -> bool | None:
    """The bit of a truth table at three values; None if it depends on an unknown one."""
    if table is None:
        return None
    choices = product(*((False, True) if value is None else (value,) for value in values))
    answers = {bool(table >> (a << 2 | b << 1 | c) & 1) for a, b, c in choices}
    return answers.pop() if len(answers) == 1 else None


def _select(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    chosen = thread.predicate(operands[2])
    return ([thread.partly(operands[0 if chosen else 1])], ()) if chosen is not None else _UNKNOWN


def _extend(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
    value, bits = thread.word(operands[0]), thread.word(operands[1])
    if value is None or not bits:
        return _UNKNOWN
    value &= (1 << bits) - 1
    return [(value if ".U32" in instruction.opcode else _signed(value, bits)) & WORD], ()


_COMPARISONS: Mapping[str, Callable[[int, int], bool]] = {
    "LT": operator.lt, "LE": operator.le, "GT": operator.gt, "GE": operator.ge, "EQ": operator.eq, "NE": operator.ne,
}  # fmt: skip


def _compare(thread: Thread, instruction: Instruction, operands: list[str]) -> Outcome:
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
    return None, (combined(parts, outcome, others[0]), combined(parts, opposite, others[0]))


def _compared(how: str, one: Partly, other: Partly, signed_bits: int) -> bool | None:
    """A comparison of partly known words; None if it depends on the unknown bits."""
    unknown = one.unknown | other.unknown
    if how in ("EQ", "NE") and unknown:
        return how == "NE" if (one.value ^ other.value) & ~unknown else None
    if signed_bits and unknown >> (signed_bits - 1):
        return None
    ends = product(one.ends, other.ends)
    answers = {_COMPARISONS[how](*(_signed(end, signed_bits) if signed_bits else end for end in pair)) for pair in ends}
    return answers.pop() if len(answers) == 1 else None


def combined(parts: Sequence[str], one: bool | None, other: bool | None) -> bool | None:
    if "AND" in parts:
        return False if False in (one, other) else None if None in (one, other) else True
    if "OR" in parts:
        return True if True in (one, other) else None if None in (one, other) else False
    return None


MEANINGS: Mapping[str, Meaning] = {
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
