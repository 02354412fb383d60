"""What other programs read: JUnit XML, an in-toto statement, badges."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from verify import cli
from verify.architectures import EMULATED, find
from verify.record.schema import CheckResult
from verify.record.verdict import assess
from verify.report import documents, export
from verify.tests import samples
from verify.tests.samples import known, measured, passing, record, result, waived, write


@pytest.fixture(autouse=True)
def small_catalogue(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("record.verdict", "report.verb"):
        monkeypatch.setattr(f"verify.{module}.catalogue", samples.checks)
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))


def test_junit_has_a_suite_for_each_phase_and_keeps_codes_and_numbers() -> None:
    hostile = "<b>&\x00 wrong"
    results = [
        result("p1.bf16.matmul", "CRASH", message=hostile),
        result("p4.oracle.n1", measurements=measured(float("nan"), 1.0), verdict="FAIL"),
        result("p4.oracle.n33", measurements=measured(0.5, 1.0)),
        result("p8.kernel.ms", "SKIP", code="NO_BASELINE"),
    ]
    whole = ElementTree.fromstring(export.junit([("sm120", results)]).encode())
    suites = {suite.get("name"): suite for suite in whole}
    assert list(suites) == ["sm120: 1 environment", "sm120: 4 equivalence", "sm120: 8 latency"]
    assert suites["sm120: 1 environment"].find("testcase/error").get("message") == "<b>&? wrong"
    assert suites["sm120: 4 equivalence"].get("failures") == "1"
    assert suites["sm120: 8 latency"].find("testcase/skipped").get("type") == "NO_BASELINE"
    told = {one.get("name"): one.get("value") for one in suites["sm120: 4 equivalence"].iter("property")}
    assert told["error"] == "measured 0.5, allowed 1, headroom 2"
    assert told["repeat"].startswith("python -m pytest")


@pytest.mark.parametrize(
    ("results", "verdict", "failed"),
    [
        (passing(), "PASSED", []),
        ([*passing(), result("p8.kernel.ms", "FAIL")], "WARNED", []),
        (passing()[1:], "FAILED", ["p1.bf16.matmul"]),
        ([waived("p1.bf16.matmul"), *passing()[1:]], "WARNED", []),
        ([waived("p1.bf16.matmul"), *passing()[2:]], "FAILED", ["p1.torch_sees.gpu"]),
        ([result("p1.bf16.matmul", "FAIL"), *passing()[1:]], "FAILED", ["p1.bf16.matmul"]),
        ([result("p1.bf16.matmul", "SKIP"), *passing()[1:]], "FAILED", ["p1.bf16.matmul"]),
    ],
)
def test_an_attestation_fails_on_hard_checks_and_warns_on_soft_ones(
    results: list[CheckResult], verdict: str, failed: list[str]
) -> None:
    made = record("sm120", results)
    told = json.loads(export.attestation(made))
    assert told["_type"] == "https://in-toto.io/Statement/v1"
    assert told["subject"] == [{"name": "sample@1.0", "digest": {"sha256": made.subject.content_sha256}}]
    assert (told["predicate"]["result"], told["predicate"]["failedTests"]) == (verdict, failed)
    assert told["predicate"]["warnedTests"] == [
        one.id for one in results if (one.verdict == "FAIL" and one.gate == "soft") or one.verdict == "WAIVED"
    ]


@pytest.mark.parametrize(
    ("target", "results", "message", "green"),
    [
        (find(120), passing(), "VERIFIED 6/6", True),
        (find(120), passing()[1:], "INCOMPLETE 5/6", False),
        (find(120), [waived("p1.bf16.matmul"), *passing()[1:]], "INCOMPLETE 5/6", False),
        (EMULATED, passing("emulated"), "EMULATED PASS 5/5", False),
    ],
)
def test_only_a_verified_badge_is_green(target, results, message: str, green: bool) -> None:
    found = assess(target, [record(target.target, results)], samples.checks())
    badge = json.loads(export.endpoint(found))
    assert badge["message"] == message
    assert ("green" in badge["color"]) is green
    image = ElementTree.fromstring(export.svg(found))
    assert image.get("aria-label") == f"TriAttention {target.target}: {message}"
    assert ("#2e7d32" in export.svg(found)) is green


def test_the_verbs_write_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(record("sm120", passing()), tmp_path, "evidence")
    records = ["--records", str(path.parent)]
    assert cli.main(["report", "--format", "badge", *records]) == 3
    assert "give --out DIR" in capsys.readouterr().err
    assert cli.main(["report", "--format", "badge", "--out", str(tmp_path / "badges"), *records]) == 0
    assert json.loads((tmp_path / "badges" / "sm120.json").read_text())["color"] == "brightgreen"
    assert (tmp_path / "badges" / "sm90.svg").exists()
    assert cli.main(["report", "--format", "junit", "--out", str(tmp_path / "all.xml"), *records]) == 0
    assert len(ElementTree.parse(tmp_path / "all.xml").getroot()) == 2
    assert cli.main(["export", "--junit", str(path)]) == 0
    assert "<testsuite " in capsys.readouterr().out
    assert cli.main(["export", "--attestation", str(path), "--out", str(tmp_path / "a.json")]) == 0
    assert json.loads((tmp_path / "a.json").read_text())["predicate"]["result"] == "PASSED"
    assert cli.main(["export", "--junit", "absent"]) == 3
    assert cli.main(["export", "--junit", str(path), "--out", str(path / "below")]) == 3


def test_a_known_deviation_is_a_failure_with_its_reason_in_every_format() -> None:
    made = assess(find(120), [record("sm120", [known("p4.oracle.n1")])], samples.checks())
    case = next(
        one
        for one in ElementTree.fromstring(export.report_junit([made])).iter("testcase")
        if one.find("failure") is not None
    )
    told = "Zeros are NaN. (https://example.org/12, until 2027-03-01)"
    assert {one.get("name"): one.get("value") for one in case.iter("property")}["known deviation"] == told
    assert f"; known deviation: {told}" in documents.report_markdown(made, ())
    assert "**p4.oracle did not hold: claim**: `p4.oracle.n1`" in documents.report_markdown(made, ())
    whole = json.loads(documents.report_json(made, ()))
    assert whole["findings"] == [{"cause": "FAIL: p4.oracle", "checks": ["p4.oracle.n1"], "blocks": []}]
    (check,) = (one for row in whole["rows"] for one in row["checks"] if one["deviation"])
    assert check["deviation"]["issue"] == "https://example.org/12"


def test_a_waived_failure_is_skipped_and_its_waiver_is_in_every_format() -> None:
    found = assess(find(120), [record("sm120", [waived("p4.oracle.n1"), *passing()[1:2]])], samples.checks())
    (case,) = (
        one
        for one in ElementTree.fromstring(export.report_junit([found])).iter("testcase")
        if one.find("skipped") is not None
    )
    told = "FAIL, waived by @owner until 2027-01-31: Zeros are NaN. (https://example.org/12)"
    assert case.find("skipped").attrib == {"message": "WAIVED measured 2, allowed 1", "type": "WAIVED"}
    assert {one.get("name"): one.get("value") for one in case.iter("property")}["waiver"] == told
    text = documents.report_markdown(found, ())
    assert (
        f"## Waived failures\n\n* **p4.oracle.n1** measured 2, allowed 1 (`{found.cells[3].outcome.repeat}`); {told}"
        in text
    )
    assert "## Failures" not in text
    assert "failures are waived on sm120 (1)" in documents.summary_markdown([found], ())
    assert "| ●W |" in documents.grid_markdown([found], ())
    whole = json.loads(documents.report_json(found, ()))
    assert (whole["must_pass"]["waived"], whole["findings"]) == (["p4.oracle.n1"], [])
    (check,) = (one for row in whole["rows"] for one in row["checks"] if one["waiver"])
    assert (check["verdict"], check["waiver"]["verdict"], check["waiver"]["owner"]) == ("WAIVED", "FAIL", "@owner")
