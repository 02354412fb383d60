"""Generated tasks: the same for the same seed, right by an independent solution, and free of accidental answers."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator

import pytest

from triattention.errors import TriAttentionError
from triattention.evaluation.datasets import load_dataset
from triattention.evaluation.grading import grade
from triattention.evaluation.needle import needle_recalls
from triattention.evaluation.state_query import simulate, state_queries


def _states(graph: dict[str, list[str]], start: str) -> Iterator[dict[str, object]]:
    """Every state of the search, by recursion: the path from the start is the stack."""
    visited: list[str] = []

    def visit(path: list[str]) -> Iterator[dict[str, object]]:
        visited.append(path[-1])
        state = {"current_node": path[-1], "stack": path}
        yield {**state, "visited": list(visited)}
        for neighbour in sorted(graph[path[-1]]):
            if neighbour not in visited:
                yield from visit([*path, neighbour])
                yield {**state, "visited": list(visited)}

    return visit([start])


@pytest.mark.parametrize("steps", [1, 2, 12, 40, 500])
def test_the_expected_state_is_that_of_a_recursive_search_of_the_graph_in_the_prompt(steps: int) -> None:
    for question in state_queries(steps, count=5):
        lines = re.findall(r"^([A-Z]+): ([A-Z, ]+)$", question.prompt, re.MULTILINE)
        graph = {node: neighbours.split(", ") for node, neighbours in lines}
        start = re.search(r"the current node is ([A-Z]+),", question.prompt)
        assert start is not None
        assert f"after exactly {steps} step" in question.prompt
        assert all(neighbours == sorted(neighbours) for neighbours in graph.values())
        assert all(node in graph[other] for node, neighbours in graph.items() for other in neighbours)
        expected = list(_states(graph, start[1]))[steps]
        assert json.loads(question.answer) == expected
        assert grade(f"```json\n{json.dumps(expected, indent=1)}\n```", question.answer, question.grader).correct


def test_searches_also_go_back_and_their_graphs_have_cycles() -> None:
    states = [json.loads(question.answer) for question in state_queries(12)]
    assert any(len(state["stack"]) < len(state["visited"]) for state in states)
    assert len({question.answer for question in state_queries(12)}) == 20


def test_the_example_in_the_prompt_is_right_and_a_search_that_ends_early_is_refused() -> None:
    graph = {"A": ["B", "C"], "B": ["A"], "C": ["A"]}
    example = '{"current_node": "C", "stack": ["A", "C"], "visited": ["A", "B", "C"]}'
    assert simulate(graph, "A", 3).to_json() == example
    assert f"the state after 3 steps is {example}\n" in state_queries(12)[0].prompt
    with pytest.raises(ValueError, match="the search ends with step 5, before step 9"):
        simulate(graph, "A", 9)


@pytest.mark.parametrize("words", [16, 200, 1024])
def test_a_needle_is_the_only_number_of_its_text_and_its_depth_sweeps_from_start_to_end(words: int) -> None:
    dataset = load_dataset(f"needle:{words}")
    texts = [question.question.partition("\n\n")[0] for question in dataset.questions]
    for text, question in zip(texts, dataset.questions, strict=True):
        assert re.findall(r"\d+", question.prompt) == [question.answer]
        assert text.count("secret number") == 1
        assert words <= len(text.split()) <= words + 25
        assert grade(f"The secret number is {question.answer}.", question.answer, question.grader).correct
    assert texts[0].startswith("Remember that the secret number")
    assert texts[-1].endswith(f"the secret number is {dataset.questions[-1].answer}.")
    for place, text in enumerate(texts):
        before = len(text.partition("Remember")[0].split())
        assert before == pytest.approx(place / 19 * (len(text.split()) - 7), abs=12.5)  # half the longest sentence
    assert len({question.answer for question in dataset.questions}) == 20


def test_a_recall_is_the_text_of_the_question_up_to_its_answer() -> None:
    questions, recalls = load_dataset("needle:200", seed=3).questions, needle_recalls(200, seed=3)
    for question, (context, answer, _) in zip(questions, recalls, strict=True):
        assert context.startswith(question.question.partition("\n\n")[0])
        assert context.endswith("\n\nThe secret number is")
        assert answer == f" {question.answer}"
    assert [recall.depth for recall in recalls] == pytest.approx([place / 19 for place in range(20)])
    assert needle_recalls(200, count=1)[0].depth == 0


@pytest.mark.parametrize(
    ("name", "digest"),
    [("dfs", "689b3818fe616452"), ("needle", "ae69920faccbef0d")],
)
def test_a_seed_makes_the_same_questions_everywhere_and_another_seed_makes_others(name: str, digest: str) -> None:
    dataset = load_dataset(name)
    made = "\0".join(part for question in dataset.questions for part in (question.prompt, question.answer))
    assert hashlib.sha256(made.encode()).hexdigest()[:16] == digest
    assert not set(dataset.questions) & set(load_dataset(name, seed=1).questions)


def test_names_say_the_size_and_are_fit_for_file_names() -> None:
    for name, full in (("dfs", "dfs-12"), ("dfs:7", "dfs-7"), ("needle", "needle-1024"), ("needle:64", "needle-64")):
        dataset = load_dataset(name)
        assert dataset.name == full
        assert len(dataset.questions) == 20
    assert load_dataset("dfs:12") == load_dataset("dfs")


@pytest.mark.parametrize(
    ("name", "allowed"),
    [
        *(
            (f"dfs:{bad}", "STEPS must be a whole number from 1 to 500")
            for bad in ("x", "0", "501", "-1", "", "1.5", "²")
        ),
        *((f"needle:{bad}", "WORDS must be a whole number from 16 to 1000000") for bad in ("0", "15", "9" * 5000)),
    ],
)
def test_an_argument_that_is_out_of_range_is_told_what_is_allowed(name: str, allowed: str) -> None:
    with pytest.raises(TriAttentionError, match=re.escape(f"dataset {name}: {allowed}; for example ")):
        load_dataset(name)
