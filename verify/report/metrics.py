"""A record as Prometheus metrics, in the text format that the node exporter's textfile collector reads."""

from __future__ import annotations

from collections import Counter
from datetime import datetime

from verify.record.cells import owed
from verify.record.headroom import room, tightest
from verify.record.schema import Record
from verify.record.verdict import TargetVerdict, assess_record
from verify.report.ctrf import card
from verify.report.matrix import NOT_RUN

_PREFIX = "triattention_verify"

#: Every sample has these, so that no two kinds of evidence, and no two cards, are ever added up.
_WHERE = ("target", "evidence", "gpu")


def prometheus(record: Record) -> str:
    """The metrics of one record; the same record always makes the same text.

    The label ``gpu`` is the beginning of the card's hashed UUID, or empty. Nothing names a machine or a path.
    """
    from prometheus_client import CollectorRegistry, Gauge, generate_latest

    registry = CollectorRegistry()

    def gauge(name: str, about: str, *labels: str) -> Gauge:
        return Gauge(f"{_PREFIX}_{name}", about, (*_WHERE, *labels), registry=registry)

    found, gpu, made = assess_record(record), card(record.environment.gpu), record.environment
    here = (record.target, record.kind, gpu)
    verdict = gauge("verdict", "Verdict on the target by this record alone: 1 for the one that holds.", "verdict")
    for one in TargetVerdict:
        verdict.labels(*here, one).set(one is found.verdict)
    must = gauge("must_pass_checks", "Must-pass checks of the target, passed or not.", "passed")
    passed = sum(cell.passed for cell in found.must_pass)
    must.labels(*here, "true").set(passed)
    must.labels(*here, "false").set(len(found.must_pass) - passed)
    checks = gauge("checks", "Checks by gate and verdict, those without a result included.", "gate", "verdict")
    counted = Counter((one.evidence, one.gate, str(one.verdict)) for one in record.telling)
    for cell in owed(record, found.must_pass):
        counted[record.kind, cell.check.spec.gate, NOT_RUN] += 1
    for (evidence, gate, word), number in sorted(counted.items()):
        checks.labels(record.target, evidence, gpu, gate, word).set(number)
    seconds = gauge("check_duration_seconds", "Time that a check took.", "check", "gate", "verdict")
    headroom = gauge("check_headroom_ratio", "Allowed over measured, where it is least.", "check", "gate")
    for result in record.telling:
        where = (record.target, result.evidence, gpu, result.id, result.gate)
        seconds.labels(*where, result.verdict).set(result.duration_s)
        nearest = tightest(result.measurements)
        if nearest is not None and (left := room(nearest)) is not None:
            headroom.labels(*where).set(left)
    gauge("run_timestamp_seconds", "When the run began, in Unix time.").labels(*here).set(
        datetime.fromisoformat(record.time_utc).timestamp()
    )
    gauge("run_duration_seconds", "Time that the run took.").labels(*here).set(record.duration_s)
    about = {
        "run_id": record.run_id,
        "gpu_name": made.gpu.name if made.gpu else "",
        "driver": made.gpu.driver if made.gpu else "",
        "torch": made.torch,
        "triton": made.triton,
        "subject": record.subject.name,
        "subject_version": record.subject.version,
        "commit": record.subject.git_sha,
        "instrument": record.instrument_sha256,
        "model": record.model,
        "selection": record.selection,
    }
    gauge("run_info", "What was run, with what; always 1.", *about).labels(*here, *about.values()).set(1)
    return generate_latest(registry).decode()
