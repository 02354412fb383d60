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
from verify.checks import PHASES
from verify.files import repository_root, started_in
from verify.record.cells import Cell, without_proof
from verify.record.findings import next_step, title
from verify.record.schema import FAILING, CheckResult, Finding
from verify.record.simulation import EVERY_SKIP_CODE
from verify.record.verdict import Assessment, TargetVerdict, describe_subject, fill_command, missing_by_phase
from verify.report.keep_sets import kept_words
from verify.report.looks import BY_WORD, LOOKS
from verify.report.matrix import NOT_RUN, Row, bound, by_phase, count, headroom, rows
from verify.report.plots import text_plot
from verify.report.sentences import known_without_it, stacks

#: The widths from which a row has room for padding, and for its claim.
ROOMY = 96
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
    TargetVerdict.NO_RUNNER: "bold yellow",
    TargetVerdict.NO_RECORD: "bold yellow",
    TargetVerdict.INVALID: "bold yellow",
}


def verdict_style(verdict: TargetVerdict) -> str:
    """The colour of the verdict on a target."""
    return _VERDICT_STYLE.get(verdict, "bold red")


class PipeConsole(Console):
    """A console on stdout that raises BrokenPipeError if the reader ends (``| head``); the command line handles it."""

    def __init__(self) -> None:
        super().__init__(highlight=False)

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


def print_report(assessment: Assessment, console: Console) -> None:
    """The whole report on one target: verdict, runs, matrix, failures, and what is missing."""
    console.print(heading(assessment.target))
    console.print()
    console.print(_verdict_line(assessment))
    if assessment.used or assessment.stale:
        console.print()
        console.print(_runs(assessment))
    if known := known_without_it(assessment):
        console.print()
        console.print(Text("\n".join(known)))
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
    _print_silent(assessment, console)
    console.print(_verdict_line(assessment))


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
    if kind in BY_WORD:
        return Text(word, style=LOOKS[BY_WORD[kind]].style)
    if kind in FAILING:
        return Text(word, style="bold red")
    return Text(word, style="yellow" if word.startswith((NOT_RUN, "BLOCKED", "WAIVED")) else "dim")


def heading(target: Target) -> Text:
    heading = Text(target.target, style="bold")
    heading.append(f"  {products(target)}", style="default")
    if isinstance(target, Architecture):
        heading.append(f"\n{target.family}, compute capability {target.capability}", style="dim")
        for remark in filter(None, (target.note, target.toolchain_gap and f"toolchain gap: {target.toolchain_gap}")):
            heading.append(f"; {remark}", style="dim")
    return heading


def products(target: Target) -> str:
    if isinstance(target, Architecture):
        return ", ".join(target.products) or "no product known"
    return "Triton's interpreter and CPU torch"


def _verdict_line(assessment: Assessment) -> Table:
    line = Table.grid(padding=(0, 2, 0, 0))
    line.add_column(no_wrap=True)
    line.add_column()
    style = verdict_style(assessment.verdict)
    line.add_row(Text(assessment.verdict, style=style), Text(assessment.sentence))
    for told in (*(f"{name}: {words}" for name, words in assessment.capabilities.items()), *stacks(assessment)):
        line.add_row("", Text(told))
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
        word = LOOKS[record.kind].made
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
    _print_waived(cells, console)


def _print_waived(cells: Sequence[Cell], console: Console) -> None:
    """The waived failures: those that are waived alike together, with the first message."""
    alike: dict[str, list[CheckResult]] = {}
    for cell in cells:
        if cell.result is not None and cell.result.waiver is not None:
            alike.setdefault(str(cell.result.waiver), []).append(cell.result)
    for why, members in alike.items():
        first, *others = members
        console.print(Text.assemble(("WAIVED ", "bold yellow"), (first.id, "bold"), f"  {first.said}"))
        _print_others([one.id for one in others], console)
        console.print(Text(why, style="yellow"))
        console.print(Text(f"repeat: {_from_here(first.repeat)}", style="dim"), soft_wrap=True)
        console.print()


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
    how = f"({result.evidence}, not run) " if first.warns else ""
    console.print(Text.assemble((f"{result.verdict} ", style), how, (first.check.id, "bold"), f"  {result.said}"))
    for kept in (one for one in result.kept if one.swapped):
        console.print(Text(f"first round, {kept_words(kept)}"))
    _print_others([cell.check.id for cell in members if cell is not first], console)
    for deviation in deviations:
        of = "" if known == len(members) else f", {known} of {len(members)} checks"
        console.print(Text(f"known deviation{of}: {deviation}", style="yellow"))
    console.print(Text(f"what to do: {next_step(result, spec.remedy)}", style="dim"))
    console.print(Text(f"more: python -m verify explain {first.check.id}", style="dim"), soft_wrap=True)
    # on one line, however long, so that it can be copied
    console.print(Text(f"repeat: {_from_here(result.repeat)}", style="dim"), soft_wrap=True)
    console.print()


def _print_others(others: Sequence[str], console: Console) -> None:
    """The further checks of which the same is said, if there are any."""
    if others:
        more = f" and {len(others) - _MEMBERS} more" if len(others) > _MEMBERS else ""
        console.print(Text(f"also: {', '.join(others[:_MEMBERS])}{more}"))


def _from_here(repeat: str) -> str:
    """A command to repeat a check, which a record holds relative to one folder, for the current directory."""
    root = started_in(repository_root())
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


def _print_silent(assessment: Assessment, console: Console) -> None:
    """The failures of a simulated run that no cell shows, because their checks launched no kernel."""
    results = (one for record in assessment.used if record.simulation for one in record.results)
    silent = [one for one in results if one.evidence == "emulated" and one.verdict in FAILING]
    if silent:
        told = f"{count(len(silent), 'check')} failed without launching a kernel, the first of them {silent[0].id}"
        nothing = f"this says nothing about {assessment.target.target}"
        console.print(Text(f"{told} ({silent[0].said}); {nothing}.", style="bold red"))


def _matrix(folded: Sequence[Row], console_width: int) -> Table:
    # in 80 columns, the table has no padding, and the longest skip code is on its own line
    roomy = console_width >= ROOMY
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, int(roomy), 0, 0))
    table.add_column("plan", no_wrap=True)
    table.add_column("check", overflow="fold")
    table.add_column("gate", no_wrap=True)
    table.add_column("verdict", max_width=28 if roomy else max(map(len, EVERY_SKIP_CODE)), overflow="fold")
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
                row.evidence if roomy else row.evidence.replace("+", "+\n"),
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
    ahead = "".join(f"; {words}" for words in without_proof(cell for cells in missing.values() for cell in cells))
    console.print(Text(f"Missing: {total} ({places}){ahead}."))
    where = "on a machine with this GPU" if isinstance(assessment.target, Architecture) else "on any machine"
    console.print(Text.assemble(f"To run them, {where}: ", (fill_command(assessment), "bold")), soft_wrap=True)
