"""The planted faults as data: one TOML file per layer, read without torch, libcst or the subject."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from verify.checks import Check
from verify.errors import ConfigurationError
from verify.record.schema import Verdict
from verify.record.strict import Strict
from verify.run.mutation import Mutation, PtxEdit

#: From the arithmetic to the conclusions; each is the name of a file under ``faults/``.
LAYERS = (
    "kernel", "ptx", "scoring", "ranking", "statistics", "selection", "trigger", "hf", "vllm", "cli", "record",
    "report",
)  # fmt: skip

FAULTS, WRAPPERS = (Path(__file__).with_name(name) for name in ("faults", "wrappers"))

_END = frozenset({Verdict.FAIL, Verdict.ERROR, Verdict.CRASH, Verdict.TIMEOUT, Verdict.ABSENT, Verdict.REFUSED})


#: The device that mutations of compiled code are tried on, whatever the others are tried on.
PTX_DEVICE = "sim:sm90"


class _File(Strict):
    """One file of faults before validation: ``[[fault]]`` and ``[[right]]`` tables, and nothing else."""

    fault: list[dict[str, Any]] = Field(default_factory=list)
    right: list[dict[str, Any]] = Field(default_factory=list)


class Edit(Strict):
    """One change of a subject's source: ``after`` replaces the ``nth`` (from 1) or only ``before``.

    ``file`` is relative to the package; ``within`` is the dotted name of a function or class, empty for the whole file;
    ``before`` and ``after`` are each one expression or one statement. Formatting and comments do not matter.
    """

    file: str = Field(min_length=1)
    within: str = ""
    before: str = Field(min_length=1)
    after: str = Field(min_length=1)
    nth: int | None = Field(default=None, ge=1)


class Wrapper(Strict):
    """A module of ``wrappers/`` whose ``plant(names)`` replaces names of the published module ``around``."""

    module: str
    around: str

    @field_validator("module")
    @classmethod
    def _is_there(cls, name: str) -> str:
        if not (WRAPPERS / f"{name}.py").is_file():
            raise ValueError(f"there is no wrappers/{name}.py")
        return name


class Change(Strict):
    """One change of a record: the value ``at`` a path is set to ``to``, removed, or listed ``twice``.

    In ``results`` the key of the path is a check's id.
    """

    at: tuple[str | int, ...] = Field(min_length=1)
    to: str | int | float | bool | dict[str, str] | None = None
    op: Literal["set", "remove", "twice"] = "set"


class Tampered(Strict):
    """A good record of ``target`` made on ``day``, with the results of some ``phases``, and the changes made to it."""

    target: str = "sm120"
    day: int = Field(default=1, ge=1, le=28)
    phases: tuple[int, ...] = tuple(range(1, 9))
    changes: tuple[Change, ...] = ()


class Fault(Strict):
    """One mistake that somebody could make, and the checks that claim to catch it.

    ``kills`` are ids or families of checks, or names in ``records.JUDGES`` for tampered records. A fault is caught when
    one of them ends in one of ``verdicts`` with a message that matches the pattern ``says``. It is planted by edits of
    the ``bundled`` or the ``plain`` subject, by a ``wrapper`` around any subject, in ``records``, or in the compiled
    code (``ptx``) of the ``subjects``.

    Two kinds of change are not mistakes: a ``right`` one, which keeps what the code promises, and one that is
    ``equivalent`` for the reason given there. They have ``passes`` instead of ``kills``: checks that must still pass.
    """

    layer: str
    name: str = Field(pattern=r"^[a-z0-9_]+$")
    what: str = Field(min_length=1)
    kills: tuple[str, ...] = ()
    passes: tuple[str, ...] = ()
    says: str = ""
    right: bool = False
    equivalent: str = ""
    verdicts: frozenset[Verdict] = frozenset({Verdict.FAIL})
    bundled: tuple[Edit, ...] = ()
    plain: tuple[Edit, ...] = ()
    wrapper: Wrapper | None = None
    records: tuple[Tampered, ...] = ()
    ptx: tuple[PtxEdit, ...] = ()
    subjects: frozenset[Literal["bundled", "plain"]] = frozenset({"bundled"})

    @property
    def id(self) -> str:
        return f"{self.layer}.{self.name}"

    @model_validator(mode="after")
    def _planted_in_one_way(self) -> Fault:
        ways = [bool(self.bundled or self.plain), self.wrapper is not None, bool(self.records), bool(self.ptx)]
        if sum(ways) != 1:
            raise ValueError("plant it by edits, by a wrapper, in records or in ptx, and in one way only")
        if (bool(self.kills), bool(self.passes)) != (not self.harmless, self.harmless):
            raise ValueError("a mistake has kills; what is right or equivalent has passes instead")
        if not self.verdicts <= _END:
            raise ValueError(f"verdicts may be {', '.join(sorted(_END))}")
        try:
            re.compile(self.says)
        except re.error as error:
            raise ValueError(f"says is not a regular expression ({error})") from error
        return self

    @property
    def harmless(self) -> bool:
        return self.right or bool(self.equivalent)

    @property
    def mutation(self) -> Mutation | None:
        """What is planted in compiled code; None for a fault of another kind."""
        return Mutation(fault=self.id, edits=self.ptx) if self.ptx else None

    def edits_of(self, subject: str) -> tuple[Edit, ...]:
        """The edits for the subject of that name; none if the fault cannot be planted in it."""
        return {"bundled": self.bundled, "plain": self.plain}.get(subject, ())

    def fits(self, subject: str) -> bool:
        return bool(self.edits_of(subject) or self.wrapper or self.records or (self.ptx and subject in self.subjects))

    def claimed(self, checks: Iterable[Check]) -> list[Check]:
        """The checks that claim to catch it, or that must pass. Raises ConfigurationError if one of the names is not
        that of a check.
        """
        checks, named = list(checks), self.kills or self.passes
        for claim in named:
            if not any(claim in (check.id, check.spec.family) for check in checks):
                raise ConfigurationError(
                    f"fault {self.id} names {claim}, which is not a check; "
                    f"name another in {FAULTS.name}/{self.layer}.toml"
                )
        return [check for check in checks if {check.id, check.spec.family} & {*named}]


def mutation_of(fault: str) -> Mutation:
    """The mutation of a fault in compiled code, by its id. Raises ConfigurationError if it is none."""
    found = next((one.mutation for one in load_faults() if one.id == fault and one.mutation), None)
    if found is None:
        raise ConfigurationError(
            f"{fault!r} is no fault in compiled code; name one of {FAULTS / 'ptx.toml'}, such as ptx.root_dropped"
        )
    return found


@cache
def load_faults(folder: Path = FAULTS) -> tuple[Fault, ...]:
    """Every fault, layer by layer in the order of the files.

    Raises ConfigurationError naming the file and the fault that is invalid, or whose id is taken.
    """
    if strays := sorted({path.stem for path in folder.glob("*.toml")} - {*LAYERS}):
        raise ConfigurationError(f"{strays[0]}.toml does not belong to a layer; name it after one: {', '.join(LAYERS)}")
    faults: dict[str, Fault] = {}
    for layer in LAYERS:
        path = folder / f"{layer}.toml"
        for number, entry in enumerate(_entries(path), start=1):
            try:
                fault = Fault.model_validate({"layer": layer, **entry})
            except ValidationError as error:
                raise _wrong(f"{path.name}, {entry.get('name', f'number {number}')}", error) from error
            if fault.id in faults:
                raise ConfigurationError(f"{path.name} has two faults named {fault.name}; rename one")
            faults[fault.id] = fault
    return tuple(faults.values())


def _entries(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    try:
        file = _File.model_validate(tomllib.loads(path.read_text("utf-8")))
        return [*file.fault, *({"right": True, **entry} for entry in file.right)]
    except ValidationError as error:
        raise _wrong(path.name, error) from error
    except ValueError as error:  # not UTF-8, or not TOML
        raise ConfigurationError(f"{path.name} is not TOML ({error}); correct it there") from error


def _wrong(what: str, error: ValidationError) -> ConfigurationError:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "fault"
    return ConfigurationError(f"{what}: {place}: {first['msg']}; correct it there")
