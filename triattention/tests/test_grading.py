from __future__ import annotations

import signal
import threading

import pytest

from triattention import grading
from triattention.grading import Grade, grade

CORRECT = [
    ("The answer to this classic math problem is 4.", "4"),
    ("7 + 6 = 13.", "13"),
    ("5 * 5 = 25, which is what multiplying 5 * 5 gives", "25"),
    ("$5 \\times 5 = 25$", "25"),
    ("There are seven days in a week.", "7"),
    ("The answer is 3. A triangle has 3 sides and 180 degrees.", "3"),
    ("so that \\boxed{\\frac{1}{2}} is left", "0.5"),
    ("The answer is $\\frac{3}{4}$.", "$\\frac{3}{4}$"),
    ("it adds up to\n#### 1,234", "1234"),
    ("<think>perhaps 5</think>It is 6.", "6"),
    ("It costs $40", "40"),
    ("It grew by 3.50.", "3.5"),
    ("The capital of France is Paris. Lyon is not.", "Paris"),
    ("Not Lyon, but Paris.", "Paris"),
    ("The answer is **New York**.", "new york"),
    ("The chemical symbol for water is H2O.", "H2O"),
]

WRONG = [
    ("It is 14.", "4"),
    ("-4", "4"),
    ("We multiply 5 * 5.", "25"),
    ("$5 \\times 5$", "25"),
    ("First 4, then 5.", "4"),
    ("", "4"),
    ("", "Paris"),
    ("<think>it is 5", "5"),
    ("Parisian", "Paris"),
    ("It is Lyon, not Paris.", "Paris"),
    ("It isn\u2019t Paris.", "Paris"),
    ("Paris or Lyon.", "Paris"),
    ("Lyon. Paris is larger.", "Paris"),
    ("York is new.", "New York"),
]


@pytest.mark.parametrize(("reply", "expected"), CORRECT)
def test_a_reply_that_gives_the_answer_is_correct(reply: str, expected: str) -> None:
    assert grade(reply, expected).correct


@pytest.mark.parametrize(("reply", "expected"), WRONG)
def test_a_reply_that_does_not_is_wrong(reply: str, expected: str) -> None:
    assert not grade(reply, expected).correct


def test_the_extracted_answer_is_the_last_marked_one() -> None:
    assert grade("The answer is 4. No, the answer is 5.", "5") == Grade(True, "5")
    assert grade("nothing here", "5").extracted == "nothing here"
    assert grade("only 2 + 2", "4").extracted == ""


def test_grading_works_outside_the_main_thread() -> None:
    found: list[bool] = []
    thread = threading.Thread(target=lambda: found.append(grade("It is 4.", "4").correct))
    thread.start()
    thread.join()
    assert found == [True]


def test_an_alarm_of_somebody_else_survives() -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    outer = signal.setitimer(signal.ITIMER_REAL, 100.0)
    try:
        assert grade("It is 4.", "4").correct
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100.0
    finally:
        signal.setitimer(signal.ITIMER_REAL, *outer)
        signal.signal(signal.SIGALRM, before)


def test_a_number_too_large_to_compute_is_wrong_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(grading, "_MATH_SECONDS", 1)
    assert not grade("$9^{9^{9^{9}}}$", "4").correct
