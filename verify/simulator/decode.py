"""Instructions of one kernel as Python functions: their operands found, their registers numbered."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from verify.simulator.block_memory import LocalMemory
from verify.simulator.errors import Unsupported
from verify.simulator.opcodes import operation
from verify.simulator.operation import dtype_of
from verify.simulator.ptx import Instruction, Kernel
from verify.simulator.state import Get, Put, Run, State

#: Makes the function of an instruction that does more than compute a value.
Effect = Callable[["Decoder", Instruction], Run]

_REGISTER = re.compile(r"[%A-Za-z_$][\w$]*$")
_SPECIAL = re.compile(r"%(?:tid|ntid|ctaid|nctaid)\.[xyz]|%laneid|%warpid")
_ADDRESS = re.compile(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+))?\s*\]")


@dataclass(slots=True)
class Step:
    """One decoded instruction: ``kind`` is run, branch, exit or barrier.

    ``guard`` is the index of its predicate, -1 without one. ``dead`` are the registers that nothing reads any more
    after it.
    """

    instruction: Instruction
    kind: str
    run: Run | None
    guard: int
    target: int
    reads: tuple[int, ...]
    writes: tuple[int, ...]
    dead: tuple[int, ...] = ()

    @property
    def meeting(self) -> bool:
        """Whether the lanes of a warp must be there together."""
        return self.kind == "barrier" or (self.kind == "run" and "sync" in self.instruction.modifiers)


class Decoder:
    """Finds the operands of instructions. ``types`` has the type of each register, ``names`` its name."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.types: list[np.dtype] = []
        self.names: list[str] = []
        #: Registers that some instruction reads; complete once every instruction is decoded.
        self.ever_read: set[int] = set()
        self._index: dict[str, int] = {}
        self._reads: list[int] = []
        self._writes: list[int] = []
        self.shared_places, self.static_shared_bytes = _placed(kernel)

    def decode(self, instruction: Instruction, effects: Mapping[str, Effect]) -> Step:
        """Raises Unsupported, with the opcode and its line, for what is not executed here."""
        self._reads, self._writes = [], []
        try:
            guard = self.register(instruction.guard) if instruction.guard else -1
            run, kind, target = None, "run", -1
            if instruction.base == "bra":
                kind, target = "branch", self.kernel.labels[instruction.operands[-1]]
            elif instruction.base in ("ret", "exit"):
                kind = "exit"
            elif instruction.base in ("bar", "barrier") and ".warp" not in instruction.opcode:
                kind = "barrier"
                self._require_whole_block(instruction)
            else:
                effect = next((effects[name] for name in _prefixes(instruction.opcode) if name in effects), compute)
                run = effect(self, instruction)
        except Unsupported as error:
            raise Unsupported(error.what, instruction.line) from error
        except (ValueError, IndexError, KeyError, TypeError) as error:  # operands of another number or form
            raise Unsupported(instruction.text, instruction.line) from error
        reads = [*self._reads, *([guard] if guard >= 0 else [])]
        self.ever_read.update(reads)
        return Step(instruction, kind, run, guard, target, tuple(reads), tuple(self._writes))

    def _require_whole_block(self, instruction: Instruction) -> None:
        words = instruction.opcode.replace("::", "__").split(".")[1:]
        if "sync" not in words or set(words) - {"sync", "cta", "aligned"} or instruction.guard:
            raise Unsupported(instruction.text)
        counts = instruction.operands[1:]
        if not instruction.operands[0].isdigit() or counts not in ((), (str(self.kernel.threads),)):
            raise Unsupported(f"{instruction.text} (a barrier of a part of the block)")

    def register(self, name: str) -> int:
        """The index of a register. Raises Unsupported if it is not declared."""
        if name not in self._index:
            kind = self.kernel.registers.get(name) or self.kernel.registers.get(re.sub(r"\d+$", "", name))
            if kind is None:
                raise Unsupported(f"the operand {name}")
            bits = kind if kind == "pred" else f"b{kind[1:]}"
            try:
                dtype = dtype_of(bits)
            except KeyError as error:
                raise Unsupported(f"registers of type {kind}") from error
            self._index[name] = len(self.types)
            self.types.append(dtype)
            self.names.append(name)
        return self._index[name]

    def read(self, text: str, dtype: np.dtype) -> Get:
        """The value of an operand as ``dtype``: the low part of a wider register, never of a narrower one."""
        if _SPECIAL.fullmatch(text):
            return lambda machine: machine.special[text].astype(dtype, copy=False)
        if text in self.shared_places:
            return _constant(self.shared_places[text], dtype)
        if text in self.kernel.local:
            return _constant(LocalMemory.BASE + _local_places(self.kernel)[text], dtype)
        if text in self.kernel.constants:
            return lambda machine: machine.constants[text].astype(dtype, copy=False)
        if not text.startswith("!") and _REGISTER.match(text):
            return self._read_register(text, dtype)
        if text.startswith("!"):
            inner = self._read_register(text[1:], dtype)
            return lambda machine: ~inner(machine)
        return _literal(text, dtype)

    def _read_register(self, name: str, dtype: np.dtype) -> Get:
        index = self.register(name)
        self._reads.append(index)
        have = self.types[index]
        if have == dtype:
            return lambda machine: machine.value(index)
        if have.itemsize == dtype.itemsize and bool not in (have, dtype):
            return lambda machine: machine.value(index).view(dtype)
        if have.itemsize > dtype.itemsize and bool not in (have, dtype):
            low = np.dtype(f"u{dtype.itemsize}")
            return lambda machine: machine.value(index).astype(low).view(dtype)
        raise Unsupported(f"the operand {name} as {dtype}")

    def write(self, name: str, dtype: np.dtype) -> Put:
        """Stores values of ``dtype`` into a register; signed ones are extended by their sign. ``_`` drops them."""
        if name == "_":
            return lambda machine, value, mask: None
        index = self.register(name)
        self._writes.append(index)
        have = self.types[index]
        if have == dtype:
            return lambda machine, value, mask: machine.set(index, value, mask)
        if have.itemsize == dtype.itemsize and bool not in (have, dtype):
            return lambda machine, value, mask: machine.set(index, value.view(have), mask)
        if have.itemsize > dtype.itemsize and dtype.kind in "iu":
            wide = np.dtype(f"{dtype.kind}{have.itemsize}")
            return lambda machine, value, mask: machine.set(index, value.astype(wide).view(have), mask)
        raise Unsupported(f"a result of type {dtype} in {name}")

    def address(self, text: str) -> Get:
        """The address ``[register + offset]`` or ``[name + offset]``."""
        found = _ADDRESS.fullmatch(text)
        if found is None:
            raise Unsupported(f"the address {text}")
        base, offset = found[1], int(found[2] or "0", 0)
        wide = base.startswith("%") and self.types[self.register(base)].itemsize == 8
        dtype = np.dtype(np.uint64 if wide or base in self.kernel.constants else np.uint32)
        get = self.read(base, dtype)
        if not offset:
            return get
        step = np.array([[offset & ((1 << 8 * dtype.itemsize) - 1)]], dtype)
        return lambda machine: get(machine) + step


def _prefixes(opcode: str) -> list[str]:
    """The names under which an opcode may be known, the longest first: ``ld.global.b32``, ``ld.global``, ``ld``."""
    words = opcode.split(".")
    return [".".join(words[:count]) for count in range(len(words), 0, -1)]


def compute(decoder: Decoder, instruction: Instruction) -> Run:
    """An instruction that computes a value from values."""
    target, *sources = instruction.operands
    if "{" in target or any("{" in one for one in sources):
        return _packed(decoder, instruction)
    if "|" in target:
        return _with_opposite(decoder, instruction)
    found = operation(instruction.opcode, len(sources))
    gets = [decoder.read(text, dtype) for text, dtype in zip(sources, found.inputs, strict=True)]
    put, evaluate = decoder.write(target, found.result), found.compute
    if found.approximate:
        one = found.inputs[0].type(1)

        def approximate(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
            values = [get(machine) for get in gets]
            if active is not None:  # the others may hold values for which no error is documented
                values = [np.where(active, value, one) for value in values]
            put(machine, evaluate(machine.approximated(), *values), mask)

        return approximate
    if len(gets) == 2:
        first, second = gets
        return lambda machine, active, mask: put(machine, evaluate(first(machine), second(machine)), mask)
    return lambda machine, active, mask: put(machine, evaluate(*[get(machine) for get in gets]), mask)


def _with_opposite(decoder: Decoder, instruction: Instruction) -> Run:
    """setp with a second result, the opposite of the first."""
    (target, *sources), found = instruction.operands, operation(instruction.opcode, len(instruction.operands) - 1)
    if instruction.base != "setp" or len(sources) != 2:
        raise Unsupported(instruction.text)
    gets = [decoder.read(text, dtype) for text, dtype in zip(sources, found.inputs, strict=True)]
    first, second = (decoder.write(name, found.result) for name in target.split("|"))

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        holds = found.compute(*[get(machine) for get in gets])
        first(machine, holds, mask)
        second(machine, ~holds, mask)

    return run


def parts_of(text: str) -> list[str]:
    """The names in ``{a, b}``, or the only one."""
    return [one.strip() for one in text.strip("{} ").split(",")]


def _packed(decoder: Decoder, instruction: Instruction) -> Run:
    """mov between one register and the parts of it, the lowest first."""
    if instruction.base != "mov":
        raise Unsupported(instruction.opcode)
    if len(instruction.modifiers) != 1 or len(instruction.operands) != 2:
        raise Unsupported(instruction.text)
    whole = dtype_of(instruction.modifiers[0])
    target, source = instruction.operands
    parts = parts_of(target if "{" in target else source)
    part = np.dtype(f"u{whole.itemsize // len(parts)}")
    if len(parts) * part.itemsize != whole.itemsize or ("{" in target and "{" in source):
        raise Unsupported(instruction.text)
    shifts = [whole.type(8 * part.itemsize * place) for place in range(len(parts))]
    if "{" in target:
        get = decoder.read(source, whole)
        puts = [decoder.write(name, part) for name in parts]

        def unpack(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
            value = get(machine)
            for put, shift in zip(puts, shifts, strict=True):
                put(machine, (value >> shift).astype(part), mask)

        return unpack
    gets, put_whole = [decoder.read(name, part) for name in parts], decoder.write(target, whole)

    def pack(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        value = gets[0](machine).astype(whole)
        for get, shift in zip(gets[1:], shifts[1:], strict=True):
            value = value | (get(machine).astype(whole) << shift)
        put_whole(machine, value, mask)

    return pack


def _constant(value: int, dtype: np.dtype) -> Get:
    found = np.array([[value]], dtype)
    return lambda machine: found


def _literal(text: str, dtype: np.dtype) -> Get:
    """A number: ``0f3F800000``, ``0d...``, ``-5``, ``0x3C00U``; integers are the bits of floats."""
    bits: Any
    if found := re.fullmatch(r"0([fF])([0-9a-fA-F]{8})|0([dD])([0-9a-fA-F]{16})", text):
        bits = np.array([[int(found[2] or found[4], 16)]], np.uint32 if found[2] else np.uint64)
        if bits.dtype.itemsize != dtype.itemsize:
            raise Unsupported(f"the operand {text} as {dtype}")
        return lambda machine: bits.view(dtype)
    if not re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        raise Unsupported(f"the operand {text}")
    number = int(text.rstrip("U"), 0)
    if dtype.kind == "b":
        return _constant(number != 0, dtype)
    word = np.dtype(f"u{dtype.itemsize}")
    bits = np.array([[number & ((1 << 8 * dtype.itemsize) - 1)]], object).astype(word)
    return lambda machine: bits.view(dtype)


def _placed(kernel: Kernel) -> tuple[dict[str, int], int]:
    """Where each shared variable begins, and the bytes of those with a fixed size; the launch's own come last."""
    places: dict[str, int] = {}
    end = 0
    for name, one in sorted(kernel.shared.items(), key=lambda item: item[1].size == 0):
        end = -(-end // one.alignment) * one.alignment
        places[name] = end
        end += one.size
    return places, end


def _local_places(kernel: Kernel) -> dict[str, int]:
    places: dict[str, int] = {}
    end = 0
    for name, one in kernel.local.items():
        end = -(-end // one.alignment) * one.alignment
        places[name] = end
        end += one.size
    return places


def local_bytes(kernel: Kernel) -> int:
    """The local memory of one thread, in bytes."""
    return sum(-(-one.size // 16) * 16 for one in kernel.local.values())


def free_dead(steps: Sequence[Step]) -> None:
    """Set ``dead`` of each step: registers whose value nothing can read after it (a backward data-flow analysis)."""
    live = [0] * (len(steps) + 1)
    uses = [sum(1 << index for index in {*step.reads}) for step in steps]
    kills = [0 if step.guard >= 0 else sum(1 << index for index in {*step.writes}) for step in steps]
    guarded = [sum(1 << index for index in {*step.writes}) if step.guard >= 0 else 0 for step in steps]
    changed = True
    while changed:
        changed = False
        for place in range(len(steps) - 1, -1, -1):
            step = steps[place]
            after = live[place + 1] if step.kind not in ("branch", "exit") or step.guard >= 0 else 0
            after |= live[step.target] if step.kind == "branch" else 0
            before = uses[place] | guarded[place] | (after & ~kills[place])
            if before != live[place]:
                live[place] = before
                changed = True
    for place, step in enumerate(steps):
        if step.kind == "run":
            gone = {*step.reads, *step.writes}
            step.dead = tuple(index for index in gone if not live[place + 1] >> index & 1)
