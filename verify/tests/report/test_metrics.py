"""A record as Prometheus metrics: read again by the client's own parser, named by Prometheus's rules."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from verify import cli
from verify.record.schema import Record
from verify.record.verdict import TargetVerdict
from verify.report.metrics import prometheus
from verify.tests import samples
from verify.tests.samples import measured, passing, record, result, simulated, waived, write

#: Suffixes that say a kind of metric or a part of one, which a gauge is not.
_RESERVED = ("_total", "_count", "_sum", "_bucket", "_created", "_gauge")

#: Units as Prometheus spells them, by what stands for them elsewhere.
_NOT_BASE = re.compile(r"_(ms|us|ns|s|sec|millis|minutes|hours|percent|mib|gib|kb|mb|gb)(_|$)")


@pytest.fixture(autouse=True)
def small_catalogue(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("verify.record.verdict.catalogue", samples.checks)


Samples = dict[tuple[tuple[str, str], ...], float]


def families(made: Record) -> dict[str, Samples]:
    """The samples of each metric by their labels; each metric is described, and has no sample twice."""
    found: dict[str, Samples] = {}
    for family in text_string_to_metric_families(prometheus(made)):
        assert (family.type, bool(family.documentation)) == ("gauge", True)
        assert family.name not in found
        found[family.name] = {tuple(sorted(one.labels.items())): one.value for one in family.samples}
        assert len(found[family.name]) == len(family.samples)
    return found


def of(found: dict[str, Samples], name: str, **labels: str) -> float:
    (value,) = (
        value for given, value in found[f"triattention_verify_{name}"].items() if labels.items() <= dict(given).items()
    )
    return value


def test_names_follow_the_rules_of_prometheus() -> None:
    for name, given in families(record("sm120", passing())).items():
        assert re.fullmatch(r"triattention_verify_[a-z_]+", name)
        assert not name.endswith(_RESERVED)
        assert not _NOT_BASE.search(name)
        if name.endswith("_info"):
            assert {*given.values()} == {1.0}


@pytest.mark.parametrize(
    ("made", "evidence", "gpu"),
    [
        (record("sm120", passing()), "hardware", "0" * 12),
        (record("emulated", passing("emulated")), "emulated", ""),
        (simulated("sm120", [result("p4.oracle.n1", evidence="simulated")]), "simulated", ""),
    ],
    ids=["hardware", "emulated", "simulated"],
)
def test_every_sample_says_target_evidence_and_card(made: Record, evidence: str, gpu: str) -> None:
    for given in families(made).values():
        for labels in map(dict, given):
            assert (labels["target"], labels["evidence"], labels["gpu"]) == (made.target, evidence, gpu)


@pytest.mark.parametrize(
    ("made", "verdict"),
    [
        (record("sm120", passing()), "VERIFIED"),
        (record("sm120", passing()[1:]), "INCOMPLETE"),
        (record("sm120", [result("p1.bf16.matmul", "FAIL"), *passing()[1:]]), "FAILED"),
        (record("emulated", passing("emulated")), "EMULATED PASS"),
    ],
    ids=["verified", "incomplete", "failed", "emulated"],
)
def test_one_state_of_the_verdict_holds(made: Record, verdict: str) -> None:
    found = families(made)
    states = {dict(labels)["verdict"]: value for labels, value in found["triattention_verify_verdict"].items()}
    assert states == {one.value: float(one.value == verdict) for one in TargetVerdict}


def test_counts_hold_every_check_once() -> None:
    made = record("sm120", [waived("p1.bf16.matmul"), *passing()[2:], result("p8.kernel.ms", "FAIL")])
    found = families(made)
    assert of(found, "must_pass_checks", passed="true") == 4
    assert of(found, "must_pass_checks", passed="false") == 2
    assert of(found, "checks", gate="hard", verdict="PASS") == 4
    assert of(found, "checks", gate="hard", verdict="WAIVED") == 1
    assert of(found, "checks", gate="hard", verdict="NOT RUN") == 1
    assert of(found, "checks", gate="soft", verdict="FAIL") == 1


def test_a_check_has_its_seconds_and_its_least_headroom() -> None:
    numbers = [*measured(0.1, 1.0), *measured(0.5, 1.0)]
    made = record("sm120", [result("p4.oracle.n1", measurements=numbers), result("p4.oracle.n33", duration_s=2.5)])
    found = families(made)
    assert of(found, "check_headroom_ratio", check="p4.oracle.n1") == 2.0
    assert of(found, "check_duration_seconds", check="p4.oracle.n33", verdict="PASS") == 2.5
    # nothing was measured, so there is no ratio
    assert len(found["triattention_verify_check_headroom_ratio"]) == 1


def test_the_time_of_the_run_is_unix_time() -> None:
    assert of(families(record("sm120", passing(), day=2)), "run_timestamp_seconds") == 1793577600


def test_a_name_may_hold_anything() -> None:
    made = record("sm120", passing())
    hostile = 'a"b\\c\nd{e="f"} 1'
    made = made.model_copy(update={"subject": made.subject.model_copy(update={"name": hostile})})
    assert of(families(made), "run_info", subject=hostile) == 1


def test_the_verb_writes_a_whole_file(tmp_path: Path) -> None:
    path, out = write(record("sm120", passing()), tmp_path), tmp_path / "collector" / "triattention.prom"
    for _ in range(2):
        assert cli.main(["export", "--prometheus", str(path), "--out", str(out)]) == 0
    assert out.read_text() == prometheus(record("sm120", passing()))
    assert [one.name for one in out.parent.iterdir()] == ["triattention.prom"]
