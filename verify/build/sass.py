"""The machine code of a kernel (SASS), as ``cuobjdump -res-usage -sass`` prints it for a cubin."""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_FUNCTION = re.compile(r"^\s*Function : (\S+)\n((?:(?!\s*Function : ).*\n?)*)", re.MULTILINE)
_USAGE = re.compile(r"\bFunction (\S+):\s+REG:(\d+) STACK:(\d+) .*?CONSTANT\[0\]:(\d+)")
_WIDTH = re.compile(r"\.(8|16|32|64|128|256)\b|\.[US](8|16)\b")


@dataclass(frozen=True, slots=True)
class Instruction:
    """One line of machine code; ``guard`` is the predicate in front of it, such as ``!P0``, or empty."""

    address: int
    guard: str
    opcode: str
    operands: tuple[str, ...]

    @property
    def base(self) -> str:
        return self.opcode.partition(".")[0]

    @property
    def width_bits(self) -> int:
        """How many bits per thread a load or a store moves."""
        found = _WIDTH.search(self.opcode)
        return int(found[1] or found[2]) if found else 32


@dataclass(frozen=True)
class Program:
    """The machine code of one kernel; ``constant_bytes`` is the size of the bank that ends with the arguments."""

    registers: int
    stack_bytes: int
    constant_bytes: int
    instructions: tuple[Instruction, ...]

    @classmethod
    def parse(cls, text: str, kernel: str) -> Program:
        """Parse the output of ``cuobjdump`` for a cubin. Raises ValueError if it does not show ``kernel``.

        ``instructions`` is empty if the tool does not know the architecture.
        """
        usage = {found[1]: found for found in _USAGE.finditer(text)}.get(kernel)
        if usage is None:
            raise ValueError(f"cuobjdump printed no resource usage of {kernel}")
        code = dict(_FUNCTION.findall(text)).get(kernel, "")
        lines = [line for line in map(_LINE.match, code.splitlines()) if line]
        found = [Instruction(int(line[1], 16), line[2] or "", line[3], tuple(_operands(line[4]))) for line in lines]
        return cls(int(usage[2]), int(usage[3]), int(usage[4]), tuple(_without_padding(found)))

    def count(self, *opcodes: str) -> int:
        return sum(instruction.base in opcodes for instruction in self.instructions)

    @property
    def loads_by_width(self) -> dict[str, int]:
        """Global loads by their width in bits per thread, widest first."""
        widths = sorted((i.width_bits for i in self.instructions if i.base in ("LDG", "LD", "LDGSTS")), reverse=True)
        return {str(width): widths.count(width) for width in dict.fromkeys(widths)}

    def local_bytes(self, opcode: str) -> int:
        """Bytes per thread moved by local loads (LDL) or local stores (STL): the spills."""
        return sum(i.width_bits // 8 for i in self.instructions if i.base == opcode)


def _operands(text: str) -> list[str]:
    # some disassembler releases append scheduling information: &req={1} ?trans2
    text = re.sub(r"\s+[&?]\w.*", "", text)
    return [part.strip() for part in text.split(",")] if text else []


def _without_padding(found: list[Instruction]) -> list[Instruction]:
    """The code without the NOPs and the branch to itself that fill its last block."""
    end = len(found)
    while end and found[end - 1].base == "NOP":
        end -= 1
    last = found[end - 1] if end else None
    if last and last.base == "BRA" and last.operands[-1:] == (f"{last.address:#x}",):
        end -= 1
    return found[:end]
