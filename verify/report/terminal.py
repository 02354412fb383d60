"""The reports as rich renderables: they fit 80 columns, use more if available, and are plain text in a pipe."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verify.architectures import Architecture, Target
from verify.checks import CAPABILITIES, PHASES, SKIP_CODES
from verify.files import repository_root
from verify.record.findings import next_step, title
from verify.record.schema import FAILING, CheckResult, Evidence, Finding
from verify.record.verdict import (
    Assessment,
    Cell,
    TargetVerdict,
    commit_of,
    describe_subject,
    fill_command,
    missing_by_phase,
    profile_of,
)
from verify.report.matrix import (
    COMPILED,
    LEGEND,
    NOT_RUN,
    VERSIONS,
    Mark,
    Row,
    bound,
    built,
    by_phase,
    compiled_words,
    count,
    grid,
    headline,
    headroom,
    rows,
    versions,
)
from verify.report.plots import text_plot

#: The widths from which a row has room for padding, and for its claim.
_ROOMY = 96
_WIDE = 140

#: How many findings, runs, further checks of a finding and family names are printed; the rest is only counted.
_TOLD = 10
_RUNS = 5
_MEMBERS = 6
_FAMILIES = 3

_VERDICT_STYLE = {
    TargetVerdict.VERIFIED: "bold green",
    TargetVerdict.CONFORMS: "bold cyan",
    # a pass, but not on a GPU: only VERIFIED is green
    TargetVerdict.EMULATED_PASS: "bold cyan",
    TargetVerdict.INCOMPLETE: "bold yellow",
    TargetVerdict.EMULATED_INCOMPLETE: "bold yellow",
}


class PipeConsole(Console):
    """A console on stdout that raises BrokenPipeError if the reader ends (``| head``); the command line handles it."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_report(assessment: Assessment, console: Console) -> None:
    """The whole report on one target: verdict, runs, matrix, failures, and what is missing."""
    console.print(_heading(assessment.target))
    console.print()
    console.print(_verdict_line(assessment))
    if assessment.used or assessment.stale:
        console.print()
        console.print(_runs(assessment))
    if assessment.compilation:
        console.print()
        console.print(Text(f"Compiled ahead of time: {compiled_words(assessment.compilation)}."))
    _print_cells(assessment, assessment.cells, console)
    for because, cells in assessment.outdated.items():
        console.print(Text(f"stale: {count(len(cells), 'result')}, {_named(cells)}: {because}", style="yellow"))
    for cell in assessment.with_curves:
        print_curves(cell.outcome, console)
    _print_unknown(assessment, console)
    _print_missing(assessment, console)


def print_run(assessment: Assessment, console: Console) -> None:
    """The end of one run: the matrix of the checks it ran, failures, verdict."""
    _print_cells(assessment, [cell for cell in assessment.cells if cell.result is not None], console)
    _print_unknown(assessment, console)
    console.print(_verdict_line(assessment))


def print_summary(assessments: Sequence[Assessment], console: Console) -> None:
    """One sentence on what is verified, then one line per target."""
    console.print(Text(headline(assessments)), "")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name, options in (
        ("target", {"no_wrap": True}),
        ("verdict", {"no_wrap": True}),
        ("must-pass", {"justify": "right", "no_wrap": True}),
        ("compiled", {"justify": "right", "no_wrap": True}),
        ("newest record", {"no_wrap": True}),
        ("products", {}),
    ):
        table.add_column(name, **options)
    for assessment in assessments:
        passed = sum(cell.passed for cell in assessment.must_pass)
        table.add_row(
            assessment.target.target,
            Text(assessment.verdict, style=_VERDICT_STYLE.get(assessment.verdict, "bold red")),
            f"{passed}/{len(assessment.must_pass)}",
            built(assessment.compilation),
            assessment.used[0].time_utc[:10] if assessment.used else "-",
            _products(assessment.target),
        )
    console.print(table)
    console.print()
    console.print("For one of them in full: python -m verify report --gpu sm120", soft_wrap=True)


def print_subjects(assessments: Sequence[Assessment], console: Console) -> None:
    """What each subject offers on one target, capability by capability, from its newest records."""
    if not assessments:
        console.print("There is no record of any subject on this target.")
        return
    console.print(_heading(assessments[0].target))
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    told = []
    for one in assessments:
        newest = one.used[0]
        who = newest.subject
        head = f"{who.source}\n{who.name} {who.version} ({commit_of(who)})"
        table.add_column(Text(head), overflow="fold")
        told.append(one.offered)
    profiles = [profile_of(one.used[0].subject) or "none" for one in assessments]
    table.add_row(
        "verdict", *(Text(one.verdict, style=_VERDICT_STYLE.get(one.verdict, "bold red")) for one in assessments)
    )
    table.add_row("profile", *profiles)
    table.add_row("findings", *(str(len(one.findings)) for one in assessments))
    table.add_row("seed", *(str(one.used[0].seed) for one in assessments))
    for name in CAPABILITIES.values():
        if any(name in one for one in told):
            table.add_row(name, *(one.get(name, "-") for one in told))
    console.print(table)
    if len({(one.used[0].seed, one.used[0].instrument_sha256) for one in assessments}) > 1:
        console.print(Text("Not all were judged by the same suite with the same problems.", style="yellow"))


#: The verdict on a target in the three characters of its column.
_SHORT = {
    TargetVerdict.VERIFIED: "VER",
    TargetVerdict.CONFORMS: "CON",
    TargetVerdict.FAILED: "FAI",
    TargetVerdict.INCOMPLETE: "inc",
    TargetVerdict.INFRA: "INF",
    TargetVerdict.EMULATED_PASS: "emu",
    TargetVerdict.EMULATED_FAIL: "FAI",
    TargetVerdict.EMULATED_INCOMPLETE: "inc",
}


def print_grid(assessments: Sequence[Assessment], console: Console) -> None:
    """A mark for every check on every target; the verdicts; and the versions."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=0)
    table.add_column("check", overflow="ellipsis", no_wrap=True)
    for one in assessments:
        table.add_column(one.target.target.removeprefix("sm")[:3], no_wrap=True, width=4)
    gate = ""
    for spec, marks in grid(assessments):
        if spec.gate != gate:
            gate = spec.gate
            table.add_section()
            table.add_row(Text(gate.upper(), style="bold"))
        found = [marks.get(one.target.target) for one in assessments]
        table.add_row(Text(spec.family), *(_mark_text(one) if one else Text("-", style="dim") for one in found))
    table.add_section()
    styles = [_VERDICT_STYLE.get(one.verdict, "bold red") for one in assessments]
    verdicts = [Text(_SHORT[one.verdict], style=style) for one, style in zip(assessments, styles, strict=True)]
    table.add_row(Text("verdict", style="bold"), *verdicts)
    console.print(table)
    console.print()
    console.print(Text(f"{LEGEND}; - does not apply.", style="dim"))
    console.print(
        Text(
            "VER verified, CON conforms, FAI failed, inc incomplete, INF infra, "
            "emu an emulated pass, which verifies no GPU."
        )
    )
    if lines := versions(assessments):
        console.print()
        made = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
        for name in VERSIONS:
            made.add_column(name, overflow="fold")
        for line in lines:
            made.add_row(*map(Text, line))
        console.print(made)


def _mark_text(one: Mark) -> Text:
    return Text(str(one), style="dim" if one.stale or one.evidence is None else _mark_style(one.word, one.evidence))


def _mark_style(word: str, evidence: Evidence) -> str:
    if word == "PASS":
        return {"hardware": "green", "compiled": "cyan", "emulated": "blue"}[evidence]
    return "bold red" if word in FAILING else "yellow"


def print_curves(result: CheckResult, console: Console) -> None:
    """The curves of one result in one plot, in plain characters."""
    console.print(Text.assemble((result.id, "bold"), f"  {result.evidence}"))
    console.print(Text("\n".join(text_plot(result.curves, console.width))))
    console.print()


def verdict_text(word: str) -> Text:
    """The verdict of a check in its colour."""
    kind = word.split()[0]
    if kind == "PASS":
        return Text(word, style="green")
    if kind == COMPILED:
        return Text(word, style="cyan")
    if kind in FAILING:
        return Text(word, style="bold red")
    return Text(word, style="yellow" if word.startswith((NOT_RUN, "BLOCKED")) else "dim")


def _heading(target: Target) -> Text:
    heading = Text(target.target, style="bold")
    heading.append(f"  {_products(target)}", style="default")
    if isinstance(target, Architecture):
        heading.append(f"\n{target.family}, compute capability {target.capability}", style="dim")
        for remark in filter(None, (target.note, target.toolchain_gap and f"toolchain gap: {target.toolchain_gap}")):
            heading.append(f"; {remark}", style="dim")
    return heading


def _products(target: Target) -> str:
    if isinstance(target, Architecture):
        return ", ".join(target.products) or "no product known"
    return "Triton's interpreter and CPU torch"


def _verdict_line(assessment: Assessment) -> Table:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column()
    style = _VERDICT_STYLE.get(assessment.verdict, "bold red")
    line.add_row(Text(assessment.verdict, style=style), Text(assessment.sentence))
    for name, words in assessment.capabilities.items():
        line.add_row("", Text(f"{name}: {words}"))
    return line


def _runs(assessment: Assessment) -> Table:
    table = Table.grid(padding=(0, 2, 0, 0))
    records = (*assessment.used, *assessment.stale)
    for record in records[:_RUNS]:
        environment = record.environment
        where = f"{environment.gpu.name}, driver {environment.gpu.driver}" if environment.gpu else environment.os
        subject = describe_subject(record.subject)
        facts = f"{where}; torch {environment.torch}, triton {environment.triton}; {subject}; {record.state}"
        different = assessment.why_stale(record)
        word = "compiled" if record.ahead_of_time else "run"
        kind = Text("stale", style="yellow") if different else Text(word, style="dim")
        table.add_row(kind, Text(f"{record.run_id}: {facts}{f'; {different}' if different else ''}"))
    if len(records) > _RUNS:
        table.add_row("", f"and {count(len(records) - _RUNS, 'more record')}; --format json lists them all")
    return table


def _print_cells(assessment: Assessment, cells: Sequence[Cell], console: Console) -> None:
    if not cells:
        return
    console.print()
    console.print(_matrix(rows(cells), console.width))
    console.print()
    by_id = {cell.check.id: cell for cell in cells}
    found = assessment.findings
    for number, finding in enumerate(found[:_TOLD], start=1):
        _print_finding(number, finding, by_id, console)
    if (more := len(found) - _TOLD) > 0:
        console.print(Text(f"and {count(more, 'more finding')}; the record lists them all", style="red"))


def _print_finding(number: int, finding: Finding, cells: Mapping[str, Cell], console: Console) -> None:
    """The failures with one cause: the cause, the checks, the first message, what to do, and how to repeat it."""
    members = [cells[name] for name in finding.checks]
    # a HARD failure says more than a SOFT one, and a new one more than a known one
    first = min(members, key=lambda cell: (not cell.must_pass, cell.outcome.deviation is not None))
    result, spec = first.outcome, first.check.spec
    style = "bold red" if first.must_pass else "bold yellow"
    deviations = dict.fromkeys(str(cell.outcome.deviation) for cell in members if cell.outcome.deviation)
    known = sum(cell.outcome.deviation is not None for cell in members)
    blocks = f", which {'block' if len(members) > 1 else 'blocks'} {count(len(finding.blocks), 'more check')}"
    held = f"{count(len(members), 'check')}{blocks if finding.blocks else ''}"
    told = title(finding, result, spec.claim)
    console.print(Text.assemble((f"finding {number}  ", style), (told, "bold"), f"  ({held})"))
    console.print(Text.assemble((f"{result.verdict} ", style), (first.check.id, "bold"), f"  {result.said}"))
    if others := [cell.check.id for cell in members if cell is not first]:
        more = f" and {len(others) - _MEMBERS} more" if len(others) > _MEMBERS else ""
        console.print(Text(f"also: {', '.join(others[:_MEMBERS])}{more}"))
    for deviation in deviations:
        of = "" if known == len(members) else f", {known} of {len(members)} checks"
        console.print(Text(f"known deviation{of}: {deviation}", style="yellow"))
    console.print(Text(f"what to do: {next_step(result, spec.remedy)}", style="dim"))
    console.print(Text(f"more: python -m verify explain {first.check.id}", style="dim"), soft_wrap=True)
    # on one line, however long, so that it can be copied
    console.print(Text(f"repeat: {_from_here(result.repeat)}", style="dim"), soft_wrap=True)
    console.print()


def _from_here(repeat: str) -> str:
    """A command to repeat a check, which a record holds relative to the repository, for the current directory."""
    root = repository_root()
    if Path.cwd() == root:
        return repeat
    words = []
    for word in shlex.split(repeat):
        option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        local = (root / value.partition("::")[0]).exists() and "/" in value
        words.append(f"{option}{equals}{os.path.relpath(root / value) if local else value}")
    return shlex.join(words)


def _named(cells: Sequence[Cell]) -> str:
    """The families of the cells; the first few by name, the rest counted."""
    families = list(dict.fromkeys(cell.check.spec.family for cell in cells))
    more = f" and {len(families) - _FAMILIES} more" if len(families) > _FAMILIES else ""
    return f"{', '.join(families[:_FAMILIES])}{more}"


def _print_unknown(assessment: Assessment, console: Console) -> None:
    unknown = assessment.unknown_ids
    if unknown:
        told = f"{count(len(unknown), 'check')} in the records are not in this suite, the first of them {unknown[0]}."
        console.print(Text(told, style="yellow"))


def _matrix(folded: Sequence[Row], console_width: int) -> Table:
    # in 80 columns, the table has no padding, and the longest skip code is on its own line
    roomy = console_width >= _ROOMY
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, int(roomy), 0, 0))
    table.add_column("plan", no_wrap=True)
    table.add_column("check", overflow="fold")
    table.add_column("gate", no_wrap=True)
    table.add_column("verdict", max_width=28 if roomy else max(map(len, SKIP_CODES)), overflow="fold")
    table.add_column("evidence", no_wrap=True)
    table.add_column("measured / allowed", justify="right", no_wrap=True)
    table.add_column("headroom", justify="right", no_wrap=True)
    wide = console_width >= _WIDE
    if wide:
        table.add_column("claim", ratio=1)
    for phase, members in by_phase(folded).items():
        table.add_section()
        table.add_row("", Text(f"{phase} {PHASES[phase]}", style="bold"))
        for row in members:
            cells: list[Text | str] = [
                row.spec.plan or "",
                Text(row.spec.family),
                Text(row.spec.gate.upper(), style="bold" if row.spec.gate == "hard" else "dim"),
                verdict_text(row.verdict),
                row.evidence,
                bound(row.tightest),
                headroom(row.tightest),
            ]
            table.add_row(*cells, *([Text(row.spec.claim, style="dim")] if wide else []))
    return table


def _print_missing(assessment: Assessment, console: Console) -> None:
    missing = missing_by_phase(assessment)
    if not missing:
        return
    places = ", ".join(f"{len(cells)} in phase {phase} {PHASES[phase]}" for phase, cells in missing.items())
    total = count(sum(map(len, missing.values())), "must-pass check")
    compiled = sum(cell.compiled for cells in missing.values() for cell in cells)
    ahead = f"; {compiled} of them compiled ahead of time" if compiled else ""
    console.print(Text(f"Missing: {total} ({places}){ahead}."))
    where = "on a machine with this GPU" if isinstance(assessment.target, Architecture) else "on any machine"
    console.print(Text.assemble(f"To run them, {where}: ", (fill_command(assessment), "bold")), soft_wrap=True)
