"""The NVIDIA architectures that this suite covers: names, families, minimum software, toolchain gaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from verify.errors import ConfigurationError

Family = Literal["Ampere", "Ada Lovelace", "Hopper", "Blackwell", "Rubin"]


@dataclass(frozen=True, slots=True)
class Minimums:
    """The oldest versions that can run the suite on an architecture; None where no minimum is known."""

    cuda: str | None = None
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    flash_attn: str | None = None
    vllm: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits per multiprocessor (CUDA programming guide, specifications per compute capability)."""

    warps: int
    blocks: int
    shared_kib: int

    @property
    def shared_bytes_per_block(self) -> int:
        """The most that one block can request: all but the 1 KiB that is reserved for each block."""
        return self.shared_kib * 1024 - 1024

    def occupancy(self, registers: int, warps: int, shared_bytes: int) -> float:
        """The theoretical occupancy, from 0 to 1, with blocks of ``warps`` warps; 0 if no block fits.

        Registers are allocated per warp in units of 256, in four partitions of 16,384; shared memory in units of 128
        bytes, with 1 KiB reserved per block.
        """
        per_warp = -(-registers * 32 // 256) * 256
        warps_by_registers = 4 * (16_384 // per_warp)
        per_block = -(-(shared_bytes + 1024) // 128) * 128
        resident = min(
            self.blocks, self.warps // warps, warps_by_registers // warps, self.shared_kib * 1024 // per_block
        )
        return resident * warps / self.warps


@dataclass(frozen=True, slots=True)
class Architecture:
    """One compute capability: its SM number, its products, its minimum software and its limits.

    ``toolchain_gap`` says why no toolchain known to the suite can build for it.
    """

    sm: int
    family: Family
    products: tuple[str, ...]
    minimums: Minimums = Minimums()
    limits: Limits | None = None
    note: str = ""
    toolchain_gap: str = ""

    @property
    def target(self) -> str:
        return f"sm{self.sm}"

    @property
    def capability(self) -> str:
        """The compute capability in CUDA's notation: ``12.0`` for SM 120."""
        return f"{self.sm // 10}.{self.sm % 10}"

    def occupancy(self, registers: int, warps: int, shared_bytes: int) -> float | None:
        """``Limits.occupancy``; None if the limits are not known."""
        return self.limits.occupancy(registers, warps, shared_bytes) if self.limits else None


@dataclass(frozen=True, slots=True)
class Emulated:
    """The target of a run without a GPU: Triton's interpreter and CPU torch."""

    target: str = "emulated"


EMULATED = Emulated()
Target = Architecture | Emulated

#: The minimum versions on any GPU, from the plan's table.
SUITE_MINIMUMS = Minimums(cuda="12.8", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

_A100, _GA10X, _ADA, _ORIN = Limits(64, 32, 164), Limits(48, 16, 100), Limits(48, 24, 100), Limits(48, 16, 164)
_HOPPER, _THOR, _RTX_50 = Limits(64, 32, 228), Limits(48, 24, 228), Limits(48, 24, 100)

_BLACKWELL_RTX = Minimums(cuda="12.8", driver="570", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

#: Every architecture that the suite covers, ascending. NVIDIA did not assign the missing numbers.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(80, "Ampere", ("A100", "A30"), Minimums(cuda="11.0"), _A100),
    Architecture(86, "Ampere", ("GeForce RTX 30 series", "RTX A6000", "A10", "A40"), Minimums(cuda="11.1"), _GA10X),
    Architecture(87, "Ampere", ("Jetson Orin",), Minimums(cuda="11.4"), _ORIN, note="unified memory"),
    Architecture(
        88,
        "Ampere",
        (),
        Minimums(cuda="13.0"),
        note="no product is known to have it",
        toolchain_gap="known to ptxas 13 only; Triton's LLVM cannot build it",
    ),
    Architecture(89, "Ada Lovelace", ("GeForce RTX 40 series", "L4", "L40", "L40S"), Minimums(cuda="11.8"), _ADA),
    Architecture(90, "Hopper", ("H100", "H200", "GH200"), Minimums(cuda="11.8"), _HOPPER),
    Architecture(100, "Blackwell", ("B200", "GB200"), Minimums(cuda="12.8", driver="570"), _HOPPER),
    Architecture(103, "Blackwell", ("B300", "GB300"), Minimums(cuda="12.9"), _HOPPER),
    Architecture(107, "Rubin", (), Minimums(triton="3.9"), note="no product is known to this suite"),
    Architecture(
        110,
        "Blackwell",
        ("Jetson Thor",),
        Minimums(cuda="13.0", driver="580", triton="3.7.1"),
        _THOR,
        note="called sm101 before CUDA 13; unified memory",
    ),
    Architecture(120, "Blackwell", ("GeForce RTX 50 series", "RTX PRO 6000 Blackwell"), _BLACKWELL_RTX, _RTX_50),
    Architecture(
        121,
        "Blackwell",
        ("GB10 (DGX Spark)",),
        _BLACKWELL_RTX,
        _RTX_50,
        note="unified memory; ptxas knows it from CUDA 12.9 on",
    ),
)

#: SM numbers that NVIDIA renamed: refused, so that no record has a name that the toolchain no longer uses.
RENAMED = {101: 110}

_BY_SM: dict[int, Architecture] = {architecture.sm: architecture for architecture in ARCHITECTURES}
_NAME = re.compile(r"(?:sm_?)?(?:(?P<sm>\d{2,3})|(?P<major>\d{1,2})\.(?P<minor>\d))", re.IGNORECASE)


def find(sm: int) -> Architecture | None:
    """The architecture with this SM number; None if the suite does not cover it."""
    return _BY_SM.get(sm)


def known_targets() -> tuple[Target, ...]:
    """Every target a report can be about: the GPUs ascending, then ``emulated``."""
    return (*ARCHITECTURES, EMULATED)


def parse_target(text: str) -> Target:
    """The target that ``text`` names: ``sm120``, ``SM_120``, ``120`` and ``12.0`` are one GPU; ``emulated`` is no GPU.

    Raises ConfigurationError, with the valid names, for anything else.
    """
    name = text.strip()
    if name.lower() == EMULATED.target:
        return EMULATED
    match = _NAME.fullmatch(name)
    if match:
        sm = int(match["sm"] or match["major"] + match["minor"])
        if sm in _BY_SM:
            return _BY_SM[sm]
        if sm in RENAMED:
            new = _BY_SM[RENAMED[sm]]
            raise ConfigurationError(
                f"sm{sm} was renamed to {new.target} in CUDA 13 ({', '.join(new.products)}); use {new.target}"
            )
    known = ", ".join(target.target for target in known_targets())
    raise ConfigurationError(f"{text!r} is not a GPU architecture that this suite covers; use one of {known}")


def parse_targets(text: str) -> tuple[Architecture, ...]:
    """The GPUs that ``all``, ``120,121``, ``sm120`` or ``80-121`` names, ascending and without repeats.

    A range includes the covered architectures from one end to the other. Raises ConfigurationError for a name that
    ``parse_target`` refuses, for ``emulated``, and for a reversed range.
    """
    if text.strip().lower() == "all":
        return ARCHITECTURES
    chosen: set[int] = set()
    for part in text.split(","):
        ends = [parse_target(end) for end in part.split("-", 1)]
        gpus = [end for end in ends if isinstance(end, Architecture)]
        if len(gpus) < len(ends):
            raise ConfigurationError(
                "nothing is built for emulated, which is not a GPU; name GPUs such as sm120 or all"
            )
        first, last = gpus[0].sm, gpus[-1].sm
        if first > last:
            raise ConfigurationError(f"the range {part.strip()!r} is reversed; write {last}-{first}")
        chosen.update(architecture.sm for architecture in ARCHITECTURES if first <= architecture.sm <= last)
    return tuple(architecture for architecture in ARCHITECTURES if architecture.sm in chosen)
