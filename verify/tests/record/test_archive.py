from __future__ import annotations

import json
from pathlib import Path

import pytest

from verify.errors import ConfigurationError
from verify.record.archive import load
from verify.record.reading import json_schema, write_record
from verify.tests.samples import REPOSITORY, compiled, passing, record, write, write_tree


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(write_tree(tmp_path / "tree"))
    return tmp_path / "tree"


def test_evidence_and_runs_are_read_and_nothing_else(tree: Path) -> None:
    reports = tree / "reports"
    write(record("sm90", passing(), day=1), reports, "evidence")
    run = write(record("sm120", passing(), day=2), reports)
    (run.parent / "run.json").write_text("{}")
    (reports / "schema").mkdir()
    (reports / "schema" / "record.schema.json").write_text(json_schema())
    archive = load()
    assert [r.target for r in archive.records] == ["sm90", "sm120"]
    assert archive.unreadable == ()


def test_a_published_run_is_read_once(tree: Path) -> None:
    published = record("sm90", passing())
    write(published, tree / "reports", "evidence")
    write(published, tree / "reports")
    assert len(load().records) == 1


def test_given_folders_replace_the_usual_ones(tree: Path, tmp_path: Path) -> None:
    write(record("sm90", passing()), tree / "reports")
    run = write(record("sm120", passing()), tmp_path / "elsewhere")
    (run.parent / "run.json").write_text("{}")
    write(record("sm80", passing()), tmp_path / "elsewhere", "evidence")
    write_record(compiled("sm90"), run.parent / "sm90.json")
    archive = load([tmp_path / "elsewhere"])
    assert sorted(r.target for r in archive.records) == ["sm120", "sm80", "sm90"]
    assert archive.unreadable == ()


def test_an_unreadable_record_is_named_with_its_first_problem(tree: Path) -> None:
    good = write(record("sm90", passing(), day=1), tree / "reports")
    broken = good.parent.parent / "broken" / "record.json"
    broken.parent.mkdir()
    broken.write_text(good.read_text()[:200])
    wrong = good.parent.parent / "wrong" / "record.json"
    wrong.parent.mkdir()
    wrong.write_text(json.dumps(json.loads(good.read_text()) | {"seed": "many"}))
    archive = load()
    assert len(archive.records) == 1
    assert [str(broken) in archive.unreadable[0], str(wrong) in archive.unreadable[1]] == [True, True]
    assert "seed" in archive.unreadable[1]


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="absent is not a directory"):
        load([tmp_path / "absent"])


def test_the_committed_schema_is_the_one_of_the_code() -> None:
    assert (REPOSITORY / "reports" / "schema" / "record.schema.json").read_text() == json_schema()
