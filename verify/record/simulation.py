"""The part of a record about a simulation: kernels compiled for an architecture and executed without its GPU."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final

from pydantic import Field, model_validator

from verify.checks import SKIP_CODES
from verify.record.strict import Sha256, Strict

#: The code of a skip where the simulator does not execute an instruction of the kernel.
UNSUPPORTED: Final = "SIM_UNSUPPORTED"
#: Every code that a skip may have. A check skips with one of ``verify.checks.SKIP_CODES``; the simulator adds its own.
EVERY_SKIP_CODE: Final = MappingProxyType(
    {**SKIP_CODES, UNSUPPORTED: "the simulator does not execute an instruction of this kernel"}
)

#: How approximate instructions, such as ``ex2.approx``, may be rounded: to the nearest value, or to either end of the
#: interval in which a GPU's result may be.
MODES: Final = ("nearest", "lowest", "highest")


class Census(Strict):
    """Static counts of the floating-point instructions of one kernel, by family, in its PTX and in its machine code.

    If they differ, the assembler fused or split operations, and the GPU may round differently from the simulation.
    """

    ptx: dict[str, int]
    sass: dict[str, int]

    @property
    def equal(self) -> bool:
        return self.ptx == self.sass


class SimulatedKernel(Strict):
    """One kernel whose PTX was executed: its launches, and the instructions executed, summed over all threads.

    ``uncounted`` says why there is no ``census``.
    """

    kernel: str = Field(min_length=1)
    ptx_sha256: Sha256
    launches: int = Field(ge=1)
    thread_instructions: int = Field(ge=0)
    census: Census | None = None
    uncounted: str = ""

    @model_validator(mode="after")
    def _counted_or_not(self) -> SimulatedKernel:
        if (self.census is None) != bool(self.uncounted):
            raise ValueError(f"{self.kernel}: a kernel says why it is uncounted if it has no census, and only then")
        return self

    @property
    def rounds_alike(self) -> bool:
        """Whether the machine code has the floating-point instructions that were executed."""
        return self.census is not None and self.census.equal


class Simulation(Strict):
    """A run of kernels that Triton compiled for one architecture, executed from their PTX by the suite's simulator.

    ``modes`` are those of ``MODES`` that were tried, ``poisons`` the words, in hexadecimal, that undefined registers
    were filled with, ``warp_orders`` the seeds of the orders in which warps ran. ``not_executed`` says in words what
    was left out, such as ptxas and the card.
    """

    sm: int = Field(ge=10, le=999)
    triton: str = Field(min_length=1)
    simulator_sha256: Sha256
    modes: list[str]
    poisons: list[str]
    warp_orders: list[int]
    not_executed: list[str]
    kernels: list[SimulatedKernel]
