"""What is known about a warp's registers and predicates while its control flow is followed."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

REGISTER = re.compile(r"(?P<minus>-?)(?P<not>~?)(?P<file>U?R)(?P<number>\d+|Z)(?P<suffix>(?:\.\w+)*)")
PREDICATE = re.compile(r"(?P<not>!?)(?P<name>U?P(?:\d|T))")
IMMEDIATE = re.compile(r"(-?)(0x[0-9a-f]+|\d+)")
_CONSTANT = re.compile(r"c\[0x0\]\[(0x[0-9a-f]+)\]")

#: All bits of a word.
WORD = 0xFFFFFFFF


class Partly(NamedTuple):
    """A word whose bits in ``unknown`` are not known, for example a thread's number in its warp."""

    value: int
    unknown: int

    @property
    def ends(self) -> tuple[int, int]:
        """The smallest and the largest unsigned value that the word may have."""
        return self.value & ~self.unknown, self.value | self.unknown


#: A word, a partly known word, or None for an unknown one.
Word = int | Partly | None


class Thread:
    """Registers and predicates whose values all threads of a warp share; unknown ones are None."""

    def __init__(self, constants: Mapping[int, int], warp: int) -> None:
        self._constants, self.warp = constants, warp
        # code for Jetson Orin begins with a test of UR2, which the hardware sets; 0 takes the longer path
        self.words: dict[str, Word] = {"UR2": 0}
        self.predicates: dict[str, bool | None] = {}

    def predicate(self, text: str) -> bool | None:
        found = PREDICATE.fullmatch(text)
        if found is None:
            return None
        value = True if found["name"].endswith("T") else self.predicates.get(found["name"])
        return value if value is None or not found["not"] else not value

    def word(self, text: str, part: int = 0) -> int | None:
        """The 32-bit word that an operand names, or the word ``part`` words after it; None unless it is known."""
        known = self.partly(text, part)
        return known if isinstance(known, int) else None

    def bits(self, text: str, words: int = 1) -> Partly:
        """What is known of one word, or of two consecutive ones."""
        value = unknown = 0
        for part in range(words):
            known = self.partly(text, part)
            known = Partly(0, WORD) if known is None else Partly(known, 0) if isinstance(known, int) else known
            value, unknown = value | known.value << 32 * part, unknown | known.unknown << 32 * part
        return Partly(value, unknown)

    def partly(self, text: str, part: int = 0) -> Word:
        """``word``, or what is known of it if only some bits are."""
        if found := IMMEDIATE.fullmatch(text):
            value = int(found[2], 0) * (-1 if found[1] else 1)
            return (value >> 32 * part) & WORD
        if found := _CONSTANT.fullmatch(text):
            return self._constants.get(int(found[1], 16) + 4 * part)
        found = REGISTER.fullmatch(text)
        if found is None or found["suffix"].replace(".reuse", "") not in ("", ".64"):
            return None
        value = 0 if found["number"] == "Z" else self.words.get(f"{found['file']}{int(found['number']) + part}")
        if value is None or (found["minus"] and (part or isinstance(value, Partly))):
            return None
        if isinstance(value, Partly):
            return Partly(~value.value & WORD, value.unknown) if found["not"] else value
        value = ~value if found["not"] else value
        return (-value if found["minus"] else value) & WORD

    def double(self, text: str) -> int | None:
        low, high = self.word(text), self.word(text, 1)
        return None if low is None or high is None else low | high << 32

    def write(self, place: str, words: list[Word]) -> None:
        """Write words to a register and those after it."""
        found = REGISTER.fullmatch(place)
        if found["number"] != "Z":
            for part, value in enumerate(words):
                self.words[f"{found['file']}{int(found['number']) + part}"] = value
