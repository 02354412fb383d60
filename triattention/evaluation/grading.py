"""Grading: whether the final answer of a reply is the expected one.

The rules of the grader ``auto``, in order:

1. Reasoning inside ``<think>...</think>`` is dropped; a reply whose reasoning never ends has no answer.
2. The final answer is the last one that the reply marks: ``\\boxed{...}``, ``#### ...``, ``answer is ...``,
   ``answer: ...`` (to the end of that sentence).
3. Without a mark, a mathematical answer is the last expression of the reply, and an answer in words is in its first
   sentence: calculations end with their result, facts are stated first.
4. Mathematical answers (a number, or anything in LaTeX) are compared by value with math-verify: 0.5 is 1/2, 14 is not
   4. If a number is expected, an unevaluated expression is not an answer: ``5 * 5`` is not 25, ``5 * 5 = 25`` is. An
   integer up to twelve may also be written as a word.
5. Words are compared as whole words, ignoring case, never as substrings. A clause with a negation or an alternative
   (``not Paris``, ``Paris or Lyon``) is not an answer.

The other graders apply rule 1, and then:

* ``math``: rules 2 to 4 for every answer, LaTeX or not: ``p - q``, ``3, 5, 7``, ``x=5``. An interval may be given as an
  inequality. An expected answer that is entirely ``\\text{...}`` is compared as words, with the whole box if there is
  one.
* ``number``: the answer is the first number of the reply, or of its marked part, compared exactly and as a whole. If a
  different number with as many digits is also there, there is no answer.
* ``json``: the answer is the last JSON object in the reply, in a code fence or not. It must equal the expected object:
  the same keys in any order, and the same values with lists in the same order.
"""

from __future__ import annotations

import json
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

from triattention.errors import TriAttentionError
from triattention.evaluation.questions import GRADERS

_MATH_SECONDS = 5

_NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(\.\d+)?(\s*/\s*\d+)?\s*%?")
#: Numbers with an operator between them; a slash without spaces is a fraction.
_SUM = re.compile(r"\d+(?:[.,]\d+)*(?:(?:\s*(?:[-+*\u00d7\u00f7]|\\times|\\cdot|\\div)\s*|\s+/\s+)\d+(?:[.,]\d+)*)+")
_MARK = re.compile(r"(?:\banswer\b[^.:=\n]{0,80}?(?:\bis\b(?:\s*:)?|:|=)|####)[\s*]*", re.IGNORECASE)
#: A full stop ends a sentence only before a space, so that 3.5 stays whole.
_SENTENCE_END = re.compile(r"[.!?](?=[\s\"')*]|$)|\n")
_CLAUSE_END = re.compile(r"[,;:()]|\bbut\b|\brather\b", re.IGNORECASE)
_NO_ANSWER = re.compile(r"\b(?:not|never|neither|nor|cannot|or|either)\b|n't\b", re.IGNORECASE)
#: A whole number that stands alone, with or without thousands separators.
_WHOLE = re.compile(r"(?<![\w.,-])-?(?:\d{1,3}(?:,\d{3})+|\d+)(?!\w|[.,]\d)")
_TEXT = re.compile(r"\\(?:text|textbf|textit|mbox|mathrm)\{([^{}]*)\}")
_DELIMITER = re.compile(r"(?<!\\)\$|(?<!\\)\\[(\[]")
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:! ](?=\d{3}(?!\d))")
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
    """``extracted`` is the text graded as the final answer, empty if there was none."""

    correct: bool
    extracted: str


def grade(reply: str, expected: str, grader: str = "auto") -> Grade:
    """Grade one reply by the rules above. Raises TriAttentionError for an unknown grader."""
    text = _after_thinking(reply).replace("\u2019", "'").strip()
    expected = expected.strip()
    match grader:
        case "auto":
            return _grade_auto(text, expected)
        case "math":
            return _grade_math(text, expected)
        case "number":
            return _grade_number(text, expected)
        case "json":
            return _grade_json(text, expected)
    raise TriAttentionError(f"the grader {grader!r} is not known; use one of {', '.join(GRADERS)}")


def _grade_auto(text: str, expected: str) -> Grade:
    marked = _marked(text)
    if _is_mathematical(expected):
        return _grade_mathematical(text if marked is None else marked, expected)
    return _grade_words(_first_sentence(text) if marked is None else marked, expected)


def _grade_math(text: str, expected: str) -> Grade:
    marked = _marked(text)
    if words := _TEXT.fullmatch(expected):
        if "\\boxed{" not in text:
            return _grade_words(_first_sentence(text) if marked is None else marked, words[1])
        return Grade(_words(_TEXT.sub(r"\1", marked or "")) == _words(words[1]), marked or "")
    return _grade_mathematical(text if marked is None else _in_box(marked), expected, _in_box(expected))


def _grade_number(text: str, expected: str) -> Grade:
    marked = _marked(text)
    numbers = [found[0].replace(",", "") for found in _WHOLE.finditer(text if marked is None else marked)]
    if not numbers or any(other != numbers[0] and len(other) == len(numbers[0]) for other in numbers):
        return Grade(False, "")
    return Grade(numbers[0] == expected, numbers[0])


def _grade_json(text: str, expected: str) -> Grade:
    decoder = json.JSONDecoder()
    found, place = "", text.find("{")
    while place >= 0:
        try:
            value, end = decoder.raw_decode(text, place)
            found = _canonical(value)
        except (ValueError, RecursionError):
            end = place + 1  # this brace does not start a JSON object, or one nested too deeply
        place = text.find("{", end)
    return Grade(found == _canonical(json.loads(expected)), found)


def _canonical(value: Any) -> str:
    """ASCII text for comparison: 1, 1.0 and true are equal in Python, and a lone surrogate cannot be encoded."""
    return json.dumps(value, sort_keys=True)


def _after_thinking(reply: str) -> str:
    if "</think>" in reply:
        return reply.rpartition("</think>")[2]
    return reply.partition("<think>")[0]


def _marked(text: str) -> str | None:
    """The text after the last mark, or None if there is no mark."""
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


def _grade_mathematical(text: str, expected: str, gold: str | None = None) -> Grade:
    """Compare with ``gold``, which is ``expected`` as LaTeX; without ``gold``, strictly as in ``auto``."""
    if expected.isdecimal() and int(expected) < len(_NUMBER_WORDS) and not re.search(r"\d", text):
        return _grade_words(_first_sentence(text), _NUMBER_WORDS[int(expected)])
    if _NUMBER.fullmatch(expected):
        text = _SUM.sub("", text)
    with _math_verify() as (parse, verify):
        found = parse(_as_latex(text))
        known = parse(gold or _as_latex(expected))
        correct = bool(found) and verify(known, found, allow_set_relation_comp=gold is not None)
    return Grade(correct, str(found[-1]) if found else "")


def _as_latex(text: str) -> str:
    """Add the dollar signs that math-verify needs to recognise LaTeX; the content of a box has none."""
    return f"${text}$" if "\\" in text and "$" not in text else text


def _in_box(text: str) -> str:
    """``text`` as LaTeX, even without delimiters, and then with thin spaces between digit groups removed."""
    return text if _DELIMITER.search(text) else f"\\boxed{{{_THIN_SPACE.sub('', text)}}}"


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
    """math-verify's parse and verify, each limited to 5 s.

    The time limit is an alarm signal, which only the main thread can set (other threads have no limit). It would cancel
    an existing alarm (pytest-timeout), which is therefore restored afterwards.
    """
    # it warns once per process if the limit is off, and logs every text that it cannot parse
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    in_main = threading.current_thread() is threading.main_thread()
    limit = _MATH_SECONDS if in_main else None
    outer, started = (signal.getitimer(signal.ITIMER_REAL)[0], time.monotonic()) if in_main else (0.0, 0.0)
    try:
        yield (
            lambda text: math_verify.parse(text, parsing_timeout=limit),
            lambda gold, found, **options: math_verify.verify(gold, found, timeout_seconds=limit, **options),
        )
    finally:
        if outer:
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))
