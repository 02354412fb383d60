"""Grading: is the final answer of a reply the expected one?

The rules, in order:

1. Reasoning inside ``<think>...</think>`` is dropped; a reply that never leaves it has no answer.
2. The final answer is what the reply marks as such, the last mark winning: ``\\boxed{...}``, ``#### ...``,
   ``answer is ...``, ``answer: ...`` (to the end of that sentence).
3. Without a mark, a mathematical answer is the last expression of the reply, and an answer in words is in its first
   sentence: sums are worked out before they are answered, facts are stated first.
4. Mathematical answers (a number, or anything in LaTeX) are compared by value with math-verify: 0.5 is 1/2, 14 is not
   4. Where a number is expected, a sum that is left to do is no answer: ``5 * 5`` is not 25, ``5 * 5 = 25`` is. A whole
   number up to twelve may also be written as a word.
5. Words are compared whole and without case, never as substrings. A clause that denies or hedges (``not Paris``,
   ``Paris or Lyon``) does not answer.
"""

from __future__ import annotations

import logging
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import math_verify

_MATH_SECONDS = 5

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?(\s*/\s*\d+)?\s*%?")
#: Numbers with an operator between them; a slash without spaces is a fraction.
_SUM = re.compile(r"\d+(?:[.,]\d+)*(?:(?:\s*(?:[-+*\u00d7\u00f7]|\\times|\\cdot|\\div)\s*|\s+/\s+)\d+(?:[.,]\d+)*)+")
_MARK = re.compile(r"(?:\banswer\b[^.:=\n]{0,80}?(?:\bis\b(?:\s*:)?|:|=)|####)[\s*]*", re.IGNORECASE)
#: A full stop ends a sentence only before a space, so that 3.5 stays whole.
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')*]|$)|\n")
_CLAUSE_END = re.compile(r"[,;:()]|\bbut\b|\brather\b", re.IGNORECASE)
_NO_ANSWER = re.compile(r"\b(?:not|never|neither|nor|cannot|or|either)\b|n't\b", re.IGNORECASE)
_WORD = re.compile(r"[^\W_]+")
_NUMBER_WORDS = (
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
)


@dataclass(frozen=True, slots=True)
class Grade:
    """``extracted`` is what was taken for the final answer, empty when there was none."""

    correct: bool
    extracted: str


def grade(reply: str, expected: str, grader: str = "auto") -> Grade:
    """Grade one reply by the rules above."""
    text = _after_thinking(reply).replace("\u2019", "'").strip()
    expected = expected.strip()
    marked = _marked(text)
    if _is_mathematical(expected):
        return _grade_mathematical(text if marked is None else marked, expected)
    return _grade_words(_first_sentence(text) if marked is None else marked, expected)


def _after_thinking(reply: str) -> str:
    if "</think>" in reply:
        return reply.rpartition("</think>")[2]
    return reply.partition("<think>")[0]


def _marked(text: str) -> str | None:
    """What follows the last mark, or None where there is none."""
    boxed = text.rfind("\\boxed{")
    marks = list(_MARK.finditer(text))
    if boxed >= 0 and (not marks or boxed > marks[-1].start()):
        return _braced(text[boxed + len("\\boxed{") :])
    return _first_sentence(text[marks[-1].end() :]) if marks else None


def _braced(text: str) -> str:
    """``text`` up to the brace that closes the one before it."""
    depth = 1
    for index, character in enumerate(text):
        depth += {"{": 1, "}": -1}.get(character, 0)
        if depth == 0:
            return text[:index]
    return text


def _first_sentence(text: str) -> str:
    return _SENTENCE_END.split(text.lstrip(), maxsplit=1)[0].strip(" *")


def _is_mathematical(expected: str) -> bool:
    return (
        bool(_NUMBER.fullmatch(expected)) or "\\" in expected or (expected.startswith("$") and expected.endswith("$"))
    )


def _grade_mathematical(text: str, expected: str) -> Grade:
    if expected.isdecimal() and int(expected) < len(_NUMBER_WORDS) and not re.search(r"\d", text):
        return _grade_words(_first_sentence(text), _NUMBER_WORDS[int(expected)])
    if _NUMBER.fullmatch(expected):
        text = _SUM.sub("", text)
    with _math_verify() as (parse, verify):
        found = parse(_as_latex(text))
        correct = bool(found) and verify(parse(_as_latex(expected)), found)
    return Grade(correct, str(found[-1]) if found else "")


def _as_latex(text: str) -> str:
    """math-verify looks for LaTeX between dollar signs only; the inside of a box has none."""
    return f"${text}$" if "\\" in text and "$" not in text else text


def _grade_words(text: str, expected: str) -> Grade:
    wanted = _words(expected)
    clauses = (clause for clause in _CLAUSE_END.split(text) if not _NO_ANSWER.search(clause))
    return Grade(any(_contains(_words(clause), wanted) for clause in clauses), text)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.casefold())


def _contains(words: list[str], wanted: list[str]) -> bool:
    width = len(wanted)
    return width > 0 and any(words[i : i + width] == wanted for i in range(len(words) - width + 1))


@contextmanager
def _math_verify() -> Iterator[tuple[Any, Any]]:
    """math-verify's parse and verify, each within 5 s.

    Its time limit is an alarm signal, which only the main thread can set (elsewhere there is no limit), and which would
    cancel an alarm somebody else has set (pytest-timeout): that one is set again afterwards.
    """
    # it warns once per process where the limit is off, and logs every text that it cannot parse
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    in_main = threading.current_thread() is threading.main_thread()
    limit = _MATH_SECONDS if in_main else None
    outer, started = (signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()) if in_main else (0.0, 0.0)
    try:
        yield (
            lambda text: math_verify.parse(text, parsing_timeout=limit),
            lambda gold, found: math_verify.verify(gold, found, timeout_seconds=limit),
        )
    finally:
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))
