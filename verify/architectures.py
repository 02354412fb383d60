"""The NVIDIA architectures this suite speaks about: names, families, minimum software, toolchain gaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from verify.errors import ConfigurationError

Family = Literal["Ampere", "Ada Lovelace", "Hopper", "Blackwell", "Rubin"]


@dataclass(frozen=True, slots=True)
class Minimums:
    """The oldest versions that can run the suite on an architecture; None where no floor is known."""

    cuda: str | None = None
    driver: str | None = None
    torch: str | None = None
    triton: str | None = None
    flash_attn: str | None = None
    vllm: str | None = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What one multiprocessor holds at a time (CUDA programming guide, specifications per compute capability)."""

    warps: int
    blocks: int
    shared_kib: int

    @property
    def shared_bytes_per_block(self) -> int:
        """What one block may ask for: all but the 1 KiB that every block takes besides."""
        return self.shared_kib * 1024 - 1024

    def occupancy(self, registers: int, warps: int, shared_bytes: int) -> float:
        """The theoretical occupancy, of 1, of blocks of ``warps`` warps; 0 where not one fits.

        Registers are given out per warp in units of 256 to four partitions of 16,384; shared memory in units of 128
        bytes, 1 KiB more per block than it asks for.
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
    """One compute capability: its SM number, the products that have it, what it needs and what it holds.

    ``toolchain_gap`` says why no toolchain that the suite knows can build for it.
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
        """``Limits.occupancy``, None where the limits are not known."""
        return self.limits.occupancy(registers, warps, shared_bytes) if self.limits else None


@dataclass(frozen=True, slots=True)
class Emulated:
    """The target of a run without a GPU: Triton's interpreter and CPU torch."""

    target: str = "emulated"


EMULATED = Emulated()
Target = Architecture | Emulated

#: What the suite needs on any GPU: the plan's table of minimum versions.
SUITE_MINIMUMS = Minimums(cuda="12.8", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

_A100, _GA10X, _ADA, _ORIN = Limits(64, 32, 164), Limits(48, 16, 100), Limits(48, 24, 100), Limits(48, 16, 164)
_HOPPER, _THOR, _RTX_50 = Limits(64, 32, 228), Limits(48, 24, 228), Limits(48, 24, 100)

_BLACKWELL_RTX = Minimums(cuda="12.8", driver="570", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

#: Every architecture the suite covers, ascending. A gap in the numbers is a number NVIDIA never gave out.
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

#: Names that NVIDIA changed: refused, so that no record is filed under a name the toolchain no longer uses.
RENAMED = {101: 110}

_BY_SM: dict[int, Architecture] = {architecture.sm: architecture for architecture in ARCHITECTURES}
_NAME = re.compile(r"(?:sm_?)?(?:(?P<sm>\d{2,3})|(?P<major>\d{1,2})\.(?P<minor>\d))", re.IGNORECASE)


def find(sm: int) -> Architecture | None:
    """The architecture with this SM number, None where the suite does not cover it."""
    return _BY_SM.get(sm)


def known_targets() -> tuple[Target, ...]:
    """Every target a report can be about: the GPUs ascending, then ``emulated``."""
    return (*ARCHITECTURES, EMULATED)


def parse_target(text: str) -> Target:
    """The target that ``text`` names: ``sm120``, ``SM_120``, ``120`` and ``12.0`` are one GPU; ``emulated`` is none.

    Raises ConfigurationError, with the names that would work, for anything else.
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
                f"sm{sm} was renamed {new.target} in CUDA 13 ({', '.join(new.products)}); ask for {new.target}"
            )
    known = ", ".join(target.target for target in known_targets())
    raise ConfigurationError(f"{text!r} is no GPU architecture that this suite covers; known are {known}")


def parse_targets(text: str) -> tuple[Architecture, ...]:
    """The GPUs that ``all``, ``120,121``, ``sm120`` or ``80-121`` names, ascending and without repeats.

    A range names the architectures that there are between its ends. Raises ConfigurationError for a name that
    ``parse_target`` refuses, ``emulated``, and a range that runs backwards.
    """
    if text.strip().lower() == "all":
        return ARCHITECTURES
    chosen: set[int] = set()
    for part in text.split(","):
        ends = [parse_target(end) for end in part.split("-", 1)]
        if EMULATED in ends:
            raise ConfigurationError("emulated is no GPU, and nothing is built for it; name GPUs such as sm120 or all")
        first, last = ends[0].sm, ends[-1].sm
        if first > last:
            raise ConfigurationError(f"the range {part.strip()!r} runs backwards; write {last}-{first}")
        chosen.update(architecture.sm for architecture in ARCHITECTURES if first <= architecture.sm <= last)
    return tuple(architecture for architecture in ARCHITECTURES if architecture.sm in chosen)
