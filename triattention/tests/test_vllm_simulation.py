"""The plugin's scheduler half on vLLM's real schedulers, and wrong ones, which must not get through."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Iterator
from importlib.util import find_spec

import pytest

from triattention.tests.vllm_simulation import run_long_prompt, run_traffic
from triattention.vllm.runtime import eviction
from triattention.vllm.runtime.eviction import Evictor

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="PKG_MISSING: vllm")

STEPS = 3_000

#: Lines of the evictor, what stands in their place, and what the simulation then says.
MUTANTS = {
    "the tail block is evicted": ({"*sources, newest = live": "newest, *sources = live[::-1]"}, "takes blocks"),
    "blocks that others read are written": (
        {"block.ref_cnt == 1 and block.block_hash is None": "True"}, "prefix cache|others may read",
    ),
    "blocks of the prefix cache are written": ({"and block.block_hash is None": ""}, "prefix cache|others may read"),
    "an offset outlives a preemption": (
        {"offsets = Rounds(), {}": "offsets = Rounds(), dict(self._offsets)", "known[0] is row": "True"},
        "blocks of .* tokens|goes on with",
    ),
    "a round comes for a preempted request": ({"if one.request_id in alive": ""}, "which does not run"),
    "thinned blocks are hashed": ({"manager.num_cached_block[name] = _NEVER_HASH_AGAIN": "pass"}, "prefix cache"),
    "evicted blocks are lost": ({"pool.free_blocks(reversed(released))": "pass"}, "held, .* free|Cannot get"),
    "the pool is not asked first": ({"if missing > pool.get": "if 0 > pool.get"}, "Cannot get"),
    "one block too few goes": (
        {"blocks_to_evict(length, prompt)": "blocks_to_evict(length, prompt) - 1"}, "goes on with",
    ),
    "one block too many goes": (
        {"blocks_to_evict(length, prompt)": "blocks_to_evict(length, prompt) + 1"}, "than are protected|held, .* free",
    ),
    "an earlier round is forgotten": ({"if offset:": "if offset and rounds.evictions:"}, "blocks of .* tokens"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _quiet_and_as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The V1 runner's outputs, no plugin of this environment's, and the variables that vLLM sets taken back."""
    before = dict(os.environ)
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    monkeypatch.setenv("ENABLE_TRIATTENTION", "0")
    logging.disable(logging.WARNING)
    yield
    logging.disable(logging.NOTSET)
    for name in set(os.environ) - set(before):
        del os.environ[name]
    os.environ.update(before)


@pytest.mark.parametrize("caching", [False, True], ids=["uncached", "prefix_caching"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_attention_sees_a_requests_own_tokens_and_no_block_is_lost(asynchronous: bool, caching: bool) -> None:
    outcome = run_traffic(asynchronous, caching, STEPS, seed=0)
    assert outcome.steps >= STEPS
    assert min(outcome.rounds, outcome.preemptions, outcome.aborts, outcome.resets, outcome.finished) > 20, outcome
    if caching:
        assert min(outcome.prefix_hits, outcome.rounds_put_off) > 0, outcome


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_a_long_prompt_never_exceeds_budget_interval_and_chunk(asynchronous: bool) -> None:
    outcome = run_long_prompt(asynchronous)
    assert 12_000 + 128 < outcome.longest <= 12_000 + 128 + 1_024
    assert outcome.rounds > 28_000 // 1_024


@pytest.mark.parametrize("name", MUTANTS)
def test_a_wrong_evictor_is_noticed(name: str) -> None:
    changes, said = MUTANTS[name]
    source = inspect.getsource(Evictor)
    for old, new in changes.items():
        assert source.count(old) == 1, f"the evictor has no longer one {old!r}"
        source = source.replace(old, new)
    namespace = dict(vars(eviction))
    exec(source, namespace)
    with pytest.raises((AssertionError, RuntimeError, ValueError), match=said):
        run_traffic(True, True, STEPS, seed=0, evictor=namespace["Evictor"])
