"""What the first screen says: what is red, what is new since the last green run, what did not run, and the nights."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from itertools import chain, groupby

from verify.architectures import known_targets
from verify.checks import Check
from verify.record.absences import MEANINGS
from verify.record.archive import moment
from verify.record.index import Index, Point
from verify.record.schema import FAILING, Record, Verdict
from verify.record.verdict import Assessment
from verify.report.changes import Change, Compared
from verify.report.comparable import is_green, verdicts_of
from verify.report.difference import on_target
from verify.report.matrix import count

#: How many nights a strip shows: two weeks.
NIGHTS = 14

#: The kinds of change that the first screen names, and their headings; those of ``_ALWAYS`` also where there are none.
_KINDS = {
    "newly failing": "New since the last green run",
    "did not run": "Did not run",
    "still failing": "Failing for longer",
    "flaky": "Flaky",
}
_ALWAYS = ("newly failing", "did not run")


@dataclass(frozen=True, slots=True)
class Night:
    """One day (UTC) of a target: how what ran on it ended, as the ``tone`` of a square and in words."""

    day: date
    tone: str
    told: str


@dataclass(frozen=True, slots=True)
class News:
    """What runs say about one target: its newest runs compared with earlier ones, and its last nights.

    ``age`` is that of the newest run on the target: the days between it and the newest record of all, so that the same
    records always make the same pages. ``day`` is empty if nothing ever ran on it.
    """

    target: str
    runs: Sequence[Compared]
    day: str
    age: int
    nights: Sequence[Night]

    @property
    def old(self) -> str:
        """The age in words; empty for a run of the newest day."""
        return f"{count(self.age, 'day')} old" if self.age else ""

    @property
    def strip(self) -> str:
        """The nights in words, neighbours that ended alike together."""
        told = []
        for words, members in groupby(self.nights, lambda one: one.told):
            days = [str(one.day) for one in members]
            told.append(f"{days[0]}{f' to {days[-1]}' if len(days) > 1 else ''}: {words}")
        return f"{self.target}, the last {len(self.nights)} nights. {'; '.join(told)}"


@dataclass(frozen=True, slots=True)
class Item:
    """The checks of one family that share a fate on one target; ``family`` is empty if it is about the target."""

    target: str
    family: str
    gate: str
    told: str
    checks: Sequence[str]


def latest(index: Index, checks: Sequence[Check]) -> dict[str, News]:
    """The news of every target that has records, by its name."""
    days = [*(head.time_utc[:10] for head in index.heads.values()), *(one.time_utc[:10] for one in index.absences)]
    newest = max(days, default="")
    found = {}
    for name in (one.target for one in known_targets()):
        if own := [head for head in index.heads.values() if head.target == name]:
            points = index.points(None, name)
            ran = sorted((head for head in own if head.on_target), key=moment)
            day = ran[-1].time_utc[:10] if ran else ""
            age = (date.fromisoformat(newest) - date.fromisoformat(day or newest)).days
            missed = {one.time_utc[:10]: MEANINGS[one.absence] for one in index.absences if one.target == name}
            nights = _nights(ran, points, checks, date.fromisoformat(newest), missed) if ran else []
            runs = [*chain(*on_target(index, name, checks, points))]
            found[name] = News(name, runs, day, age, nights)
    return found


def _nights(
    ran: Sequence[Record],
    points: Sequence[Point],
    checks: Sequence[Check],
    last: date,
    missed: Mapping[str, str],
) -> list[Night]:
    """The nights up to ``last`` of a target; ``ran`` are the runs on it, ``points`` its results, both oldest first.
    ``missed`` is why some days have no record.
    """
    wanted = [last - timedelta(days=back) for back in reversed(range(NIGHTS))]
    recent = [one for one in points if one.time_utc[:10] >= str(wanted[0])]
    verdicts, gates = verdicts_of(recent), {one.id: one.gate for one in recent}
    days: dict[str, list[Record]] = {}
    for head in ran:
        days.setdefault(head.time_utc[:10], []).append(head)
    return [
        _night(day, days[str(day)], verdicts, gates, checks)
        if str(day) in days
        else Night(day, "gap", missed.get(str(day), "did not run"))
        for day in wanted
    ]


def _night(
    day: date,
    ran: Sequence[Record],
    verdicts: Mapping[str, Mapping[str, Verdict]],
    gates: Mapping[str, str],
    checks: Sequence[Check],
) -> Night:
    """The night of the runs of one day; of a check that ran twice, the later verdict counts."""
    ended = {name: verdict for head in ran for name, verdict in verdicts.get(head.run_id, {}).items()}
    hard, soft = (sum(v in FAILING for name, v in ended.items() if gates[name] == gate) for gate in ("hard", "soft"))
    told = [f"{count(number, f'{gate} check')} failed" for number, gate in ((hard, "HARD"), (soft, "SOFT")) if number]
    waived = sum(verdict is Verdict.WAIVED for verdict in ended.values())
    told += [f"{count(waived, 'check')} waived"] if waived else []
    if not any(is_green(head, _spared(verdicts.get(head.run_id, {})), checks) for head in ran) and not hard:
        told.append("some must-pass checks without a result")
    good = "pass" if ran[-1].kind == "hardware" else "emulated"
    tone = "fail" if hard else "warn" if soft else "part" if told else good
    return Night(day, tone, " and ".join(told) or "its must-pass checks passed")


def _spared(verdicts: Mapping[str, Verdict]) -> dict[str, Verdict]:
    """``verdicts`` as if what is waived had passed, to see whether anything else is missing."""
    return {name: Verdict.PASS if one is Verdict.WAIVED else one for name, one in verdicts.items()}


def red(assessments: Iterable[Assessment]) -> dict[str, list[Item]]:
    """What the matrix shows in red, by target."""
    found = []
    for one in assessments:
        groups: dict[tuple[str, str, str], list[str]] = {}
        for cell in one.cells:
            if cell.failed or cell.warns:
                how = cell.outcome.verdict if cell.proves else f"{cell.outcome.verdict} {cell.outcome.evidence}"
                groups.setdefault((cell.check.spec.family, cell.check.spec.gate, how), []).append(cell.check.id)
        found += [Item(one.target.target, *key, members) for key, members in groups.items()]
    return _by_target(found)


def changed(news: Iterable[News]) -> dict[str, dict[str, list[Item]]]:
    """What changed, by heading and target: the kinds of change that there are, and those that are always named."""
    found: dict[str, dict[str, list[Item]]] = {_KINDS[kind]: {} for kind in _ALWAYS}
    every = [(one.target, run, change) for one in news for run in one.runs for change in run.changes]
    for kind, heading in _KINDS.items():
        groups: dict[tuple[str, str, str, str], list[str]] = {}
        for target, run, change in every:
            if change.kind == kind:
                key = (target, *_grouped(target, run, change))
                groups.setdefault(key, []).append(change.id)
        if groups:
            found[heading] = _by_target(Item(*key, members) for key, members in groups.items())
    return found


def _by_target(items: Iterable[Item]) -> dict[str, list[Item]]:
    """Items by target, the targets of which a HARD check is concerned first."""
    found: dict[str, list[Item]] = {}
    for one in sorted(items, key=lambda item: item.gate != "hard"):
        found.setdefault(one.target, []).append(one)
    return found


def _grouped(target: str, run: Compared, change: Change) -> tuple[str, str, str]:
    """The family, the gate and the words of a change, without what differs from check to check."""
    if change.id == target:
        return "", change.gate, change.told
    day = run.before.time_utc[:10] if run.before else ""
    since = f"last green run {day}" if run.green else f"compared with {day}, as no earlier run is green"
    return change.id.rpartition(".")[0], change.gate, f"{change.told.partition(': ')[0]} ({since})"


def incomparable(news: Iterable[News]) -> list[str]:
    """The targets whose newest runs have no earlier run that they can be compared with."""
    return [one.target for one in news if one.runs and not any(run.before for run in one.runs)]
