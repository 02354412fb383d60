"""Questions: the prompt, the expected answer, and how the reply is graded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass

from triattention.errors import TriAttentionError

#: How a reply can be graded; the rules are in ``triattention.evaluation.grading``.
GRADERS = ("auto", "math", "number", "json")


@dataclass(frozen=True, slots=True)
class Question:
    """A question, its answer, one of GRADERS, and an instruction about the form of the reply.

    Raises TriAttentionError for an unknown grader, and for an answer that the grader cannot use.
    """

    question: str
    answer: str
    grader: str = "auto"
    instruction: str = ""

    def __post_init__(self) -> None:
        if self.grader not in GRADERS:
            raise TriAttentionError(f'"grader" is {self.grader!r}; it must be one of {", ".join(GRADERS)}')
        if self.grader == "number" and not re.fullmatch(r"-?\d+", self.answer):
            raise TriAttentionError(f'"answer" is {self.answer!r}; the grader "number" needs a whole number')
        if self.grader == "json" and not _is_json_object(self.answer):
            raise TriAttentionError(f'"answer" is {self.answer!r}; the grader "json" needs the text of a JSON object')

    @property
    def prompt(self) -> str:
        """The text sent to the model: the question, then the instruction as a separate paragraph."""
        return f"{self.question}\n\n{self.instruction}" if self.instruction else self.question


@dataclass(frozen=True, slots=True)
class Dataset:
    """Questions in order; ``name`` is usable in file names."""

    name: str
    questions: tuple[Question, ...]


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except ValueError:
        return False
