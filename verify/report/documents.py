"""The reports as Markdown and JSON: the same facts in the same order as on the terminal; the output is reproducible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import Any

from verify.architectures import Architecture
from verify.checks import PHASES
from verify.record.builds import Compilation
from verify.record.cells import Cell
from verify.record.findings import title
from verify.record.headroom import room, tightest
from verify.record.schema import CheckResult, Finding, Measurement, Record
from verify.record.verdict import Assessment, describe_subject, fill_command, missing_by_phase
from verify.report.matrix import LEGEND, VERSIONS, Row, bound, count, grid, headroom, rows, versions
from verify.report.plots import mermaid, value_rows
from verify.report.sentences import built, headline, known_without_it, simulated, stacks


def markdown_table(header: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    """A GitHub table; a ``|`` or a line break in a cell is escaped."""
    lines = [header, ["---"] * len(header), *body]
    return "".join("| " + " | ".join(_cell_text(cell) for cell in line) + " |\n" for line in lines)


def dumps(value: Any) -> str:
    """JSON with NaN and infinities as strings, as in a record."""
    return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"


def report_markdown(assessment: Assessment, unreadable: Sequence[str]) -> str:
    parts = [f"# {assessment.target.target}: {assessment.verdict}\n\n{assessment.sentence}\n"]
    if assessment.used or assessment.stale:
        header = ["run", "time", "GPU", "driver", "torch", "triton", "subject", "counts"]
        parts.append(markdown_table(header, _run_lines(assessment)))
    parts += [f"{_one_line(sentence)}\n" for sentence in (*stacks(assessment), *known_without_it(assessment))]
    header = ["phase", "plan", "check", "gate", "verdict", "evidence", "measured / allowed", "headroom"]
    body = [
        [
            f"{row.phase} {PHASES[row.phase]}",
            row.spec.plan or "",
            f"`{row.spec.family}`",
            row.spec.gate.upper(),
            row.verdict,
            row.evidence,
            bound(row.tightest),
            headroom(row.tightest),
        ]
        for row in rows(assessment.cells)
    ]
    parts.append(markdown_table(header, body))
    if failed := [cell for cell in assessment.cells if cell.failed or cell.warns]:
        by_id = {cell.check.id: cell for cell in failed}
        told = (f"* {_finding(one, by_id[one.checks[0]])}\n" for one in assessment.findings)
        parts.append("## Findings\n\n" + "".join(told))
        parts.append("## Failures\n\n" + "".join(map(_failure, failed)))
    if waived := [cell for cell in assessment.cells if cell.result and cell.result.waiver]:
        parts.append("## Waived failures\n\n" + "".join(map(_failure, waived)))
    if assessment.outdated:
        told = (f"* {why}: {', '.join(_families(cells))}\n" for why, cells in assessment.outdated.items())
        parts.append("## Stale results\n\n" + "".join(told))
    if assessment.with_curves:
        parts.append("## Curves\n\n" + "\n".join(_curves(cell.outcome) for cell in assessment.with_curves))
    if assessment.missing:
        counted = count(len(assessment.missing), "must-pass check")
        parts.append(f"## Missing\n\n{counted}; run them with `{fill_command(assessment)}`.\n")
    if assessment.unknown_ids:
        named = "".join(f"* `{check_id}`\n" for check_id in assessment.unknown_ids)
        parts.append("## Results of checks that are not in this suite\n\n" + named)
    if unreadable:
        parts.append("## Unreadable records\n\n" + "".join(f"* {_one_line(sentence)}\n" for sentence in unreadable))
    return "\n".join(parts)


def summary_markdown(assessments: Sequence[Assessment], unreadable: Sequence[str]) -> str:
    body = [
        [
            assessment.target.target,
            ", ".join(assessment.target.products) if isinstance(assessment.target, Architecture) else "",
            assessment.verdict,
            f"{sum(cell.passed for cell in assessment.must_pass)}/{len(assessment.must_pass)}",
            simulated(assessment),
            built(assessment.compilation),
            assessment.used[0].time_utc if assessment.used else "-",
        ]
        for assessment in assessments
    ]
    header = ["target", "products", "verdict", "must-pass", "simulated", "compiled", "newest record"]
    table = markdown_table(header, body)
    told = f"{headline(assessments)}\n\n{table}"
    return told + "".join(f"\n* unreadable record {_one_line(sentence)}" for sentence in unreadable)


def grid_markdown(assessments: Sequence[Assessment], unreadable: Sequence[str]) -> str:
    """Every check on every target: a table of the HARD ones, one of the SOFT ones, the verdicts, the versions."""
    names = [one.target.target for one in assessments]
    parts = []
    lines = grid(assessments)
    for gate in ("hard", "soft"):
        body = [
            [f"`{spec.family}`", spec.plan or "", *(str(marks.get(name, "-")) for name in names)]
            for spec, marks in lines
            if spec.gate == gate
        ]
        verdicts = [["**verdict**", "", *(one.verdict for one in assessments)]] if gate == "hard" else []
        parts.append(f"## {gate.upper()}\n\n" + markdown_table(["check", "plan", *names], body + verdicts))
    parts.append(f"{LEGEND}; - does not apply.\n")
    parts.append("## Versions\n\n" + markdown_table(VERSIONS, versions(assessments)))
    parts += ["".join(f"* unreadable record {_one_line(sentence)}\n" for sentence in unreadable)] if unreadable else []
    return "\n".join(parts)


def grid_json(assessments: Sequence[Assessment], unreadable: Sequence[str]) -> str:
    lines = [
        {"family": spec.family, "gate": spec.gate, "plan": spec.plan, "phase": spec.phase}
        | {"marks": {name: asdict(one) | {"mark": str(one)} for name, one in marks.items()}}
        for spec, marks in grid(assessments)
    ]
    made = [dict(zip(VERSIONS, line, strict=True)) for line in versions(assessments)]
    whole = {"targets": [_summary(one) for one in assessments], "matrix": lines, "versions": made}
    return dumps(whole | {"unreadable": list(unreadable)})


def report_json(assessment: Assessment, unreadable: Sequence[str]) -> str:
    missing = missing_by_phase(assessment)
    whole = _summary(assessment) | {
        "subject": assessment.subject.model_dump() if assessment.subject else None,
        "runs": [_run(record) for record in assessment.used],
        "not_pinned": stacks(assessment),
        "stale": [_run(record) | {"because": assessment.why_stale(record)} for record in assessment.stale],
        "outdated": {why: [cell.check.id for cell in cells] for why, cells in assessment.outdated.items()},
        "compilation": assessment.compilation.model_dump(mode="json") if assessment.compilation else None,
        "simulation": assessment.simulation.model_dump(mode="json") if assessment.simulation else None,
        "findings": [one.model_dump() for one in assessment.findings],
        "rows": [_row(row) for row in rows(assessment.cells)],
        "missing": [cell.check.id for cells in missing.values() for cell in cells],
        "fill": fill_command(assessment) if missing else None,
        "unknown_ids": list(assessment.unknown_ids),
        "unreadable": list(unreadable),
    }
    return dumps(whole)


def summary_json(assessments: Sequence[Assessment], unreadable: Sequence[str]) -> str:
    return dumps({"targets": [_summary(assessment) for assessment in assessments], "unreadable": list(unreadable)})


def compilations_json(compilations: Sequence[Compilation]) -> str:
    return dumps({"targets": [{"target": f"sm{one.sm}"} | one.model_dump(mode="json") for one in compilations]})


FULL: MappingProxyType[str, Callable[[Assessment, Sequence[str]], str]] = MappingProxyType(
    {"markdown": report_markdown, "json": report_json}
)
SUMMARY: MappingProxyType[str, Callable[[Sequence[Assessment], Sequence[str]], str]] = MappingProxyType(
    {"markdown": summary_markdown, "json": summary_json}
)
GRID: MappingProxyType[str, Callable[[Sequence[Assessment], Sequence[str]], str]] = MappingProxyType(
    {"markdown": grid_markdown, "json": grid_json}
)


def _summary(assessment: Assessment) -> dict[str, Any]:
    target, hard = assessment.target, assessment.must_pass
    gpu = target if isinstance(target, Architecture) else None
    return {
        "target": target.target,
        "family": gpu.family if gpu else None,
        "capability": gpu.capability if gpu else None,
        "products": list(gpu.products) if gpu else [],
        "toolchain_gap": gpu.toolchain_gap if gpu else "",
        "verdict": assessment.verdict.value,
        "sentence": assessment.sentence,
        "must_pass": {
            "total": len(hard),
            "passed": sum(cell.passed for cell in hard),
            "failed": [cell.check.id for cell in hard if cell.failed],
            "waived": [cell.check.id for cell in hard if cell.waived],
        },
        "compiled": {
            "kernels": built(assessment.compilation),
            "must_pass": [cell.check.id for cell in hard if cell.compiled],
            "not_built": [cell.check.id for cell in hard if cell.not_compiled],
        },
        "simulated": {
            "checks": simulated(assessment),
            "must_pass": [cell.check.id for cell in hard if cell.simulated],
            "failed": [cell.check.id for cell in hard if cell.simulated_failed],
        },
        "newest_record": assessment.used[0].time_utc if assessment.used else None,
    }


def _run(record: Record) -> dict[str, Any]:
    gpu = record.environment.gpu
    return {
        "run_id": record.run_id,
        "time_utc": record.time_utc,
        "state": record.state,
        "kind": record.kind,
        "ahead_of_time": record.kind == "compiled",
        "selection": record.selection,
        "model": record.model,
        "seed": record.seed,
        "gpu": gpu.name if gpu else None,
        "driver": gpu.driver if gpu else None,
        "torch": record.environment.torch,
        "triton": record.environment.triton,
        "subject": describe_subject(record.subject),
    }


def _run_lines(assessment: Assessment) -> Iterable[list[str]]:
    for record in (*assessment.used, *assessment.stale):
        run, different = _run(record), assessment.why_stale(record)
        columns = ("run_id", "time_utc", "gpu", "driver", "torch", "triton", "subject")
        yield [*(run[column] or "-" for column in columns), f"no: {different}" if different else "yes"]


def _finding(one: Finding, first: Cell) -> str:
    blocks = f"; blocks {', '.join(f'`{name}`' for name in one.blocks)}" if one.blocks else ""
    told = title(one, first.outcome, first.check.spec.claim)
    return f"**{_one_line(told)}**: {', '.join(f'`{name}`' for name in one.checks)}{blocks}"


def _failure(cell: Cell) -> str:
    result = cell.outcome
    why = f"known deviation: {result.deviation}" if result.deviation else str(result.waiver or "")
    return (
        f"* **{result.id}**{'' if cell.proves else f' ({result.evidence}, not run)'} {_one_line(result.message)} "
        f"(`{result.repeat}`){f'; {_one_line(why)}' if why else ''}\n"
    )


def _families(cells: Iterable[Cell]) -> Iterable[str]:
    return dict.fromkeys(f"`{cell.check.spec.family}`" for cell in cells)


def _curves(result: CheckResult) -> str:
    header, *body = value_rows(result.curves)
    parts = [f"### `{result.id}`, {result.evidence}\n", mermaid(result.curves), markdown_table(header, body)]
    return "\n".join(filter(None, parts))


def _row(row: Row) -> dict[str, Any]:
    return {
        "phase": row.phase,
        "plan": row.spec.plan,
        "family": row.spec.family,
        "gate": row.spec.gate,
        "claim": row.spec.claim,
        "verdict": row.verdict,
        "evidence": row.evidence,
        "tightest": _measurement(row.tightest),
        "checks": [_check(cell) for cell in row.cells],
    }


def _check(cell: Cell) -> dict[str, Any]:
    result = cell.result
    return {
        "id": cell.check.id,
        "must_pass": cell.must_pass,
        "counts": cell.proves,
        "verdict": result.verdict.value if result else None,
        "code": result.code if result else None,
        "by": result.by if result else None,
        "evidence": result.evidence if result else None,
        "run_id": cell.run_id,
        "message": result.message if result else "",
        "deviation": result.deviation.model_dump(mode="json") if result and result.deviation else None,
        "waiver": result.waiver.model_dump(mode="json") if result and result.waiver else None,
        "tightest": _measurement(tightest(result.measurements)) if result else None,
        "curves": [curve.model_dump() for curve in result.curves] if result else [],
    }


def _measurement(measurement: Measurement | None) -> dict[str, Any] | None:
    return measurement.model_dump() | {"headroom": room(measurement)} if measurement else None


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_finite(member) for member in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value


def _cell_text(text: str) -> str:
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())
