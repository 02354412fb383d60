"""The request for a run: the arguments of ``python -m verify run``, validated and frozen."""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, field
from pathlib import Path

from verify.architectures import Emulated, parse_target
from verify.checks import DEFAULT_SEED, PHASES, PROFILES
from verify.errors import ConfigurationError
from verify.files import default_out
from verify.run.levels import LEVELS

#: The devices by name; ``sim:sm120`` is a simulated GPU.
DEVICES = ("auto", "cpu", "cuda")
_SIMULATED = "sim:"

#: torch.manual_seed takes 64 bits, numpy's legacy generator 32; the smaller range serves both.
_SEED_LIMIT = 2**32


def parse_phases(text: str) -> tuple[int, ...]:
    """The phases that ``4``, ``1-8`` or ``1,3-5`` names, ascending and without repeats.

    Raises ConfigurationError naming the part that is not a phase or an ascending range of phases.
    """
    chosen: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d)\s*(?:-\s*(\d)\s*)?", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (0, 0)
        if not (min(PHASES) <= first <= last <= max(PHASES)):
            raise ConfigurationError(
                f"{part.strip()!r} is not a phase; give numbers from {min(PHASES)} to {max(PHASES)} such as 4 or 1,3-5"
            )
        chosen.update(range(first, last + 1))
    return tuple(sorted(chosen))


def parse_expect(text: str) -> int:
    """The SM number of the GPU in ``--expect``. Raises ConfigurationError for unknown names and ``emulated``."""
    target = parse_target(text)
    if isinstance(target, Emulated):
        raise ConfigurationError("--expect emulated does not name a GPU; use --device cpu for a run without one")
    return target.sm


def parse_device(text: str) -> str:
    """``auto``, ``cpu``, ``cuda`` or ``sim:sm<NN>``, as a request and a manifest have it.

    Raises ConfigurationError for any other name, and for a simulated GPU that the suite does not cover.
    """
    if text in DEVICES:
        return text
    if not text.startswith(_SIMULATED):
        raise ConfigurationError(
            f"device {text!r} is unknown; use auto, cpu, cuda, or a simulated GPU such as sim:sm120"
        )
    target = parse_target(text.removeprefix(_SIMULATED))
    if isinstance(target, Emulated):
        raise ConfigurationError(f"device {text!r} does not name a GPU; use --device cpu for Triton's interpreter")
    return f"{_SIMULATED}{target.target}"


def simulated_sm(device: str) -> int | None:
    """The SM of a simulated device; None for any other."""
    return int(device.removeprefix(f"{_SIMULATED}sm")) if device.startswith(_SIMULATED) else None


@dataclass(frozen=True)  # without slots, so that the defaults can be read from the class
class RunRequest:
    """A requested run. Raises ConfigurationError if a field is out of range or two contradict each other.

    ``phases`` are ascending; ``expression`` is a pytest marker expression; ``expect`` is the SM number the GPU must
    have; ``subject`` is an argument of ``find_subject``; ``profile`` is what it must pass, instead of what it claims;
    ``resume`` is the id or the directory of an earlier run, whose frozen request then replaces every field except
    ``out``, ``expect`` and ``strict_soft``; ``confirm`` names the one whose HARD failures are tried again
    (``verify/run/confirm.py``). ``beside`` is a word for a run that is shown next to the others and merged with none.
    """

    phases: tuple[int, ...] = tuple(PHASES)
    expression: str | None = None
    device: str = "auto"
    expect: int | None = None
    model: str = "embedded"
    subject: str = "bundled"
    seed: int = DEFAULT_SEED
    out: Path = field(default_factory=default_out)
    resume: str | None = None
    strict_soft: bool = False
    sanitize: bool = False
    profile: str | None = None
    confirm: str | None = None
    beside: str = ""

    def __post_init__(self) -> None:
        unknown = [phase for phase in self.phases if phase not in PHASES]
        if unknown or not self.phases:
            raise ConfigurationError(f"phases {list(self.phases)} must be numbers from {min(PHASES)} to {max(PHASES)}")
        if self.phases != tuple(sorted(set(self.phases))):
            raise ConfigurationError(f"phases {list(self.phases)} must be ascending and without repeats")
        parse_device(self.device)
        if self.device not in ("auto", "cuda") and self.expect is not None:
            what = "a CPU has no SM" if self.device == "cpu" else "no GPU is used"
            raise ConfigurationError(
                f"--device {self.device} and --expect sm{self.expect} contradict each other: {what}; drop one of them"
            )
        if self.expect is not None:
            parse_target(f"sm{self.expect}")
        if self.profile not in (None, *PROFILES):
            raise ConfigurationError(f"profile {self.profile!r} is unknown; use {', '.join(PROFILES)}")
        if not 0 <= self.seed < _SEED_LIMIT:
            raise ConfigurationError(f"seed {self.seed} is out of range; use 0 to {_SEED_LIMIT - 1}")
        if not re.fullmatch(r"[a-z0-9-]*", self.beside):
            raise ConfigurationError(f"--beside {self.beside!r} is not a word; use letters, digits and hyphens")
        for name in ("expression", "model", "subject", "resume", "confirm"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise ConfigurationError(f"{name} is empty; omit the option or give it a value")
        if self.out.exists() and not self.out.is_dir():
            raise ConfigurationError(f"--out {self.out} is not a directory; name a directory for the run's files")


#: Options that are fixed when a run starts, by the name of their setting.
_FIXED = {
    "level": "--level", "phases": "--phases", "expression": "-m", "device": "--device", "model": "--model",
    "subject": "--subject", "seed": "--seed", "sanitize": "--sanitize", "profile": "--profile",
    "confirm": "--confirm", "beside": "--beside",
}  # fmt: skip


def request_of(chosen: argparse.Namespace) -> RunRequest:
    """The validated request of ``run``. Raises ConfigurationError, also for ``--resume`` with an option that its run
    fixed.
    """
    given = {name: value for name, value in vars(chosen).items() if name != "verb"}
    for name in ("resume", "confirm"):
        if name in given and (fixed := [flag for other, flag in _FIXED.items() if other in given and other != name]):
            raise ConfigurationError(f"--{name} keeps the options of the original run; drop {', '.join(fixed)}")
    if (level := given.pop("level", None)) is not None:
        if own := [_FIXED[name] for name in ("phases", "expression", "sanitize") if name in given]:
            raise ConfigurationError(f"--level {level} says which checks run; drop {', '.join(own)}")
        given |= LEVELS[level]
    elif "phases" in given:
        given["phases"] = parse_phases(",".join(given["phases"]))
    if "device" in given:
        given["device"] = parse_device(given["device"])
    if "expect" in given:
        given["expect"] = parse_expect(given["expect"])
    return RunRequest(**given)
