"""The files that a run writes while it runs, and the record that is made from them.

``run.json`` is the frozen manifest. ``events.jsonl`` grows by one flushed line per event, so that an abort, a hang or a
kill loses nothing that was finished. ``record.json`` can be composed from the two at any time.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import IO, Any, Literal

from pydantic import ValidationError

from verify.errors import ConfigurationError
from verify.files import write_atomic
from verify.record.digest import instrument_of
from verify.record.findings import Trail, findings
from verify.record.reading import write_record
from verify.record.schema import BLOCKING, CheckResult, MachineState, Record, Sitting, Verdict
from verify.record.simulation import MODES, SimulatedKernel, Simulation
from verify.run.manifest import Manifest, Selected, utc_now
from verify.run.request import simulated_sm
from verify.simulator import NOT_EXECUTED, ORDER_SEED, POISONS

MANIFEST, EVENTS, RECORD, LOCK = "run.json", "events.jsonl", "record.json", "lock"

#: The kinds of event, with the fields of each.
_FIELDS = {
    "start": {"id"},
    "result": {"result"},
    "elapsed": {"seconds"},
    "machine": {"phase", "at", "state"},
    "grounds": {"names"},
    "trail": {"id", "failed", "passed"},
    "launched": {"kernels"},
    "mutated": {"fault", "kernel"},
}


def create(run_dir: Path, manifest: Manifest) -> None:
    """Create the run's directory with its manifest and, unless it mutates code, a record without results."""
    run_dir.mkdir(parents=True)
    write_atomic(run_dir / MANIFEST, manifest.model_dump_json(indent=1) + "\n")
    update(run_dir, manifest)


def read_manifest(run_dir: Path) -> Manifest:
    """The frozen manifest of a run. Raises ConfigurationError naming the file if it is missing or damaged."""
    path = run_dir / MANIFEST
    try:
        return Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read ({error.strerror}); start a new run") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"]) or "file"
        raise ConfigurationError(f"{path} is damaged ({place}: {first['msg']}); start a new run") from error


def append(run_dir: Path, event: dict[str, Any]) -> None:
    """Append an event in a single write, so that lines of two processes cannot mix and a kill cannot tear one."""
    line = json.dumps(event) + "\n"
    path = run_dir / EVENTS
    try:
        with path.open("ab", buffering=0) as stream:
            stream.write(line.encode())
    except OSError as error:
        error.filename = str(path)  # which a failed write does not name
        raise


def append_start(run_dir: Path, check_id: str) -> None:
    append(run_dir, {"event": "start", "id": check_id, "time_utc": utc_now()})


def append_result(run_dir: Path, result: CheckResult) -> None:
    append(run_dir, {"event": "result", "result": result.model_dump(mode="json")})


def append_elapsed(run_dir: Path, seconds: float) -> None:
    """Append the wall time of one sitting; a resumed run has several."""
    append(run_dir, {"event": "elapsed", "seconds": seconds})


def append_machine(run_dir: Path, phase: int, at: Literal["start", "end"], state: MachineState) -> None:
    """Append how busy the machine is when a phase starts or ends."""
    append(run_dir, {"event": "machine", "phase": phase, "at": at, "state": state.model_dump(mode="json")})


def append_grounds(run_dir: Path, names: Iterable[str], *, phase: int = 0, file: str = "") -> None:
    """Append further files that every result of a phase, or of one file of checks, rests on."""
    append(run_dir, {"event": "grounds", "phase": phase, "file": file, "names": sorted(names)})


def append_trail(run_dir: Path, result: CheckResult, calls: Sequence[Mapping[str, str]]) -> None:
    """Append the calls that a check made of its subject, if it judged them: without repeats, the last one apart if the
    check failed there.
    """
    wrong = result.verdict is Verdict.FAIL
    if not calls or (result.verdict is not Verdict.PASS and not wrong):
        return
    passed = {tuple(call.items()): call for call in (calls[:-1] if wrong else calls)}
    failed = calls[-1] if wrong else None
    append(run_dir, {"event": "trail", "id": result.id, "failed": failed, "passed": [*passed.values()]})


def append_launched(run_dir: Path, kernels: Sequence[SimulatedKernel]) -> None:
    """Append what a simulated check executed, by kernel."""
    append(run_dir, {"event": "launched", "kernels": [one.model_dump() for one in kernels]})


def append_mutated(run_dir: Path, fault: str, kernel: str) -> None:
    """Append that a fault was planted in the compiled code of a kernel. No record can be made of the run after it."""
    append(run_dir, {"event": "mutated", "fault": fault, "kernel": kernel})


def read_mutated(run_dir: Path) -> list[str]:
    """The kernels in whose compiled code a fault was planted. Raises ConfigurationError for a damaged file."""
    return [event["kernel"] for event in read_events(run_dir) if event["event"] == "mutated"]


def _simulation(manifest: Manifest, happened: Iterable[dict[str, Any]]) -> Simulation | None:
    """What a simulated run executed so far; None for any other run."""
    if (sm := simulated_sm(manifest.device)) is None:
        return None
    kernels: dict[str, SimulatedKernel] = {}
    for event in happened:
        for found in event["kernels"] if event["event"] == "launched" else ():
            one = SimulatedKernel.model_validate(found)
            if before := kernels.get(one.ptx_sha256):
                more = {"launches": before.launches, "thread_instructions": before.thread_instructions}
                one = one.model_copy(update={name: getattr(one, name) + count for name, count in more.items()})
            kernels[one.ptx_sha256] = one
    own = {name: digest for name, digest in manifest.sources.items() if name.startswith("verify/simulator/")}
    return Simulation(
        sm=sm, triton=manifest.environment.triton, simulator_sha256=instrument_of(own), modes=[*MODES],
        poisons=[f"{word:#010x}" for word in POISONS], warp_orders=[ORDER_SEED], not_executed=[*NOT_EXECUTED],
        kernels=[*kernels.values()],
    )  # fmt: skip


def _trails(happened: Iterable[dict[str, Any]]) -> dict[str, Trail]:
    return {one["id"]: Trail(one["failed"], one["passed"]) for one in happened if one["event"] == "trail"}


class Follower:
    """Reads the events that were appended since its last call or, at first, since its creation."""

    def __init__(self, run_dir: Path, *, from_start: bool = False) -> None:
        self._path = run_dir / EVENTS
        self._position = self._lines = 0
        if not from_start:
            self.new()

    def new(self) -> list[dict[str, Any]]:
        """The new events in order, with the objects they hold. Text after the last newline is still being written, and
        not yet an event.

        Raises ConfigurationError naming the file and the number of a complete line that is not an event.
        """
        if not self._path.exists():
            return []
        with self._path.open("rb") as stream:
            stream.seek(self._position)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        found = []
        for line in whole.splitlines():
            self._lines += 1
            found.append(_event(line, self._path, self._lines))
        return found


def _event(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        event = json.loads(line)
        if not isinstance(event, dict) or not event.keys() >= _FIELDS[event["event"]]:
            raise ValueError("not an event")
        if event["event"] == "result":
            event["result"] = CheckResult.model_validate(event["result"])
        if event["event"] == "machine":
            event["state"] = MachineState.model_validate(event["state"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path}, line {number}, is damaged; start a new run") from error
    return event


def read_events(run_dir: Path) -> list[dict[str, Any]]:
    """All events so far, in order."""
    return Follower(run_dir, from_start=True).new()


def read_results(run_dir: Path) -> dict[str, CheckResult]:
    """The final result of every check that has one. Raises ConfigurationError for a damaged file."""
    return _results(read_events(run_dir))


def _results(happened: Iterable[dict[str, Any]]) -> dict[str, CheckResult]:
    results = (event["result"] for event in happened if event["event"] == "result")
    return {result.id: result for result in results}


def judged(results: Mapping[str, CheckResult]) -> set[str]:
    """The ids of the checks that need not be tried again: all except those without a verdict because of the machine.

    INFRA is not a judgement of the subject, and checks that it blocked were not tried. A check stays BLOCKED only as
    long as its blocker has failed.
    """
    failed = {result.id for result in results.values() if result.verdict in BLOCKING - {Verdict.INFRA}}
    return {
        result.id
        for result in results.values()
        if result.verdict is not Verdict.INFRA and (result.verdict is not Verdict.BLOCKED or result.by in failed)
    }


def _sittings(found: Iterable[dict[str, Any]]) -> list[Sitting]:
    sittings: list[Sitting] = []
    for event in found:
        state, phase = event["state"], event["phase"]
        if event["at"] == "start":
            sittings.append(Sitting(phase=phase, start=state))
            continue
        last = next((n for n in reversed(range(len(sittings))) if sittings[n].phase == phase), None)
        if last is not None and sittings[last].end is None:
            sittings[last] = sittings[last].model_copy(update={"end": state})
    return sittings


def drop_torn_line(run_dir: Path) -> None:
    """Remove a last line that a power failure left incomplete, so that the next event starts its own line."""
    path = run_dir / EVENTS
    if path.exists():
        content = path.read_bytes()
        os.truncate(path, content.rfind(b"\n") + 1)


def blocker(needs: tuple[str, ...], results: dict[str, CheckResult]) -> str | None:
    """The id of the check whose failure in this run makes a check with these ``needs`` meaningless.

    A need is a full id or a family. If a need was itself blocked, its blocker is returned. Needs are HARD, except in
    phase 7, where all checks are SOFT and none means anything without an active plugin.
    """
    for need in needs:
        for result in results.values():
            if result.id != need and result.id.rpartition(".")[0] != need:
                continue
            if result.verdict is Verdict.BLOCKED:
                return result.by
            if result.verdict in BLOCKING:
                return result.id
    return None


def update(run_dir: Path, manifest: Manifest) -> None:
    """Bring ``record.json`` up to date while the run goes on; a run that mutates code has none."""
    if manifest.mutation is None:
        compose(run_dir, "running")


def compose(run_dir: Path, state: Literal["running", "interrupted", "complete"]) -> Record:
    """Write ``record.json`` from the manifest and the events so far, atomically, and return it.

    Results are in the order of the selection. Raises ConfigurationError for a run that mutates code, or did.
    """
    manifest = read_manifest(run_dir)
    happened = read_events(run_dir)
    if manifest.mutation or any(event["event"] == "mutated" for event in happened):
        raise ConfigurationError(f"run {manifest.run_id} mutates compiled code, so it makes no record; start a new run")
    found = _results(happened)
    results, rests_on = _grounded(
        [check for check in manifest.selected if check.id in found], found, happened, manifest
    )
    record = Record(
        run_id=manifest.run_id,
        time_utc=manifest.time_utc,
        state=state,
        target=manifest.target,
        subject=manifest.subject_info,
        instrument_sha256=manifest.instrument_sha256,
        environment=manifest.environment,
        model=manifest.model_id,
        seed=manifest.seed,
        selection=manifest.selection,
        duration_s=sum(event["seconds"] for event in happened if event["event"] == "elapsed"),
        results=results,
        machine=_sittings(event for event in happened if event["event"] == "machine"),
        sources={name: manifest.sources[name] for name in sorted({name for names in rests_on for name in names})},
        rests_on=rests_on,
        findings=[] if state == "running" else findings(results, _trails(happened)),
        simulation=_simulation(manifest, happened),
        confirms=manifest.confirms,
        beside=manifest.beside,
    )
    write_record(record, run_dir / RECORD)
    return record


def _grounded(
    checks: Iterable[Selected],
    found: Mapping[str, CheckResult],
    happened: Iterable[dict[str, Any]],
    manifest: Manifest,
) -> tuple[list[CheckResult], list[list[str]]]:
    """The results of ``checks``, each with the index of its list of grounds, and these lists; one per file of checks.

    If nothing was noted, because a process died before its first check, the list has every file.
    """
    noted = _noted(happened)
    lists: dict[tuple[str, ...], int] = {}
    results = []
    for check in checks:
        file = check.node.partition("::")[0]
        if not manifest.sources:  # from an older version of the suite
            results.append(found[check.id])
            continue
        names: Set[str] = manifest.sources.keys()
        if file in noted:
            names &= noted[file] | noted.get(check.phase, set())
        place = lists.setdefault(tuple(sorted(names)), len(lists))
        results.append(found[check.id].model_copy(update={"rests_on": place}))
    return results, [[*names] for names in lists]


def _noted(happened: Iterable[dict[str, Any]]) -> dict[str | int, set[str]]:
    """The names that results rest on, by file of checks and by phase."""
    noted: dict[str | int, set[str]] = {}
    for event in happened:
        if event["event"] == "grounds":
            noted.setdefault(event["file"] or event["phase"], set()).update(event["names"])
    return noted


def read_grounds(run_dir: Path) -> set[str]:
    """The names of all files that some result rests on. Raises ConfigurationError for a damaged file."""
    return set().union(*_noted(read_events(run_dir)).values())


def lock(run_dir: Path) -> IO[bytes]:
    """Lock the run until the returned file, and every copy that a child inherited, is closed.

    Raises ConfigurationError if another process holds the lock.
    """
    stream = (run_dir / LOCK).open("ab")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        stream.close()
        raise ConfigurationError(f"run {run_dir.name} is still running; wait for it, or stop it first") from error
    return stream
