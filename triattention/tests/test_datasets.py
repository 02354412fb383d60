from __future__ import annotations

import re
from pathlib import Path

import pytest

from triattention.errors import TriAttentionError
from triattention.evaluation.datasets import Question, load_dataset
from triattention.evaluation.grading import grade


def test_smoke_has_twenty_questions_whose_own_answers_are_graded_correct() -> None:
    questions = load_dataset("smoke").questions
    assert len(questions) == len({q.question for q in questions}) == 20
    assert Question("What is 2+2?", "4") in questions
    assert all(grade(f"It is {q.answer}.", q.answer).correct for q in questions)


def test_a_local_file_keeps_order_takes_numbers_and_skips_empty_lines(tmp_path: Path) -> None:
    path = tmp_path / "my set.jsonl"
    path.write_text('{"question": "a\u2028b", "answer": 4, "id": 1}\n\n{"question": "c", "answer": "d"}\r\n', "utf-8")
    dataset = load_dataset(str(path))
    assert dataset.name == "my-set"
    assert dataset.questions == (Question("a\u2028b", "4"), Question("c", "d"))


def test_a_line_may_choose_its_grader(tmp_path: Path) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "a", "answer": "p - q", "grader": "math"}\n{"question": "b", "answer": 7}\n')
    first, second = load_dataset(str(path)).questions
    assert (first.grader, second.grader) == ("math", "auto")
    assert (first.prompt, first.instruction) == ("a", "")


def test_a_prompt_is_the_question_and_then_what_is_asked_of_the_reply() -> None:
    assert Question("How many?", "4", instruction="Use \\boxed{}.").prompt == "How many?\n\nUse \\boxed{}."


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["Unix", "Windows"])
@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ('{"question": ', "not JSON (Expecting value at column 14)"),
        ("[1]", "a list, not an object"),
        ('{"answer": "b"}', 'no "question", but [\'answer\']; call the field that counts "question"'),
        ('{"question": " ", "answer": "b"}', "\"question\" is ' '"),
        ('{"question": "a"}', 'no "answer", but [\'question\']; call the field that counts "answer"'),
        ('{"question": null, "answer": "b"}', '"question" is None; it must be text'),
        ('{"question": "a", "answer": true}', '"answer" is True'),
        ('{"question": "a", "answer": ""}', "\"answer\" is ''"),
        (
            '{"question": "a", "answer": "b", "grader": "strict"}',
            "\"grader\" is 'strict'; it must be one of auto, math",
        ),
        ('{"question": "a", "answer": "b", "grader": ["math"]}', "\"grader\" is ['math']"),
        ('{"question": "a", "answer": "b", "grader": "number"}', 'the grader "number" needs a whole number'),
        ('{"question": "a", "answer": "[1]", "grader": "json"}', 'the grader "json" needs the text of a JSON object'),
        # what can mean two things
        ('{"question": "a", "question": "b", "answer": 1}', "'question' twice in one object; correct or"),
        ('{"question": "a", "answer": NaN}', "NaN, which JSON does not have"),
        ('{"question": "a", "answer": 1e999}', "1e999, which is beyond float64"),
        ('{"question": "a", "answer": 1e-999999999999}', "1e-999999999999, which is too small for float64"),
        ("5", "a number, not an object with question and answer"),
        ('{"question": "a", "answer": 1, "x": ' + "[" * 9999 + "]" * 9999 + "}", "nested too deeply"),
        ('{"question": "\\ud83d", "answer": 1}', "half of a surrogate pair"),
        ('{"question": 5, "answer": 1}', '"question" is 5; it must be text'),
        ('{"problem": "a", "prompt": "b", "answer": 1}', "both 'problem' and 'prompt'; call the field that counts"),
        ('{"data": {"question": "a"}, "answer": 1}', "no \"question\", but ['data', 'answer']; call the field that"),
        ('{"question": {"text": "a"}, "answer": 1}', "\"question\" is {'text': 'a'}; it must be text"),
        ('{"question": "a", "answer": ["b"]}', "\"answer\" is ['b']; it must be text or a number"),
        (
            '{"messages": [{"role": "system"}, {"role": "user"}], "answer": 1}',
            '"messages" is a list of 2, and a question is one text; give it as',
        ),
        ("{", "one object must not span several lines"),
        ("question,answer", "not JSON (Expecting value at column 1); correct or remove the line"),
    ],
)
def test_a_broken_line_is_named_with_its_number_and_reason(tmp_path: Path, line: str, reason: str, end: str) -> None:
    path = tmp_path / "set.jsonl"
    path.write_text('{"question": "a", "answer": "b"}' + end + line + end)
    with pytest.raises(TriAttentionError, match=re.escape(f"{path}, line 2: ") + ".*" + re.escape(reason)):
        load_dataset(str(path))


def test_unknown_names_and_unreadable_files_are_one_sentence(tmp_path: Path) -> None:
    known = "smoke, aime24, aime25, math500, gsm8k, dfs[:STEPS], needle[:WORDS], or the path of a .jsonl file"
    for name in ("aime", "AIME24", "smoke:3", "", "dfs/12"):
        with pytest.raises(TriAttentionError, match=re.escape(f"dataset {name!r} is not known; known: {known}")):
            load_dataset(name)
    with pytest.raises(TriAttentionError, match="No such file"):
        load_dataset(str(tmp_path / "none.jsonl"))
    empty, binary = tmp_path / "empty.jsonl", tmp_path / "binary.jsonl"
    empty.write_text("\n")
    binary.write_bytes(b"\n\xe9\n")
    with pytest.raises(TriAttentionError, match="has no questions"):
        load_dataset(str(empty))
    with pytest.raises(TriAttentionError, match="line 2 is not UTF-8"):
        load_dataset(str(binary))
