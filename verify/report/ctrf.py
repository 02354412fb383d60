"""A record as a CTRF report (Common Test Report Format), which AICR and summaries of CI jobs read.

https://ctrf.io; the format's own JSON schema is in the npm package ``ctrf``.
"""

from __future__ import annotations

from collections import Counter
from datetime import datetime
from typing import Any, Final

from verify.checks import PHASES
from verify.record.cells import Cell, owed
from verify.record.headroom import room, tightest
from verify.record.schema import CheckResult, Evidence, Gpu, Record, Verdict
from verify.record.verdict import Assessment, TargetVerdict, assess_record
from verify.report.documents import dumps
from verify.report.looks import line_of
from verify.report.matrix import NOT_RUN

_SPECIFICATION: Final = "0.0.0"
_TOOL: Final = "triattention-verify"

#: What CTRF calls a verdict; the others (CRASH, TIMEOUT, ERROR, INFRA, WAIVED) are neither passed nor failed there.
_STATUS = {
    Verdict.PASS: "passed",
    Verdict.FAIL: "failed",
    Verdict.SKIP: "skipped",
    Verdict.BLOCKED: "skipped",
    Verdict.ABSENT: "skipped",
    Verdict.REFUSED: "skipped",
}
_STATUSES = ("passed", "failed", "skipped", "pending", "other")

#: As many digits of a GPU's hashed UUID as tell the cards of a fleet apart.
_DIGITS = 12


def ctrf(record: Record) -> str:
    """The report of one record; the same record always makes the same report.

    ``rawStatus`` has the verdict of this suite, ``extra`` the measurement with the least headroom. A must-pass check of
    a run on its target that was skipped, was blocked or has no result is ``failed``. ``healthy`` is true only for a
    VERIFIED GPU.
    """
    found = assess_record(record)
    must = {cell.check.id: cell for cell in found.must_pass}
    tests = [_test(one, record, must.get(one.id)) for one in record.telling]
    tests += [_absent(cell, record) for cell in owed(record, found.must_pass)]
    counted = Counter(one["status"] for one in tests)
    start_ms = round(datetime.fromisoformat(record.time_utc).timestamp() * 1000)
    duration_ms = round(record.duration_s * 1000)
    summary = {"tests": len(tests), **{name: counted[name] for name in _STATUSES}}
    return dumps(
        {
            "reportFormat": "CTRF",
            "specVersion": _SPECIFICATION,
            "runId": record.run_id,
            "generatedBy": _TOOL,
            "results": {
                "tool": {"name": _TOOL, "extra": {"instrument_sha256": record.instrument_sha256}},
                "summary": summary
                | {"start": start_ms, "stop": start_ms + duration_ms, "duration": duration_ms}
                | {"extra": {"verdict": found.verdict, "sentence": found.sentence}},
                "tests": tests,
                "environment": _environment(record, found),
            },
        }
    )


def card(gpu: Gpu | None) -> str:
    """What a report calls one GPU: the first digits of its hashed UUID; empty without a GPU."""
    return gpu.uuid_sha256[:_DIGITS] if gpu else ""


def _environment(record: Record, found: Assessment) -> dict[str, Any]:
    made, subject = record.environment, record.subject
    gpu = made.gpu
    versions = ("cuda_runtime", "torch", "triton", "transformers", "vllm", "flash_attn", "python")
    return {
        "reportName": f"TriAttention on {line_of(record)}",
        "appName": subject.name,
        "appVersion": subject.version,
        **({} if subject.git_sha == "none" else {"commit": subject.git_sha}),
        "osVersion": made.os,
        "testEnvironment": line_of(record),
        "healthy": found.verdict is TargetVerdict.VERIFIED,
        "extra": {
            "target": record.target,
            "evidence": record.kind,
            "verdict": found.verdict,
            "gpu": gpu and {"name": gpu.name, "uuid_sha256": card(gpu), "sm": gpu.sm, "driver": gpu.driver},
            **{name: getattr(made, name) for name in versions},
            "subject_source": subject.source,
            "subject_sha256": subject.content_sha256,
            "model": record.model,
            "seed": record.seed,
            "selection": record.selection,
        },
    }


def _test(result: CheckResult, record: Record, cell: Cell | None) -> dict[str, Any]:
    status, message = _STATUS.get(result.verdict, "other"), result.message
    if cell is not None and record.on_target:
        if status == "skipped":
            status = "failed"
        elif status == "passed" and not cell.passed:
            status, message = "other", f"does not count, because the model is {record.model}"
    facts: dict[str, Any] = {
        "code": result.code,
        "by": result.by,
        "deviation": result.deviation and result.deviation.model_dump(mode="json"),
        "waiver": result.waiver and result.waiver.model_dump(mode="json"),
        "repeat": result.repeat,
        "measurements": len(result.measurements),
    }
    if (number := tightest(result.measurements)) is not None:
        facts |= {"quantity": number.name, "unit": number.unit, "where": number.where}
        facts |= {"measured": number.measured, "allowed": number.allowed, "headroom": room(number)}
    made = _named(result.id, result.gate, record, result.evidence, must_pass=cell is not None)
    made |= {"status": status, "rawStatus": result.verdict, "duration": round(result.duration_s * 1000)}
    made |= {"message": message} if message else {}
    made["extra"] |= {name: value for name, value in facts.items() if value not in (None, "")}
    return made


def _absent(cell: Cell, record: Record) -> dict[str, Any]:
    made = _named(cell.check.id, cell.check.spec.gate, record, record.kind, must_pass=True)
    return made | {
        "status": "failed",
        "rawStatus": NOT_RUN,
        "duration": 0,
        "message": "must-pass, but there is no result",
    }


def _named(name: str, gate: str, record: Record, evidence: Evidence, *, must_pass: bool) -> dict[str, Any]:
    """What identifies a test. The evidence is part of its name and id, so no reader takes one kind for another."""
    phase = int(name[1])
    extra = {"check": name, "gate": gate, "evidence": evidence, "target": record.target, "must_pass": must_pass}
    where = evidence if record.target == evidence else f"{record.target}, {evidence}"
    return {
        "name": f"{name} ({where})",
        "testId": f"{record.target}/{evidence}/{name}",
        "suite": [where, f"{phase} {PHASES[phase]}"],
        "tags": [gate, evidence],
        "extra": extra,
    }
