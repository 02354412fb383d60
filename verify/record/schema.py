"""The record of a run: one JSON file that holds everything a verdict rests on.

``verify/record/reading.py`` reads and writes it.
"""

from __future__ import annotations

import math
import sys
from datetime import date
from enum import StrEnum
from typing import Annotated, Final, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from verify.checks import Gate
from verify.record.builds import Compilation
from verify.record.curves import Curve, clash
from verify.record.pictures import MOST, KeptSet
from verify.record.simulation import EVERY_SKIP_CODE, UNSUPPORTED, Simulation
from verify.record.strict import Sha256, Strict

SCHEMA_VERSION: Final = 1


class Verdict(StrEnum):
    """How a check ended. Only PASS is a pass; a check without a result is absent, which is not green."""

    PASS = "PASS"
    FAIL = "FAIL"
    ERROR = "ERROR"
    CRASH = "CRASH"
    TIMEOUT = "TIMEOUT"
    SKIP = "SKIP"
    ABSENT = "ABSENT"
    REFUSED = "REFUSED"
    BLOCKED = "BLOCKED"
    INFRA = "INFRA"
    WAIVED = "WAIVED"


#: Verdicts that report a problem. WAIVED is a problem that the suite's own list of known failures has. SKIP and BLOCKED
#: report that nothing was learnt; ABSENT, that the subject does not offer what the check asks for; REFUSED, that it
#: says so at the call.
FAILING = frozenset({Verdict.FAIL, Verdict.ERROR, Verdict.CRASH, Verdict.TIMEOUT, Verdict.INFRA})

#: A check that needs one with such a verdict is BLOCKED.
BLOCKING = FAILING | {Verdict.WAIVED}

#: Neither a failure nor a pass.
NOT_OFFERED = frozenset({Verdict.ABSENT, Verdict.REFUSED})

#: How a result was obtained, best first; the four are never mixed in one cell.
Evidence = Literal["hardware", "simulated", "compiled", "emulated"]
EVIDENCE: Final[tuple[Evidence, ...]] = get_args(Evidence)


class Measurement(Strict):
    """A number that was compared with a bound; ``headroom`` is allowed / measured. Of a bound ``by_design`` a correct
    result may need all, so the headroom says nothing.
    """

    name: str = Field(min_length=1)
    measured: float
    allowed: float
    unit: str = ""
    where: str = ""
    by_design: bool = False

    @property
    def within(self) -> bool:
        return self.measured <= self.allowed  # False for NaN, as it must be

    @property
    def headroom(self) -> float:
        return math.inf if self.measured == 0 else self.allowed / self.measured

    @property
    def told(self) -> str:
        """The measured and the allowed value, and where, as in a failure message."""
        unit, place = self.unit and f" {self.unit}", self.where and f" at {self.where}"
        return f"{self.name}: measured {self.measured:.6g}{unit}, allowed {self.allowed:.6g}{unit}{place}"


class Deviation(Strict):
    """Why a failure was known before the run: the reason, the URL of the issue, and the last day it counts as known."""

    reason: str = Field(pattern=r"\S")
    issue: str = Field(pattern=r"^https?://\S+$")
    expires: date

    def __str__(self) -> str:
        return f"{self.reason} ({self.issue}, until {self.expires})"


class Waiver(Strict):
    """Why a failure, which ended with ``verdict``, is tolerated until the day it ``expires``, and by whom."""

    verdict: Literal[Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT]
    reason: str = Field(pattern=r"\S")
    issue: str = Field(pattern=r"^https?://\S+$")
    owner: str = Field(pattern=r"\S")
    expires: date

    def __str__(self) -> str:
        return f"{self.verdict}, waived by {self.owner} until {self.expires}: {self.reason} ({self.issue})"


class CheckResult(Strict):
    """One check on one target. Raises ValidationError when the verdict and the other fields contradict each other.

    ``cause`` is what made it fail, if that is known: an exception and its line, or a cause that the check names.
    ``aspect`` is what the subject refuses (``aggregation=max``), ``choice`` which of several lawful readings of the
    method it follows. ``kept`` are keep sets of a round next to the oracle's. ``deviation`` is why the subject's author
    knew of a FAIL before the run; it changes no verdict. ``waiver`` is why this suite tolerates a failure for a time;
    such a result is WAIVED, which is not a pass.
    ``rests_on`` is the index of its list in the record's ``rests_on``; older records have none.
    """

    id: str = Field(pattern=r"^p[1-8]\.[a-z0-9_]+\.[A-Za-z0-9_\-]+$")
    gate: Gate
    plan: str | None = None
    verdict: Verdict
    code: str | None = None
    by: str | None = None
    evidence: Evidence
    seed: int
    duration_s: float = Field(ge=0)
    measurements: list[Measurement] = Field(default_factory=list)
    curves: list[Curve] = Field(default_factory=list)
    kept: list[KeptSet] = Field(default_factory=list, max_length=MOST)
    message: str = ""
    cause: str = ""
    aspect: str = ""
    choice: str = ""
    deviation: Deviation | None = None
    waiver: Waiver | None = None
    repeat: Annotated[str, Field(min_length=1), AfterValidator(sys.intern)]  # alike in every run of a machine
    rests_on: int | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _consistent(self) -> CheckResult:
        if (self.verdict is Verdict.SKIP) != (self.code is not None):
            raise ValueError(f"{self.id}: a SKIP has a code and no other verdict does (code {self.code!r})")
        if self.code is not None and self.code not in EVERY_SKIP_CODE:
            raise ValueError(f"{self.id}: unknown skip code {self.code!r}; known: {', '.join(EVERY_SKIP_CODE)}")
        if self.code == "NO_GPU" and self.evidence == "hardware":
            raise ValueError(f"{self.id}: SKIP(NO_GPU) contradicts its hardware evidence")
        if (self.verdict is Verdict.BLOCKED) != (self.by is not None):
            raise ValueError(f"{self.id}: a BLOCKED names its blocker and no other verdict does (by {self.by!r})")
        if self.verdict is Verdict.PASS:
            for measurement in self.measurements:
                if not measurement.within:
                    raise ValueError(f"{self.id}: PASS, but {measurement.name} is outside its bound")
        if self.deviation is not None and self.verdict is not Verdict.FAIL:
            raise ValueError(f"{self.id}: only a FAIL can be a known deviation, and this is {self.verdict}")
        if (self.verdict is Verdict.WAIVED) != (self.waiver is not None):
            raise ValueError(f"{self.id}: a WAIVED result has a waiver and no other does, and this is {self.verdict}")
        if self.verdict in BLOCKING | NOT_OFFERED and not self.message:
            raise ValueError(f"{self.id}: {self.verdict} without a message")
        if self.curves and (wrong := clash(self.curves)):
            raise ValueError(f"{self.id}: {wrong}")
        return self

    @property
    def said(self) -> str:
        """The message without the command that repeats the check, which ``repeat`` has."""
        return self.message.partition("; repeat with: ")[0]


class Finding(Strict):
    """Failing checks with one cause: what they have in common, their ids, and the ids of the checks they block."""

    cause: str = Field(min_length=1)
    checks: list[str] = Field(min_length=1)
    blocks: list[str] = Field(default_factory=list)


class Gpu(Strict):
    name: str = Field(min_length=1)
    uuid_sha256: str = Field(min_length=1)
    sm: int = Field(ge=10, le=999)
    memory_gib: float = Field(gt=0)
    driver: str = Field(min_length=1)


class Environment(Strict):
    """The environment of a run. The version of an absent package is ``not installed``, never empty."""

    gpu: Gpu | None
    cuda_runtime: str = Field(min_length=1)
    cuda_toolkit: str = Field(min_length=1)
    torch: str = Field(min_length=1)
    triton: str = Field(min_length=1)
    ptxas: dict[str, str]
    flash_attn: str = Field(min_length=1)
    vllm: str = Field(min_length=1)
    transformers: str = Field(min_length=1)
    python: str = Field(min_length=1)
    os: str = Field(min_length=1)
    variables: dict[str, str]


class MachineState(Strict):
    """The state of the machine at one moment: the number of ``cores`` that the run may use, the load average of the
    last minute, and the processor seconds since boot in which these cores were busy (``busy_s``) or lost to a
    hypervisor (``steal_s``).
    """

    cores: int = Field(ge=1)
    load_average: float = Field(ge=0)
    busy_s: float = Field(ge=0)
    steal_s: float = Field(ge=0)


class Sitting(Strict):
    """The machine at the ``start`` and the ``end`` of one phase; a resumed run may have several for a phase.

    ``end`` is None if the process of the phase was ended together with the run.
    """

    phase: int = Field(ge=1, le=8)
    start: MachineState
    end: MachineState | None = None


#: Begins the names of a patch's options among what is narrowed.
PATCH = "patch."


class SubjectInfo(Strict):
    """The implementation under test; ``git_sha`` is ``none`` where the source is not a git checkout.

    ``content_sha256`` is the digest of the package's files, independent of their location and of git. ``profile`` is
    what it must pass (None: what it offers), ``narrowed`` the values that its author says it takes, by property.
    """

    name: str = Field(min_length=1)
    version: str = Field(min_length=1)
    source: str = Field(min_length=1)
    git_sha: str = Field(min_length=1)
    dirty: bool
    content_sha256: Sha256
    profile: str | None = None
    narrowed: dict[str, list[str]] = Field(default_factory=dict)


class Record(Strict):
    """One run on one target (``emulated`` or ``sm<NN>``).

    ``instrument_sha256`` is the digest of the suite's own sources, ``machine`` how busy the machine was during each
    phase (absent in older records). ``sources`` has the digests of the files of suite and subject that results rest on;
    each list in ``rests_on`` has the names of the files that some of the results rest on (``verify/record/grounds.py``;
    both are absent in older records). ``findings`` are the failures grouped by cause (absent in older records). A
    record with a ``compilation`` or a ``simulation`` was made without the target's GPU. The first has only compiled
    evidence. The second has simulated evidence, and emulated evidence where a check launched no kernel, which says
    nothing about any target. ``confirms`` is the run whose failures this one tried again, ``beside`` a word for a run
    that is only shown next to the others: neither counts for a verdict. A ``rehearsal`` is a made-up record. Raises
    ValidationError if the parts contradict each other.
    """

    schema_version: Literal[1] = SCHEMA_VERSION
    run_id: str = Field(min_length=1)
    time_utc: str = Field(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z$")
    state: Literal["running", "interrupted", "complete"]
    target: str = Field(pattern=r"^(emulated|sm\d{2,3})$")
    subject: SubjectInfo
    instrument_sha256: Sha256
    environment: Environment
    model: str = Field(min_length=1)
    seed: int
    selection: str
    duration_s: float = Field(ge=0)
    results: list[CheckResult]
    machine: list[Sitting] = Field(default_factory=list)
    sources: dict[str, Sha256] = Field(default_factory=dict)
    rests_on: list[list[str]] = Field(default_factory=list)
    findings: list[Finding] = Field(default_factory=list)
    compilation: Compilation | None = None
    simulation: Simulation | None = None
    confirms: str | None = None
    beside: str = ""
    rehearsal: bool = False

    @property
    def apart(self) -> bool:
        """Whether it counts for no verdict, because it confirms another run, or is only shown next to the others."""
        return self.confirms is not None or bool(self.beside)

    @property
    def kind(self) -> Evidence:
        """The evidence that the record was made for."""
        if self.compilation is not None:
            return "compiled"
        if self.simulation is not None:
            return "simulated"
        return "emulated" if self.target == "emulated" else "hardware"

    @property
    def on_target(self) -> bool:
        """Whether it is a run on its target, and not a compilation or a simulation for it."""
        return self.kind in ("hardware", "emulated")

    @property
    def telling(self) -> list[CheckResult]:
        """The results that say something about the target: in a simulation, those of checks that launched a kernel."""
        return [one for one in self.results if self.simulation is None or one.evidence != "emulated"]

    @model_validator(mode="after")
    def _once_and_on_target(self) -> Record:
        seen: set[str] = set()
        interpreted = self.environment.variables.get("TRITON_INTERPRET", "unset") not in ("", "0", "unset")
        for result in self.results:
            if result.id in seen:
                raise ValueError(f"{result.id} has two results in run {self.run_id}")
            seen.add(result.id)
            if result.evidence == "hardware" and self.target == "emulated":
                raise ValueError(f"{result.id} claims hardware evidence in an emulated run")
            if result.evidence == "hardware" and interpreted:
                raise ValueError(f"{result.id} claims hardware evidence, but TRITON_INTERPRET emulated the kernels")
            if result.rests_on is not None and result.rests_on >= len(self.rests_on):
                raise ValueError(f"{result.id} rests on list {result.rests_on}, but there are {len(self.rests_on)}")
        if unknown := [name for names in self.rests_on for name in names if name not in self.sources]:
            raise ValueError(f"results rest on {unknown[0]}, but sources has no digest of it")
        gpu = self.environment.gpu
        if self.compilation is not None:
            if f"sm{self.compilation.sm}" != self.target:
                raise ValueError(f"run {self.run_id} claims {self.target}, but was built for sm{self.compilation.sm}")
            ran = [result.id for result in self.results if result.evidence != "compiled"]
            ran += [gpu.name] if gpu is not None else []
            if ran:
                raise ValueError(f"run {self.run_id} was built ahead of time, but {ran[0]} ran")
        elif self.simulation is None and self.target != "emulated" and (gpu is None or f"sm{gpu.sm}" != self.target):
            raise ValueError(f"run {self.run_id} claims {self.target}, but its environment has another GPU or none")
        return self

    @model_validator(mode="after")
    def _simulated_or_not(self) -> Record:
        known, gpu = self.simulation, self.environment.gpu
        if known is None:
            for result in self.results:
                if result.evidence == "simulated" or result.code == UNSUPPORTED:
                    raise ValueError(f"{result.id} claims to be simulated, but run {self.run_id} has no simulation")
                if result.evidence == "emulated" and self.target != "emulated":
                    raise ValueError(f"{result.id} is emulated, but run {self.run_id} is on {self.target}")
            return self
        if self.compilation is not None:
            raise ValueError(f"run {self.run_id} has both a compilation and a simulation")
        if f"sm{known.sm}" != self.target:
            raise ValueError(f"run {self.run_id} claims {self.target}, but sm{known.sm} was simulated")
        if gpu is not None:
            raise ValueError(f"run {self.run_id} was simulated, but its environment has the GPU {gpu.name}")
        for result in self.results:
            if result.evidence not in ("simulated", "emulated"):
                raise ValueError(f"{result.id} claims {result.evidence} evidence in a simulated run")
            if result.evidence == "simulated" and result.code != UNSUPPORTED and not known.kernels:
                raise ValueError(f"{result.id} is simulated, but the simulation executed no kernel")
        return self
