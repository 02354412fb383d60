"""Reports about several subjects: each has its own, and none replaces the machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from verify.architectures import EMULATED
from verify.errors import ConfigurationError
from verify.record.index import open_index
from verify.record.reading import read_record, write_record
from verify.record.schema import SubjectInfo
from verify.report.history import history
from verify.report.verb import report
from verify.tests.samples import passing, record, result


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


def test_another_subject_is_named_above_every_table_and_may_refuse(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = read_record(folder / "other.json")
    results = [result(one.id, "REFUSED", evidence="emulated") for one in whole.results]
    write_record(whole.model_copy(update={"results": results}), folder / "other.json")
    for print_it in (
        lambda: report(None, folders=[folder], subject="other"),
        lambda: report(None, folders=[folder], subject="other", every_check=True),
        lambda: history(None, None, [folder], "other"),
        lambda: history(None, "emulated", [folder], "other"),
    ):
        assert print_it() == 0
        assert capsys.readouterr().out.startswith("Subject: Other 2 (checkout:other, no git commit).\n")
    assert report(None, folders=[folder]) == 0
    assert "Subject:" not in capsys.readouterr().out


def test_records_of_which_no_result_is_valid_are_not_called_absent(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in folder.iterdir():
        made = read_record(file)
        write_record(made.model_copy(update={"sources": dict.fromkeys(made.sources, "ab" * 32)}), file)
    assert report("emulated", folders=[folder], subject="all") == 0
    assert "No result of 2 records on emulated is still valid; run the subjects again" in capsys.readouterr().out
