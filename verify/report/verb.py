"""``python -m verify report``: what the records prove about a GPU; also the matrix at the end of a run."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from verify.architectures import Target, known_targets, parse_target
from verify.checks import Check, catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import default_out, repository_root, write_out
from verify.heartbeat import Heartbeat
from verify.record.archive import newest_first
from verify.record.grounds import BUNDLED
from verify.record.index import Index, open_index
from verify.record.kills import FOLDER
from verify.record.reading import rehearsing
from verify.record.schema import Record
from verify.record.verdict import Assessment, assess, assess_record, describe_subject
from verify.report.matrix import count
from verify.report.sentences import beside_words

#: The value of ``--subject`` that shows every subject.
EVERYONE = "all"

if TYPE_CHECKING:
    from rich.console import Console


def report(
    gpu: str | None,
    form: str = "terminal",
    folders: Sequence[Path] = (),
    *,
    every_check: bool = False,
    out: Path | None = None,
    subject: str | None = None,
) -> int:
    """Print the report on one target, or a line per target if ``gpu`` is None; return 0, or 5 for unreadable records.

    ``github`` prints the annotations of a workflow, and appends Markdown to the summary of its step.
    ``subject`` is whose records are shown: by default the bundled one's; with ``all`` every subject's side by side on
    one target. ``every_check`` prints the matrix of all checks and targets. ``out`` is the file to write to instead, or
    the folder for badges and for ``html``, the pages of all targets. Raises ConfigurationError for an unknown GPU, a
    records directory that does not exist, and options that contradict each other.
    """
    if subject == EVERYONE:
        return _compare(parse_target(gpu or "emulated"), form, folders)
    if rehearsing() and form in ("junit", "badge", "github"):
        raise ConfigurationError(f"--format {form} is read as evidence, and a rehearsal is none; drop --rehearsal")
    if form == "html":
        return _make_site(gpu, folders, out, subject)
    if form in ("terminal", "github") and out is not None:
        raise ConfigurationError(f"--out {out} needs another format than {form}; drop it, or give --format")
    targets = [parse_target(gpu)] if gpu is not None else list(known_targets())
    checks = list(catalogue())
    with open_index(folders, subject) as index:
        assessments = [_assessed(index, target, checks) for target in targets]
        unreadable, beside = index.unreadable, index.beside()
    if form == "terminal":
        _print_terminal(assessments, gpu is not None, every_check)
        for record in () if gpu is not None else beside:
            print(f"\nNext to the others: {beside_words(record)}")
        shown = {head.subject.source for head in index.heads.values()}
        if others := [one.source for one in index.subjects if one.source not in shown]:
            names = ", ".join(others)
            print(f"\nThere are records of other subjects too ({names}): --subject NAME, or --subject {EVERYONE}.")
    elif form == "github":
        _print_for_github(assessments, unreadable, gpu is not None)
    elif form == "badge":
        from verify.report import export

        if out is None:
            raise ConfigurationError("a badge is two files for each GPU; give --out DIR")
        export.write_badges(assessments, out)
    else:
        from verify.report import documents, export

        several = documents.GRID if every_check else documents.SUMMARY
        if form == "junit":
            text = export.report_junit(assessments)
        elif gpu is not None:
            text = documents.FULL[form](assessments[0], unreadable)
        else:
            text = several[form](assessments, unreadable)
            if form == "markdown":
                text += "".join(f"\nNext to the others: {beside_words(record)}\n" for record in beside)
        write_out(text, out)
    return _told(unreadable)


def _assessed(index: Index, target: Target, checks: Sequence[Check]) -> Assessment:
    return assess(target, index.records(target), checks, index.checkout, index.absences)


def print_matrix(record: Record, console: Console) -> None:
    """Print the matrix of the checks with results in one run, the failures, and the verdict with its sentence.

    The verdict counts every must-pass check of the target, so a run of some phases leaves its GPU INCOMPLETE.
    """
    from verify.report import terminal

    terminal.print_run(assess_record(record), console)


def _compare(target: Target, form: str, folders: Sequence[Path]) -> int:
    from verify.report import overview, terminal

    if form != "terminal":
        raise ConfigurationError(f"--subject {EVERYONE} is a table in the terminal; drop --format {form}")
    checks = list(catalogue())
    with open_index(folders) as index:
        assessments = [_assessed(index.about(one), target, checks) for one in index.subjects]
    if not any(one.used for one in assessments) and (stale := sum(len(one.stale) for one in assessments)):
        none_valid = f"No result of {count(stale, 'record')} on {target.target} is still valid"
        print(f"{none_valid}; run the subjects again, or see why: python -m verify report --gpu {target.target}")
        return _told(index.unreadable)
    overview.print_subjects([one for one in assessments if one.used], terminal.PipeConsole())
    return _told(index.unreadable)


def _make_site(gpu: str | None, folders: Sequence[Path], out: Path | None, subject: str | None) -> int:
    from rich.console import Console

    from verify.report.site.build import CHARTED, Site, build
    from verify.report.site.news import latest

    if gpu is not None:
        raise ConfigurationError(f"--format html makes the pages of every target; drop --gpu {gpu}")
    reports = default_out().parent
    site = (out or reports / "site").resolve()
    checks = list(catalogue())
    homes = [home.resolve() for folder in folders or [reports] for home in (folder, folder / "runs")]
    began = time.monotonic()
    with (
        Heartbeat(Console(stderr=True), lambda: f"making the pages for {time.monotonic() - began:.0f} s"),
        open_index(folders, subject) as index,
    ):
        assessments = [_assessed(index, target, checks) for target in known_targets()]
        heads = newest_first(index.heads.values())
        news, points = latest(index, checks), index.points(last=CHARTED)
        files, faults = index.files(), repository_root() / FOLDER
        pages = build(
            Site(assessments, heads, files, points, news, index.unreadable, checks, homes, faults, index.beside()), site
        )
    print(f"{site / 'index.html'}: {count(pages, 'page')} from {count(len(heads), 'record')}")
    return _told(index.unreadable)


def _told(unreadable: Sequence[str]) -> int:
    """Print each record that could not be read; return UNREADABLE if there are any, else 0."""
    for sentence in unreadable:
        print(f"verify: unreadable record {sentence}", file=sys.stderr)
    return Exit.UNREADABLE if unreadable else 0


def _print_for_github(assessments: Sequence[Assessment], unreadable: Sequence[str], one: bool) -> None:
    from verify.report import documents, workflow
    from verify.report.sentences import headline

    closing = assessments[0].sentence if one else headline(assessments)
    for line in workflow.annotated(assessments, closing):
        print(line)
    if one:
        text = documents.report_markdown(assessments[0], unreadable)
    else:
        text = documents.summary_markdown(assessments, unreadable)
    workflow.summarise(text)


def _print_terminal(assessments: Sequence[Assessment], one: bool, every_check: bool) -> None:
    from verify.report import overview, terminal

    console = terminal.PipeConsole()
    records = newest_first(record for found in assessments for record in (*found.used, *found.stale))
    if not one and records and records[0].subject.source != BUNDLED:
        console.print(f"Subject: {describe_subject(records[0].subject)}.\n", markup=False)
    if one:
        terminal.print_report(assessments[0], console)
    elif every_check:
        overview.print_grid(assessments, console)
    else:
        overview.print_summary(assessments, console)
