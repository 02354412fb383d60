"""Collecting one night: earlier nights of this branch only, sound records, and a reason for every GPU without one."""

from __future__ import annotations

import io
import json
import shutil
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
        yield Night(NOW, tmp_path / "nights", checks, rehearsal=True, since="2026-11-07T02:17:00Z")


def collected(night: Night, tmp_path: Path, jobs: dict[str, Job] | None = None) -> tuple[list[str], list[str]]:
    """The sentences, and what is in the folder of nights."""
    collect(night, [ROW], tmp_path / "artifacts", jobs or {})
    return night.told, sorted(path.name for path in night.nights.iterdir())


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


def test_a_night_that_is_collected_again_takes_the_same_record_again(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    artifact(tmp_path, checks)
    collected(night, tmp_path)
    assert collected(night, tmp_path) == ([], ["20261107T031700Z-sm90-beef"])
    kept = night.nights / "20261107T031700Z-sm90-beef" / "record.json"
    kept.write_text(kept.read_text().replace("row 0", "row 1") + " ")
    told, _ = collected(night, tmp_path)
    assert "INVALID" in told[0]
    assert "another record of this run is there already" in told[0]


def test_a_record_of_another_night_is_refused(night: Night, tmp_path: Path, checks: list[Check]) -> None:
    night.since = "2026-11-07T03:30:00Z"
    artifact(tmp_path, checks)
    assert (
        "it is of 2026-11-07T03:17:00Z, before this night began (2026-11-07T03:30:00Z)"
        in collected(night, tmp_path)[0][0]
    )


def test_the_artifact_is_the_one_of_the_row_and_of_the_last_attempt(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    artifact(tmp_path, checks, "sm120", "record-sm90-nvl-7-1")
    artifact(tmp_path, checks, name="record-sm90-7-10")
    artifact(tmp_path, checks, name="record-sm90-7-9", state="running")
    assert collected(night, tmp_path) == ([], ["20261107T031700Z-sm90-beef"])


def test_a_job_that_needs_no_gpu_and_leaves_no_sound_record_is_told_and_counts(night: Night, tmp_path: Path) -> None:
    told, _ = collected(night, tmp_path, {"emulated without a GPU": Job(True, "failure")})
    assert told[1:] == ["emulated: the job 'emulated without a GPU' left no sound record (failure)"]
    assert night.lost


def test_an_unsound_record_makes_the_gpu_invalid_and_the_others_go_on(
    night: Night, tmp_path: Path, checks: list[Check]
) -> None:
    artifact(tmp_path, checks, state="interrupted")
    artifact(tmp_path, checks, "sm120", "emulated-7-1")
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


@pytest.mark.parametrize("content", [b"{", b"{}", b"[]", b"\xff"])
def test_an_outcome_that_cannot_be_read_stops_nothing(night: Night, tmp_path: Path, content: bytes) -> None:
    folder = tmp_path / "artifacts" / "record-sm90-7-1"
    folder.mkdir()
    (folder / OUTCOME).write_bytes(content)
    assert "its outcome.json cannot be read" in collected(night, tmp_path)[0][0]


@pytest.mark.parametrize("change", [{"time_utc": "2026-11-32T03:17:00Z"}, {"run_id": "20261399T031700Z-sm90-beef"}])
def test_a_moment_that_is_none_makes_a_record_invalid(
    night: Night, tmp_path: Path, checks: list[Check], change: dict[str, object]
) -> None:
    artifact(tmp_path, checks, **change)
    told = collected(night, tmp_path)[0][0]
    assert "INVALID" in told
    assert "has a value that cannot be read" in told


def test_an_absence_at_a_moment_that_is_none_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "absence.json"
    path.write_text(
        json.dumps({"absence": "NO_RUNNER", "target": "sm90", "time_utc": "2026-99-07T05:00:00Z", "why": "x"})
    )
    assert "is not an absence" in read([path])[1][0]


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


@pytest.mark.parametrize("change", [{"head_repository_id": 2}, {"head_branch": "theirs"}, None])
def test_artifacts_of_forks_and_of_other_branches_are_passed_over(
    github: GitHub, tmp_path: Path, change: dict[str, object] | None
) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "a").write_text("ours")
    for day in range(1, 28):
        github.keep("nights", tmp_path / "kept", f"2026-11-{day:02d}T05:00:00Z")
        known = github.artifacts[-1]
        if day > 1:
            known["workflow_run"] = change and known["workflow_run"] | change
    assert fetched(github, tmp_path / "nights") == "earlier nights up to 2026-11-01"


def test_an_artifact_that_is_damaged_or_leaves_its_folder_harms_nothing(github: GitHub, tmp_path: Path) -> None:
    github.keep("nights", tmp_path, "2026-11-06T05:00:00Z")
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        archive.writestr("../outside", "x")
    github.contents[1] = content.getvalue()
    fetched(github, tmp_path / "nights")
    assert not (tmp_path / "outside").exists()
    shutil.rmtree(tmp_path / "nights")
    github.contents[1] = b"no archive"
    with pytest.raises(NightlyError, match=r"the artifact nights of 2026-11-06\S+ is damaged .*; delete it"):
        fetched(github, tmp_path / "nights")
    assert not (tmp_path / "nights").exists()
