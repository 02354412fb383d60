"""What was built ahead of time for one architecture, as a record keeps it."""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field, model_validator

from verify.record.strict import Sha256, Strict

#: What an option of a launch, or a constant of a kernel, may be.
Plain = bool | int | float | str | None


class BuildVerdict(StrEnum):
    """How one build ended.

    OUT_OF_RESOURCES: it was built, and one program of it asks for more than a multiprocessor has. NOT_FOUND: the kernel
    cannot be looked up by whoever does not launch it, so that only a launch tells. TOOLCHAIN_TOO_OLD: the assembler
    does not know the architecture, or not what the kernel asks of it. Neither of these two is a fault of the kernel's.
    CRASH: the process that built it died, or the machine under it failed.
    """

    OK = "OK"
    COMPILE_ERROR = "COMPILE_ERROR"
    OUT_OF_RESOURCES = "OUT_OF_RESOURCES"
    NOT_FOUND = "NOT_FOUND"
    TOOLCHAIN_TOO_OLD = "TOOLCHAIN_TOO_OLD"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"


#: What says that the kernel, launched so, cannot run on the architecture.
REFUSED = frozenset({BuildVerdict.COMPILE_ERROR, BuildVerdict.OUT_OF_RESOURCES})

#: What says that something is wrong with the kernel or with the machine that built it.
WRONG = REFUSED | {BuildVerdict.CRASH, BuildVerdict.TIMEOUT}


class Code(Strict):
    """The machine code of one kernel.

    ``loads`` counts global loads by their bits per thread, ``spill_*`` are bytes per thread, ``special_functions`` the
    MUFU instructions; all of them in the code, once each. ``warp_instructions_per_key`` is what is executed, loops
    included: warp-level instructions of a program over the keys that it scores; None, with the reason in ``uncounted``,
    where the code does not tell.
    """

    instructions: int = Field(ge=1)
    spill_store_bytes: int = Field(ge=0)
    spill_load_bytes: int = Field(ge=0)
    loads: dict[str, int]
    special_functions: int = Field(ge=0)
    warp_instructions_per_key: float | None
    uncounted: str = ""


class Resources(Strict):
    """What one kernel takes on one architecture, read from its cubin.

    ``registers`` and ``stack_bytes`` are per thread, ``shared_bytes`` per program. ``occupancy`` is the theoretical
    one, of 1; None where the limits of the architecture are not known. ``code`` is None where the toolchain's
    disassembler does not know the architecture.
    """

    registers: int = Field(ge=1)
    stack_bytes: int = Field(ge=0)
    shared_bytes: int = Field(ge=0)
    warps: int = Field(ge=1)
    occupancy: float | None = Field(ge=0, le=1)
    code: Code | None


class Build(Strict):
    """One kernel, built for one architecture as one or more variants launch it.

    ``options`` are num_warps and the like where the launch gives them, ``constants`` its constexpr arguments.
    ``alternative`` is whether it is one of several configurations, among which the autotuner does without this one
    where it does not build.
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
        """What tells it from its alternatives, in words to put behind its variant; empty where it has none."""
        settings = {**self.constants, **self.options}
        return f" ({', '.join(f'{name}={value}' for name, value in settings.items())})" if self.alternative else ""

    @model_validator(mode="after")
    def _consistent(self) -> Build:
        built = self.verdict is BuildVerdict.OK
        if built != (self.resources is not None and self.ptx_sha256 is not None and self.cubin_sha256 is not None):
            raise ValueError(f"{self.kernel}: a build that is OK has resources and digests, and no other has")
        if built == bool(self.message):
            raise ValueError(f"{self.kernel}: a build that is not OK says why, and no other says anything")
        return self


class Compilation(Strict):
    """Everything built for one architecture.

    ``toolchain`` is the verdict of the suite's own control kernel, which anything that knows the architecture can
    build; where it is not OK, ``gap`` says why and nothing else is built. ``unlaunched`` has, by variant, why the
    subject's own call came to no kernel.
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
            raise ValueError(f"sm{self.sm}: a toolchain gap has a sentence, and nothing else has one")
        if self.gap and self.builds:
            raise ValueError(f"sm{self.sm}: the toolchain cannot build for it, but {self.builds[0].kernel} was built")
        return self

    def of(self, variant: str) -> list[Build]:
        """The builds that ``variant`` needs: those that it launches, but for a configuration that the autotuner does
        without because another one of its kernel was built.
        """
        launched = [build for build in self.builds if variant in build.variants]
        tuned = {build.kernel for build in launched if build.alternative and build.verdict is BuildVerdict.OK}
        spare = [build.alternative and build.kernel in tuned for build in launched]
        return [b for b, spared in zip(launched, spare, strict=True) if b.verdict is BuildVerdict.OK or not spared]

    @property
    def needed(self) -> list[Build]:
        """The builds that some variant needs."""
        wanted = {
            id(build) for name in {name for one in self.builds for name in one.variants} for build in self.of(name)
        }
        return [build for build in self.builds if id(build) in wanted]
