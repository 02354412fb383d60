"""``ci/gpus.toml``: the kinds of runners that verify a GPU every night. Standard library only."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ci.nightly import NightlyError

#: The options of ``verify run``, by level.
LEVELS = {"must-pass": ("-m", "hard and not slow"), "usual": ("-m", "not slow"), "everything": ()}

#: How long the watch over the jobs lasts.
_MOST_MIN = 340

_LABEL = re.compile(r"[A-Za-z0-9_.-]+")
_IMAGE = re.compile(r"\S+@sha256:[0-9a-f]{64}")
_VERSION = re.compile(r"\d+(\.\d+)*")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """One kind of runner. Raises NightlyError for a value that cannot be."""

    name: str
    sm: int
    labels: tuple[str, ...]
    gpus: int
    level: str
    timeout_min: int
    start_within_min: int
    driver: str = ""
    image: str = ""

    def __post_init__(self) -> None:
        together = self.start_within_min + self.timeout_min
        for name, good, expected in (
            ("name", bool(_LABEL.fullmatch(self.name)), "letters, digits, hyphens"),
            ("sm", 80 <= self.sm <= 121, "80 to 121"),
            ("labels", bool(self.labels) and all(map(_LABEL.fullmatch, self.labels)), "a list of a runner's labels"),
            ("gpus", self.gpus >= 1, "1 or more"),
            ("level", self.level in LEVELS, ", ".join(LEVELS)),
            ("timeout_min", 1 <= self.timeout_min <= 360, "1 to 360"),
            ("start_within_min", 1 <= self.start_within_min <= 360, "1 to 360"),
            ("timeout_min", together <= _MOST_MIN, f"at most {_MOST_MIN} together with start_within_min"),
            ("driver", not self.driver or bool(_VERSION.fullmatch(self.driver)), "a version such as 570"),
            ("image", not self.image or bool(_IMAGE.fullmatch(self.image)), "an image by digest, name@sha256:..."),
        ):
            if not good:
                raise NightlyError(f"ci/gpus.toml: {name} of {self.name} is {getattr(self, name)!r}; give {expected}")

    @property
    def target(self) -> str:
        return f"sm{self.sm}"

    @property
    def options(self) -> tuple[str, ...]:
        """The options of ``verify run``."""
        return ("--expect", self.target, *LEVELS[self.level])


_TYPES: dict[str, type] = {
    "name": str, "sm": int, "labels": list, "gpus": int, "level": str, "timeout_min": int, "start_within_min": int,
    "driver": str, "image": str,
}  # fmt: skip
_OPTIONAL = ("driver", "image")


def read_gpus(path: Path = Path("ci/gpus.toml")) -> list[Gpu]:
    """The rows of the file. Raises NightlyError, in one sentence, for the first mistake, and if there is no row."""
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise NightlyError(f"{path} cannot be read ({error.strerror})") from error
    except tomllib.TOMLDecodeError as error:
        raise NightlyError(f"{path} is not TOML ({error})") from error
    if unknown := content.keys() - {"gpu"}:
        raise NightlyError(f"{path}: {min(unknown)} is not known; a row begins with [[gpu]]")
    rows = [_row(path, number, entry) for number, entry in enumerate(content.get("gpu", ()), start=1)]
    if not rows:
        raise NightlyError(f"{path} has no row, so nothing would be verified; add a [[gpu]]")
    for what in ("name", "sm"):  # the records of two cards of one SM would hide each other
        values = [getattr(row, what) for row in rows]
        if twice := next((value for value in values if values.count(value) > 1), None):
            raise NightlyError(f"{path} has two rows with the {what} {twice}; change or remove one")
    return rows


def _row(path: Path, number: int, entry: Any) -> Gpu:
    if not isinstance(entry, dict):
        raise NightlyError(f"{path}: row {number} is not a table; begin it with [[gpu]]")
    known = [one.name for one in fields(Gpu)]
    if unknown := entry.keys() - set(known):
        raise NightlyError(f"{path}: {min(unknown)} of row {number} is not known; a row has {', '.join(known)}")
    for name, kind in _TYPES.items():
        if name not in entry and name not in _OPTIONAL:
            raise NightlyError(f"{path}: row {number} has no {name}")
        if name in entry and (not isinstance(entry[name], kind) or isinstance(entry[name], bool)):
            raise NightlyError(f"{path}: {name} of row {number} is {entry[name]!r}; give a {kind.__name__}")
    if not all(isinstance(label, str) for label in entry["labels"]):
        raise NightlyError(f"{path}: labels of row {number} are {entry['labels']!r}; give a list of words")
    return Gpu(**{**entry, "labels": tuple(entry["labels"])})
