"""What a fleet run leaves: the records of its nodes or their absences, one matrix, and one exit code."""

from __future__ import annotations

import base64
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from verify.architectures import parse_target
from verify.checks import catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import write_atomic
from verify.record.absences import MEANINGS, Absence, Kind
from verify.run import events


@dataclass(frozen=True, slots=True)
class Ended:
    """How a target ended: its exit code, a line for the user, and the folder of its record or absence, if any."""

    code: int
    said: str
    folder: Path | None


def taken(target: str, result: Mapping[str, Any], out: Path) -> Ended:
    """Write the files of a result to a run's folder in ``out`` if its record is sound, else the target's absence."""
    if result.get("stopped"):
        return Ended(Exit.INTERRUPTED, f"{target}: stopped", None)
    if "absent" in result:
        return _absence(target, result["absent"], result["why"], out)
    files = {name: base64.b64decode(content) for name, content in result["files"].items()}
    record = next((name for name in files if name.endswith("/record.json")), None)
    last = next((line.strip() for line in reversed(result["tail"].splitlines())), "it printed nothing")
    if result["code"] is None or record is None:
        end = (
            "took longer than its limit" if result["code"] is None else f"ended with exit code {result['code']}: {last}"
        )
        return _absence(target, "NO_RECORD", f"verify run {end}", out)
    with tempfile.TemporaryDirectory() as scratch:
        _write(files, Path(scratch))
        if why := unsound(Path(scratch) / record, target):
            return _absence(target, "INVALID", why, out)
    run_id = Path(record).parent.name
    if (out / run_id).exists():
        return Ended(result["code"], f"{target}: {out / run_id} is there already", out / run_id)
    _write(files, out)
    return Ended(result["code"], f"{target}: exit code {result['code']}, {out / record}", out / run_id)


def _write(files: Mapping[str, bytes], folder: Path) -> None:
    # the record last: a folder that has one is whole
    for name in sorted(files, key=lambda name: name.endswith("/record.json")):
        parts = Path(name).parts
        if len(parts) != 2 or ".." in parts:
            raise ConfigurationError(f"a node handed over a file {name!r}, which is not one of a run; update its suite")
        write_atomic(folder / name, files[name])


def unsound(record: Path, target: str) -> str:
    """Why a record does not count: another target, or a problem of what the run selected; empty if it counts."""
    from verify.record.checker import examine
    from verify.record.reading import read_record

    checks = list(catalogue())
    if (record.parent / events.MANIFEST).is_file():
        try:
            selected = {one.id for one in events.read_manifest(record.parent).selected}
        except ConfigurationError as error:
            return str(error)
        checks = [one for one in checks if one.id in selected]
    if problems := examine([record], checks):
        more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
        return f"{': '.join(filter(None, (problems[0].id, problems[0].problem)))}{more}"
    found = read_record(record).target
    return "" if found == target else f"it is a record of {found}"


def _absence(target: str, kind: Kind, why: str, out: Path) -> Ended:
    one = Absence(absence=kind, target=target, time_utc=f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%SZ}", why=why)
    return Ended(Exit.CANNOT, f"{target}: {kind}, {MEANINGS[kind]}: {why}", one.write(out).parent)


def print_matrix(ended: Mapping[str, Ended], subject: str) -> None:
    """The report on the targets of the run, from its own records alone."""
    from verify.record.index import open_index
    from verify.record.verdict import assess
    from verify.report import overview, terminal

    folders = [one.folder for one in ended.values() if one.folder is not None]
    if not folders:
        return
    checks = list(catalogue())
    whose = None if subject == "bundled" else subject
    with open_index(folders, whose) as index:
        found = [
            assess(parse_target(target), index.records(parse_target(target)), checks, index.checkout, index.absences)
            for target in ended
        ]
    overview.print_grid(found, terminal.PipeConsole())


def exit_code(codes: Iterable[int]) -> int:
    """Of several runs: interrupted before failed, failed before unknown, each before success."""
    found = {*codes}
    order = (Exit.INTERRUPTED, Exit.FAILED, Exit.CANNOT, Exit.SOFT)
    return next((code for code in order if code in found), Exit.OK if found == {Exit.OK} else Exit.CANNOT)
