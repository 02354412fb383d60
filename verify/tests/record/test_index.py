"""The index of records: it says what the records say, and it is as fast as it has to be."""

from __future__ import annotations

import json
import math
import re
import shutil
from pathlib import Path

import pytest

from verify.architectures import known_targets
from verify.checks import catalogue
from verify.record import index as tables
from verify.record.archive import load
from verify.record.index import open_index
from verify.record.schema import Record
from verify.record.verdict import assess
from verify.report import documents
from verify.tests.samples import (
    REPOSITORY,
    checks,
    compiled,
    measure_report,
    measured,
    passing,
    reading_s,
    record,
    result,
    write,
    write_many,
)


@pytest.fixture
def reports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    return tmp_path / "reports"


def of_another_torch(made: Record) -> Record:
    return made.model_copy(update={"environment": made.environment.model_copy(update={"torch": "2.6.0"})})


def mixed() -> list[Record]:
    """Runs of parts, of other models and of other software, an unknown check, and kernels built ahead of time."""
    other_gate = result("p4.oracle.n1", gate="soft")
    return [
        record("sm120", passing(), day=1),
        record("sm120", [result("p4.oracle.n1", "FAIL"), result("p8.kernel.ms", "SKIP")], day=2),
        record("sm120", [*passing()[:2], result("p4.gone.x"), other_gate], day=3, model="other"),
        of_another_torch(record("sm120", passing(), day=4)),
        record("sm120", [result("p4.oracle.n33", measurements=measured(2e-7, 1e-6))], day=5),
        record("emulated", passing("emulated"), day=6),
        compiled("sm90", [result("p4.oracle.n1", evidence="compiled")], run_id="old"),
        compiled("sm90", [result("p4.oracle.n33", evidence="compiled")], day=8),
        compiled("sm88", gap="the assembler does not know it"),
    ]


def test_every_verdict_is_the_same_with_and_without_the_index(reports: Path) -> None:
    for one in mixed():
        write(one, reports)
    (reports / "broken.json").write_text("{")
    archive = load([reports])
    for _ in ("cold", "warm"):
        with open_index([reports]) as index:
            assert index.unreadable == archive.unreadable
            for target in known_targets():
                plain, indexed = (
                    assess(target, some, checks(), index.checkout) for some in (archive.records, index.records(target))
                )
                assert documents.report_json(plain, ()) == documents.report_json(indexed, ())
                assert documents.report_markdown(plain, ()) == documents.report_markdown(indexed, ())


def test_a_file_that_changed_is_read_again_and_one_that_went_is_forgotten(reports: Path) -> None:
    path = write(record("sm120", passing()), reports)
    other = write(record("sm90", passing()), reports)
    with open_index([reports]) as index:
        assert len(index.heads) == 2
    path.write_text(path.read_text().replace('"message": ""', '"message": "changed"', 1))
    shutil.rmtree(other.parent)
    with open_index([reports]) as index:
        (head,) = index.heads.values()
        assert index.find(head.run_id).results[0].message == "changed"
        assert index.find("run-sm90-1") is None


@pytest.mark.parametrize("content", [b"no database", b"SQLite format 3\x00" + b"\xff" * 200])
def test_a_damaged_index_is_made_anew(reports: Path, tmp_path: Path, content: bytes) -> None:
    write(record("sm120", passing()), reports)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "records.sqlite").write_bytes(content)
    with open_index([reports]) as index:
        assert len(index.heads) == 1


def test_the_index_is_made_again_when_a_part_of_a_record_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: set[str] = set()
    monkeypatch.setattr(tables, "digest_of", lambda files, root: asked.update(one.stem for one in files) or "0" * 64)
    tables._version()
    schema = (REPOSITORY / "verify" / "record" / "schema.py").read_text()
    assert {"schema", *re.findall(r"^from verify\.record\.(\w+) import", schema, re.MULTILINE)} <= asked


def test_without_a_cache_every_record_is_read_and_the_user_is_told(
    reports: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(record("sm120", passing()), reports)
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "file"))
    with open_index([reports]) as index:
        assert len(index.heads) == 1
    assert "so every record is read" in capsys.readouterr().err


def test_the_course_of_a_check_is_told_oldest_first(reports: Path) -> None:
    for day, value in ((2, 0.5), (1, 0.25), (3, float("nan"))):
        verdict = "FAIL" if value != value else "PASS"
        one = result("p4.oracle.n1", verdict, measurements=measured(value, 1.0))
        write(record("sm120", [one], day=day), reports)
    write(record("sm90", [result("p4.oracle.n1")]), reports)
    with open_index([reports]) as index:
        assert [point.share for point in index.points("p4.oracle.n1", "sm120")] == [0.25, 0.5, None]
        assert len(index.points("p4.oracle.n1")) == len(index.points("p4.oracle")) == 4
        assert index.points("p4.ora") == []


def test_a_point_is_of_the_measurement_that_every_report_shows(reports: Path) -> None:
    below, exact, free = measured(-5, 1e-9, "gap"), measured(0, 0, "differences"), measured(9, math.inf, "ties")
    close, loose = measured(0.5, 1, "close"), measured(0.1, 1, "loose")
    write(record("sm120", [result("p4.oracle.n1", measurements=[*below, *exact, *free, *loose, *close])]), reports)
    write(record("sm90", [result("p4.oracle.n1", measurements=below)]), reports)
    with open_index([reports]) as index:
        shown = {one.target: (one.measure, one.measured, one.share) for one in index.points("p4.oracle.n1")}
    assert shown == {"sm120": ("close", 0.5, 0.5), "sm90": ("gap", -5, 0)}


def test_a_thousand_records_are_reported_in_time_and_memory(tmp_path: Path) -> None:
    write_many(tmp_path, 1000, list(catalogue()))
    (last,) = tmp_path.rglob("run-00999.json")  # two that contradict each other are named, and the others are merged
    last.with_name("other.json").write_text(last.read_text().replace('"seed": 1', '"seed": 2', 1))
    # of the processor, and in times that merely reading all of them takes now, so that no machine is too slow or busy
    limits = {"cold": (3.5, ["--all"]), "warm": (0.4, ["--all"]), "one": (0.3, ["--gpu", "sm90"])}
    for name, (limit, words) in limits.items():
        words += ["--records", str(tmp_path / "evidence")]
        before_s = reading_s(tmp_path / "evidence")
        made = measure_report(*words, cwd=REPOSITORY, cache=tmp_path / "cache")
        assert made.exit_code == 5
        assert "contradict each other about run run-00999; none counts until only one is left" in made.said
        assert ("VERIFIED" if name == "one" else "●P") in made.printed
        allowed_s = limit * max(before_s, reading_s(tmp_path / "evidence"))
        assert made.processor_s < allowed_s, f"{name}: {made.processor_s:.1f} s, {allowed_s:.1f} s allowed"
        assert made.mebibytes < 500, name


def test_each_record_that_does_not_count_is_named_with_its_reason(reports: Path) -> None:
    good = write(record("sm90", passing(), day=1), reports, "evidence")
    text = good.read_text()
    bad = {
        "empty": "",
        "truncated": text[:-300],
        "newer": text.replace('"schema_version": 1', '"schema_version": 2'),
        "contradictory": text.replace('"sm": 90', '"sm": 80').replace("run-sm90-1", "run-x"),
        "running": text.replace('"complete"', '"running"').replace("run-sm90-1", "run-y"),
        "duplicate": text,
    }
    for name, content in bad.items():
        (reports / f"{name}.json").write_text(content)
    for version, day in (("one", 3), ("two", 4)):
        whole = json.loads(text) | {"run_id": "run-z", "time_utc": f"2026-11-{day:02d}T00:00:00Z"}
        (reports / f"{version}.json").write_text(json.dumps(whole))
    archive = load([reports])
    told = {name: next(one for one in archive.unreadable if f"{name}.json" in one) for name in bad}
    assert "is cut off or not JSON (EOF while parsing" in told["empty"]
    assert "is cut off or not JSON (EOF while parsing" in told["truncated"]
    assert "has schema version 2, but this suite reads 1" in told["newer"]
    assert (
        "contradicts itself (Value error, run run-x claims sm90, but its environment has another"
        in told["contradictory"]
    )
    assert "is half-written (state running); let the run end, or continue it" in told["running"]
    assert "is a duplicate of" in next(one for one in archive.unreadable if "remove one of them" in one)
    assert any("contradict each other about run run-z" in one for one in archive.unreadable)
    assert [one.run_id for one in archive.records] == ["run-sm90-1"]
    with open_index([reports]) as index:
        assert sorted(index.unreadable) == sorted(archive.unreadable)
