"""How sensitive the numeric checks are, and how far they are from false alarms: ``python -m verify.sensitivity``.

Each check runs with an error planted into one element of what it judges: it must fail at 30 times what is allowed and
pass at 0.3 times. The smallest error that it catches is its detection limit. Correct subjects must pass with many seeds
and with headroom. Both results are kept in ``reports/sensitivity/``.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, ValidationError

from verify.checks import Check, catalogue
from verify.errors import ConfigurationError
from verify.files import INSTALLED, REPORTS, repository_root, write_atomic
from verify.heartbeat import Heartbeat
from verify.judge.perturb import CAUGHT, TOLERATED, Limit
from verify.machine.environment import version_of
from verify.record.digest import instrument_sha256
from verify.record.grounds import Checkout
from verify.record.headroom import tightest
from verify.record.schema import CheckResult, Measurement, SubjectInfo, Verdict
from verify.record.strict import Sha256, Strict
from verify.run.manifest import utc_now
from verify.run.scratch import Scratch, scratch_run
from verify.selftest.plant import subject_key
from verify.subject.find import find_subject
from verify.subject.subject import Subject

#: The least headroom that a correct subject may have in any tolerance.
HEADROOM = 2.0
SEEDS = 100

#: Neither phase 7 nor 8 has a HARD check.
_PHASES = "1-6"

#: Phases whose checks draw their inputs from the seed; in phase 6 the inputs come from a model.
_SEEDED = (4, 5)

_LIMIT_S = 3 * 3600

#: pytest's exit code if it ran no test.
_NONE_SELECTED = 5


class Measured(Strict):
    """What a report about the instrument was measured with."""

    time_utc: str
    device: Literal["auto", "cpu", "cuda"]
    subject: SubjectInfo
    instrument_sha256: Sha256


class Sharpness(Strict):
    """One HARD numeric check: its verdicts on the two planted errors, the limit of its least sensitive comparison."""

    id: str
    comparisons: int = Field(ge=1)
    on_caught: Verdict
    on_tolerated: Verdict
    limit: Limit

    @property
    def sharp(self) -> bool:
        return self.on_caught is Verdict.FAIL and self.on_tolerated is Verdict.PASS and self.limit.factor < math.inf


class Detection(Strict):
    """What each HARD numeric check catches. ``caught`` and ``tolerated`` are in units of what is allowed.

    ``unseen`` has the checks whose measurements are fractions but into which no error could be planted.
    """

    schema_version: Literal[1] = 1
    measured: Measured
    caught: float = CAUGHT
    tolerated: float = TOLERATED
    checks: list[Sharpness]
    unseen: list[str]

    @property
    def faults(self) -> list[str]:
        """What is wrong, one line per check."""
        dull = [
            f"{check.id}: {check.on_caught} at {self.caught:g} times its tolerance, "
            f"{check.on_tolerated} at {self.tolerated:g} times, limit {check.limit.factor:.3g}"
            for check in self.checks
            if not check.sharp
        ]
        return dull + [
            f"{name}: it compares fractions without the comparisons of verify/judge/tolerance.py"
            for name in self.unseen
        ]


class Room(Strict):
    """The least headroom of one numeric check over its seeds; one seed if the check draws nothing."""

    id: str
    seeds: int
    headroom: float
    name: str
    message: str

    @property
    def enough(self) -> bool:
        return self.headroom >= HEADROOM  # False for NaN


class Family(Strict):
    """The headroom of one correct subject in the checks of a family.

    ``rests_on`` has the files that could have changed it (``verify/record/grounds.py``), ``sha256`` is their digest.
    """

    time_utc: str
    torch: str
    device: Literal["auto", "cpu", "cuda"]
    seeds: int
    rests_on: list[str]
    sha256: Sha256
    checks: list[Room]


class Headroom(Strict):
    """The headroom of one correct subject in every tolerance, by family."""

    schema_version: Literal[2] = 2
    subject: str
    families: dict[str, Family] = Field(default_factory=dict)

    @property
    def rooms(self) -> list[Room]:
        return [room for family in self.families.values() for room in family.checks]

    @property
    def faults(self) -> list[str]:
        """What is too close to a false alarm, one line per check."""
        return [
            f"{room.id}: {room.headroom:.3g} times over {room.seeds} seeds, {room.name} {room.message}".strip()
            for room in self.rooms
            if not room.enough
        ]


def detection_file() -> Path:
    return repository_root() / REPORTS / "sensitivity" / "detection.json"


def headroom_file(subject: Subject) -> Path:
    return repository_root() / REPORTS / "sensitivity" / "headroom" / f"{subject_key(subject)}.json"


def recorded_limits() -> dict[str, Limit]:
    """The recorded detection limit of every check that has one, by id; empty if nothing is recorded."""
    path = detection_file()
    if not path.is_file():
        return {}
    return {check.id: check.limit for check in Detection.model_validate_json(path.read_bytes()).checks}


def measure_detection(
    *options: str, phases: str = _PHASES, subject: str = "bundled", device: str = "auto"
) -> Detection:
    """Plant errors into every HARD numeric check of ``phases`` that pytest's ``options`` select.

    Raises ConfigurationError when pytest cannot run them.
    """
    hard = ["phases", "-m", "hard and not slow", f"--phase={phases}", *options]
    tolerated = _run(*hard, f"--plant-error={TOLERATED}", subject=subject, device=device)
    nodes = [check.node for check in catalogue() if check.id in tolerated.probed]
    caught = _run(*nodes, f"--plant-error={CAUGHT}", subject=subject, device=device).results
    checks = [
        Sharpness(
            id=name,
            comparisons=len(found.limits),
            on_caught=caught[name].verdict,
            on_tolerated=tolerated.results[name].verdict,
            limit=max(found.limits, key=lambda limit: limit.factor),
        )
        for name, found in tolerated.probed.items()
    ]
    unseen = [
        name
        for name, result in tolerated.results.items()
        if name not in tolerated.probed and any(map(_fractional, result.measurements))
    ]
    return Detection(measured=_measured(subject, device), checks=checks, unseen=unseen)


def measure_headroom(subject: str = "bundled", device: str = "auto", seeds: int = SEEDS) -> Headroom:
    """Run the numeric checks of phases 4 and 5 with many seeds, and those of phase 6, which draw nothing, once.

    Of phase 6 it runs the checks that have a recorded detection limit. A family that was measured with the same torch
    and whose files are unchanged is not measured again. Each is written to ``headroom_file`` at once, so an interrupted
    measurement, which takes an hour, continues where it stopped. Raises ConfigurationError when pytest cannot run them.
    """
    found, known = find_subject(subject, repository_root()), recorded_limits()
    path, checkout = headroom_file(found), Checkout(repository_root(), found.root, found.folder)
    kept = _kept(path)
    by_family: dict[str, list[Check]] = {}
    for check in catalogue():
        if check.phase in _SEEDED or (check.phase == 6 and check.id in known):
            by_family.setdefault(check.spec.family, []).append(check)
    now = Headroom(subject=found.source)
    for family, checks in by_family.items():
        measured = kept.get(family)
        if measured is None or not _is_current(measured, checkout, device, seeds):
            measured = kept[family] = _family(checks, checkout, subject, device, seeds)
            write_atomic(path, Headroom(subject=found.source, families=kept).model_dump_json(indent=1) + "\n")
        now.families[family] = measured
    write_atomic(path, now.model_dump_json(indent=1) + "\n")
    return now


def _kept(path: Path) -> dict[str, Family]:
    if not path.is_file():
        return {}
    try:
        return Headroom.model_validate_json(path.read_bytes()).families
    except ValidationError as error:
        raise ConfigurationError(f"{path} is damaged or of another version; delete it to measure anew") from error


def _is_current(measured: Family, checkout: Checkout, device: str, seeds: int) -> bool:
    same = measured.torch, measured.device, measured.seeds, measured.sha256
    return same == (version_of("torch"), device, seeds, _sha256(checkout, measured.rests_on))


def _family(checks: Sequence[Check], checkout: Checkout, subject: str, device: str, seeds: int) -> Family:
    """The headroom of the numeric checks among ``checks``, measured now."""
    nodes = [check.node for check in checks]
    run = scratch_run(*nodes, f"--seeds={seeds}", subject=subject, device=device, limit_s=_LIMIT_S)
    if run.exit_code != _NONE_SELECTED:  # sanitizer checks are not selected
        run = run.finished()
    rooms = [
        _room(run.results[name], probed.seeds)
        for name, probed in run.probed.items()
        # a check that passes without a measurement is not numeric, although scores may be compared on the way
        if run.results[name].measurements or run.results[name].verdict is not Verdict.PASS
    ]
    files = sorted(run.rests_on)
    return Family(
        time_utc=utc_now(), torch=version_of("torch"), device=device, seeds=seeds, rests_on=files,
        sha256=_sha256(checkout, files), checks=rooms,
    )  # fmt: skip


def _sha256(checkout: Checkout, names: Iterable[str]) -> str:
    return hashlib.sha256(json.dumps(checkout.digests(names), sort_keys=True).encode()).hexdigest()


def _fractional(measurement: Measurement) -> bool:
    """Whether it is a ratio or a difference of floating-point numbers: not a whole number, and without a unit."""
    whole = measurement.measured.is_integer() and measurement.allowed.is_integer()
    return not whole and not measurement.unit


def _run(*options: str, subject: str, device: str) -> Scratch:
    return scratch_run(*options, subject=subject, device=device, limit_s=_LIMIT_S).finished()


def _room(result: CheckResult, seeds: int) -> Room:
    least = tightest(result.measurements)
    headroom = least.headroom if least and (result.verdict is Verdict.PASS or not least.within) else 0.0
    name = least.name if least else ""
    return Room(id=result.id, seeds=seeds, headroom=headroom, name=name, message=result.message)


def _measured(subject: str, device: str) -> Measured:
    root = repository_root()
    return Measured(
        time_utc=utc_now(),
        device=device,
        subject=find_subject(subject, root).info(),
        instrument_sha256=instrument_sha256(root),
    )


def _detection(chosen: argparse.Namespace) -> int:
    found = measure_detection(subject=chosen.subject, device=chosen.device)
    write_atomic(detection_file(), found.model_dump_json(indent=1) + "\n")
    return _tell(f"{len(found.checks)} HARD numeric checks", "faults", found.faults)


def _headroom(chosen: argparse.Namespace) -> int:
    found = measure_headroom(subject=chosen.subject, device=chosen.device, seeds=chosen.seeds)
    return _tell(f"{len(found.rooms)} numeric checks", f"with less than {HEADROOM:g} times headroom", found.faults)


def _tell(what: str, problem: str, wrong: Sequence[str]) -> int:
    print("\n".join([*wrong, f"{what}, {len(wrong)} {problem}"]))
    return 1 if wrong else 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure and record detection or headroom; 1 if a check falls short, 3 if it cannot be measured."""
    parser = argparse.ArgumentParser(prog="python -m verify.sensitivity", description=__doc__)
    parser.add_argument("what", choices=("detection", "headroom"))
    parser.add_argument("--subject", default="bundled")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seeds", type=int, default=SEEDS, help=f"for headroom; default: {SEEDS}")
    chosen = parser.parse_args(arguments)
    from rich.console import Console

    began = time.monotonic()
    try:
        if INSTALLED:
            raise ConfigurationError(f"{chosen.what} is recorded in a checkout; clone the repository and run it there")
        with Heartbeat(Console(stderr=True), lambda: f"{chosen.what} for {(time.monotonic() - began) / 60:.0f} min"):
            return {"detection": _detection, "headroom": _headroom}[chosen.what](chosen)
    except ConfigurationError as error:
        print(f"verify: {error}", file=sys.stderr)
        return 3


if __name__ == "__main__":
    sys.exit(main())
