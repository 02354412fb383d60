"""The page of each run, and its contribution to other pages; worker processes make them, several runs each."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from verify.record.archive import read_again
from verify.record.reading import rehearse
from verify.record.schema import CheckResult, Record, Verdict
from verify.report.site import charts
from verify.report.site.page import Frame
from verify.report.site.view import lines, page_name

#: The number of last results on a check's page.
LAST = 12

#: Files of a run that its page links to.
_LOGS = ("*.log", "events.jsonl")

#: Units of time: measurements in these are shown with the latencies.
_TIMES = frozenset({"s", "ms", "us", "ns"})


class Past(NamedTuple):
    """A result, with its run, time and target."""

    run_id: str
    time_utc: str
    target: str
    result: CheckResult


@dataclass
class Notes:
    """What pages about several runs show; runs are added newest first."""

    #: By run id, the number of results by verdict.
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    #: The last results of each family, newest first.
    past: dict[str, list[Past]] = field(default_factory=dict)
    #: The measurements of phase 8 and those in a unit of time, by check, name and unit, oldest first.
    times: dict[tuple[str, str, str], list[dict[str, Any]]] = field(default_factory=dict)
    #: How often a check of phase 8 was skipped with a code.
    codes: Counter[str] = field(default_factory=Counter)

    def add(self, older: Notes) -> None:
        """Add runs that are older than all that were added before."""
        self.counts |= older.counts
        for family, members in older.past.items():
            own = self.past.setdefault(family, [])
            own += members[: LAST - len(own)]
        for key, points in older.times.items():
            self.times[key] = points + self.times.get(key, [])
        self.codes += older.codes


def write_runs(
    frame: Frame,
    claims: Mapping[str, str],
    files: Sequence[Path],
    *,
    homes: Sequence[Path],
    made: Path,
    out: Path,
    rehearsal: bool,
) -> Notes:
    """Write the page of each run in ``files``, newest first, into ``made``, which is renamed to ``out`` later.

    ``claims`` are those of the families of checks that have a page; ``homes`` are the folders in which runs may have
    left logs. The process need not know yet that the records are made up for a ``rehearsal``. Returns what the other
    pages show. Raises ConfigurationError for a record that can no longer be read.
    """
    rehearse(rehearsal)
    page, notes = frame.renderer(), Notes()
    for path in files:
        record = read_again(path)
        noted = _noted(record, claims.keys())
        text = page(
            "run.html",
            "../",
            record=record,
            lines=lines(record.results, claims),
            outcomes={one.id: one for one in record.results},
            claims=claims,
            counts=noted.counts[record.run_id],
            logs=_logs(record, homes, out),
            curves=[(one.id, charts.plot(one.curves)) for one in record.results if one.curves],
            # a picture of every pass would double the time of a page, and the GPU's own page has them
            kept=[one for one in record.results if one.kept and one.verdict is not Verdict.PASS],
        )
        (made / f"{page_name(record.run_id)}.html").write_text(text, encoding="utf-8")
        notes.add(noted)
    return notes


def _noted(record: Record, families: Set[str]) -> Notes:
    counts = Counter(str(result.verdict) for result in record.results)
    notes = Notes({record.run_id: dict(counts.most_common())})
    for result in record.telling:
        family, latency = result.id.rpartition(".")[0], result.id.startswith("p8.")
        if family in families:
            notes.past.setdefault(family, []).append(Past(record.run_id, record.time_utc, record.target, result))
        if latency and result.code:
            notes.codes[result.code] += 1
        for one in result.measurements:
            # how long the simulator takes says nothing about a GPU
            if (latency or one.unit in _TIMES) and math.isfinite(one.measured) and result.evidence != "simulated":
                allowed = one.allowed if math.isfinite(one.allowed) else None
                point = {"time": record.time_utc, "target": record.target, "value": one.measured, "allowed": allowed}
                notes.times.setdefault((result.id, one.name, one.unit), []).append(point)
    return notes


def _logs(record: Record, homes: Sequence[Path], out: Path) -> list[tuple[str, str]]:
    """The name of each log that the run left, and its path relative to the run's page in ``out``."""
    if Path(record.run_id).name != record.run_id:
        return []
    kept = [path for home in homes for pattern in _LOGS for path in sorted((home / record.run_id).glob(pattern))]
    return [(path.name, Path(os.path.relpath(path, out)).as_posix()) for path in kept]
