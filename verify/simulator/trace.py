"""The values that pass from one line of a kernel's source to another, and the first line at which two runs differ.

Threads hold other elements on another architecture, and may hold one several times, so the values of a line are a set.
A compiler may also move work from one line to another, so a value counts as different only if the other run never
holds it, on any line. Values that pass within one line, such as the partial sums of a reduction, are not compared.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from verify.errors import ConfigurationError
from verify.files import write_atomic
from verify.simulator.decode import Step
from verify.simulator.program import Program
from verify.simulator.state import Run, State

#: The unsigned type of the bits of a value, by its type in an opcode.
_BITS = {"f16": "u2", "bf16": "u2", "f32": "u4", "f64": "u8"}
#: Opcodes that move a value and do not compute with it.
_MOVES = {"mov", "selp", "ld", "st", "shfl", "prmt"}
#: The kind of a stored value, which an opcode gives only by its width.
_STORED = {2: "b16", 4: "b32", 8: "b64"}
_SEPARATOR = "|"

#: What passed out of one line: the line, as ``kernels.py:81``, and the type of the values.
Place = tuple[str, str]


@dataclass(slots=True)
class Trace:
    """The bits of the values that passed out of each line, ascending and without repeats, in the order of the lines'
    first values.
    """

    values: dict[Place, np.ndarray] = field(default_factory=dict)

    def note(self, place: Place, bits: np.ndarray) -> None:
        before = self.values.get(place)
        self.values[place] = np.unique(bits if before is None else np.append(before, bits))

    def watch(self, program: Program) -> None:
        """Note the values in every later run of the program."""
        origins = _Origins(program)
        for step in program.steps:
            if step.run is None:
                continue
            passing = [*_passing(program, step, origins)]
            if passing:
                step.run = _noting(self, step.run, passing)

    def write(self, path: Path, about: str) -> None:
        """Write it with ``about``, which names the run in words."""
        parts = {_SEPARATOR.join(place): bits for place, bits in self.values.items()}
        stream = io.BytesIO()
        np.savez_compressed(stream, about=np.array(about), **parts)  # type: ignore[arg-type]  # as in kept.py
        write_atomic(path, stream.getvalue())


def read_trace(path: Path) -> tuple[str, Trace]:
    """What ``Trace.write`` wrote. Raises ConfigurationError for another file."""
    try:
        found = np.load(path, allow_pickle=False)
        if not isinstance(found, np.lib.npyio.NpzFile):
            raise ValueError("it has one array")
        with found:
            parts = {name: found[name] for name in found.files}
        about = str(parts.pop("about"))
        return about, Trace({_place(name, bits): bits for name, bits in parts.items()})
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise ConfigurationError(f"{path} is not a trace that this suite wrote ({error}); make it again") from error


def _place(name: str, bits: np.ndarray) -> Place:
    line, _, kind = name.rpartition(_SEPARATOR)
    if not line or bits.ndim != 1 or bits.dtype.kind != "u":
        raise ValueError(f"{name} is no line with its values")
    return line, kind


class _Origins:
    """Finds the instruction that a value comes from: the last that writes its register, behind moves, which may pack
    two values into one register or unpack them. In a loop the last is the one that hands a value to the next turn.
    """

    def __init__(self, program: Program) -> None:
        self._writer = {index: step for step in program.steps for index in step.writes}

    def line(self, index: int, part: int | None) -> str:
        """The line that made the value of a register, or of one half of it; empty if that is not known."""
        seen = set()
        while (index, part) not in seen and index in self._writer:
            seen.add((index, part))
            step = self._writer[index]
            halves = len(step.reads), len(step.writes)
            if step.instruction.base != "mov" or step.guard >= 0 or halves not in ((1, 1), (1, 2), (2, 1)):
                line = step.instruction.source
                return "" if line.endswith(":0") else line  # 0 is where the compiler knows no line
            if halves == (1, 2):
                part = step.writes.index(index)
            index = step.reads[part or 0 if halves == (2, 1) else 0]
            part = None if halves == (2, 1) else part
        return ""


def _passing(program: Program, step: Step, origins: _Origins) -> Iterator[tuple[int, int | None, Place]]:
    """The registers, or halves of them, whose values an instruction uses and another line of the source has made."""
    one = step.instruction
    stores = one.base == "st" and "global" in one.modifiers
    kind = one.modifiers[-1] if one.modifiers else ""
    plain = kind.removesuffix("x2")
    if not stores and (plain not in _BITS or one.base in _MOVES):
        return
    stored = {name.strip("{} ") for text in one.operands[1:] for name in text.split(",")}
    for index in dict.fromkeys(step.reads):
        dtype = program.types[index]
        if dtype.kind == "b" or (stores and program.names[index] not in stored):
            continue
        for part in (None,) if stores or plain == kind else (0, 1):
            line = origins.line(index, part)
            if line and line != one.source:
                yield index, part, (line, _STORED[dtype.itemsize] if stores else plain)


def _noting(trace: Trace, run: Run, passing: list[tuple[int, int | None, Place]]) -> Run:
    def noting(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        for index, part, place in passing:
            values = np.ascontiguousarray(machine.flat(machine.value(index), active))
            bits = values.view(_BITS.get(place[1], f"u{values.dtype.itemsize}"))
            trace.note(place, bits if part is None else bits[part::2])
        run(machine, active, mask)

    return noting


@dataclass(frozen=True, slots=True)
class Difference:
    """How the values that pass out of one line differ: how many each run has there, and the bits of those that the
    other run holds nowhere.
    """

    place: Place
    counts: tuple[int, int]
    only: tuple[np.ndarray, np.ndarray]

    @property
    def pair(self) -> tuple[str, str]:
        """A value that only one run has, and the nearest that the other has instead, in words."""
        first, second = self.only
        if not len(first) or not len(second):
            shown = [_told(bits[0], self.place[1]) if len(bits) else "none" for bits in self.only]
            return shown[0], shown[1]
        one, other = (_numbers(bits, self.place[1]) for bits in self.only)
        with np.errstate(invalid="ignore", over="ignore"):
            distance = np.abs(one[0] - other)
        nearest = int(np.nan_to_num(distance, nan=np.inf).argmin())
        return _told(first[0], self.place[1]), _told(second[nearest], self.place[1])


def differences(one: Trace, other: Trace) -> Iterator[Difference]:
    """Where two traces differ, in the order of the lines' first values in ``one``. A line of which only one run has
    values of a type is not compared: the compiler did its work elsewhere, or in integers.
    """
    held = [_by_width(trace) for trace in (one, other)]
    for place in (place for place in one.values if place in other.values):
        bits = [trace.values[place] for trace in (one, other)]
        only = [np.setdiff1d(own, there[own.dtype]) for own, there in zip(bits, held[::-1], strict=True)]
        if len(only[0]) or len(only[1]):
            yield Difference(place, (len(bits[0]), len(bits[1])), (only[0], only[1]))


def _by_width(trace: Trace) -> dict[np.dtype, np.ndarray]:
    """Every value of a trace, by the type of its bits."""
    found: dict[np.dtype, list[np.ndarray]] = {}
    for bits in trace.values.values():
        found.setdefault(bits.dtype, []).append(bits)
    return {dtype: np.unique(np.concatenate(several)) for dtype, several in found.items()}


def _numbers(bits: np.ndarray, kind: str) -> np.ndarray:
    """The values of bits, in float64; four bytes of an unknown kind are taken for float32."""
    if kind.startswith("bf16"):
        return (bits.astype("u4") << np.uint32(16)).view("f4").astype("f8")
    if kind.startswith("f16"):
        return bits.view("f2").astype("f8")
    if bits.dtype.itemsize == 4:
        return bits.view("f4").astype("f8")
    return bits.view("f8") if kind == "f64" else bits.astype("f8")


def _told(bits: np.unsignedinteger, kind: str) -> str:
    return f"{_numbers(np.array([bits]), kind)[0]:.9g} (0x{int(bits):0{2 * bits.dtype.itemsize}x})"
