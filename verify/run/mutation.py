"""Mutations of compiled code: edits of the PTX of each launch, made after Triton compiled it and before it is executed.

``verify selftest`` plants them. A run whose manifest has a mutation never makes a record.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field, model_validator

from verify.record.strict import Strict

#: Between two instructions, in ``find`` and in ``to``.
_NEXT = "; "
_INSTRUCTION = re.compile(r"\s*((?:@!?%\w+\s+)?[a-z][^;]*?)\s*;\s*(?://.*)?")
#: A place that a branch may go to. The labels named ``$L__tmp`` are only for debuggers.
_LABEL = re.compile(r"(?!\$L__tmp)[\w$]+:(?!:)")


class PtxEdit(Strict):
    """One change of PTX: what the regular expression ``find`` matches becomes ``to``, with its groups as ``\\1``.

    ``find`` matches one whole instruction, or several that follow each other, with ``; `` between them. An instruction
    has single spaces and no semicolon. ``to`` is any number of instructions, none if empty; one in braces may declare
    registers. ``nth`` is which match: 1 is the first one, -1 the last, None all of them.
    """

    find: str = Field(min_length=1)
    to: str
    nth: int | None = None

    @model_validator(mode="after")
    def _is_an_expression(self) -> PtxEdit:
        if self.nth == 0:
            raise ValueError("nth counts from 1, or from -1 at the end")
        try:
            re.compile(self.find).sub(self.to, "")
        except re.error as error:
            raise ValueError(f"find and to are not a regular expression and its replacement ({error})") from error
        return self


class Mutation(Strict):
    """The edits of one fault, by its id. They are made together or, where one of them does not apply, not at all."""

    fault: str
    edits: tuple[PtxEdit, ...] = Field(min_length=1)

    def alteration(self, note: Callable[[str], Any]) -> Callable[[str, str], str]:
        """A function of a kernel's name and PTX that returns the PTX to execute; ``note`` is given each kernel once
        that is changed.
        """
        known: dict[str, str] = {}

        def altered(kernel: str, ptx: str) -> str:
            if ptx not in known:
                found = mutated(ptx, self.edits)
                if found is not None:
                    note(kernel)
                known[ptx] = ptx if found is None else found
            return known[ptx]

        return altered


def mutated(ptx: str, edits: Sequence[PtxEdit]) -> str | None:
    """The PTX with every edit, one after the other; None if one of them does not apply, or nothing changes."""
    found = ptx
    for edit in edits:
        after = _edited(found, edit)
        if after is None:
            return None
        found = after
    return None if found == ptx else found


def _edited(ptx: str, edit: PtxEdit) -> str | None:
    """The PTX with one edit; None if it does not apply."""
    lines = ptx.split("\n")
    places: list[tuple[int, str, int]] = []  # line, instruction, number of its basic block
    block = 0
    for number, line in enumerate(lines):
        if found := _INSTRUCTION.fullmatch(line):
            places.append((number, re.sub(r"\s+", " ", found[1]), block))
        elif _LABEL.match(line.strip()):
            block += 1
    pattern, count = re.compile(edit.find), edit.find.count(_NEXT) + 1
    matches: list[tuple[int, re.Match[str]]] = []
    place = 0
    while place + count <= len(places):
        window = places[place : place + count]
        match = pattern.fullmatch(_NEXT.join(text for _, text, _ in window))
        if match is not None and window[0][2] == window[-1][2]:
            matches.append((place, match))
            place += count
        else:
            place += 1
    if edit.nth is not None:
        index = edit.nth - 1 if edit.nth > 0 else len(matches) + edit.nth
        matches = matches[index : index + 1] if 0 <= index < len(matches) else []
    for place, match in matches:
        first, *others = (number for number, _, _ in places[place : place + count])
        lines[first] = _as_lines(match.expand(edit.to))
        for number in others:
            lines[number] = ""
    return "\n".join(lines) if matches else None


def _as_lines(text: str) -> str:
    end = "" if not text or text.endswith(f"{_NEXT}}}") else ";"
    return f"\t{text.replace(_NEXT, ';' + chr(10) + chr(9))}{end}"
