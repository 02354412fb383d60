"""Collects the records of a night: checks each, says why a GPU has none, and compares the night with earlier ones.

A record that ``verify check`` refuses is left out, and its GPU is INVALID; the others go on. The folder of nights then
holds the last weeks, from which the reports, the pages and ``alerts.json`` are made.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import sys
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from ci.nightly import NightlyError
from ci.nightly.facts import FACTS, NEW, of_night
from ci.nightly.github import Api, annotation, summarise
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

#: How many days of records are carried from night to night.
_KEPT_DAYS = 45

#: The artifact that carries them, and the most bytes that it may have unpacked.
NIGHTS, _MOST_BYTES = "nights", 8 * 2**30

#: The artifacts of tonight's jobs, by what their names begin with; a row's name follows.
_OF_A_ROW, _OTHERS = "record-", ("compiled-", "emulated-", "newest-")


@dataclass(frozen=True, slots=True)
class Job:
    """What GitHub says of a row's job: whether a runner took it, and how it ended."""

    taken: bool
    conclusion: str


def fetch_earlier(api: Api, nights: Path) -> str:
    """Unpack the newest artifact of earlier nights into ``nights``; returns how far it goes. Raises NightlyError."""
    found = api.get("/actions/artifacts", name=NIGHTS, per_page=10)["artifacts"]
    usable = [one for one in found if not one["expired"] and _own(one["workflow_run"])]
    if not usable:
        return "there are no earlier nights"
    newest = max(usable, key=lambda one: one["created_at"])
    content = api.download(f"/actions/artifacts/{newest['id']}/zip")
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(one.file_size for one in archive.infolist()) > _MOST_BYTES:
                raise NightlyError(f"the artifact {NIGHTS} of {newest['created_at']} is too large; delete it")
            archive.extractall(nights)
    except zipfile.BadZipFile as error:
        raise NightlyError(
            f"the artifact {NIGHTS} of {newest['created_at']} is damaged ({error}); delete it"
        ) from error
    return f"earlier nights up to {newest['created_at'][:10]}"


def _own(run: Mapping[str, Any]) -> bool:
    """Whether an artifact is of this repository and branch: anybody can upload one by a pull request from a fork."""
    same = run["head_repository_id"] == run["repository_id"]
    return same and run["head_branch"] == os.environ.get("GITHUB_REF_NAME")


def jobs_of(api: Api, run: str, attempt: str) -> dict[str, Job]:
    """The jobs of this run of the workflow, by name. Raises NightlyError."""
    found = api.pages(f"/actions/runs/{run}/attempts/{attempt}/jobs", "jobs")
    return {one["name"]: Job(bool(one["runner_name"]), one["conclusion"] or one["status"]) for one in found}


@dataclass(slots=True)
class Night:
    """Tonight: its moment (RFC 3339), the folder of nights, and the checks of the suite."""

    time_utc: str
    nights: Path
    checks: Sequence[Check]
    rehearsal: bool

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
                if target not in (None, record.target):
                    problems = [f"it is of {record.target}, and the job was for {target}"]
                elif (self.nights / record.run_id / "record.json").exists() and path.name == "record.json":
                    problems = [f"run {record.run_id} is there already"]
            if problems:
                more = f" and {len(problems) - 1} more problems" if len(problems) > 1 else ""
                refused.append(f"{path.parent.name}/{path.name}: {problems[0]}{more}")
                continue
            place = self.nights / record.run_id / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, place)
            taken.append(record)
        return taken, refused

    def absent(self, kind: Kind, target: str, why: str) -> Absence:
        found = Absence(absence=kind, target=target, time_utc=self.time_utc, why=why, rehearsal=self.rehearsal)
        found.write(self.nights)
        return found

    def forget(self) -> None:
        """Remove what is older than the days that are kept."""
        oldest = datetime.fromisoformat(self.time_utc) - timedelta(days=_KEPT_DAYS)
        for folder in self.nights.iterdir():
            if folder.is_dir() and folder.name[:8] < f"{oldest:%Y%m%d}":
                shutil.rmtree(folder)


def of_row(
    night: Night, row: Mapping[str, Any], folder: Path | None, job: Job | None, told: list[str]
) -> Absence | None:
    """Take the record of a row, or say why there is none. ``folder`` is the artifact of its job, if it left one;
    ``told`` gets a sentence for each other file of it that is refused.
    """
    target = row["target"]
    if row["why"]:
        return night.absent("NO_RUNNER", target, row["why"])
    if folder is None:
        if job is None or not job.taken:
            return night.absent("NO_RUNNER", target, f"its job did not begin within {row['start_within_min']} minutes")
        return night.absent("NO_RECORD", target, f"the job ended with {job.conclusion} and uploaded nothing")
    taken, refused = night.take(folder, target)
    if any(one.on_target and one.confirms is None for one in taken):
        told += [f"{target}: refused: {sentence}" for sentence in refused]
        return None
    if refused:
        return night.absent("INVALID", target, refused[0])
    return night.absent("NO_RECORD", target, _said(folder))


def _said(folder: Path) -> str:
    """What the job of an artifact without a record said last."""
    for path in folder.rglob(OUTCOME):
        outcome = json.loads(path.read_text("utf-8"))
        return f"exit code {outcome['exit_code']}: {outcome['said'] or 'it said nothing'}"
    return "its artifact has no record"


def collect(night: Night, rows: Iterable[Mapping[str, Any]], artifacts: Path, jobs: Mapping[str, Job]) -> list[str]:
    """Take every record of the night; a sentence for each GPU without one and each other record that is refused."""
    told: list[str] = []
    folders = {path.name: path for path in sorted(artifacts.iterdir()) if path.is_dir()}
    for row in rows:
        start = f"{_OF_A_ROW}{row['name']}-"
        # the last attempt, if the job ran again
        folder = next((path for name, path in reversed(folders.items()) if name.startswith(start)), None)
        if absence := of_row(night, row, folder, jobs.get(row["name"]), told):
            told.append(f"{row['target']}: {absence.told}")
    for name, folder in folders.items():
        if name.startswith(_OTHERS):
            told += [f"{name}: refused: {sentence}" for sentence in night.take(folder)[1]]
    night.forget()
    return told


def publish(night: Night, told: Sequence[str], out: Path, site: bool) -> int:
    """Write the summary, the pages and the facts for alerts; 1 if a HARD check got worse or did not run, else 0."""
    folders = [night.nights]
    with open_index(folders) as index:
        facts = of_night(index, night.checks, night.time_utc)
    out.mkdir(parents=True, exist_ok=True)
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    for one in facts["failing"]:
        if one["kind"] == NEW:
            print(annotation("error", f"{one['place']} {one['family']}", one["told"]))
    for sentence in told:
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
    summarise("\n".join(["## The night", "", *(f"* {sentence}" for sentence in told), "", printed.getvalue()]))
    if site:
        verb.report(None, "html", folders, out=out / "site")
    return worse


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
    rows = json.loads(os.environ.get("ROWS") or "[]")
    night = Night(now, chosen.nights, list(catalogue()), chosen.rehearsal)
    for folder in (chosen.nights, chosen.artifacts):
        folder.mkdir(parents=True, exist_ok=True)
    jobs: dict[str, Job] = {}
    if (api := Api.of_environment()) is not None:
        print(fetch_earlier(api, chosen.nights), file=sys.stderr)
        jobs = jobs_of(api, os.environ["GITHUB_RUN_ID"], os.environ.get("GITHUB_RUN_ATTEMPT", "1"))
    told = collect(night, rows, chosen.artifacts, jobs)
    return publish(night, told, chosen.out, not chosen.no_site)


if __name__ == "__main__":
    sys.exit(main())
