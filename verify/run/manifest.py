"""The part of a run that is fixed before its first check: target, subject, environment, seed and selection."""

from __future__ import annotations

import os
import secrets
import shlex
from collections.abc import Iterable
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from verify.architectures import parse_target
from verify.checks import Gate, derive_seed
from verify.errors import ConfigurationError
from verify.files import INSTALLED, started_in
from verify.machine.conflicts import interpreter_conflict
from verify.machine.device import DeviceName
from verify.machine.environment import capture
from verify.record.deviations import Entry, known, told_before
from verify.record.digest import instrument_of
from verify.record.grounds import Checkout
from verify.record.known_failures import KnownFailure, applying, waiver
from verify.record.schema import CheckResult, Deviation, Environment, Evidence, Sha256, SubjectInfo, Verdict, Waiver
from verify.run.mutation import Mutation
from verify.subject.subject import Subject


class Selected(BaseModel):
    """A check that the run must finish, with what the runner needs if the check's process dies."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    node: str
    gate: Gate
    plan: str | None
    timeout_s: float = Field(gt=0)
    slow: bool = False

    @property
    def phase(self) -> int:
        return int(self.id[1])


class Surroundings(BaseModel):
    """The machine, the subject and the instrument of a run, which is never resumed with others."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    subject_info: SubjectInfo
    instrument_sha256: Sha256
    environment: Environment
    sources: dict[str, Sha256] = Field(default_factory=dict)  #: every file that a result may rest on

    def refuse(self, now: Surroundings, run_id: str) -> None:
        """Raise ConfigurationError naming the first difference in ``now``, with both values."""
        pairs: dict[str, tuple[object, object]] = {
            "the target": (self.target, now.target),
            "the subject's commit": (self.subject_info.git_sha, now.subject_info.git_sha),
            "the subject's content": (self.subject_info.content_sha256[:12], now.subject_info.content_sha256[:12]),
            "the suite's own source": (self.instrument_sha256[:12], now.instrument_sha256[:12]),
        }
        frozen, found = _facts(self.environment), _facts(now.environment)
        pairs |= {name: (frozen.get(name, "unset"), found.get(name, "unset")) for name in frozen | found}
        for name, (before, after) in pairs.items():
            if before != after:
                raise ConfigurationError(
                    f"run {run_id} cannot be resumed: {name} was {before} and is now {after}; start a new run"
                )


def _facts(environment: Environment) -> dict[str, object]:
    """Every fact of ``environment``, by a name that can be used in a sentence."""
    facts: dict[str, object] = {}
    for name, value in environment.model_dump().items():
        if isinstance(value, dict):
            facts |= {key if name == "variables" else f"{name} {key}": fact for key, fact in value.items()}
        else:
            facts[name] = "none" if value is None else value
    return facts


class Manifest(Surroundings):
    """One run on one target, frozen. ``known_failures`` are those that concern it, also expired ones. A run with a
    ``mutation`` makes no record (``events.compose``).
    """

    run_id: str
    time_utc: str
    device: str = Field(pattern=r"^(cpu|cuda|sim:sm\d{2,3})$")
    subject: str
    model: str
    seed: int
    selection: str
    selected: tuple[Selected, ...]
    deviations: tuple[Entry, ...] = ()
    known_failures: tuple[KnownFailure, ...] = ()
    mutation: Mutation | None = None
    confirms: str | None = None
    beside: str = ""

    @model_validator(mode="after")
    def _mutated_in_a_simulation(self) -> Manifest:
        if self.mutation and not self.device.startswith("sim:"):
            raise ValueError("only the code of a simulated GPU can be mutated")
        return self

    @property
    def model_id(self) -> str:
        """The model's name in a record: for a local one the name of its directory, without its path."""
        return _model_id(self.model)

    @property
    def places(self) -> dict[Path, str]:
        """The directories outside the repository that the run uses, with their placeholders in a record."""
        named = {self.subject: "<subject>", self.model: "<model>"}
        own = {started_in(Path()): "."} if INSTALLED else {}
        return own | {Path(name): word for name, word in named.items() if Path(name).is_absolute()}

    @property
    def evidence(self) -> Evidence:
        return "hardware" if self.device == "cuda" else "emulated"

    def repeat_command(self, node: str, root: Path) -> str:
        """The command line that repeats one check from the repository root; its paths are relative to that root.

        Of an installed suite it names the check as ``--pyargs`` takes it, and runs in the folder that has the reports.
        """
        file, _, test = node.partition("::")
        module = file.removesuffix(".py").replace("/", ".")
        named, root = (["--pyargs", f"{module}::{test}"], started_in(root)) if INSTALLED else ([node], root)
        words = ["python", "-m", "pytest", *map(shlex.quote, named), "--device", self.device, "--seed", str(self.seed)]
        if self.subject != "bundled":
            words.append(f"--subject={shlex.quote(_relative(self.subject, root))}")
        if self.model != "embedded":
            words.append(f"--model={shlex.quote(_relative(self.model, root))}")
        if "--sanitize" in self.selection.split():
            words.append("--sanitize")
        return " ".join(words)

    @property
    def day(self) -> date:
        """The day on which the run began, UTC."""
        return date.fromisoformat(self.time_utc[:10])

    def deviation_of(self, check_id: str) -> Deviation | None:
        """Why a failure of the check was known when the run began; None if it was not."""
        return known(self.deviations, check_id, self.day)

    def waiver_of(self, check_id: str, verdict: Verdict) -> Waiver | None:
        """Why a check that ended with ``verdict`` is WAIVED; None if it is not."""
        return waiver(self.known_failures, check_id, verdict, self.day)

    @property
    def told_before(self) -> list[str]:
        """A sentence for each known deviation and known failure that had expired when the run began."""
        return [*told_before(self.deviations, self.day), *told_before(self.known_failures, self.day)]

    def result(self, check: Selected, verdict: Verdict, root: Path, **fields: Any) -> CheckResult:
        """The result of a check of this run, WAIVED if its ``verdict`` is a known failure; ``fields`` are those that
        the run does not determine.
        """
        why = self.waiver_of(check.id, verdict)
        return CheckResult(
            id=check.id,
            gate=check.gate,
            plan=check.plan,
            verdict=Verdict.WAIVED if why else verdict,
            waiver=why,
            seed=derive_seed(self.seed, check.id),
            repeat=self.repeat_command(check.node, root),
            deviation=self.deviation_of(check.id) if verdict is Verdict.FAIL else None,
            **({"evidence": self.evidence} | fields),
        )


def survey(
    device: DeviceName, subject: Subject, root: Path, expect: int | None = None, simulated: int | None = None
) -> Surroundings:
    """Examine the current machine, subject and instrument, with the phases of ``root``.

    ``expect`` is the SM number that the GPU must have, ``simulated`` that of a simulated one. Raises
    ConfigurationError if the GPU is another one or unknown to the suite, if the subject does not import, or if there is
    no GPU and the installed packages cannot interpret kernels.
    """
    if device == "cpu" and simulated is None and (conflict := interpreter_conflict()):
        raise ConfigurationError(f"without a GPU the kernels are interpreted, but {conflict}")
    environment = capture(device)
    gpu = environment.gpu
    if gpu is not None:
        parse_target(f"sm{gpu.sm}")
    if expect is not None and (gpu is None or gpu.sm != expect):
        found = "no GPU that torch can use" if gpu is None else f"sm{gpu.sm} ({gpu.name})"
        raise ConfigurationError(
            f"--expect sm{expect}, but this machine has {found}; run it on an sm{expect}, or drop --expect"
        )
    sources = Checkout(root, subject.root, subject.folder).everything()
    return Surroundings(
        target=f"sm{simulated or gpu.sm}" if simulated or gpu else "emulated",  # type: ignore[union-attr]
        subject_info=subject.info(),
        instrument_sha256=instrument_of(sources),
        environment=environment,
        sources=sources,
    )


def freeze(
    surroundings: Surroundings,
    *,
    device: str,
    subject: Subject,
    model: str,
    seed: int,
    selection: str,
    selected: tuple[Selected, ...],
    deviations: tuple[Entry, ...] = (),
    known_failures: Iterable[KnownFailure] = (),
    mutation: Mutation | None = None,
    confirms: str | None = None,
    beside: str = "",
) -> Manifest:
    """A manifest with a new run id, and with those of the ``known_failures`` that concern it."""
    model = str(Path(model).resolve()) if Path(model).is_dir() else model
    where = (surroundings.target, surroundings.environment, _model_id(model))
    return Manifest(
        **dict(surroundings),
        run_id=new_run_id(surroundings.target),
        time_utc=utc_now(),
        device=device,
        subject=subject.option,
        model=model,
        seed=seed,
        selection=selection,
        selected=selected,
        deviations=deviations,
        known_failures=applying(known_failures, (check.id for check in selected), *where),
        mutation=mutation,
        confirms=confirms,
        beside=beside,
    )


def _model_id(model: str) -> str:
    return Path(model).name if Path(model).is_absolute() else model


def utc_now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def new_run_id(target: str) -> str:
    """A name that sorts by time and differs between runs of the same second."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{target}-{secrets.token_hex(2)}"


def _relative(name: str, root: Path) -> str:
    return os.path.relpath(name, root) if Path(name).is_absolute() else name
