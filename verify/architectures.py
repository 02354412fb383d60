"""The NVIDIA architectures this suite speaks about: names, families, minimum software, toolchain gaps."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from verify.outcome import ConfigurationError

Family = Literal["Ampere", "Ada Lovelace", "Hopper", "Blackwell"]


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
class Architecture:
    """One compute capability: its SM number, the products that have it and what it needs."""

    sm: int
    family: Family
    products: tuple[str, ...]
    minimums: Minimums = Minimums()
    note: str = ""
    toolchain_gap: str = ""

    @property
    def target(self) -> str:
        return f"sm{self.sm}"

    @property
    def capability(self) -> str:
        """The compute capability in CUDA's notation: ``12.0`` for SM 120."""
        return f"{self.sm // 10}.{self.sm % 10}"


@dataclass(frozen=True, slots=True)
class Emulated:
    """The target of a run without a GPU: Triton's interpreter and CPU torch."""

    target: str = "emulated"


EMULATED = Emulated()
Target = Architecture | Emulated

#: What the suite needs on any GPU: the plan's table of minimum versions.
SUITE_MINIMUMS = Minimums(cuda="12.8", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

_BLACKWELL_RTX = Minimums(cuda="12.8", driver="570", torch="2.6", triton="3.2", flash_attn="2.7", vllm="0.19")

#: Every architecture the suite covers, ascending. A gap in the numbers is a number NVIDIA never gave out.
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(80, "Ampere", ("A100", "A30"), Minimums(cuda="11.0")),
    Architecture(86, "Ampere", ("GeForce RTX 30 series", "RTX A6000", "A10", "A40"), Minimums(cuda="11.1")),
    Architecture(87, "Ampere", ("Jetson Orin",), Minimums(cuda="11.4"), note="unified memory"),
    Architecture(
        88,
        "Ampere",
        (),
        Minimums(cuda="13.0"),
        note="no product is known to have it",
        toolchain_gap="known to ptxas 13 only; Triton's LLVM cannot build it",
    ),
    Architecture(89, "Ada Lovelace", ("GeForce RTX 40 series", "L4", "L40", "L40S"), Minimums(cuda="11.8")),
    Architecture(90, "Hopper", ("H100", "H200", "GH200"), Minimums(cuda="11.8")),
    Architecture(100, "Blackwell", ("B200", "GB200"), Minimums(cuda="12.8", driver="570")),
    Architecture(103, "Blackwell", ("B300", "GB300"), Minimums(cuda="12.9")),
    Architecture(
        110,
        "Blackwell",
        ("Jetson Thor",),
        Minimums(cuda="13.0", driver="580", triton="3.7.1"),
        note="called sm101 before CUDA 13; unified memory",
    ),
    Architecture(120, "Blackwell", ("GeForce RTX 50 series", "RTX PRO 6000 Blackwell"), _BLACKWELL_RTX),
    Architecture(
        121,
        "Blackwell",
        ("GB10 (DGX Spark)",),
        _BLACKWELL_RTX,
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
