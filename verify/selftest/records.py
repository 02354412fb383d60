"""Tampered records, and the rules that must refuse them or must not turn green on them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from verify.architectures import find, parse_target
from verify.checks import Check, catalogue, derive_seed
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.record.checker import examine
from verify.record.grounds import PACKAGE, SUBJECT, Checkout
from verify.record.kills import Cell, Outcome
from verify.record.reading import UnreadableRecord, read_record
from verify.record.schema import CheckResult, Environment, Gpu, Measurement, Record, SubjectInfo
from verify.record.verdict import TargetVerdict, assess, must_pass
from verify.selftest.faults import Change, Fault, Tampered

#: The files that the results of a sound record rest on: one of the suite and one of the subject.
_SOURCES = ("verify/judge/oracle.py", f"{SUBJECT}/{PACKAGE}/__init__.py")

_GREEN = (TargetVerdict.VERIFIED, TargetVerdict.EMULATED_PASS)


def judge(fault: Fault) -> list[Cell]:
    """What each rule that claims to catch a tampered record says about it."""
    with TemporaryDirectory() as folder:
        paths = []
        for number, tampered in enumerate(fault.records):
            paths.append(Path(folder) / f"{number}.json")
            paths[-1].write_text(json.dumps(_applied(fault, tampered)), "utf-8")
        return [_cell(fault, name, _judge_named(fault, name)(paths)) for name in fault.kills]


def _cell(fault: Fault, name: str, objection: str | None) -> Cell:
    killed = objection is not None and re.search(fault.says, objection) is not None
    outcome = Outcome.KILLED if killed else Outcome.SURVIVED
    return Cell(
        check=name, outcome=outcome, verdict="passed" if objection is None else "refused", message=objection or ""
    )


def _refused(paths: Sequence[Path]) -> str | None:
    """The sentence with which ``read_record`` refuses one of the files."""
    for path in paths:
        try:
            read_record(path)
        except UnreadableRecord as error:
            return str(error).removeprefix(f"{path.parent}/")
    return None


def _not_green(paths: Sequence[Path]) -> str | None:
    """The verdict and its sentence if all files together do not turn the first one's target green."""
    records = [read_record(path) for path in paths]
    found = assess(parse_target(records[0].target), records, _checks(), _checkout())
    return None if found.verdict in _GREEN else f"{found.verdict}: {found.sentence}"


def _unsound(paths: Sequence[Path]) -> str | None:
    """The problems that the independent checker finds in the files."""
    return "\n".join(problem.problem for problem in examine(paths, _checks())) or None


#: The rules by name: each takes the files and returns its objection, or None.
JUDGES: dict[str, Callable[[Sequence[Path]], str | None]] = {
    "read_record": _refused, "assess": _not_green, "check": _unsound,
}  # fmt: skip


def _judge_named(fault: Fault, name: str) -> Callable[[Sequence[Path]], str | None]:
    if name not in JUDGES:
        raise ConfigurationError(
            f"fault {fault.id} names {name}, which does not judge records; use {' or '.join(JUDGES)} "
            f"in faults/{fault.layer}.toml"
        )
    return JUDGES[name]


@cache
def _checks() -> tuple[Check, ...]:
    return tuple(catalogue())


@cache
def _checkout() -> Checkout:
    root = repository_root()
    return Checkout(root, root, root / PACKAGE)


def good_record(target: str, day: int = 1, phases: Sequence[int] = tuple(range(1, 9))) -> Record:
    """A sound record in which every must-pass check of those phases passed on the target."""
    sm = None if target == "emulated" else int(target.removeprefix("sm"))
    seed, digest = 0, hashlib.sha256(b"sample").hexdigest()
    again = f"--device {'cuda' if sm else 'cpu'} --seed {seed}"
    wanted = must_pass(_checks(), find(sm) if sm else parse_target(target))
    results = [
        CheckResult(
            id=check.id, gate=check.spec.gate, plan=check.spec.plan, verdict="PASS", duration_s=0.5,
            seed=derive_seed(seed, check.id), evidence="hardware" if sm else "emulated",
            repeat=f"python -m pytest '{check.node}' {again}",
            measurements=[Measurement(name="error", measured=0.25, allowed=1.0)], rests_on=0,
        )
        for check in wanted
        if check.phase in phases
    ]  # fmt: skip
    sources = {name: _checkout().sha256(name) or digest for name in _SOURCES}
    gpu = Gpu(name=f"Sample GPU {sm}", uuid_sha256=digest, sm=sm, memory_gib=16, driver="580.1") if sm else None
    environment = Environment(
        gpu=gpu, cuda_runtime="13.0", cuda_toolkit="13.0", torch="2.13.0", triton="3.7.1", ptxas={},
        flash_attn="not installed", vllm="0.32.0", transformers="5.19.0", python="3.11.7", os="Linux",
        variables={"TRITON_DEFAULT_FP_FUSION": "1"} | ({} if sm else {"TRITON_INTERPRET": "1"}),
    )  # fmt: skip
    subject = SubjectInfo(
        name="sample", version="1.0", source="bundled", git_sha=digest[:40], dirty=False, content_sha256=digest
    )
    return Record(
        run_id=f"202611{day:02d}T000000Z-{target}-0001", time_utc=f"2026-11-{day:02d}T00:00:00Z", target=target,
        state="complete",
        subject=subject, instrument_sha256=digest, environment=environment, model="embedded", seed=seed,
        selection="everything", duration_s=1.0, results=results, sources=sources, rests_on=[[*_SOURCES]],
    )  # fmt: skip


def _applied(fault: Fault, tampered: Tampered) -> dict[str, Any]:
    """The record as JSON data with every change made. Raises ConfigurationError if one does not apply."""
    data = good_record(tampered.target, tampered.day, tampered.phases).model_dump(mode="json")
    for change in tampered.changes:
        try:
            _change(data, change)
        except (KeyError, IndexError, StopIteration, TypeError) as error:
            raise ConfigurationError(
                f"fault {fault.id} no longer applies: a good record has nothing at {'/'.join(map(str, change.at))}; "
                f"edit its 'at' in faults/{fault.layer}.toml"
            ) from error
    return data


def _change(data: Any, change: Change) -> None:
    *way, last = change.at
    for key in way:
        data = data[_index(data, key)]
    if change.op == "set":
        key = last if isinstance(data, dict) else _index(data, last)
        data[key] = change.to
        return
    index = _index(data, last)
    if change.op == "remove":
        del data[index]
    else:
        data.append(data[index])


def _index(data: Any, key: str | int) -> str | int:
    """The index of a result by its id; any other key is its own index, and must exist."""
    if isinstance(data, list) and isinstance(key, str):
        return next(number for number, item in enumerate(data) if item["id"] == key)
    if isinstance(data, dict) and key not in data:
        raise KeyError(key)
    return key
