"""The pages of the site, one function each, and the folder they are written to."""

from __future__ import annotations

import math
import os
import shutil
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from multiprocessing import active_children, get_context
from operator import itemgetter
from pathlib import Path
from typing import Any

from verify.checks import PHASES, Check, CheckSpec
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.record import kills
from verify.record.digest import instrument_sha256
from verify.record.grounds import BUNDLED
from verify.record.index import Point
from verify.record.reading import rehearsing
from verify.record.schema import Record
from verify.record.verdict import Assessment, fill_command, missing_by_phase
from verify.report.keep_sets import most_telling
from verify.report.looks import place
from verify.report.sentences import beside_words, compiled_words, headline, in_short, simulated_words, stacks, tally
from verify.report.site import charts
from verify.report.site.news import NIGHTS, News, changed, incomparable, red
from verify.report.site.page import Frame
from verify.report.site.roofline import roofline
from verify.report.site.runs import Notes, Past, write_runs
from verify.report.site.tolerances import tolerances
from verify.report.site.view import Column, across, failures, lines

_STATIC = Path(__file__).parent / "static"

#: The history in the chart of a check's page: how many of the newest records, of how many of the tightest targets.
CHARTED, _TIGHTEST = 12, 5

#: How many families of a target are named in a line on top of the matrix; the rest is only counted.
_TOLD_ITEMS = 4

#: The worker processes, of 170 MiB each, and how many runs are worth one: it takes half a second to start.
_PROCESSES, _WORTH = 2, 50


@dataclass
class Site:
    """The data of the pages.

    ``heads`` are the records without results, newest first, and ``files`` the files of the full records. ``homes`` are
    the folders in which runs may have left logs. ``points`` are the results of the newest records of each target,
    oldest first, for the charts of headroom. ``news`` are by target. ``beside`` are runs that are only shown next to
    the others.
    """

    assessments: Sequence[Assessment]
    heads: Sequence[Record]
    files: Sequence[Path]
    points: Sequence[Point]
    news: Mapping[str, News]
    unreadable: Sequence[str]
    checks: Sequence[Check]
    homes: Sequence[Path]
    selftest: Path
    beside: Sequence[Record] = ()

    @cached_property
    def columns(self) -> list[Column]:
        """Every target; of a subject other than the bundled one those of which there is a record."""
        every = bool(not self.heads or self.heads[0].subject.source == BUNDLED)
        shown = [one for one in self.assessments if every or one.used or one.stale]
        return [Column(one, self.news.get(one.target.target)) for one in shown]

    @cached_property
    def families(self) -> dict[str, CheckSpec]:
        """The families of checks by name, in the order of the terminal's matrix."""
        specs = {check.spec.family: check.spec for check in self.checks}
        return {family: specs[family] for family in dict.fromkeys(f for column in self.columns for f in column.rows)}

    @property
    def claims(self) -> dict[str, str]:
        return {family: spec.claim for family, spec in self.families.items()}


def build(site: Site, out: Path) -> int:
    """Replace the folder ``out``, completely or not at all, and return its number of pages.

    Raises ConfigurationError if ``out`` is a file, a folder with anything but a site in it, or cannot be created.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "site.css").is_file())):
        raise ConfigurationError(f"--out {out} holds something other than a site; name a new or an empty folder")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.")
    except OSError as error:
        raise ConfigurationError(f"--out {out} cannot be created ({error.strerror}); choose another folder") from error
    with scratch as folder:
        made, old = Path(folder, "new"), Path(folder, "old")
        shutil.copytree(_STATIC, made)
        for kind in ("run", "gpu", "check"):
            (made / kind).mkdir()
        with _processes() as beside:
            for name, text in _pages(site, beside, made, out):
                (made / name).write_text(text, encoding="utf-8")
        pages = sum(1 for _ in made.rglob("*.html"))
        if out.exists():
            os.replace(out, old)
        os.replace(made, out)
    return pages


@contextmanager
def _processes() -> Iterator[Executor]:
    """Worker processes, which end when this one is interrupted."""
    # Ctrl-C interrupts them too, but only this process reports it
    pool = ProcessPoolExecutor(_PROCESSES, get_context("spawn"), signal.signal, (signal.SIGINT, signal.SIG_IGN))
    try:
        yield pool
    except BaseException:
        for process in active_children():
            process.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _pages(site: Site, beside: Executor, made: Path, out: Path) -> Iterator[tuple[str, str]]:
    """The file name and the text of every page except those of the runs, which are written into ``made``.

    Most of the work is in those and in drawing charts, which holds the GIL: both are done by ``beside``.
    """
    frame = Frame(len(site.heads), site.heads[0] if site.heads else None, site.unreadable)
    write = partial(
        write_runs, frame, site.claims, homes=site.homes, made=made / "run", out=out / "run", rehearsal=rehearsing()
    )
    share = max(_WORTH, math.ceil(len(site.files) / _PROCESSES))
    runs = [beside.submit(write, site.files[start : start + share]) for start in range(0, len(site.files), share)]
    trends = {
        family: beside.submit(charts.over_time, trend, "headroom", log=True) for family, trend in _trends(site).items()
    }
    common = {"headline": headline(site.assessments), "in_short": in_short(site.assessments)}
    page = frame.renderer(columns=site.columns, families=site.families, **common)
    yield "index.html", page("matrix.html", **_matrix(site))
    yield "tolerances.html", page("tolerances.html", **tolerances(site.columns, _blocks(site)))
    yield "catalogue.html", page("catalogue.html", by_phase=_by_phase(site), ids=_ids(site))
    yield "resources.html", page("resources.html", **_resources(site))
    yield "faults.html", page("faults.html", **_faults(site.selftest), instrument=instrument_sha256(repository_root()))
    for column in site.columns:
        yield f"gpu/{column.name}.html", page("gpu.html", "../", **_gpu(column, site))
    notes = Notes()
    for some in runs:
        notes.add(some.result())
    yield "runs.html", page("runs.html", runs=[(head, notes.counts[head.run_id]) for head in site.heads])
    yield "latency.html", page("latency.html", **_latency(site, notes))
    for family in site.families:
        trend = trends[family].result() if family in trends else ""
        yield f"check/{family}.html", page("check.html", "../", trend=trend, **_check(family, site, notes.past))


def _matrix(site: Site) -> dict[str, Any]:
    marks = {family: [(column, column.of_family(family)) for column in site.columns] for family in site.families}
    shown = [mark for row in marks.values() for _, mark in row if mark is not None]
    failing = {family for family, row in marks.items() if any(mark and mark.tone == "fail" for _, mark in row)}
    return {
        "failing": [spec for phases in _blocks(site, failing).values() for specs in phases.values() for spec in specs],
        "blocks": _blocks(site, site.families.keys() - failing),
        "marks": marks,
        "words": sorted({mark.word for mark in shown}),
        "versions": _versions(site.columns),
        "news": {"Red": red(column.assessment for column in site.columns), **changed(site.news.values())},
        "told_items": _TOLD_ITEMS,
        "nights": NIGHTS,
        "beside": [beside_words(record) for record in site.beside],
        "incomparable": incomparable(site.news.values()),
    }


def _blocks(site: Site, chosen: Set[str] | None = None) -> dict[str, dict[int, list[CheckSpec]]]:
    """The families of checks by gate and phase, HARD ones first; only those of ``chosen``, if given."""
    blocks = {}
    for gate in ("hard", "soft"):
        phases = {
            phase: [one for one in specs if one.gate == gate and (chosen is None or one.family in chosen)]
            for phase, specs in _by_phase(site).items()
        }
        blocks[gate] = {phase: specs for phase, specs in phases.items() if specs}
    return {gate: phases for gate, phases in blocks.items() if phases}


def _versions(columns: Sequence[Column]) -> dict[str, list[str]]:
    """The versions in each target's newest record, by the name of the software."""
    found: dict[str, list[str]] = {"driver": [], "torch": [], "triton": [], "ptxas": []}
    for column in columns:
        record, compilation = column.newest, column.assessment.compilation
        environment = record.environment if record else None
        found["driver"].append(environment.gpu.driver if environment and environment.gpu else "-")
        found["torch"].append(environment.torch if environment else "-")
        found["triton"].append(environment.triton if environment else "-")
        found["ptxas"].append(compilation.ptxas if compilation else "-")
    return found


def _by_phase(site: Site) -> dict[int, list[CheckSpec]]:
    phases: dict[int, list[CheckSpec]] = {phase: [] for phase in PHASES}
    for spec in site.families.values():
        phases[spec.phase].append(spec)
    return phases


def _ids(site: Site) -> dict[str, list[Check]]:
    found: dict[str, list[Check]] = {}
    for check in site.checks:
        found.setdefault(check.spec.family, []).append(check)
    return found


def _gpu(column: Column, site: Site) -> dict[str, Any]:
    assessment = column.assessment
    runs = {record.run_id: record for record in assessment.used}
    results = [cell.result for cell in assessment.cells if cell.result is not None]
    failed = failures(assessment)
    above = {failure.cells[0].check.id for failure in failed}  # their keep sets are next to what failed
    return {
        "column": column,
        "stacks": stacks(assessment),
        "outcomes": {result.id: result for result in results},
        "claims": site.claims,
        "lines": lines(results, site.families, column),
        "absent": _absent(column, site),
        "failed": failed,
        "missing": missing_by_phase(assessment),
        "fill": fill_command(assessment) if assessment.missing else "",
        "compiled": compiled_words(assessment.compilation) if assessment.compilation else "",
        "executed": simulated_words(assessment.simulation) if assessment.simulation else "",
        "tally": tally(assessment) if assessment.compilation or assessment.simulation else "",
        "runs": runs,
        "builds": assessment.compilation.builds if assessment.compilation else [],
        "build_name": charts.build_name,
        "curves": [(cell.outcome, charts.plot(cell.outcome.curves)) for cell in assessment.with_curves],
        "kept": [result for result in results if result.kept and result.id not in above],
        "pictured": {result.id for result in results if result.kept},
    }


def _absent(column: Column, site: Site) -> list[tuple[CheckSpec, int]]:
    """The families that have checks without a result on the target, and how many."""
    absent = Counter(cell.check.spec.family for cell in column.assessment.cells if cell.result is None)
    return [(site.families[family], number) for family, number in absent.items()]


def _check(family: str, site: Site, noted: Mapping[str, Sequence[Past]]) -> dict[str, Any]:
    checks = [check for check in site.checks if check.spec.family == family]
    cases = [(check, {column.name: column.of_check(check.id) for column in site.columns}) for check in checks]
    alone: dict[str, list[Check]] = {}
    for check, marks in cases if len(cases) > 1 else ():
        if _fails(marks):
            alone.setdefault(across(marks), []).append(check)
    past = noted.get(family, ())
    curved = next((one.result for one in past if one.result.curves), None)
    telling = most_telling(one.result for one in past)
    return {
        "spec": site.families[family],
        "node": checks[0].node.partition("[")[0],
        "cases": cases,
        "sentence": across({column.name: column.of_family(family) for column in site.columns}),
        "alone": alone,
        "past": past,
        "curved": curved,
        "plot": charts.plot(curved.curves) if curved else "",
        "pictured": next((one for one in past if one.result is telling), None),
    }


def _trends(site: Site) -> dict[str, list[dict[str, Any]]]:
    """By family, the least headroom in each record of the targets that its chart shows, oldest first."""
    least: dict[str, dict[str, dict[str, Any]]] = {}
    for one in site.points:
        family, room = one.id.rpartition(".")[0], 1 / one.share if one.share else math.inf
        if family in site.families and 0 < room < math.inf:  # a log scale cannot show others
            of_runs = least.setdefault(family, {})
            where = place(one.target, one.evidence)
            point = {"time": one.time_utc, "target": where, "value": room, "allowed": 1}
            of_runs[one.run_id] = min(of_runs.get(one.run_id, point), point, key=itemgetter("value"))
    shown = {family: _tightest(list(of_runs.values())) for family, of_runs in least.items()}
    return {family: trend for family, trend in shown.items() if trend}


def _tightest(trend: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of the targets that came closest to the bound, among targets with more than one point."""
    number = Counter(point["target"] for point in trend)
    least: dict[str, float] = {}
    for point in trend:
        if number[point["target"]] > 1:
            least[point["target"]] = min(point["value"], least.get(point["target"], math.inf))
    chosen = sorted(least, key=lambda target: least[target])[:_TIGHTEST]
    return [point for target in chosen for point in trend if point["target"] == target]


def _fails(marks: Mapping[str, Any]) -> bool:
    return any(mark is not None and mark.tone == "fail" for mark in marks.values())


def _resources(site: Site) -> dict[str, Any]:
    known = [one for column in site.columns if (one := column.assessment.compilation) is not None]
    good = [one for one in known if one.builds]
    names = list(dict.fromkeys(charts.build_name(build) for one in good for build in one.builds))
    found = {(one.sm, charts.build_name(build)): build for one in good for build in one.builds}
    metrics = [
        {
            "name": metric,
            "title": title,
            "spread": charts.spread(good, metric),
            "multiples": charts.multiples(good, metric),
            "table": [(name, [_cell(found.get((one.sm, name)), metric) for one in good]) for name in names],
        }
        for metric, title in (charts.METRICS.items() if good else ())
    ]
    gaps = [(f"sm{one.sm}", one.gap) for one in known if one.gap]
    told = {"metrics": metrics, "sms": [one.sm for one in good], "gaps": gaps, "builds": len(names)}
    return {**told, "roofline": roofline(site.columns)}


def _cell(build: Any, metric: str) -> str:
    value = charts.number(build, metric) if build is not None else None
    return "-" if value is None else f"{value:.4g}"


def _latency(site: Site, notes: Notes) -> dict[str, Any]:
    """The measurements of phase 8, and those of any other check in a unit of time, by check and name."""
    shown: list[dict[str, Any]] = [
        {"id": key[0], "name": key[1], "unit": key[2], "points": points[-1:], "number": len(points)}
        | {"chart": charts.over_time(points[-CHARTED * len(site.columns) :], key[2] or key[1])}
        for key, points in notes.times.items()
    ]
    return {
        "kernel": [one for one in shown if one["id"].startswith("p8.")],
        "beside": [one for one in shown if not one["id"].startswith("p8.")],
        "codes": notes.codes,
        "specs": [spec for spec in site.families.values() if spec.phase == 8],
    }


def _faults(folder: Path) -> dict[str, Any]:
    """The kill matrices of ``folder`` by name, and a sentence for each file that is not one."""
    matrices, wrong = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            matrices[path.stem] = kills.read(path)
        except ConfigurationError as error:
            wrong.append(str(error))
    return {"matrices": matrices, "wrong": wrong}
