"""The part of a record about kernels built ahead of time for one architecture."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from verify.record.strict import Sha256, Strict

#: The value of a launch option or a kernel constant.
Plain = bool | int | float | str | None


class BuildVerdict(StrEnum):
    """How one build ended.

    OUT_OF_RESOURCES: it was built, but one program needs more than a multiprocessor has. NOT_FOUND: the kernel cannot
    be found without launching it, so only a launch can show whether it works. TOOLCHAIN_TOO_OLD: the assembler does not
    know the architecture, or an instruction that the kernel needs. Neither NOT_FOUND nor TOOLCHAIN_TOO_OLD is a fault
    of the kernel. CRASH: the process that built it died, or its machine failed.
    """

    OK = "OK"
    COMPILE_ERROR = "COMPILE_ERROR"
    OUT_OF_RESOURCES = "OUT_OF_RESOURCES"
    NOT_FOUND = "NOT_FOUND"
    TOOLCHAIN_TOO_OLD = "TOOLCHAIN_TOO_OLD"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"


#: The kernel, launched with these options, cannot run on the architecture.
REFUSED = frozenset({BuildVerdict.COMPILE_ERROR, BuildVerdict.OUT_OF_RESOURCES})

#: Something is wrong with the kernel or with the machine that built it.
WRONG = REFUSED | {BuildVerdict.CRASH, BuildVerdict.TIMEOUT}


class Code(Strict):
    """The machine code of one kernel.

    ``loads`` counts global loads by their bits per thread, ``spill_*`` are bytes per thread, ``special_functions``
    counts MUFU instructions. These are static counts. ``warp_instructions_per_key`` is dynamic, loops included: the
    warp-level instructions that a program executes, divided by the keys it scores; None, with the reason in
    ``uncounted``, where the code does not show it.
    """

    instructions: int = Field(ge=1)
    spill_store_bytes: int = Field(ge=0)
    spill_load_bytes: int = Field(ge=0)
    loads: dict[str, int]
    special_functions: int = Field(ge=0)
    warp_instructions_per_key: float | None
    uncounted: str = ""


class Resources(Strict):
    """The resources of one kernel on one architecture, read from its cubin.

    ``registers`` and ``stack_bytes`` are per thread, ``shared_bytes`` per program. ``occupancy`` is theoretical, from 0
    to 1; None where the limits of the architecture are not known. ``code`` is None where the toolchain's disassembler
    does not know the architecture.
    """

    registers: int = Field(ge=1)
    stack_bytes: int = Field(ge=0)
    shared_bytes: int = Field(ge=0)
    warps: int = Field(ge=1)
    occupancy: float | None = Field(ge=0, le=1)
    code: Code | None


class Build(Strict):
    """One kernel, built for one architecture as one or more variants launch it.

    ``options`` are those that the launch sets, such as num_warps; ``constants`` are its constexpr arguments.
    ``alternative`` says whether it is one of several autotuner configurations: the autotuner drops one that does not
    build.
    """

    kernel: str = Field(min_length=1)
    variants: list[str] = Field(min_length=1)
    options: dict[str, Plain] = Field(default_factory=dict)
    constants: dict[str, Plain] = Field(default_factory=dict)
    alternative: bool = False
    verdict: BuildVerdict
    message: str = ""
    duration_s: float = Field(ge=0)
    ptx_sha256: Sha256 | None = None
    cubin_sha256: Sha256 | None = None
    resources: Resources | None = None

    @property
    def configuration(self) -> str:
        """The settings that distinguish it from its alternatives, to append to its variant; empty without any."""
        settings = {**self.constants, **self.options}
        return f" ({', '.join(f'{name}={value}' for name, value in settings.items())})" if self.alternative else ""

    @model_validator(mode="after")
    def _consistent(self) -> Build:
        built = self.verdict is BuildVerdict.OK
        if built != (self.resources is not None and self.ptx_sha256 is not None and self.cubin_sha256 is not None):
            raise ValueError(f"{self.kernel}: a build has resources and digests if it is OK, and only then")
        if built == bool(self.message):
            raise ValueError(f"{self.kernel}: a build has a message if it is not OK, and only then")
        return self


#: How the reason begins why a variant that the subject does not offer launches nothing.
NOT_OFFERED = "not offered: "


class Compilation(Strict):
    """Everything built for one architecture.

    ``toolchain`` is the verdict of the suite's control kernel, which any toolchain that knows the architecture can
    build. Where it is not OK, ``gap`` says why and nothing else is built. ``unlaunched`` maps a variant to the reason
    why the subject's call launched no kernel.
    """

    sm: int = Field(ge=10, le=999)
    triton: str = Field(min_length=1)
    ptxas: str = Field(min_length=1)
    toolchain: BuildVerdict = BuildVerdict.OK
    gap: str = ""
    builds: list[Build] = Field(default_factory=list)
    unlaunched: dict[str, str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _nothing_in_a_gap(self) -> Compilation:
        if (self.toolchain is BuildVerdict.OK) == bool(self.gap):
            raise ValueError(f"sm{self.sm}: gap is set if the toolchain is not OK, and only then")
        if self.gap and self.builds:
            raise ValueError(f"sm{self.sm}: the toolchain cannot build for it, but {self.builds[0].kernel} was built")
        return self

    def of(self, variant: str) -> list[Build]:
        """The builds that ``variant`` needs: those it launches, except configurations that did not build where another
        configuration of the same kernel did.
        """
        launched = [build for build in self.builds if variant in build.variants]
        tuned = {build.kernel for build in launched if build.alternative and build.verdict is BuildVerdict.OK}
        spare = [build.alternative and build.kernel in tuned for build in launched]
        return [b for b, spared in zip(launched, spare, strict=True) if b.verdict is BuildVerdict.OK or not spared]

    @property
    def needed(self) -> list[Build]:
        """The builds that at least one variant needs."""
        wanted = {
            id(build) for name in {name for one in self.builds for name in one.variants} for build in self.of(name)
        }
        return [build for build in self.builds if id(build) in wanted]
