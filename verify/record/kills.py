"""The kill matrix: which check caught which planted fault, as stored in ``reports/selftest/``."""

from __future__ import annotations

from collections.abc import Set
from enum import StrEnum
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from verify.errors import ConfigurationError
from verify.files import REPORTS, write_out
from verify.record.schema import SubjectInfo
from verify.record.strict import Sha256, Strict

#: The matrices that come with the suite, relative to ``repository_root``.
FOLDER = REPORTS / "selftest"


class Outcome(StrEnum):
    """Whether a check caught a fault. NOT_RUN: it was skipped or blocked, or it fails without the fault too.

    A change that is not a mistake is HARMLESS if the check passes, and a FALSE_ALARM if it does not.
    """

    KILLED = "killed"
    FALSE_ALARM = "false alarm"
    SURVIVED = "survived"
    HARMLESS = "harmless"
    NOT_RUN = "not run"


class Cell(Strict):
    """One check against one fault; ``verdict`` and ``message`` are the check's own."""

    check: str
    outcome: Outcome
    verdict: str
    message: str = ""


class Row(Strict):
    """One fault, with a cell for each check that ran against it; or a change that is not a mistake: a ``right`` one, or
    one that is ``equivalent`` for the reason given there.

    If a check caught it, the checks that passed and do not claim to catch it are only counted, in ``passed``.
    """

    id: str
    what: str
    cells: list[Cell]
    duration_s: float = Field(ge=0)
    passed: int = 0
    right: bool = False
    equivalent: str = ""

    @property
    def harmless(self) -> bool:
        return self.right or bool(self.equivalent)

    def without_bystanders(self, claims: Set[str]) -> Row:
        """The same row, with the cells that passed and are not in ``claims`` only counted; unchanged if not caught."""
        if self.outcome is not Outcome.KILLED:
            return self
        cells = [cell for cell in self.cells if cell.outcome is not Outcome.SURVIVED or cell.check in claims]
        return self.model_copy(update={"cells": cells, "passed": len(self.cells) - len(cells)})

    @property
    def outcome(self) -> Outcome:
        outcomes = {cell.outcome for cell in self.cells}
        return next((outcome for outcome in Outcome if outcome in outcomes), Outcome.NOT_RUN)

    @property
    def killers(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.outcome is Outcome.KILLED]

    @property
    def caught_by(self) -> list[str]:
        """The checks that killed it; several of one family are its name and their number: ``p4.gqa (2)``."""
        families: dict[str, list[str]] = {}
        for cell in self.killers:
            families.setdefault(cell.check.rpartition(".")[0], []).append(cell.check)
        return [ids[0] if len(ids) == 1 else f"{family} ({len(ids)})" for family, ids in families.items()]


class Matrix(Strict):
    """The rows of one selftest; ``idle`` are the families of checks that killed nothing in it.

    The faults were tried on ``device``, those of compiled code on a simulated GPU.
    """

    schema_version: Literal[1] = 1
    device: str = "cpu"
    time_utc: str
    subject: SubjectInfo
    instrument_sha256: Sha256
    versions: dict[str, str]
    selection: str
    seed: int
    rows: list[Row]
    idle: list[str]

    @property
    def mistakes(self) -> list[Row]:
        """The rows of what must be caught."""
        return [row for row in self.rows if not row.harmless]

    def of(self, outcome: Outcome | str) -> list[Row]:
        return [row for row in self.rows if row.outcome == outcome]


def write(matrix: Matrix, path: Path) -> None:
    """Write ``matrix``. Raises ConfigurationError if the file cannot be written."""
    write_out(matrix.model_dump_json(indent=1) + "\n", path)


def read(path: Path) -> Matrix:
    """Read a matrix. Raises ConfigurationError naming the file if it is damaged."""
    try:
        return Matrix.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise ConfigurationError(f"{path} is not a kill matrix; remove it, or run python -m verify selftest") from error


def caught_by(checks: Set[str], root: Path) -> dict[str, list[str]]:
    """The faults that any of the checks killed, by the name of each matrix stored below ``root``."""
    matrices = {path.stem: read(path) for path in sorted((root / FOLDER).glob("*.json"))}
    return {
        name: [row.id for row in matrix.rows if any(cell.check in checks for cell in row.killers)]
        for name, matrix in matrices.items()
    }
