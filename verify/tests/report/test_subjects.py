"""Reports about several subjects: each has its own, and none replaces the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from verify.architectures import EMULATED
from verify.errors import ConfigurationError
from verify.record.index import open_index
from verify.record.schema import SubjectInfo, write_record
from verify.report.verb import report
from verify.tests.samples import passing, record


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An emulated record of the bundled subject, and a newer one of another subject."""
    own = record("emulated", [one.model_copy(update={"evidence": "emulated"}) for one in passing()], day=1)
    subject = SubjectInfo(
        name="Other", version="2", source="checkout:other", git_sha="none", dirty=False, content_sha256="ab" * 32
    )
    other = record("emulated", own.results, day=2).model_copy(update={"subject": subject})
    write_record(own, tmp_path / "own.json")
    write_record(other, tmp_path / "other.json")
    return tmp_path


def _shown(folder: Path, subject: str | None) -> list[str]:
    with open_index([folder], subject) as index:
        return [one.subject.name for one in index.records(EMULATED)]


def test_the_bundled_subject_is_shown_unless_another_is_asked_for(folder: Path) -> None:
    assert _shown(folder, None) == ["sample"]
    for name in ("Other", "checkout:other", "other"):
        assert _shown(folder, name) == ["Other"]


def test_without_a_record_of_the_bundled_one_the_newest_subject_is_shown(folder: Path) -> None:
    (folder / "own.json").unlink()
    assert _shown(folder, None) == ["Other"]


def test_a_subject_without_a_record_is_named_with_those_that_have_one(folder: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"'nobody'; there are records of checkout:other, bundled$"):
        _shown(folder, "nobody")


def test_the_report_tells_of_the_others_and_shows_all_side_by_side(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report("emulated", folders=[folder]) == 0
    assert "There are records of other subjects too (checkout:other)" in capsys.readouterr().out
    assert report("emulated", folders=[folder], subject="all") == 0
    told = capsys.readouterr().out
    assert "bundled" in told
    assert "checkout:other" in told
    with pytest.raises(ConfigurationError, match="is a table in the terminal"):
        report("emulated", "json", [folder], subject="all")
