from __future__ import annotations

import signal
import threading

import pytest

from triattention.errors import TriAttentionError
from triattention.evaluation import grading
from triattention.evaluation.grading import Grade, grade

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


def _boxed(answer: str) -> str:
    return f"We add up, and see that 3 cases are left.\n\nThe final answer is $\\boxed{{{answer}}}$."


#: Answers of the benchmarks, replies that give them in another form, and replies that come near.
MATHS: list[tuple[str, list[str], list[str]]] = [
    ("p - q", ["p-q", "-q + p", "$p - q$"], ["q - p", "p + q", "p", "2p - q"]),
    ("x=5", ["5", "x = 5"], ["x = 6", "15", "x = 55"]),
    ("1,-2", ["-2, 1", "1 \\text{ and } -2", "n = 1, -2"], ["1", "-2", "1, 2", "1, -2, 3"]),
    ("3, 5, 7", ["7, 5, 3", "\\{3, 5, 7\\}"], ["3, 5", "3, 5, 77"]),
    ("6 - 5i", ["-5i + 6"], ["6 + 5i", "1", "5 - 6i"]),
    ("\\left( 3, \\frac{\\pi}{2} \\right)", ["(3, \\pi/2)"], ["(\\frac{\\pi}{2}, 3)", "(3, \\pi)", "3"]),
    ("(6,31,-1)", ["(6, 31, -1)"], ["(6, 31, 1)", "(6, -1, 31)", "(6, 31)"]),
    ("\\frac{14}{3}", ["14/3", "\\dfrac{14}{3}", "4\\frac{2}{3}"], ["\\frac{3}{14}", "\\frac{14}{33}", "14", "4.6"]),
    ("1.25", ["\\frac54", "1.250"], ["1.2", "1.255", "125"]),
    ("3\\sqrt{13}", ["\\sqrt{117}", "3 \\sqrt{13}"], ["3\\sqrt{31}", "\\sqrt{13}", "10.8"]),
    ("\\pi", ["\\pi"], ["3.14", "2\\pi", "-\\pi"]),
    ("(2,\\infty)", ["(2, +\\infty)", "x > 2"], ["[2,\\infty)", "(-\\infty, 2)", "x \\ge 2", "2"]),
    ("[2,12)", ["[2, 12)", "2 \\le x < 12"], ["(2,12)", "[2,12]", "[2,1)", "2 < x < 12"]),
    ("(-\\infty, 2) \\cup (3, \\infty)", ["(-\\infty,2)\\cup(3,\\infty)"],
     ["(-\\infty, 2] \\cup [3, \\infty)", "(2, 3)"]),
    ("x \\in [-2,7]", ["[-2,7]", "[-2, 7]"], ["(-2,7)", "[-2,77]"]),
    ("1 \\pm \\sqrt{19}", ["1 - \\sqrt{19}, 1 + \\sqrt{19}"], ["1 + \\sqrt{19}"]),
    ("8n^2 + 4n + 1", ["4n(2n + 1) + 1"], ["8n^2 + 4n - 1", "8n^2 + 4n"]),
    ("y = 2x + 3", ["y = 3 + 2x"], ["y = 2x - 3", "y = 2x"]),
    ("\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", ["\\begin{bmatrix} 1 & 2 \\\\ 3 & 4 \\end{bmatrix}"],
     ["\\begin{pmatrix} 1 & 2 \\\\ 4 & 3 \\end{pmatrix}"]),
    ("90^\\circ", ["90", "90 \\text{ degrees}"], ["9", "190", "\\frac{\\pi}{3}"]),
    ("5.4 \\text{ cents}", ["5.4", "5.4 \\text{ cents}"], ["54", "5.45"]),
    ("\\$32,\\!348", ["32348", "\\$32{,}348", "32,348"], ["348", "32", "32349"]),
    ("10\\%", ["10", "10\\%"], ["1", "100", "1\\%"]),
    ("52_8", ["52_8", "52_{8}"], ["42", "5"]),
    ("\\text{Evelyn}", ["\\text{Evelyn}", "Evelyn", "\\textbf{evelyn}"],
     ["\\text{Eve}", "\\text{Evelyn and Carla}", "Briana"]),
    ("\\text{June 20}", ["June 20"], ["June 2", "\\text{June 21}"]),
    ("\\text{(C)}", ["C", "(C)"], ["B", "(A), (C)"]),
    ("025", ["25", "025"], ["250", "2", "5"]),
    ("204", ["204", "204.0", "12 \\cdot 17 = 204"], ["2041", "04", "12 \\cdot 17", "-204"]),
    ("1,234", ["1234", "1{,}234", "1\\,234", "\\$1,234.00"], ["234", "1", "1.234", "12345"]),
    ("18", ["\\$18", "18 \\text{ dollars}", "18"], ["8", "1.8", "180", "9 \\times 2"]),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "right", "wrong"), MATHS, ids=[expected for expected, _, _ in MATHS])
def test_a_mathematical_answer_counts_in_every_form_and_a_near_one_in_none(
    expected: str, right: list[str], wrong: list[str]
) -> None:
    assert grade(_boxed(expected), expected, "math").correct
    assert [answer for answer in right if not grade(_boxed(answer), expected, "math").correct] == []
    assert [answer for answer in wrong if grade(_boxed(answer), expected, "math").correct] == []


@pytest.mark.parametrize(
    ("reply", "expected", "correct"),
    [
        ("She sells 16 - 3 - 4 = 9 eggs, and makes 9 * 2 = <<9*2=18>>18 dollars.\n#### 18", "18", True),
        ("She earns $1,080 in total.", "1,080", True),
        ("**Answer:** 70,000", "70000", True),
        ("The answer is $p - q$.", "p - q", True),
        ("The answer is \\(p - q\\).", "p - q", True),
        ("The answer is p + q.", "p - q", False),
        ("The answer is Evelyn.", "\\text{Evelyn}", True),
        ("It is 5. <think>No.</think>It is 6.", "5", False),
        ("<think>\\boxed{5}</think>It is \\boxed{6}.", "5", False),
        ("<think>So it is \\boxed{5}", "5", False),
        ("\\boxed{4}, no: \\boxed{5}", "4", False),
        ("\\boxed{", "4", False),
        ("", "p - q", False),
    ],
)
def test_the_last_mark_outside_of_the_reasoning_is_what_counts_in_mathematics(
    reply: str, expected: str, correct: bool
) -> None:
    assert grade(reply, expected, "math").correct is correct


@pytest.mark.parametrize(
    ("reply", "correct"),
    [
        ("482137", True),
        ("The secret number is **482,137**.", True),
        ("It is 482137, in the sentence 3.", True),
        ("\\boxed{482137}", True),
        ("<think>111111?</think> $482137$", True),
        ("4821370", False),
        ("1482137", False),
        ("-482137", False),
        ("482137.5", False),
        ("0.482137", False),
        ("482,1370", False),
        ("4 8 2 1 3 7", False),
        ("482137 or 482138", False),
        ("482138, not 482137", False),
        ("<think>482137", False),
        ("x482137", False),
        ("It is not there.", False),
    ],
)
def test_a_number_is_compared_whole_and_exactly(reply: str, correct: bool) -> None:
    assert grade(reply, "482137", "number").correct is correct


STATE = '{"current_node": "B", "stack": ["A", "B"], "visited": ["A", "C", "B"]}'


@pytest.mark.parametrize(
    ("reply", "correct"),
    [
        (STATE, True),
        (f"Step 1 {{push}} gives {{}}.\n```json\n{STATE}\n```\nThat is all {{here}}.", True),
        ('{"visited": ["A", "C", "B"],\n "stack": ["A", "B"], "current_node": "B"}', True),
        (f'First {{"current_node": "A", "stack": ["A"], "visited": ["A"]}}, then {STATE}', True),
        (f"<think>{{}}</think>{STATE}", True),
        (f'{STATE} {{"current_node": "A", "stack": ["A"], "visited": ["A"]}}', False),
        (STATE.replace('["A", "B"]', '["B", "A"]'), False),
        (STATE.replace('["A", "C", "B"]', '["A", "B", "C"]'), False),
        (STATE.replace('"current_node": "B"', '"current_node": "A"'), False),
        (STATE.replace("}", ', "step": 3}'), False),
        (STATE.replace('"current_node": "B", ', ""), False),
        (STATE[:-1], False),
        (f'{{"state": {STATE}}}', False),
        (f"<think>{STATE}</think>I do not know.", False),
        (f"<think>{STATE}", False),
        ("[1, 2]", False),
        ('{"a":' * 3000, False),
        ('{"a":' * 3000 + "1" + "}" * 3000, False),
    ],
)
def test_a_state_is_the_last_json_object_and_equal_in_every_part(reply: str, correct: bool) -> None:
    assert grade(reply, STATE, "json").correct is correct


def test_json_values_of_other_types_differ_and_what_was_found_is_shown() -> None:
    assert grade('{"a": 1}', '{"a": 1}', "json") == Grade(True, '{"a": 1}')
    assert not grade('{"a": true}', '{"a": 1}', "json").correct
    assert not grade('{"a": "1"}', '{"a": 1}', "json").correct
    assert grade("nothing", '{"a": 1}', "json") == Grade(False, "")


def test_an_unknown_grader_is_refused() -> None:
    with pytest.raises(
        TriAttentionError, match="the grader 'strict' is not known; use one of auto, math, number, json"
    ):
        grade("4", "4", "strict")


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
