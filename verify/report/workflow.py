"""What GitHub shows of a workflow: annotations on the page of a run, and the summary of a step.

Only the standard library is imported with it, because some jobs run before the set-up.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from verify.record.cells import Cell
    from verify.record.schema import Finding
    from verify.record.verdict import Assessment

Level = Literal["error", "warning", "notice"]

#: Where the subject raised, which ends a cause, and where a check failed, which begins a message.
_RAISED, _CHECKED = re.compile(r"\w+ at ([^\s:]+\.py):(\d+)$"), re.compile(r"^(phases/[^\s:]+\.py):(\d+): ")

#: GitHub refuses a summary of more than 1 MiB, and then shows none.
_MOST_BYTES = 2**20

#: How many checks of a finding are named.
_NAMED = 5


def annotation(level: Level, title: str, text: str, *, file: str = "", line: str = "") -> str:
    """A workflow command that shows a message on the page of the run, and at a line of a file if one is given."""

    def escaped(words: str, more: str = "") -> str:
        for sign in f"%\r\n{more}":
            words = words.replace(sign, f"%{ord(sign):02X}")
        return words

    named = {"file": file, "line": line, "title": title}
    properties = ",".join(f"{name}={escaped(value, ':,')}" for name, value in named.items() if value)
    return f"::{level} {properties}::{escaped(text)}"


def summarise(text: str) -> bool:
    """Append Markdown to the summary of the running step; False where there is no workflow."""
    if not (path := os.environ.get("GITHUB_STEP_SUMMARY")):
        return False
    content = f"{text}\n".encode()
    if len(content) > _MOST_BYTES:
        end = b"\n\nThe rest was left out, because GitHub shows no summary of more than 1 MiB.\n"
        content = content[: _MOST_BYTES - len(end)].decode(errors="ignore").encode() + end
    with open(path, "ab") as stream:
        stream.write(content)
    return True


def annotated(assessments: Sequence[Assessment], closing: str) -> Iterator[str]:
    """The annotations of a report: for each finding (HARD: error; SOFT: warning; known: notice), each waived family
    (notice), and each target whose runs lack must-pass results (warning; error if such a check was selected and came to
    no verdict); at last a notice that says ``closing``. A target without a valid record has none.
    """
    found = [one for assessment in assessments for one in _of_target(assessment)]
    levels: tuple[Level, ...] = ("error", "warning", "notice")
    # GitHub shows ten of each level
    for level in levels:
        yield from (told for kind, told in found if kind == level)
    yield annotation("notice", "TriAttention", closing)


def _of_target(assessment: Assessment) -> Iterator[tuple[Level, str]]:
    from verify.record.verdict import fill_command

    target, cells = assessment.target.target, {cell.check.id: cell for cell in assessment.cells}
    for finding in assessment.findings:
        own = [cells[name] for name in finding.checks]
        level: Level = "error" if any(cell.check.spec.gate == "hard" for cell in own) else "warning"
        if all(cell.outcome.deviation for cell in own):
            level = "notice"
        yield level, _told(level, assessment, own, finding)
    families: dict[str, list[Cell]] = {}
    for cell in assessment.cells:
        if cell.result is not None and cell.result.waiver:
            families.setdefault(cell.check.spec.family, []).append(cell)
    for own in families.values():
        yield "notice", _told("notice", assessment, own)
    if assessment.absence is not None:
        yield "warning", annotation("warning", f"{target}: {assessment.verdict}", assessment.absence.told)
    if assessment.missing and any(record.on_target for record in assessment.used):
        number, first = len(assessment.missing), assessment.missing[0].check.id
        have = "check has" if number == 1 else "checks have"
        told = f"{number} must-pass {have} no valid result, the first {first}; run: {fill_command(assessment)}"
        # a run of some phases lacks results by intent
        ran = any(cell.result is not None for cell in assessment.missing)
        level = "error" if ran else "warning"
        yield level, annotation(level, f"{target}: {assessment.verdict}", told)


def _told(level: Level, assessment: Assessment, own: Sequence[Cell], finding: Finding | None = None) -> str:
    from verify.record.findings import title
    from verify.record.grounds import BUNDLED
    from verify.report.looks import place

    first, result = own[0].check, own[0].outcome
    names = ", ".join(cell.check.id for cell in own[:_NAMED])
    more = f" and {len(own) - _NAMED} more" if len(own) > _NAMED else ""
    parts = [title(finding, result, first.spec.claim), result.said] if finding else [result.said]
    parts += [str(why) for why in (result.deviation, result.waiver) if why]
    parts += [f"checks: {names}{more}", f"repeat: {result.repeat}"]
    where = _RAISED.search(result.cause)
    # a line of the suite is one of this repository only where the subject is part of it
    if where is None and assessment.subject is not None and assessment.subject.source == BUNDLED:
        where = _CHECKED.match(result.message)
    file, line = where.groups() if where else ("", "")
    about = f"{place(assessment.target.target, result.evidence)}: {first.spec.family} {result.verdict}"
    return annotation(level, about, "\n".join(dict.fromkeys(filter(None, parts))), file=file, line=line)
