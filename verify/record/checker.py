"""``python -m verify check``: an independent check of records that trusts none of their own claims.

It reads the files, the catalogue and the events of the run, and derives everything else again: the schema model only
decides whether a file has the shape of a record. A record of an honest failure is sound. A record that claims more than
it proves, or lacks a must-pass result, is not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pydantic import ValidationError

from verify.checks import Check, catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import decoded
from verify.record.archive import locate
from verify.record.reading import misplaced, shape_problem, unrepeated
from verify.record.rules import FILE_RULES, RULES
from verify.record.schema import Record
from verify.record.simulation import UNSUPPORTED
from verify.record.without_gpu import Json, kind_of, must_have

#: The codes with which a must-pass check may be skipped in a simulation, which verifies nothing.
_HONEST = frozenset({UNSUPPORTED, "NO_GPU"})


@dataclass(frozen=True, slots=True)
class Problem:
    """A problem in words, with its record and its check (empty: the whole record)."""

    record: str
    id: str
    problem: str

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.record, self.id, self.problem)))


def check(names: Sequence[str], *, as_json: bool = False) -> int:
    """Print every problem of the records ``names`` (files, directories of runs, run ids); 1 if there are any, else 0.

    Several records are merged; records that contradict each other are a problem. Raises ConfigurationError for a name
    that is not a record.
    """
    paths = [path for name in names for path in locate(name)]
    return tell(paths, examine(paths, every_check()), as_json=as_json)


def every_check() -> list[Check]:
    """The catalogue. Raises ConfigurationError if there is none, as no record would lack anything then."""
    if checks := list(catalogue()):
        return checks
    raise ConfigurationError("there are no checks in phases/; run this from a checkout of the suite")


def tell(paths: Sequence[object], problems: Sequence[Problem], *, as_json: bool = False) -> int:
    """Print every problem of the records at ``paths``, or that they are sound; 1 if there are any problems, else 0."""
    listed = [str(path) for path in paths]
    if as_json:
        print(json.dumps({"records": listed, "problems": [asdict(one) for one in problems]}, indent=1))
    else:
        print("\n".join(map(str, problems)) or f"sound: {', '.join(listed)}")
    return Exit.FAILED if problems else Exit.OK


def examine(paths: Iterable[Path], checks: Sequence[Check]) -> list[Problem]:
    """Every problem of the records at ``paths``: of each alone, then of all of them together."""
    known, problems, read = {one.id: one for one in checks}, [], []
    for path in paths:
        try:
            record, contradictions = _read(path)
        except ValueError as error:
            problems.append(Problem(str(path), "", str(error)))
            continue
        if why := misplaced(record.get("rehearsal", False)):
            problems.append(Problem(str(path), "", why))
            continue
        read.append((str(path), record))
        try:
            own = [Problem(str(path), *found) for rule in RULES for found in rule(record, known)]
            own += [Problem(str(path), *found) for rule in FILE_RULES for found in rule(path, record)]
        except ValueError as error:  # a moment that is none, a command with an open quote
            own = [Problem(str(path), "", f"has a value that cannot be read ({error})")]
        # the schema model's complaints are redundant where the rules found problems
        problems += own or [Problem(str(path), "", one) for one in contradictions]
    merged = [one for one in read if not (one[1].get("confirms") or one[1].get("beside"))]
    return [*problems, *_together(merged), *_absent(read, checks)]


def _read(path: Path) -> tuple[Json, list[str]]:
    """The record as JSON, and the contradictions the schema model finds. Raises ValueError if it is not a record."""
    try:
        content = decoded(path.read_bytes())
        Record.model_validate_json(content)
        found = []
    except OSError as error:
        raise ValueError(f"cannot be read ({error.strerror})") from error
    except ValidationError as error:
        if problem := shape_problem(error):
            raise ValueError(problem) from error
        found = [one["msg"] for one in error.errors()]
    return json.loads(content, object_pairs_hook=unrepeated), found


def _together(records: Sequence[tuple[str, Json]]) -> Iterator[Problem]:
    """What keeps records from being merged: two subjects, or two results of one check on one target."""
    held: dict[tuple[str, str, str], str] = {}
    for path, record in records:
        first_path, first = records[0]
        for name in ("name", "version", "content_sha256"):
            ours, theirs = record["subject"][name], first["subject"][name]
            if ours != theirs:
                yield Problem(
                    path, "", f"subject.{name} is {ours}, but {first_path} has {theirs}; they cannot be merged"
                )
        held_here = {(one["id"], record["target"], one["evidence"]) for one in record["results"]}
        if again := sorted(held_here & held.keys()):
            check_id, target, evidence = again[0]
            more = f" and {len(again) - 1} more results" if len(again) > 1 else ""
            told = f"repeats the {evidence} result on {target}{more} of {held[again[0]]}; they cannot be merged"
            yield Problem(path, check_id, told)
        held |= dict.fromkeys(held_here, path)


def _absent(records: Sequence[tuple[str, Json]], checks: Sequence[Check]) -> Iterator[Problem]:
    """The must-pass checks without a result, by family. A compilation must have those of phase 3 only, a simulation
    those of each phase that it has a result of.
    """
    # a run that only tries failures of another one again must have nothing
    records = [one for one in records if not one[1].get("confirms")]
    for target in dict.fromkeys(record["target"] for _, record in records):
        own = [(path, record) for path, record in records if record["target"] == target]
        kinds: dict[str, list[tuple[str, Json]]] = {}
        for one in own:
            kinds.setdefault(kind_of(one[1]), []).append(one)
        compiled = kinds.pop("compiled", [])
        built = [] if kinds.keys() - {"simulated"} else [[one] for one in compiled]
        for group in [*kinds.values(), *built]:
            yield from _absent_from(group, target, [one for one in checks if one.spec.gate == "hard"])


def _absent_from(group: Sequence[tuple[str, Json]], target: str, hard: Sequence[Check]) -> Iterator[Problem]:
    compilation, simulated = (group[0][1].get(part) for part in ("compilation", "simulation"))
    kind, gap = kind_of(group[0][1]), bool(compilation and compilation["gap"])
    phases = {int(result["id"][1]) for _, record in group for result in record["results"]}
    wanted = [one for one in hard if one.applies_to(target) and must_have(one.spec, kind, phases, gap=gap)]
    # must-pass checks of phase 6 are about the embedded model; runs with other models do not count
    have = {
        one["id"]: one
        for _, record in group
        for one in record["results"]
        if compilation or record["model"] == "embedded" or not one["id"].startswith("p6.")
    }
    places = ", ".join(path for path, _ in group)
    families: dict[str, list[str]] = {}
    for one in wanted:
        if one.id not in have:
            families.setdefault(one.spec.family, []).append(one.id)
        elif have[one.id]["verdict"] == "SKIP" and not (simulated and have[one.id]["code"] in _HONEST):
            yield Problem(
                places, one.id, f"is must-pass on {target}, but SKIP({have[one.id]['code']}) counts as absent"
            )
    for family, ids in families.items():
        if len(ids) == 1:
            yield Problem(places, ids[0], f"is must-pass on {target} and has no result")
        else:
            told = f"{len(ids)} checks are must-pass on {target} and have no result; the first is {ids[0]}"
            yield Problem(places, family, told)
