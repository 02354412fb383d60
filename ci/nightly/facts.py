"""What a night showed of HARD checks, as JSON: what fails, whether a second run shows it too, and what passes.

Failures are grouped by family of checks and by place: ``sm120`` is the GPU, ``sm120 simulated`` a run without it.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import Any

from ci.nightly import NEW, OLD
from verify.architectures import known_targets
from verify.checks import Check
from verify.record.index import Index
from verify.record.reading import rehearsing
from verify.record.schema import CheckResult, Record, Verdict
from verify.report.changes import Compared
from verify.report.difference import on_target
from verify.report.looks import line_of

#: The file of the facts.
FACTS = "alerts.json"

#: INFRA says nothing about a check, and the failure of its blocker stands for a BLOCKED one.
_FAILING = frozenset({Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT, Verdict.ERROR})


def of_night(index: Index, checks: Sequence[Check], time_utc: str, tonight: Container[str]) -> dict[str, Any]:
    """The facts of the night that is collected at ``time_utc`` (RFC 3339), of the runs ``tonight``, by their ids.

    A failure is ``confirmed`` if a second run shows it: one that tried it again, or the comparable one before.
    """
    failing: list[dict[str, Any]] = []
    passing: dict[str, dict[str, Any]] = {}
    for target in known_targets():
        points = index.points(None, target.target)
        for runs in on_target(index, target.target, checks, points):
            for one in runs:
                if one.after.run_id not in tonight:
                    continue
                record = index.find(one.after.run_id)
                assert record is not None  # a head of the index
                failing += _failing(index, one, record)
                passed = passing.setdefault(line_of(record), {"commit": record.subject.git_sha, "checks": []})
                passed["checks"] += [
                    result.id for result in record.telling if result.gate == "hard" and result.verdict is Verdict.PASS
                ]
    return {"time_utc": time_utc, "rehearsal": rehearsing(), "failing": failing, "passing": passing}


def _failing(index: Index, one: Compared, record: Record) -> list[dict[str, Any]]:
    """The HARD failures of a run, by family."""
    again = {
        result.id
        for second in index.confirmations(record.run_id)
        for result in second.results
        if result.verdict in _FAILING
    }
    families: dict[str, list[CheckResult]] = {}
    for result in record.telling:
        if result.gate == "hard" and result.verdict in _FAILING:
            families.setdefault(result.id.rpartition(".")[0], []).append(result)
    return [
        {
            "family": family,
            "place": line_of(record),
            "checks": [result.id for result in results],
            "kind": OLD if all(result.id in one.failed_before for result in results) else NEW,
            "confirmed": any(result.id in again or result.id in one.failed_before for result in results),
            "run": record.run_id,
            "commit": record.subject.git_sha,
            "verdict": ", ".join(dict.fromkeys(str(result.verdict) for result in results)),
            "told": f"{results[0].id}: {results[0].verdict}: {results[0].said}",
            "repeat": results[0].repeat,
        }
        for family, results in families.items()
    ]
