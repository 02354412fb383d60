"""``python -m verify report``: what the records prove about a GPU; and the matrix that ends a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import known_targets, parse_target
from verify.archive import Archive, load
from verify.checks import catalogue
from verify.matrix import count
from verify.outcome import ConfigurationError
from verify.record import Record
from verify.request import repository_root
from verify.verdict import Assessment, assess

if TYPE_CHECKING:
    from rich.console import Console

#: The report was made, but some records could not be read.
EXIT_UNREADABLE = 5


def report(gpu: str | None, form: str = "terminal", folders: Sequence[Path] = (), out: Path | None = None) -> int:
    """Print the report on one target, or a line for each where ``gpu`` is None; return 0, or 5 for unreadable records.

    ``html`` is the pages of every target, in the folder ``out``. Raises ConfigurationError for an unknown GPU, a
    records directory that is not there, and options that contradict each other.
    """
    if form == "html":
        return _make_site(gpu, folders, out)
    if out is not None:
        raise ConfigurationError(f"--out {out} is where --format html puts its pages; drop it, or ask for html")
    targets = [parse_target(gpu)] if gpu is not None else list(known_targets())
    archive, checks = load(folders), list(catalogue())
    assessments = [assess(target, archive.records, checks) for target in targets]
    if form == "terminal":
        _print_terminal(assessments, gpu is not None)
    else:
        from verify import exports

        render = exports.FULL[form] if gpu is not None else exports.SUMMARY[form]
        subject = assessments[0] if gpu is not None else assessments
        print(render(subject, archive.unreadable), end="")
    return _told(archive)


def assess_record(record: Record) -> Assessment:
    """What ``record`` alone proves about its target."""
    return assess(parse_target(record.target), [record], list(catalogue()))


def print_matrix(record: Record, console: Console) -> None:
    """Print the matrix of the checks one run has results for, what failed, and the verdict with its one sentence.

    The verdict counts every must-pass check of the target, so a run of some phases leaves its GPU INCOMPLETE.
    """
    from verify import terminal

    terminal.print_run(assess_record(record), console)


def _make_site(gpu: str | None, folders: Sequence[Path], out: Path | None) -> int:
    from verify.site.build import Site, build

    if gpu is not None:
        raise ConfigurationError(f"--format html makes the pages of every target; drop --gpu {gpu}")
    reports = repository_root() / "reports"
    site = (out or reports / "site").resolve()
    archive = load(folders)
    homes = [home.resolve() for folder in folders or [reports] for home in (folder, folder / "runs")]
    pages = build(Site(archive, list(catalogue()), homes, reports / "selftest"), site)
    print(f"{site / 'index.html'}: {count(pages, 'page')} from {count(len(archive.records), 'record')}")
    return _told(archive)


def _told(archive: Archive) -> int:
    """Name each record that could not be read; return the exit code that says whether there are any."""
    for sentence in archive.unreadable:
        print(f"verify: unreadable record {sentence}", file=sys.stderr)
    return EXIT_UNREADABLE if archive.unreadable else 0


def _print_terminal(assessments: Sequence[Assessment], one: bool) -> None:
    from verify import terminal

    console = terminal.PipeConsole()
    if one:
        terminal.print_report(assessments[0], console)
    else:
        terminal.print_summary(assessments, console)
