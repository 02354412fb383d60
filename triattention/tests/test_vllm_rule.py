"""When a paged engine evicts, and how much: the rule's formula, and properties that hold for all numbers."""

from __future__ import annotations

from math import ceil

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from triattention.vllm.runtime.eviction import Rule

RULES = st.builds(
    Rule, kv_budget=st.integers(1, 400), divide_length=st.integers(1, 100), window=st.integers(0, 200),
    block_size=st.integers(1, 64), protect_prefill=st.booleans(), include_prefill_in_budget=st.booleans(),
)  # fmt: skip
PROMPTS = st.integers(1, 500)


def test_the_published_defaults_thin_the_first_2176_tokens_to_2048() -> None:
    rule = Rule(2048, 128, 128, 16)
    assert not rule.is_due(2175, prompt=10)
    assert rule.is_due(2176, prompt=10)
    assert rule.blocks_to_evict(2176, prompt=10) == 8


@pytest.mark.parametrize(("length", "blocks"), [(40, 1), (41, 1), (42, 2), (45, 2), (46, 3), (1000, 241)])
def test_whole_blocks_go_until_the_budget_is_met(length: int, blocks: int) -> None:
    assert Rule(37, 3, 11, 4).blocks_to_evict(length, prompt=10) == blocks


def test_a_window_over_several_blocks_and_the_newest_block_stay() -> None:
    rule = Rule(20, 3, 17, 8)
    assert rule.floor(prompt=100) == 8 * (1 + 3)
    assert not rule.is_due(34, prompt=100)
    assert rule.is_due(35, prompt=100)
    assert rule.blocks_to_evict(35, prompt=100) == 1


def test_a_protected_prompt_stays_whole_blocks_of_it() -> None:
    rule = Rule(16, 4, 4, 4, protect_prefill=True)
    assert rule.floor(prompt=30) == 4 * (1 + 1 + 8)
    assert rule.blocks_to_evict(60, prompt=30) == 15 - 10


def test_a_prompt_beside_the_budget_raises_the_limit() -> None:
    rule = Rule(16, 4, 4, 4, include_prefill_in_budget=False)
    assert rule.limit(prompt=30) == 46
    assert not rule.is_due(49, prompt=30)
    assert rule.blocks_to_evict(50, prompt=30) == 1


@given(rule=RULES, prompt=PROMPTS, above=st.integers(0, 2000))
def test_a_round_ends_at_the_limit_or_floor_and_the_next_is_an_interval_away(
    rule: Rule, prompt: int, above: int
) -> None:
    most = max(rule.limit(prompt), rule.floor(prompt))
    length = most + rule.divide_length + above
    assert rule.is_due(length, prompt)
    evicted = rule.blocks_to_evict(length, prompt)
    assert evicted >= 1
    after = length - evicted * rule.block_size
    assert most - rule.block_size < after <= most
    assert not rule.is_due(after + rule.divide_length - 1, prompt)


@given(rule=RULES, prompt=PROMPTS, length=st.integers(0, 3000))
def test_what_goes_is_the_formula_and_never_what_is_protected(rule: Rule, prompt: int, length: int) -> None:
    size, blocks = rule.block_size, ceil(length / rule.block_size)
    beside = 0 if rule.include_prefill_in_budget else prompt
    movable = blocks - 1 - ceil(rule.window / size) - (ceil(prompt / size) if rule.protect_prefill else 0)
    wanted = ceil((length - rule.kv_budget - beside) / size)
    evicted = rule.blocks_to_evict(length, prompt)
    assert evicted == max(0, min(wanted, movable))
    if evicted:
        kept, older = (blocks - 1 - evicted) * size, (blocks - 1) * size
        protected = max(0, older - max(0, length - rule.window)) + (min(prompt, older) if rule.protect_prefill else 0)
        assert kept >= protected


@given(rule=RULES, requests=st.lists(st.tuples(st.integers(0, 1000), PROMPTS), min_size=1, max_size=8))
def test_many_requests_at_once_are_judged_as_each_alone(rule: Rule, requests: list[tuple[int, int]]) -> None:
    lengths, prompts = np.array(requests).T
    due = rule.is_due(lengths, prompts)
    assert due.dtype == bool
    assert due.tolist() == [bool(rule.is_due(length, prompt)) for length, prompt in requests]
