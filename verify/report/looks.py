"""How each class of evidence looks in a report: its shape, its colour and its words, best first."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from verify.record.schema import EVIDENCE, Evidence, Record, Verdict


@dataclass(frozen=True, slots=True)
class Look:
    """One class of evidence, so that no two look alike.

    ``shape`` is its character and ``style`` the colour of a pass in a terminal. ``passed`` is the word of a pass on a
    GPU's line. ``made`` says what a record made for it is, ``meaning`` what it rests on.
    """

    shape: str
    style: str
    passed: str
    made: str
    meaning: str


#: Only a pass on hardware is green, and only hardware and the emulated target, which is no GPU, have the word PASS.
LOOKS: Mapping[Evidence, Look] = MappingProxyType(
    {
        "hardware": Look("●", "green", Verdict.PASS, "run", "ran on that GPU"),
        "simulated": Look("◐", "magenta", "SIMULATED", "simulated", "PTX for that GPU, executed without it"),
        "compiled": Look("◆", "cyan", "COMPILED", "compiled", "built for that GPU, not run"),
        "emulated": Look("○", "blue", Verdict.PASS, "run", "Triton's interpreter, no GPU"),
    }
)

SHAPES: Mapping[Evidence, str] = MappingProxyType({kind: LOOKS[kind].shape for kind in EVIDENCE})

#: The evidence that has a word of its own for a pass, by this word.
BY_WORD: Mapping[str, Evidence] = MappingProxyType(
    {LOOKS[kind].passed: kind for kind in EVIDENCE if LOOKS[kind].passed != Verdict.PASS}
)


def place(target: str, evidence: Evidence) -> str:
    """The target of a result, as a name for what is listed by target: what was simulated is listed apart."""
    return f"{target} {evidence}" if evidence == "simulated" else target


def line_of(run: Record) -> str:
    """The target of a run, as a name where whole runs are listed: with the evidence of what did not run on it."""
    return run.target if run.on_target else f"{run.target} {run.kind}"
