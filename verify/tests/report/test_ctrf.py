"""A record as a CTRF report: valid by the format's own schema, with verdicts and kinds of evidence visible."""

from __future__ import annotations

import json
import sys
import tarfile
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from verify import cli
from verify.record.schema import Record
from verify.report.ctrf import ctrf
from verify.tests import samples
from verify.tests.samples import compiled, known, measured, passing, record, result, simulated, waived, write
from verify.tests.test_bootstrap import bootstrap


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.record.verdict.catalogue", samples.checks)


@cache
def schema() -> dict[str, Any]:
    """The schema that the set-up fetched; a file of others that this repository does not hold."""
    place = Path(sys.prefix) / "share" / "triattention-verify" / f"ctrf-{bootstrap.CTRF}.tgz"
    assert place.is_file(), f"{place} is not there; run make setup"
    with tarfile.open(place) as package:
        content = package.extractfile("package/dist/ctrf-schema-0.0.json")
        assert content is not None
        return json.load(content)


def report(made: Record) -> dict[str, Any]:
    """The report of a record, which the schema accepts and whose summary counts what it lists."""
    found = json.loads(ctrf(made), parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))
    jsonschema.validate(found, schema(), format_checker=jsonschema.FormatChecker())
    results = found["results"]
    for status in ("passed", "failed", "skipped", "pending", "other"):
        assert results["summary"][status] == sum(one["status"] == status for one in results["tests"])
    assert results["summary"]["tests"] == len(results["tests"])
    return results


def statuses(made: Record) -> dict[str, tuple[str, str]]:
    return {one["extra"]["check"]: (one["status"], one["rawStatus"]) for one in report(made)["tests"]}


def test_the_schema_refuses_what_is_no_report() -> None:
    found = json.loads(ctrf(record("sm120", passing())))
    found["results"]["tests"][0]["status"] = "PASS"
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(found, schema())


@pytest.mark.parametrize(
    ("verdict", "status"),
    [
        ("PASS", "passed"), ("FAIL", "failed"), ("ERROR", "other"), ("CRASH", "other"), ("TIMEOUT", "other"),
        ("INFRA", "other"), ("SKIP", "skipped"), ("ABSENT", "skipped"), ("REFUSED", "skipped"), ("BLOCKED", "skipped"),
    ],
)  # fmt: skip
def test_a_verdict_keeps_its_word(verdict: str, status: str) -> None:
    found = statuses(record("sm120", [*passing()[1:], result("p8.kernel.ms", verdict)]))
    assert found["p8.kernel.ms"] == (status, verdict)


@pytest.mark.parametrize("verdict", ["SKIP", "ABSENT", "REFUSED", "BLOCKED"])
def test_a_must_pass_check_that_proved_nothing_is_failed(verdict: str) -> None:
    found = statuses(record("sm120", [*passing()[:-1], result("p4.triton_pytorch.max", verdict)]))
    assert found["p4.triton_pytorch.max"] == ("failed", verdict)


def test_a_must_pass_check_without_a_result_is_failed() -> None:
    found = statuses(record("sm120", passing()[1:]))
    assert found["p1.bf16.matmul"] == ("failed", "NOT RUN")
    assert len(found) == len(passing())


def test_a_waived_failure_is_not_passed_and_keeps_its_waiver() -> None:
    made = record("sm120", [waived("p1.bf16.matmul"), known("p1.nvcc.version"), *passing()[1:]])
    tests = {one["extra"]["check"]: one for one in report(made)["tests"]}
    assert (tests["p1.bf16.matmul"]["status"], tests["p1.bf16.matmul"]["rawStatus"]) == ("other", "WAIVED")
    assert tests["p1.bf16.matmul"]["extra"]["waiver"]["owner"] == "@owner"
    assert tests["p1.nvcc.version"]["extra"]["deviation"]["issue"] == "https://example.org/12"


@pytest.mark.parametrize(
    ("made", "healthy"),
    [
        (record("sm120", passing()), True),
        (record("sm120", passing()[1:]), False),
        (record("sm120", [waived("p1.bf16.matmul"), *passing()[1:]]), False),
        (record("emulated", passing("emulated")), False),
        (simulated("sm120", passing("simulated")), False),
    ],
    ids=["verified", "incomplete", "waived", "emulated", "simulated"],
)
def test_only_a_verified_gpu_is_healthy(made: Record, healthy: bool) -> None:
    assert report(made)["environment"]["healthy"] is healthy


@pytest.mark.parametrize(
    ("made", "evidence"),
    [
        (record("sm120", passing()), "hardware"),
        (record("emulated", passing("emulated")), "emulated"),
        (simulated("sm120", [result("p4.oracle.n1", evidence="simulated")]), "simulated"),
        (compiled("sm120", [result("p4.oracle.n1", evidence="compiled")]), "compiled"),
    ],
    ids=lambda one: one if isinstance(one, str) else "",
)
def test_every_test_says_what_its_evidence_is(made: Record, evidence: str) -> None:
    for one in report(made)["tests"]:
        assert one["extra"]["evidence"] == evidence
        assert evidence in one["name"]
        assert evidence in one["testId"]
        assert evidence in one["suite"][0]
        assert evidence in one["tags"]


def test_what_a_simulation_only_emulated_is_left_out() -> None:
    made = simulated(
        "sm120", [result("p4.oracle.n1", evidence="simulated"), result("p1.nvcc.version", evidence="emulated")]
    )
    # of the must-pass checks, those of the phases that it ran
    assert statuses(made).keys() == {name for name in samples.HARD if name.startswith("p4.")}


def test_a_test_has_the_measurement_that_is_nearest_to_its_bound() -> None:
    numbers = [*measured(0.1, 1.0, "small"), *measured(0.5, 1.0, "large")]
    made = record("sm120", [*passing()[:-1], result("p4.triton_pytorch.max", measurements=numbers)])
    extra = report(made)["tests"][-1]["extra"]
    assert {name: extra[name] for name in ("quantity", "measured", "allowed", "headroom", "measurements")} == {
        "quantity": "large", "measured": 0.5, "allowed": 1.0, "headroom": 2.0, "measurements": 2
    }  # fmt: skip
    assert (extra["gate"], extra["must_pass"]) == ("hard", True)


def test_a_number_that_json_lacks_is_a_word() -> None:
    made = record("sm120", [result("p8.kernel.ms", "FAIL", measurements=measured(float("nan"), 1.0))])
    assert report(made)["tests"][0]["extra"]["measured"] == "NaN"


def test_the_card_is_known_by_the_beginning_of_its_hash() -> None:
    made = record("sm120", passing())
    about = report(made)["environment"]["extra"]
    assert about["gpu"]["uuid_sha256"] == "0" * 12
    assert "0" * 64 not in json.dumps(about["gpu"])


def test_the_verb_writes_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(record("sm120", passing()), tmp_path)
    assert cli.main(["export", "--ctrf", str(path)]) == 0
    assert json.loads(capsys.readouterr().out)["reportFormat"] == "CTRF"
    assert cli.main(["export", "--ctrf", str(path), "--out", str(tmp_path / "ctrf.json")]) == 0
    jsonschema.validate(json.loads((tmp_path / "ctrf.json").read_text()), schema())


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"rehearsal": True}, "is made up for a rehearsal"),
        ({"confirms": "run-1"}, "confirms run-1, and counts for no verdict"),
        ({"beside": "newest"}, "is only shown as newest, and counts for no verdict"),
    ],
)
@pytest.mark.parametrize("form", ["--ctrf", "--prometheus", "--junit", "--attestation"])
def test_what_counts_for_nothing_is_not_exported(
    form: str, fields: dict[str, Any], told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(record("sm120", passing(), **fields), tmp_path)
    assert cli.main(["export", form, str(path), "--out", str(tmp_path / "out")]) == 3
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
