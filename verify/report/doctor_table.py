"""What the doctor finds, and how it prints it."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from verify.checks import SKIP_CODES
from verify.report.matrix import count


class Status(StrEnum):
    """OK and SKIP let a run start; NEEDED does not."""

    OK = "OK"
    SKIP = "SKIP"
    NOTE = "NOTE"
    NEEDED = "NEEDED"


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of the doctor: ``step`` says what to do, and is empty if there is nothing to do."""

    what: str
    found: str
    minimum: str
    status: Status
    step: str = ""


def print_findings(findings: Sequence[Finding], skipped: Mapping[str, int], command: str) -> None:
    """Print a table of the findings, their next steps, and the ``command`` that is ready to be run, if none is missing.

    ``skipped`` has the number of checks that are skipped, by code.
    """
    from rich import box
    from rich.table import Table
    from rich.text import Text

    from verify.report.terminal import PipeConsole

    styles = {Status.OK: "green", Status.SKIP: "yellow", Status.NOTE: "yellow", Status.NEEDED: "bold red"}
    console = PipeConsole()
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 2, 0, 0))
    for column in ("what", "found", "minimum"):
        table.add_column(column, overflow="fold")
    table.add_column("status", no_wrap=True)
    for finding in findings:
        status = Text(finding.status, style=styles[finding.status])
        table.add_row(finding.what, Text(finding.found), finding.minimum, status)
    console.print(table)
    console.print()
    steps = Table.grid(padding=(0, 2, 0, 0))
    for finding in findings:
        if finding.step:
            steps.add_row(Text(finding.status, style=styles[finding.status]), Text(f"{finding.what}: {finding.step}"))
    for code, number in skipped.items():
        steps.add_row(Text("SKIP", style="yellow"), f"{count(number, 'check')} are SKIP({code}): {SKIP_CODES[code]}")
    console.print(steps)
    needed = [finding.what for finding in findings if finding.status is Status.NEEDED]
    if needed:
        console.print(f"\nNOT READY: {', '.join(needed)}.", style="bold red")
    else:
        console.print(Text(f"\nReady: {command}", style="bold green"), soft_wrap=True)
    # what follows may raise an error that is printed to stderr; it must come after this output
    sys.stdout.flush()
