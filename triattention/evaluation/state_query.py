"""The recursive state query: simulate a depth-first search for a number of steps, then report its whole state.

Modelled on the paper's benchmark of that name: the final state depends on every step before it, so a cache that loses
one of them loses the answer. The number of steps sets the difficulty.
"""

from __future__ import annotations

import json
import random
import string
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product

from triattention.evaluation.questions import Question

DEFAULT_STEPS = 12
MAX_STEPS = 500

Graph = Mapping[str, Sequence[str]]

_RULES = """\
An undirected graph is searched depth first. Each line below is a node and its neighbours, in alphabetical order.

{graph}

The state of the search is "current_node" (one node), "stack" (nodes from bottom to top) and "visited" (nodes in the \
order of their first visit). Before step 1, the current node is {start}, the stack is [{start}], and visited is \
[{start}]. The current node is always the top of the stack. One step is:
1. If the current node has a neighbour that is not in visited: push the alphabetically first such neighbour on the \
stack and append it to visited. It is now the current node.
2. Otherwise: pop the current node off the stack. The node that is then on top is the current node. Visited stays as \
it is.
A push is one step and a pop is one step.

Example: with the neighbours A: B, C; B: A; C: A and the start A, step 1 pushes B, step 2 pops B, step 3 pushes C, and \
the state after 3 steps is {example}

What is the state after exactly {steps} {noun}?"""

_INSTRUCTION = """\
Please work step by step, and end your reply with that state as one JSON object with exactly these keys: \
{"current_node": ..., "stack": [...], "visited": [...]}"""


@dataclass(frozen=True, slots=True)
class State:
    """``stack`` from bottom to top, ``visited`` in the order of first visits; ``current_node`` is the top."""

    current_node: str
    stack: tuple[str, ...]
    visited: tuple[str, ...]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def simulate(graph: Graph, start: str, steps: int) -> State:
    """The state after ``steps`` steps, each a push or a pop. Raises ValueError if the search ends earlier."""
    stack, visited = [start], [start]
    for step in range(1, steps + 1):
        unvisited = [neighbour for neighbour in graph[stack[-1]] if neighbour not in visited]
        if unvisited:
            stack.append(min(unvisited))
            visited.append(stack[-1])
        else:
            stack.pop()
        if not stack:
            raise ValueError(f"the search ends with step {step}, before step {steps}")
    return State(stack[-1], tuple(stack), tuple(visited))


def state_queries(steps: int = DEFAULT_STEPS, count: int = 20, seed: int = 0) -> tuple[Question, ...]:
    """``count`` questions of ``steps`` steps (1 to 500), each with its own graph."""
    source = random.Random(f"dfs {steps} {seed}")
    return tuple(_question(source, steps) for _ in range(count))


def _question(source: random.Random, steps: int) -> Question:
    graph = _random_graph(source, steps * 3 // 4 + 3)
    start = source.choice(sorted(graph))
    text = _RULES.format(
        graph="\n".join(f"{node}: {', '.join(neighbours)}" for node, neighbours in graph.items()),
        start=start,
        example=simulate({"A": "BC", "B": "A", "C": "A"}, "A", 3).to_json(),
        steps=steps,
        noun="step" if steps == 1 else "steps",
    )
    return Question(text, simulate(graph, start, steps).to_json(), grader="json", instruction=_INSTRUCTION)


def _random_graph(source: random.Random, size: int) -> dict[str, list[str]]:
    """A connected graph with ``size`` nodes: a random tree, and one additional edge for every four nodes.

    A complete search takes 2 (size - 1) steps to return to its start, more than any question needs.
    """
    letters = string.ascii_uppercase
    names = list(letters) if size <= len(letters) else ["".join(pair) for pair in product(letters, repeat=2)]
    nodes = source.sample(names, size)
    edges = {frozenset((node, source.choice(nodes[:place]))) for place, node in enumerate(nodes) if place}
    edges |= {frozenset(source.sample(nodes, 2)) for _ in range(size // 4)}
    return {node: sorted(other for edge in edges if node in edge for other in edge - {node}) for node in sorted(nodes)}
