"""``python -m verify history``: verdicts and headroom run by run, from the index of the records."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import parse_target
from verify.errors import ConfigurationError
from verify.record.archive import newest_first
from verify.record.curves import MOST_CURVES, Curve
from verify.record.grounds import BUNDLED
from verify.record.index import Point, open_index
from verify.record.schema import Verdict
from verify.record.verdict import describe_subject
from verify.report.comparable import BAD
from verify.report.documents import dumps
from verify.report.looks import SHAPES, line_of, place
from verify.report.matrix import LETTERS, WORST_FIRST, count
from verify.report.plots import text_plot

if TYPE_CHECKING:
    from rich.console import Console

#: How many runs a line shows, and how many results are listed one by one.
_SHOWN, _LAST = 20, 12

#: The top of a plot: failures far outside the bound would flatten everything else.
_MOST = 2.0

#: From none of the allowance used to all of it.
_BARS = "▁▂▃▄▅▆▇█"

#: The letter of a run without a result.
_NOTHING = "·"


def history(
    check: str | None,
    gpu: str | None,
    folders: Sequence[Path] = (),
    subject: str | None = None,
    *,
    as_json: bool = False,
) -> int:
    """Print, of one subject, a line for each target, for each family of checks on one target, or the history of one
    check; return 0.

    Raises ConfigurationError for a GPU or a check without any results.
    """
    target = parse_target(gpu).target if gpu is not None else None
    with open_index(folders, subject) as index:
        points = index.points(check, target)
        known = sorted({one.id for one in index.points()}) if not points and check is not None else ()
        newest, unreadable = newest_first(index.heads.values()), len(index.unreadable)
    if not points and (check or target or not newest):
        near = difflib.get_close_matches(check or "", known, n=3, cutoff=0.4)
        what = f"of {check!r}" if check else "of a check"
        hint = f"; the nearest are {', '.join(near)}" if near else ""
        unread = f"; {count(unreadable, 'record')} cannot be read" if unreadable else ""
        raise ConfigurationError(f"no record has a result {what}{f' on {target}' if target else ''}{hint}{unread}")
    if as_json:
        from dataclasses import asdict

        print(dumps([asdict(one) | {"share": one.share} for one in points]), end="")
        return 0
    from verify.report.terminal import PipeConsole

    console = PipeConsole()
    if newest and newest[0].subject.source != BUNDLED:
        console.print(f"Subject: {describe_subject(newest[0].subject)}.\n", markup=False)
    _print(points, check, target, {head.run_id: line_of(head) for head in reversed(newest)}, console)
    return 0


def _print(
    points: Sequence[Point], check: str | None, target: str | None, lines: Mapping[str, str], console: Console
) -> None:
    """The table; ``lines`` has the target of every run, oldest first, as a line names it."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    by_family, every = target is not None and check is None, target is None and check is None
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("check" if by_family else "target", overflow="fold")
    table.add_column("runs", justify="right")
    table.add_column("verdicts", no_wrap=True)
    table.add_column("used", no_wrap=True)
    table.add_column("last", justify="right", no_wrap=True)
    table.add_column("counts", overflow="fold")
    groups: dict[str, dict[str, list[Point]]] = {}
    for run_id, name in lines.items() if every else ():
        groups.setdefault(name, {})[run_id] = []
    for one in points:
        # for a target only its HARD checks, unless one check is asked for
        if every and one.gate != "hard":
            continue
        name = place(one.id.rpartition(".")[0], one.evidence) if by_family else lines[one.run_id]
        groups.setdefault(name, {}).setdefault(one.run_id, []).append(one)
    for name, members in groups.items():
        runs = [*members.values()][-_SHOWN:]
        shares = [_largest(run) for run in runs]
        last = "-" if not shares or shares[-1] is None else f"{shares[-1]:.0%}" if shares[-1] < 10 else ">1000%"
        letters = Text("".join(map(_letter, runs)))
        table.add_row(Text(name), str(len(members)), letters, _sparkline(shares), last, _counts(runs[-1]))
    console.print(table)
    console.print()
    console.print(
        "verdicts: of each run the worst failure, else P if a check passed, oldest first; "
        "used: share of the allowance, █ at or over the bound; counts: the verdicts of the last run",
        soft_wrap=True,
    )
    if every:
        console.print("Only HARD checks are shown; · is a run without any.")
    if check is not None:
        _print_runs(points, console)


def _print_runs(points: Sequence[Point], console: Console) -> None:
    from rich.table import Table
    from rich.text import Text

    from verify.report.terminal import verdict_text

    if curves := _curves(points):
        console.print()
        console.print(Text("\n".join(text_plot(curves, console.width))))
    table = Table.grid(padding=(0, 2, 0, 0))
    for one in points[: -_LAST - 1 : -1]:
        share = "" if one.share is None else f"{one.share:.3g} of what is allowed"
        word = f"{one.verdict} {one.code}" if one.code else one.verdict
        shape = SHAPES[one.evidence]
        table.add_row(
            one.time_utc[:10],
            one.target,
            shape,
            verdict_text(word),
            Text(one.id),
            Text(share),
            f"{one.duration_s:.1f} s",
        )
    console.print()
    console.print(f"newest first ({min(_LAST, len(points))} of {count(len(points), 'result')}):")
    console.print(table)


def _curves(points: Sequence[Point]) -> list[Curve]:
    """The used share of the allowance over days, for each of the targets with the most runs, simulated ones apart."""
    start = datetime.fromisoformat(points[0].time_utc)
    found: dict[str, list[tuple[float, float]]] = {}
    for run in _by_run(points):
        if (share := _largest(run)) is not None:
            days = (datetime.fromisoformat(run[0].time_utc) - start).total_seconds() / 86_400
            found.setdefault(place(run[0].target, run[0].evidence), []).append((days, min(share, _MOST)))
    most = sorted((name for name in found if len(found[name]) > 1), key=lambda name: -len(found[name]))[:MOST_CURVES]
    return [Curve.of(name, found[name], x="days", y=f"measured / allowed, at most {_MOST:g}") for name in most]


def _by_run(points: Iterable[Point]) -> list[list[Point]]:
    runs: dict[str, list[Point]] = {}
    for one in points:
        runs.setdefault(one.run_id, []).append(one)
    return list(runs.values())


def _letter(run: Sequence[Point]) -> str:
    """The worst failure, waived or not; without one, a pass; without that, the worst of what says nothing. A dot
    without results.
    """
    verdicts = sorted({one.verdict for one in run}, key=WORST_FIRST.index)
    if not verdicts:
        return _NOTHING
    bad = verdicts[0] in BAD or verdicts[0] == Verdict.WAIVED
    return LETTERS[verdicts[0] if bad or Verdict.PASS not in verdicts else Verdict.PASS]


def _counts(run: Sequence[Point]) -> str:
    """How many of the results of a run have each verdict, the most frequent first: ``408P 16S 1R``."""
    found = Counter(LETTERS[one.verdict] for one in run)
    return " ".join(f"{number}{letter}" for letter, number in found.most_common()) or _NOTHING


def _largest(run: Sequence[Point]) -> float | None:
    return max((one.share for one in run if one.share is not None), default=None)


def _sparkline(shares: Sequence[float | None]) -> str:
    top = len(_BARS) - 1
    return "".join(" " if one is None else _BARS[max(0, min(top, int(one * top)))] for one in shares)
