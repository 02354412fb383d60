"""How ``verify gate`` can end, and the exit code and the line in which each fleet tool expects to be told.

Every tool of a fleet takes a command, its exit code and one line or JSON on stdout, and the codes of one tool mean
something else to the next. This file is the only place that has them. docs/fleet.md has the same table for readers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any, Final


class Outcome(StrEnum):
    """How a gate ended. Only PASS and SOFT say that the GPU works; all from NO_GPU on say that nothing is known."""

    PASS = "pass"
    SOFT = "SOFT failure"
    HARD = "HARD failure"
    NO_GPU = "no GPU"
    WRONG_GPU = "wrong GPU"
    BUSY = "GPU in use"
    UNJUDGED = "no verdict"  #: a check ended because of the machine or of this suite, is waived, or has no result
    INTERRUPTED = "interrupted"
    TIMEOUT = "timeout"
    CONFIGURATION = "configuration"  #: an option makes no sense, on this machine as on any other


#: The exit codes of each contract in the order of ``Outcome``. What is unknown is never 0.
#:
#: ``plain``: those of this suite. ``npd`` (node-problem-detector): 0 is no problem, 1 a problem, and any other number
#: leaves the node's condition unknown. ``nagios`` (also Meta's GCM): OK, WARNING, CRITICAL, UNKNOWN. ``aicr`` (NVIDIA
#: AICR's validators): 2 is "skipped", the only code there for a check without a verdict. ``hv`` (NVIDIA Health
#: Validation): 1 is critical, or that the health could not be assessed; 2, that the tool came to no verdict at all.
#: ``slurm`` (prologs): everything but 0 drains the node.
_CODES: Final[dict[str, tuple[int, ...]]] = {
    #         PASS SOFT HARD NO_GPU WRONG BUSY UNJUDGED INTERRUPTED TIMEOUT CONFIGURATION
    "plain": (0, 0, 1, 3, 3, 3, 3, 3, 3, 3),
    "npd": (0, 0, 1, 3, 3, 3, 3, 3, 3, 3),
    "nagios": (0, 1, 2, 3, 3, 3, 3, 3, 3, 3),
    "aicr": (0, 0, 1, 2, 2, 2, 2, 2, 2, 2),
    "hv": (0, 0, 1, 1, 1, 1, 1, 2, 2, 2),
    "slurm": (0, 0, 1, 3, 3, 3, 3, 3, 3, 3),
}

#: The exit code of every outcome, by contract.
CODES: Final = MappingProxyType(
    {contract: MappingProxyType(dict(zip(Outcome, codes, strict=True))) for contract, codes in _CODES.items()}
)

#: The contracts that ``--contract`` names; without it, the codes are ``plain``.
CONTRACTS: Final = tuple(name for name in CODES if name != "plain")

#: The longest line, in characters: node-problem-detector cuts a message there.
WIDTH: Final = 80

#: Kubernetes keeps so many bytes of a container's termination message.
TERMINATION_BYTES: Final = 4096

#: The words of Nagios for its codes, and of Health Validation for what a gate can say.
_NAGIOS: Final = ("OK", "WARNING", "CRITICAL", "UNKNOWN")
_SEVERITIES: Final = {Outcome.PASS: "PASS", Outcome.SOFT: "WARNING", Outcome.HARD: "CRITICAL"}


@dataclass(frozen=True, slots=True)
class Answer:
    """What a gate found out: ``words`` are one sentence, ``details`` what its JSON has besides (checks, GPU)."""

    outcome: Outcome
    words: str
    details: dict[str, Any] = field(default_factory=dict)

    @property
    def status(self) -> str:
        """``OK``, ``WARNING``, ``CRITICAL`` or ``UNKNOWN``."""
        return _NAGIOS[CODES["nagios"][self.outcome]]


#: The outcomes of several GPUs, the one that counts first.
_ORDER: Final = (
    Outcome.HARD,
    *(Outcome.NO_GPU, Outcome.WRONG_GPU, Outcome.TIMEOUT, Outcome.UNJUDGED, Outcome.BUSY, Outcome.INTERRUPTED),
    *(Outcome.CONFIGURATION, Outcome.SOFT, Outcome.PASS),
)


def worst(answers: Mapping[str, Answer]) -> Answer:
    """The answer for a machine with several GPUs, of which ``answers`` has that of each by the GPU's name."""
    outcome = min((one.outcome for one in answers.values()), key=_ORDER.index)
    names = [name for name, one in answers.items() if one.outcome is outcome]
    details = {"gpus": {name: {"outcome": one.outcome.value, **one.details} for name, one in answers.items()}}
    first = answers[names[0]].words
    if outcome is Outcome.PASS:
        return Answer(outcome, f"{len(names)} GPUs, on each: {first}", details)
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return Answer(outcome, f"GPU {names[0]}{more}: {first}", details)


def code(contract: str | None, outcome: Outcome) -> int:
    """The exit code of ``outcome`` in a contract; None means the suite's own codes."""
    return CODES[contract or "plain"][outcome]


def told(contract: str | None, answer: Answer) -> str:
    """What a contract expects on stdout: one line of at most ``WIDTH`` printable characters, or for ``hv`` JSON."""
    if contract == "hv":
        severity = _SEVERITIES.get(answer.outcome, "UNKNOWN")
        own = {"outcome": answer.outcome.value, **answer.details}
        return json.dumps({"overall_severity": severity, "message": answer.words, "triattention": own})
    words = "".join(letter if letter.isprintable() else " " for letter in answer.words)
    start = {"nagios": f"TRIATTENTION {answer.status} - ", "slurm": f"{_slurm(answer)}triattention: "}
    whole = start.get(contract or "", f"{answer.status} triattention: ") + " ".join(words.split())
    return whole if len(whole) <= WIDTH else f"{whole[: WIDTH - 3]}..."


def _slurm(answer: Answer) -> str:
    """The prefix by which tools that read drain reasons tell whose problem it is."""
    if answer.outcome in (Outcome.PASS, Outcome.SOFT):
        return ""
    return "[user_problem] " if answer.outcome is Outcome.CONFIGURATION else "[node_problem] "
