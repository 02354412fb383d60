"""Collecting one night: earlier nights of this branch only, sound records, and a reason for every GPU without one."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from ci.nightly import NightlyError
from ci.nightly.collect import Job, Night, collect, fetch_earlier
from ci.nightly.github import Api
from ci.nightly.job import OUTCOME
from verify.checks import Check, catalogue
from verify.record.absences import read
from verify.record.archive import absences
from verify.record.reading import rehearsals_only, write_record
from verify.tests.fake_github import TOKEN, GitHub, serving
from verify.tests.rehearsal import made

NOW = "2026-11-07T05:00:00Z"
ROW = {"name": "sm90", "target": "sm90", "why": "", "start_within_min": 60}


@pytest.fixture(scope="module")
def checks() -> list[Check]:
    return list(catalogue())


@pytest.fixture
def night(tmp_path: Path, checks: list[Check]) -> Iterator[Night]:
    (tmp_path / "nights").mkdir()
    (tmp_path / "artifacts").mkdir()
    with rehearsals_only():
        yield Night(NOW, tmp_path / "nights", checks, rehearsal=True)


def collected(night: Night, tmp_path: Path, jobs: dict[str, Job] | None = None) -> tuple[list[str], list[str]]:
    """The sentences, and what is in the folder of nights."""
    told = collect(night, [ROW], tmp_path / "artifacts", jobs or {})
    return told, sorted(path.name for path in night.nights.iterdir())


def artifact(
    tmp_path: Path, checks: list[Check], target: str = "sm90", name: str = "record-sm90-7-1", **change: object
) -> None:
    one = made(target, 7, {}, checks).model_copy(update=change)
    write_record(one, tmp_path / "artifacts" / name / one.run_id / "record.json")


def test_a_sound_record_is_taken(night: Night, tmp_path: Path, checks: list[Check]) -> None:
    artifact(tmp_path, checks)
    assert collected(night, tmp_path) == ([], ["20261107T031700Z-sm90-beef"])


def test_of_two_attempts_the_last_one_counts(night: Night, tmp_path: Path, checks: list[Check]) -> None:
    artifact(tmp_path, checks, state="running")
    artifact(tmp_path, checks, name="record-sm90-7-2")
    assert collected(night, tmp_path) == ([], ["20261107T031700Z-sm90-beef"])


def test_an_unsound_record_makes_the_gpu_invalid_and_the_others_go_on(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    artifact(tmp_path, checks, state="interrupted")
    artifact(tmp_path, checks, "sm120", "compiled-7-1")
    told, kept = collected(night, tmp_path)
    assert told == [
        "sm90: INVALID on 2026-11-07: the record of the job was refused (20261107T031700Z-sm90-beef/record.json: state "
        "is 'interrupted'; only a complete run proves anything)"
    ]
    assert kept == ["20261107T031700Z-sm120-beef", "20261107T050000Z-sm90-invalid"]


def test_a_file_that_is_refused_next_to_a_sound_record_is_told(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    artifact(tmp_path, checks)
    folder = tmp_path / "artifacts" / "record-sm90-7-1"
    (folder / "20261107T031700Z-sm90-beef" / "sm90.json").write_text("{}")
    told, kept = collected(night, tmp_path)
    assert [one.partition(": is not a record")[0] for one in told] == [
        "sm90: refused: 20261107T031700Z-sm90-beef/sm90.json"
    ]
    assert kept == ["20261107T031700Z-sm90-beef"]


@pytest.mark.parametrize(
    ("job", "words"),
    [
        (None, "NO_RUNNER on 2026-11-07: no runner took the job (its job did not begin within 60 minutes)"),
        (Job(False, "cancelled"), "NO_RUNNER on 2026-11-07"),
        (Job(True, "failure"), "NO_RECORD on 2026-11-07: the job began and left no record (the job ended with failure"),
    ],
)
def test_a_job_without_an_artifact_says_whether_it_began(
    night: Night, tmp_path: Path, job: Job | None, words: str
) -> None:
    told, _ = collected(night, tmp_path, {"sm90": job} if job else {})
    assert words in told[0]
    (absence,), problems = read(absences([night.nights]))
    assert (absence.target, absence.rehearsal, problems) == ("sm90", True, [])


def test_a_job_that_refused_its_machine_says_why(night: Night, tmp_path: Path) -> None:
    folder = tmp_path / "artifacts" / "record-sm90-7-1"
    folder.mkdir()
    said = "verify: --expect sm90, but this machine has sm89 (L4)"
    (folder / OUTCOME).write_text(json.dumps({"exit_code": 3, "said": said}))
    told, _ = collected(night, tmp_path)
    assert f"NO_RECORD on 2026-11-07: the job began and left no record (exit code 3: {said})" in told[0]


def test_what_is_older_than_the_days_that_are_kept_is_forgotten(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    for name in ("20260901T031700Z-sm90-beef", "20261030T031700Z-sm90-beef"):
        (night.nights / name).mkdir()
    artifact(tmp_path, checks)
    assert collected(night, tmp_path)[1] == ["20261030T031700Z-sm90-beef", "20261107T031700Z-sm90-beef"]


@pytest.fixture
def github(monkeypatch: pytest.MonkeyPatch) -> Iterator[GitHub]:
    monkeypatch.setenv("GITHUB_REF_NAME", "main")
    with serving() as one:
        yield one


def fetched(github: GitHub, nights: Path) -> str:
    return fetch_earlier(Api(github.address, "owner/suite", TOKEN), nights)


def test_the_newest_night_of_this_branch_is_fetched(github: GitHub, tmp_path: Path) -> None:
    for day, text in ((5, "old"), (6, "new")):
        (tmp_path / "kept").mkdir(exist_ok=True)
        (tmp_path / "kept" / "a").write_text(text)
        github.keep("nights", tmp_path / "kept", f"2026-11-0{day}T05:00:00Z")
    assert fetched(github, tmp_path / "nights") == "earlier nights up to 2026-11-06"
    assert (tmp_path / "nights" / "a").read_text() == "new"


@pytest.mark.parametrize("change", [{"head_repository_id": 2}, {"head_branch": "theirs"}])
def test_an_artifact_of_a_fork_or_of_another_branch_is_not_trusted(
    github: GitHub, tmp_path: Path, change: dict[str, object]
) -> None:
    github.keep("nights", tmp_path, "2026-11-06T05:00:00Z")
    github.artifacts[0]["workflow_run"] |= change
    assert fetched(github, tmp_path / "nights") == "there are no earlier nights"


def test_an_artifact_that_is_damaged_or_leaves_its_folder_harms_nothing(github: GitHub, tmp_path: Path) -> None:
    github.keep("nights", tmp_path, "2026-11-06T05:00:00Z")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../outside", "x")
    github.contents[1] = content.getvalue()
    fetched(github, tmp_path / "nights")
    assert not (tmp_path / "outside").exists()
    github.contents[1] = b"no archive"
    with pytest.raises(NightlyError, match=r"the artifact nights of 2026-11-06\S+ is damaged .*; delete it"):
        fetched(github, tmp_path / "nights")
