"""The pages, one function each, and the folder that they make."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from verify.checks import PHASES, SKIP_CODES, Check, CheckSpec
from verify.matrix import bound, built, compiled_words, count, headroom
from verify.outcome import ConfigurationError
from verify.record import CheckResult, Record
from verify.selftest import matrix
from verify.site import charts
from verify.site.view import SHAPES, Bar, Column, across, headline, lines, page_name
from verify.verdict import Assessment, describe_subject, fill_command, missing_by_phase

_STATIC = Path(__file__).parent / "static"

#: What a check's page shows of the past: its results, and in its chart the newest records of the tightest targets.
_LAST, _CHARTED, _TIGHTEST = 12, 12, 5

#: Files of a run that its page points at.
_LOGS = ("*.log", "events.jsonl")

#: Units of time: what has one is shown with the latencies.
_TIMES = frozenset({"s", "ms", "us", "ns"})


@dataclass
class Site:
    """Everything that the pages are made from.

    ``heads`` are the records without results, newest first, and ``records`` the same in full, of which one is held at a
    time: a thousand take most of a gigabyte. ``homes`` are the folders that runs may have left logs in. The rest is
    what ``take`` noted of the records that were gone through.
    """

    assessments: Sequence[Assessment]
    heads: Sequence[Record]
    records: Iterable[Record]
    unreadable: Sequence[str]
    checks: Sequence[Check]
    homes: Sequence[Path]
    selftest: Path
    #: The number of results by verdict of each record.
    counts: list[dict[str, int]] = field(default_factory=list)
    #: The last results of each family, newest first.
    past: dict[str, list[tuple[Record, CheckResult]]] = field(default_factory=dict)
    #: The least headroom of each family in each of the newest records, oldest first.
    headroom_over_time: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    #: The measurements of phase 8 and those in a unit of time, by check, name and unit, oldest first.
    times: dict[tuple[str, str, str], list[dict[str, Any]]] = field(default_factory=dict)
    #: How often a check of phase 8 was skipped with a code.
    codes: Counter[str] = field(default_factory=Counter)
    _seen: Counter[str] = field(default_factory=Counter)

    @cached_property
    def columns(self) -> list[Column]:
        return [Column(assessment) for assessment in self.assessments]

    @cached_property
    def families(self) -> dict[str, CheckSpec]:
        """By name, in the order of the matrix on a terminal."""
        specs = {check.spec.family: check.spec for check in self.checks}
        return {family: specs[family] for family in dict.fromkeys(f for column in self.columns for f in column.rows)}

    def take(self, head: Record, record: Record) -> None:
        """Note what the pages of several runs show of this record; older ones follow."""
        self.counts.append(dict(Counter(str(result.verdict) for result in record.results).most_common()))
        for result in record.results:
            family = result.id.rpartition(".")[0]
            if family in self.families and len(members := self.past.setdefault(family, [])) < _LAST:
                members.append((head, result))
        self._seen[record.target] += 1
        if self._seen[record.target] <= _CHARTED:
            self._take_headroom(record)
        self._take_times(record)

    def _take_headroom(self, record: Record) -> None:
        least: dict[str, float] = {}
        for result in record.results:
            if result.tightest is not None and 0 < result.tightest.headroom < math.inf:
                family = result.id.rpartition(".")[0]
                least[family] = min(least.get(family, math.inf), result.tightest.headroom)
        for family, value in least.items():
            point = {"time": record.time_utc, "target": record.target, "value": value, "allowed": 1}
            self.headroom_over_time.setdefault(family, []).insert(0, point)

    def _take_times(self, record: Record) -> None:
        found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
        for result in record.results:
            latency = result.id.startswith("p8.")
            if latency and result.code:
                self.codes[result.code] += 1
            for one in result.measurements:
                if (latency or one.unit in _TIMES) and math.isfinite(one.measured):
                    allowed = one.allowed if math.isfinite(one.allowed) else None
                    point = {"time": record.time_utc, "target": record.target, "value": one.measured}
                    found.setdefault((result.id, one.name, one.unit), []).append({**point, "allowed": allowed})
        for key, points in found.items():
            self.times[key] = points + self.times.get(key, [])


def build(site: Site, out: Path) -> int:
    """Make the folder ``out`` anew, whole or not at all, and return how many pages it has.

    Raises ConfigurationError where ``out`` is a file, or a folder with anything but a site in it.
    """
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / "site.css").is_file())):
        raise ConfigurationError(f"--out {out} holds something else than a site; name a new folder or an empty one")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        made, old = Path(scratch, "new"), Path(scratch, "old")
        shutil.copytree(_STATIC, made)
        pages = 0
        for name, text in _pages(site, out):
            (made / name).parent.mkdir(exist_ok=True)
            (made / name).write_text(text, encoding="utf-8")
            pages += 1
        if out.exists():
            os.replace(out, old)
        os.replace(made, out)
    return pages


def _pages(site: Site, out: Path) -> Iterator[tuple[str, str]]:
    """The file name and the text of every page."""
    environment = Environment(
        loader=PackageLoader("verify.site"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"page": page_name, "bound": bound, "headroom": headroom, "bar": Bar.of}
    environment.globals |= {
        "phases": PHASES,
        "skip_codes": SKIP_CODES,
        "shapes": (*SHAPES, "none"),
        "columns": site.columns,
        "families": site.families,
        "describe_subject": describe_subject,
        "built": built,
        "count": count,
        "newest": site.heads[0] if site.heads else None,
        "records": len(site.heads),
        "unreadable": site.unreadable,
        "headline": headline(site.columns),
    }

    row_start = cache(environment.get_template("macros.html").module.row_start)
    environment.globals["start_of"] = lambda line, root: row_start(*line.start, root)

    def page(template: str, root: str = "", **facts: Any) -> str:
        return environment.get_template(template).render(root=root, **facts)

    for head, record in zip(site.heads, site.records, strict=True):
        site.take(head, record)
        facts = {"record": record, "lines": lines(record.results, site.families), "counts": site.counts[-1]}
        facts["logs"] = _logs(record, site.homes, out / "run")
        facts["curves"] = [(one.id, charts.plot(one.curves)) for one in record.results if one.curves]
        yield f"run/{page_name(record.run_id)}.html", page("run.html", "../", **facts)
    yield "index.html", page("matrix.html", **_matrix(site))
    yield "runs.html", page("runs.html", runs=list(zip(site.heads, site.counts, strict=True)))
    yield "catalogue.html", page("catalogue.html", by_phase=_by_phase(site), ids=_ids(site))
    yield "resources.html", page("resources.html", **_resources(site))
    yield "latency.html", page("latency.html", **_latency(site))
    yield "faults.html", page("faults.html", **_faults(site.selftest))
    for column in site.columns:
        yield f"gpu/{column.name}.html", page("gpu.html", "../", **_gpu(column, site))
    for family in site.families:
        yield f"check/{family}.html", page("check.html", "../", **_check(family, site))


def _matrix(site: Site) -> dict[str, Any]:
    blocks = {}
    for gate in ("hard", "soft"):
        phases = {phase: [spec for spec in specs if spec.gate == gate] for phase, specs in _by_phase(site).items()}
        blocks[gate] = {phase: specs for phase, specs in phases.items() if specs}
    marks = {family: [(column, column.of_family(family)) for column in site.columns] for family in site.families}
    shown = [mark for row in marks.values() for _, mark in row if mark is not None]
    return {
        "blocks": blocks,
        "marks": marks,
        "words": sorted({mark.word for mark in shown}),
        "versions": _versions(site.columns),
    }


def _versions(columns: Sequence[Column]) -> dict[str, list[str]]:
    """What each target's newest record was made with, by the name of the software."""
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
    return {
        "column": column,
        "lines": lines(results, site.families, column),
        "absent": _absent(column, site),
        "failed": [cell for cell in assessment.cells if cell.failed or cell.not_compiled],
        "missing": missing_by_phase(assessment),
        "fill": fill_command(assessment) if assessment.missing else "",
        "compiled": compiled_words(assessment.compilation) if assessment.compilation else "",
        "runs": runs,
        "builds": assessment.compilation.builds if assessment.compilation else [],
        "build_name": charts.build_name,
        "curves": [(cell.result, charts.plot(cell.result.curves)) for cell in assessment.with_curves],
    }


def _absent(column: Column, site: Site) -> list[tuple[CheckSpec, int]]:
    """The families with checks that have no result on the target, and how many these are."""
    absent = Counter(cell.check.spec.family for cell in column.assessment.cells if cell.result is None)
    return [(site.families[family], number) for family, number in absent.items()]


def _check(family: str, site: Site) -> dict[str, Any]:
    checks = [check for check in site.checks if check.spec.family == family]
    cases = [(check, {column.name: column.of_check(check.id) for column in site.columns}) for check in checks]
    past = site.past.get(family, [])
    curved = next((result for _, result in past if result.curves), None)
    trend = _tightest(site.headroom_over_time.get(family, []))
    return {
        "spec": site.families[family],
        "node": checks[0].node.partition("[")[0],
        "cases": cases,
        "sentence": across({column.name: column.of_family(family) for column in site.columns}),
        "alone": [(check, across(marks)) for check, marks in cases if len(cases) > 1 and _fails(marks)],
        "past": past,
        "curved": curved,
        "plot": charts.plot(curved.curves) if curved else "",
        "trend": charts.over_time(trend, "headroom", log=True) if trend else "",
    }


def _tightest(trend: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The points of the targets that came closest to what is allowed, of those with more than one."""
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
    return {"metrics": metrics, "sms": [one.sm for one in good], "gaps": gaps, "builds": len(names)}


def _cell(build: Any, metric: str) -> str:
    value = charts.number(build, metric) if build is not None else None
    return "-" if value is None else f"{value:.4g}"


def _latency(site: Site) -> dict[str, Any]:
    """The measurements of phase 8, and of any check in a unit of time, by family and name."""
    shown = [
        {"id": key[0], "name": key[1], "unit": key[2], "points": points[-1:], "number": len(points)}
        | {"chart": charts.over_time(points[-_CHARTED * len(site.columns) :], key[2] or key[1])}
        for key, points in site.times.items()
    ]
    return {
        "kernel": [one for one in shown if one["id"].startswith("p8.")],
        "beside": [one for one in shown if not one["id"].startswith("p8.")],
        "codes": site.codes,
        "specs": [spec for spec in site.families.values() if spec.phase == 8],
    }


def _faults(folder: Path) -> dict[str, Any]:
    """The kill matrices of ``folder`` by name, and a sentence for each file that is none."""
    matrices, wrong = {}, []
    for path in sorted(folder.glob("*.json")):
        try:
            matrices[path.stem] = matrix.read(path)
        except ConfigurationError as error:
            wrong.append(str(error))
    return {"matrices": matrices, "wrong": wrong}


def _logs(record: Record, homes: Sequence[Path], page: Path) -> list[tuple[str, str]]:
    """The name of each log that the run left behind, and the way there from its page."""
    if Path(record.run_id).name != record.run_id:
        return []
    kept = [path for home in homes for pattern in _LOGS for path in sorted((home / record.run_id).glob(pattern))]
    return [(path.name, Path(os.path.relpath(path, page)).as_posix()) for path in kept]
