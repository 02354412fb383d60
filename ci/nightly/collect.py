"""Collects the records of a night: checks each, says why a GPU has none, and compares the night with earlier ones.

A record that ``verify check`` refuses is left out, and its GPU is INVALID; the others go on. The folder of nights then
holds the last weeks, from which the reports, the pages and ``alerts.json`` are made.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from ci.nightly import NEW, NightlyError
from ci.nightly.facts import FACTS, of_night
from ci.nightly.github import Api, output, summarise
from ci.nightly.gpus import read_gpus
from ci.nightly.job import OUTCOME
from verify.checks import Check, catalogue
from verify.errors import ConfigurationError
from verify.record.absences import Absence, Kind
from verify.record.checker import examine
from verify.record.index import open_index
from verify.record.reading import read_record, rehearsals_only
from verify.record.schema import Record
from verify.report import verb
from verify.report.difference import diff
from verify.report.workflow import annotation

#: How many days of records are carried from night to night.
_KEPT_DAYS = 45

#: The artifact that carries them, and the most bytes that it may have unpacked.
NIGHTS, _MOST_BYTES = "nights", 8 * 2**30

#: Begins the name of the artifact of a row.
_OF_A_ROW = "record-"

#: The artifacts of the jobs that need no GPU, and the names of these jobs.
_OTHERS = {
    "compiled": "every GPU, compiled and simulated", "emulated": "emulated without a GPU",
    "newest": "newest without a GPU",
}  # fmt: skip

#: By how much the clocks of two machines may differ.
_CLOCKS = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Job:
    """What GitHub says of a row's job: whether a runner took it, and how it ended."""

    taken: bool
    conclusion: str


def fetch_earlier(api: Api, nights: Path) -> str:
    """Unpack the newest artifact of earlier nights as the folder ``nights``; returns how far it goes.

    Nothing is left of one that cannot be unpacked. Raises NightlyError, also if ``nights`` exists.
    """
    found = api.pages("/actions/artifacts", "artifacts", name=NIGHTS)  # newest first
    newest = next((one for one in found if not one["expired"] and _own(one["workflow_run"] or {})), None)
    if newest is None:
        return "there are no earlier nights"
    content, name = api.download(f"/actions/artifacts/{newest['id']}/zip"), f"the artifact {NIGHTS} of "
    name += str(newest["created_at"])
    with TemporaryDirectory(dir=nights.parent) as scratch:
        try:
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                if sum(one.file_size for one in archive.infolist()) > _MOST_BYTES:
                    raise NightlyError(f"{name} is too large; delete it")
                archive.extractall(Path(scratch) / NIGHTS)
            (Path(scratch) / NIGHTS).replace(nights)
        except zipfile.BadZipFile as error:
            raise NightlyError(f"{name} is damaged ({error}); delete it") from error
        except OSError as error:
            raise NightlyError(f"{name} cannot be unpacked ({error.strerror}); empty {nights}") from error
    return f"earlier nights up to {newest['created_at'][:10]}"


def _own(run: Mapping[str, Any]) -> bool:
    """Whether an artifact is of this repository and branch: anybody can upload one by a pull request from a fork."""
    same = run.get("head_repository_id") == run.get("repository_id")
    return same and run.get("head_branch") == os.environ.get("GITHUB_REF_NAME")


def jobs_of(api: Api, run: str, attempt: str) -> dict[str, Job]:
    """The jobs of this run of the workflow, by name. Raises NightlyError."""
    found = api.pages(f"/actions/runs/{run}/attempts/{attempt}/jobs", "jobs")
    return {one["name"]: Job(bool(one["runner_name"]), one["conclusion"] or one["status"]) for one in found}


@dataclass(slots=True)
class Night:
    """Tonight: its moment (RFC 3339), the folder of nights, and the checks of the suite.

    A record from before ``since`` (empty: any) is of another night. ``taken`` are the ids of tonight's runs, ``told``
    is what a reader must know, and ``lost`` says that a job that needs no GPU left no sound record.
    """

    time_utc: str
    nights: Path
    checks: Sequence[Check]
    rehearsal: bool = False
    since: str = ""
    taken: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    lost: bool = False

    def take(self, folder: Path, target: str | None = None) -> tuple[list[Record], list[str]]:
        """Copy the sound records under ``folder`` into the folder of nights, and return them; and a sentence for each
        that is refused, also for one of another target than ``target``, if given.
        """
        taken: list[Record] = []
        refused: list[str] = []
        for path in sorted(folder.rglob("record.json")) + sorted(folder.rglob("sm*.json")):
            problems = [str(one.problem) for one in examine([path], self.checks)]
            if not problems:
                record = read_record(path)
                place = self.nights / record.run_id / path.name
                problems = [*self._unwanted(record, target), *_other(path, place)]
            if problems:
                more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
                refused.append(f"{path.parent.name}/{path.name}: {problems[0]}{more}")
                continue
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            taken.append(record)
        self.taken |= {one.run_id for one in taken}
        return taken, refused

    def _unwanted(self, record: Record, target: str | None) -> Iterator[str]:
        if target not in (None, record.target):
            yield f"it is of {record.target}, and the job was for {target}"
        if self.since and datetime.fromisoformat(record.time_utc) < datetime.fromisoformat(self.since) - _CLOCKS:
            yield f"it is of {record.time_utc}, before this night began ({self.since})"

    def absent(self, kind: Kind, target: str, why: str) -> None:
        found = Absence(absence=kind, target=target, time_utc=self.time_utc, why=why, rehearsal=self.rehearsal)
        found.write(self.nights)
        self.told.append(f"{target}: {found.told}")

    def forget(self) -> None:
        """Remove what is older than the days that are kept."""
        oldest = datetime.fromisoformat(self.time_utc) - timedelta(days=_KEPT_DAYS)
        for folder in self.nights.iterdir():
            if folder.is_dir() and folder.name[:8] < f"{oldest:%Y%m%d}":
                shutil.rmtree(folder)


def _other(path: Path, place: Path) -> Iterator[str]:
    """A job that ran again leaves the same record again, which is no contradiction."""
    if place.exists() and place.read_bytes() != path.read_bytes():
        yield "another record of this run is there already"


def collect(night: Night, rows: Iterable[Mapping[str, Any]], artifacts: Path, jobs: Mapping[str, Job]) -> None:
    """Take every record of the night, and say why a GPU has none and what else is refused."""
    for row in rows:
        _row(night, row, _artifact(artifacts, f"{_OF_A_ROW}{row['name']}"), jobs.get(row["name"]))
    for name, job in _OTHERS.items():
        folder = _artifact(artifacts, name)
        taken, refused = night.take(folder) if folder else ([], [])
        night.told += [f"{name}: refused: {sentence}" for sentence in refused]
        if job in jobs and not taken:
            night.lost = True
            night.told.append(f"{name}: the job {job!r} left no sound record ({jobs[job].conclusion})")
    night.forget()


def _artifact(artifacts: Path, name: str) -> Path | None:
    """The artifact with this name of the last attempt that has one; None without any."""
    found = {}
    for path in artifacts.iterdir():
        if match := re.fullmatch(rf"{re.escape(name)}-(\d+)-(\d+)", path.name):
            found[int(match[1]), int(match[2])] = path
    return found[max(found)] if found else None


def _row(night: Night, row: Mapping[str, Any], folder: Path | None, job: Job | None) -> None:
    """Take the record of a row, or say why there is none; ``folder`` is the artifact of its job, if it left one."""
    target = row["target"]
    if row["why"]:
        night.absent("NO_RUNNER", target, row["why"])
    elif folder is not None:
        taken, refused = night.take(folder, target)
        if any(one.on_target and not one.apart for one in taken):
            night.told += [f"{target}: refused: {sentence}" for sentence in refused]
        elif refused:
            night.absent("INVALID", target, refused[0])
        else:
            night.absent("NO_RECORD", target, _said(folder))
    elif job is None or not job.taken:
        night.absent("NO_RUNNER", target, f"its job did not begin within {row['start_within_min']} minutes")
    else:
        night.absent("NO_RECORD", target, f"the job ended with {job.conclusion} and uploaded nothing")


def _said(folder: Path) -> str:
    """What the job of an artifact without a record said last."""
    for path in folder.rglob(OUTCOME):
        try:
            outcome = json.loads(path.read_text("utf-8"))
            return f"exit code {outcome['exit_code']}: {outcome['said'] or 'it said nothing'}"
        except (OSError, ValueError, KeyError, TypeError) as error:
            return f"its {OUTCOME} cannot be read ({type(error).__name__})"
    return "its artifact has no record"


def publish(night: Night, out: Path, site: bool) -> int:
    """Write the summary, the pages and the facts for alerts; 1 if a HARD check got worse or did not run, else 0."""
    folders = [night.nights]
    with open_index(folders) as index:
        facts = of_night(index, night.checks, night.time_utc, night.taken)
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for one in facts["failing"]:
        if one["kind"] == NEW:
            print(annotation("error", f"{one['place']} {one['family']}", one["told"]))
    for sentence in night.told:
        print(annotation("warning", "no record", sentence))
    worse = 0
    with redirect_stdout(io.StringIO()) as printed:
        verb.report(None, "markdown", folders)
        try:
            worse, changes = _captured(lambda: diff([], "last-green", None, folders, None, as_json=False))
        except ConfigurationError as error:  # nothing has been recorded yet
            changes = f"{error}\n"
        print(f"\n## Since the last green run\n\n```\n{changes}```\n\n<details><summary>Every check</summary>\n")
        verb.report(None, "markdown", folders, every_check=True)
        print("\n</details>")
    summarise("\n".join(["## The night", "", *(f"* {sentence}" for sentence in night.told), "", printed.getvalue()]))
    if site:
        verb.report(None, "html", folders, out=out / "site")
    return 1 if night.lost else worse


def _captured(call: Callable[[], int]) -> tuple[int, str]:
    with redirect_stdout(io.StringIO()) as printed:
        return call(), printed.getvalue()


def main(arguments: Sequence[str] | None = None) -> int:
    """Collect the night; 1 if a HARD check got worse or did not run on any target, 3 if it cannot be collected."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--artifacts", type=Path, required=True, help="the folder with tonight's artifacts")
    parser.add_argument("--nights", type=Path, required=True, help="the folder of all nights, which is made or grows")
    parser.add_argument("--out", type=Path, required=True, help="where the pages and alerts.json go")
    parser.add_argument("--now", help="the moment of the night (default: now)")
    parser.add_argument("--no-site", action="store_true", help="make no pages")
    parser.add_argument("--rehearsal", action="store_true", help="take made-up records, and no others")
    chosen = parser.parse_args(arguments)
    now = chosen.now or datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    try:
        with rehearsals_only() if chosen.rehearsal else nullcontext():
            return _collect(chosen, now)
    except (NightlyError, ConfigurationError) as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 3


def _collect(chosen: argparse.Namespace, now: str) -> int:
    chosen.artifacts.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, Job] = {}
    since = ""
    if (api := Api.of_environment()) is not None:
        run = os.environ["GITHUB_RUN_ID"]
        print(fetch_earlier(api, chosen.nights), file=sys.stderr)
        jobs = jobs_of(api, run, os.environ.get("GITHUB_RUN_ATTEMPT", "1"))
        since = api.get(f"/actions/runs/{run}")["created_at"]
    chosen.nights.mkdir(parents=True, exist_ok=True)
    night = Night(now, chosen.nights, list(catalogue()), chosen.rehearsal, since)
    collect(night, json.loads(os.environ.get("ROWS") or "null") or _unplanned(), chosen.artifacts, jobs)
    code = publish(night, chosen.out, not chosen.no_site)
    output(complete="true")  # a night that is only half collected is not kept
    return code


def _unplanned() -> list[dict[str, Any]]:
    """Every row, if the plan could not be made: then no GPU has a job, and none may stay green without a word."""
    return [{"name": one.name, "target": one.target, "why": "the night could not be planned"} for one in read_gpus()]


if __name__ == "__main__":
    sys.exit(main())
