"""Floating-point instructions that round, in the PTX of a kernel and in the machine code that ptxas made of it.

If the counts differ, ptxas has fused, split or removed some of them, and the GPU may round elsewhere than the
simulation did.
"""

from __future__ import annotations

import hashlib
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from verify.files import cache_folder, keep, kept_place
from verify.record.simulation import Census
from verify.simulator.ptx import Instruction, parse

_TOOL_LIMIT_S = 60
#: Part of the name of a kept census: another number when the counting changes.
_FORM = 1
#: One line of ``cuobjdump -sass``: an address, perhaps a guard, the opcode and its operands.
_LINE = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?)\s*;", re.M)
#: The family of an opcode, and how many operations one instruction is.
_PTX = {"fma": "fma", "mul": "mul", "add": "add", "sub": "add"}
_SASS: Mapping[str, tuple[str, int]] = {
    "FFMA": ("fma", 1), "FFMA2": ("fma", 2), "FHFMA": ("fma", 1), "FMUL": ("mul", 1), "FMUL2": ("mul", 2),
    "FADD": ("add", 1), "FADD2": ("add", 2), "FHADD": ("add", 1), "DFMA": ("fma", 1), "DMUL": ("mul", 1),
    "DADD": ("add", 1), "HMUL2": ("mul", 2), "HADD2": ("add", 2), "HFMA2": ("fma", 2),
}  # fmt: skip


def of_ptx(instructions: Iterable[Instruction]) -> dict[str, int]:
    """The operations that round in a kernel's PTX, by family."""
    counts: Counter[str] = Counter()
    for one in instructions:
        kind = one.modifiers[-1] if one.modifiers else ""
        if one.base in _PTX and kind.startswith(("f", "bf")):
            counts[_PTX[one.base]] += 2 if kind.endswith("x2") else 1
    return dict(sorted(counts.items()))


def of_sass(text: str) -> dict[str, int]:
    """The operations that round in a kernel's machine code, as cuobjdump prints it, by family."""
    counts: Counter[str] = Counter()
    for opcode, operands in _LINE.findall(text):
        base = opcode.partition(".")[0]
        family, operations = _SASS.get(base, ("", 0))
        loads_a_constant = base == "HFMA2" and operands.split(",")[1:2] == [" -RZ"]
        converts_a_half = base == "HADD2" and ".F32" in opcode
        if family and not loads_a_constant and not converts_a_half:
            counts[family] += operations
    return dict(sorted(counts.items()))


def census(ptx: str, cubin: bytes) -> tuple[Census | None, str]:
    """The counts of one kernel, or None and the reason why its machine code cannot be counted."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        try:
            done = subprocess.run(
                [knobs.nvidia.cuobjdump.path, "-sass", str(file)], capture_output=True, text=True, timeout=_TOOL_LIMIT_S
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            return None, f"cuobjdump does not run ({type(error).__name__})"
    if not _LINE.search(done.stdout):
        return None, "cuobjdump does not know this architecture"
    return Census(ptx=of_ptx(parse(ptx).instructions), sass=of_sass(done.stdout)), ""


def kept_census(ptx: str, cubin: bytes) -> tuple[Census | None, str]:
    """``census``, kept in the cache of the machine: the disassembler takes longer than most simulations."""
    place = kept_place(cache_folder() / "census", _FORM, hashlib.sha256(ptx.encode() + cubin).hexdigest())
    with suppress(OSError, ValueError):  # missing or incomplete: count again
        return Census.model_validate_json(place.read_bytes()), ""
    found, why_not = census(ptx, cubin)
    if found is not None:
        keep(place, found.model_dump_json() + "\n")
    return found, why_not
