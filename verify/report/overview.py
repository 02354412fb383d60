"""The tables of several targets or several subjects, as rich renderables."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from verify.checks import CAPABILITIES
from verify.record.schema import FAILING, Evidence
from verify.record.verdict import Assessment, TargetVerdict, commit_of, profile_of
from verify.report.looks import LOOKS
from verify.report.matrix import LEGEND, VERSIONS, Mark, grid, versions
from verify.report.sentences import built, headline, simulated
from verify.report.terminal import ROOMY, heading, products, verdict_style


def print_summary(assessments: Sequence[Assessment], console: Console) -> None:
    """One sentence on what is verified, then one line per target."""
    console.print(Text(headline(assessments)), "")
    # in 80 columns, the products need the room
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, padding=(0, int(console.width >= ROOMY), 0, 0))
    for name, options in (
        ("target", {"no_wrap": True}),
        ("verdict", {"no_wrap": True}),
        ("must-pass", {"justify": "right", "no_wrap": True}),
        ("simulated", {"justify": "right", "no_wrap": True}),
        ("compiled", {"justify": "right", "no_wrap": True}),
        ("newest", {"no_wrap": True}),
        ("products", {}),
    ):
        table.add_column(name, **options)
    for assessment in assessments:
        passed = sum(cell.passed for cell in assessment.must_pass)
        table.add_row(
            assessment.target.target,
            Text(assessment.verdict, style=verdict_style(assessment.verdict)),
            f"{passed}/{len(assessment.must_pass)}",
            simulated(assessment),
            built(assessment.compilation),
            assessment.used[0].time_utc[:10] if assessment.used else "-",
            products(assessment.target),
        )
    console.print(table)
    console.print()
    console.print("For one of them in full: python -m verify report --gpu sm120", soft_wrap=True)


def print_subjects(assessments: Sequence[Assessment], console: Console) -> None:
    """What each subject offers on one target, capability by capability, from its newest records."""
    if not assessments:
        console.print("There is no record of any subject on this target.")
        return
    console.print(heading(assessments[0].target))
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
    table.add_row("verdict", *(Text(one.verdict, style=verdict_style(one.verdict)) for one in assessments))
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
    TargetVerdict.NO_RUNNER: "run",
    TargetVerdict.NO_RECORD: "rec",
    TargetVerdict.INVALID: "INV",
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
    styles = [verdict_style(one.verdict) for one in assessments]
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
        return LOOKS[evidence].style
    return "bold red" if word in FAILING else "yellow"
