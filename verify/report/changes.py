"""A change of a check between two runs, and how the changes of one target or of all of them are printed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from verify.record.schema import Record
from verify.record.verdict import describe_subject
from verify.report.looks import line_of
from verify.report.matrix import count

if TYPE_CHECKING:
    from rich.console import Console

#: How many lines of one kind are printed; the rest is only counted.
_TOLD = 20

#: The kinds of change, worst first.
KINDS = (
    "newly failing", "did not run", "still failing", "flaky", "changed", "tighter", "slower", "newly passing", "added",
    "gone",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one check, or of a target that did not run; ``worse`` decides the exit code."""

    kind: str
    id: str
    gate: str
    told: str
    worse: bool = False


@dataclass(frozen=True, slots=True)
class Compared:
    """A run and what changed in it since ``before``, which is green unless nothing earlier is.

    ``alone`` says why it has nothing to be compared with; empty if it has. ``failed_before`` are the checks that fail
    in it and did not pass in the comparable run before either.
    """

    after: Record
    before: Record | None
    green: bool
    alone: str
    changes: Sequence[Change]
    failed_before: frozenset[str] = frozenset()

    @property
    def worse(self) -> bool:
        return any(one.worse for one in self.changes)


def as_object(runs: Sequence[Compared]) -> dict[str, object]:
    """The runs of one target and one kind of evidence, for JSON."""
    told = [
        {
            "after": one.after.run_id,
            "selection": one.after.selection,
            "before": one.before.run_id if one.before else None,
            "before_is_green": one.green,
            "nothing_comparable": one.alone or None,
            "changes": [asdict(change) for change in ordered(one.changes)],
        }
        for one in runs
    ]
    newest = runs[0].after
    worse = any(one.worse for one in runs)
    return {"target": newest.target, "evidence": newest.kind, "worse": worse, "runs": told}


def print_pair(before: Record, after: Record, changes: Sequence[Change]) -> None:
    """What changed between two runs, and how many HARD checks got worse."""
    from rich.text import Text

    from verify.report.terminal import PipeConsole

    console = PipeConsole()
    for word, record in (("from", before), ("to  ", after)):
        facts = (record.target, record.time_utc, describe_subject(record.subject), count(len(record.results), "result"))
        console.print(Text.assemble((f"{word} {record.run_id}", "bold"), f"  {', '.join(facts)}"), soft_wrap=True)
    _print_changes(changes, console)
    console.print()
    worse = sum(one.worse for one in changes)
    verdict = f"{count(worse, 'HARD check')} got worse." if worse else "No HARD check got worse."
    console.print(Text(verdict, style="bold red" if worse else "bold"))


def print_targets(targets: Sequence[Sequence[Compared]]) -> None:
    """What changed on each target, those that got worse last, and then a line for each of these."""
    from rich.text import Text

    from verify.report.terminal import PipeConsole

    console = PipeConsole()
    for one in sorted((run for runs in targets for run in runs), key=lambda one: one.worse):
        head = (line_of(one.after), "bold red" if one.worse else "bold")
        console.print(Text.assemble(head, f"  {_about(one)}"), soft_wrap=True)
        if one.changes:
            _print_changes(one.changes, console)
            console.print()
    bad = [runs for runs in targets if any(one.worse for one in runs)]
    console.print()
    for runs in bad:
        console.print(Text(f"{line_of(runs[0].after)}: {_summary(runs)}", style="bold red"), soft_wrap=True)
    alone = sum(not any(one.before or one.worse for one in runs) for runs in targets)
    counts = (
        (len(bad), "with HARD checks that got worse or did not run"),
        (alone, "with nothing comparable"),
        (len(targets) - len(bad) - alone, "without a HARD check that got worse"),
    )
    told = ", ".join(f"{number} {words}" for number, words in counts if number)
    console.print(
        Text(f"{count(len(targets), 'target')}: {told}.", style="bold red" if bad else "bold"), soft_wrap=True
    )


def _about(one: Compared) -> str:
    after = f"{one.after.run_id} of {one.after.time_utc[:10]}"
    if one.before is None:
        return f"{after}, nothing comparable: {one.alone}"
    before = f"{one.before.run_id} of {one.before.time_utc[:10]}"
    which = f"the last green run, {before}" if one.green else f"{before}, as no earlier run is green"
    return f"{after}, compared with {which}{'' if one.changes else ': no change'}"


def _summary(runs: Sequence[Compared]) -> str:
    """How many HARD checks got worse in the runs of one target, by kind, the target itself first."""
    changes = [change for one in runs for change in one.changes if change.worse]
    checks = [one for one in changes if one.id != runs[0].after.target]
    counts = ((kind, sum(one.kind == kind for one in checks)) for kind in KINDS)
    return ", ".join(["did not run"] * (checks != changes) + [f"{number} {kind}" for kind, number in counts if number])


def _print_changes(changes: Sequence[Change], console: Console) -> None:
    from rich.text import Text

    for kind in KINDS:
        found = [one for one in ordered(changes) if one.kind == kind]
        if not found:
            continue
        console.print()
        console.print(Text(f"{kind} ({len(found)})", style="bold"))
        for one in found[:_TOLD]:
            style = "bold red" if one.worse else "green" if kind == "newly passing" else "yellow"
            console.print(Text.assemble((f"  {one.gate.upper()} ", style), one.id, f"  {one.told}"), soft_wrap=True)
        if len(found) > _TOLD:
            console.print(f"  and {len(found) - _TOLD} more; --json lists them all")


def ordered(changes: Sequence[Change]) -> list[Change]:
    """Changes by kind, worst first, those of HARD checks first in each."""
    return sorted(changes, key=lambda one: (KINDS.index(one.kind), not one.worse, one.gate != "hard", one.id))
