"""Shows the kill matrix, and progress on the way to it."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from verify.heartbeat import Heartbeat, bar
from verify.record.kills import Matrix, Outcome, Row
from verify.report.matrix import count
from verify.selftest.faults import LAYERS, load_faults

if TYPE_CHECKING:
    from rich.table import Table

#: Terminals at least this wide show what was planted.
_WIDE = 140

_STYLE = {
    Outcome.KILLED: "green", Outcome.HARMLESS: "green", Outcome.NOT_RUN: "yellow", Outcome.SURVIVED: "bold red",
    Outcome.FALSE_ALARM: "bold red",
}  # fmt: skip


class Progress:
    """Progress on stderr: a bar on a terminal, elsewhere a heartbeat, and a line for each fault that is not killed."""

    def __init__(self, total: int) -> None:
        from rich.console import Console

        self._console = Console(stderr=True, highlight=False)
        self._bar = bar(self._console)
        self._task = self._bar.add_task("planting", total=total)
        self._total, self._tried, self._doing = total, 0, "starting"
        self._heartbeat = Heartbeat(self._console, self._told)

    def __enter__(self) -> Progress:
        self._bar.start()
        self._heartbeat.__enter__()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._heartbeat.__exit__(kind, error, at)
        self._bar.stop()

    def doing(self, what: str) -> None:
        """Print what begins now, and keep it for the heartbeat."""
        self._doing = what
        self.note(what)

    def _told(self) -> str:
        return f"{self._doing}; {self._tried} of {self._total} tried"

    def finished(self, row: Row) -> None:
        self._tried += 1
        self._bar.update(self._task, advance=1)
        if row.outcome not in (Outcome.KILLED, Outcome.HARMLESS):
            told = "; ".join(f"{cell.check} {cell.verdict}" for cell in row.cells)
            self.note(f"  {row.outcome} {row.id}: {told}")

    def note(self, sentence: str) -> None:
        self._console.print(sentence, markup=False, soft_wrap=True)


def print_matrix(matrix: Matrix, form: str, path: Path | None) -> None:
    """Print the outcome of every fault, then what is wrong with the suite or with the claims."""
    if form == "json":
        print(matrix.model_dump_json(indent=1))
        return
    if form == "markdown":
        from verify.report.documents import markdown_table

        body = [[f"`{row.id}`", row.what, row.outcome, _killers(row)] for row in matrix.rows]
        print(markdown_table(["fault", "what", "outcome", "by"], body))
        print("\n".join(f"* {sentence}" for sentence in _sentences(matrix)))
        return
    from verify.report.terminal import PipeConsole

    console = PipeConsole()
    console.print(_table(matrix, console.width))
    console.print()
    for sentence in _sentences(matrix):
        console.print(sentence, markup=False, soft_wrap=True)
    if path is not None:
        console.print(f"matrix: {os.path.relpath(path)}", soft_wrap=True)


def _table(matrix: Matrix, width: int) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    wide = width >= _WIDE
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0))
    for name in ("fault", "outcome", "by"):
        table.add_column(name, overflow="fold")
    table.add_column("s", justify="right", no_wrap=True)
    if wide:
        table.add_column("what", ratio=1)
    for layer in LAYERS:
        rows = [row for row in matrix.rows if row.id.startswith(f"{layer}.")]
        if rows:
            table.add_section()
        for row in rows:
            outcome = Text(row.outcome, style=_STYLE[row.outcome])
            cells = [Text(row.id), outcome, Text(_killers(row)), f"{row.duration_s:.0f}"]
            table.add_row(*cells, *([Text(row.what, style="dim")] if wide else []))
    return table


def _killers(row: Row) -> str:
    if row.killers:
        return ", ".join(row.caught_by)
    return ", ".join(f"{cell.check}: {cell.verdict}" for cell in row.cells)


def _sentences(matrix: Matrix) -> list[str]:
    total = len(matrix.mistakes)
    lines = [f"{len(matrix.of(Outcome.KILLED))} of {count(total, 'planted fault')} caught in {matrix.subject.source}."]
    if right := [row for row in matrix.rows if row.right]:
        unharmed = sum(row.outcome is Outcome.HARMLESS for row in right)
        lines.append(f"{unharmed} of {count(len(right), 'right change')} passed every check.")
    lines += [f"equivalent {row.id}: {row.what} {row.equivalent}" for row in matrix.rows if row.equivalent]
    lines += [f"NOT CAUGHT {row.id}: {row.what} ({_killers(row)})" for row in matrix.of(Outcome.SURVIVED)]
    lines += [f"FALSE ALARM {row.id}: {row.what} ({_killers(row)})" for row in matrix.of(Outcome.FALSE_ALARM)]
    lines += [f"not tried {row.id}: {_killers(row)}" for row in matrix.of(Outcome.NOT_RUN)]
    lines += [f"false claim: {claim} does not catch {fault}" for fault, claim in false_claims(matrix)]
    if matrix.selection == "everything" and matrix.idle:
        lines.append(f"Checks that caught no fault, or met none: {', '.join(matrix.idle)}.")
    return lines


def false_claims(matrix: Matrix) -> list[tuple[str, str]]:
    """Pairs of a fault and a check, or a family, that claims to catch it, ran against it, and did not."""
    faults, found = {fault.id: fault for fault in load_faults()}, []
    for row in matrix.rows:
        for claim in faults[row.id].kills:
            outcomes = {cell.outcome for cell in row.cells if claim in (cell.check, cell.check.rpartition(".")[0])}
            if outcomes and Outcome.KILLED not in outcomes and Outcome.SURVIVED in outcomes:
                found.append((row.id, claim))
    return found
