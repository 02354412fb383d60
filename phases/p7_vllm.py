"""Phase 7: the vLLM plugin in real vLLM servers, queried over HTTP (plan 5.1 to 5.3)."""

from __future__ import annotations

import importlib.util
import math
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from verify import Draw, Measure, check, skip
from verify.architectures import SUITE_MINIMUMS
from verify.machine.environment import at_least
from verify.serving.chat import assembled, converse
from verify.serving.judge import (
    ASKED,
    CHUNK,
    COMMON,
    LONGEST,
    REPLAYED,
    STORY,
    Judge,
    admitted,
    bounded,
    complete,
    differing,
    server_of,
    trace_of,
)
from verify.serving.server import Answer, Server, answer_of, block_size, telling
from verify.serving.trace import Step
from verify.subject.subject import Subject

_ACTIVATED = "[TriAttention] Runtime (V2) plugin activated: patch_scheduler=True patch_worker=True"

#: Tokens to generate. ``_BESIDE`` is for concurrent requests: enough for a round and to exhaust the block pool.
_SHORT, _BESIDE = 64, 150
#: A prompt that fits into the budget, and the number of tokens to generate: two rounds.
_DECODED = (STORY * 11, 140)

#: On a CPU this saves the worker process, which takes as long to start as the engine's (vllm/platforms/cpu.py).
_ONE_ENGINE_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}


class Servers:
    """Three servers: ``plain`` vLLM, one with the plugin switched ``off``, and one with it ``on``.

    Servers requested together start together, and run until the last check.
    """

    def __init__(self, made: Mapping[str, Server], stack: ExitStack, *, one_by_one: bool) -> None:
        self._made, self._stack, self._one_by_one = made, stack, one_by_one
        self._launched: set[str] = set()

    def launched(self, name: str) -> bool:
        return name in self._launched

    def __call__(self, *names: str) -> list[Server]:
        """The servers with these names, healthy. Every call raises AssertionError for a server that is not."""
        for name in names:
            self.launch(name)
        for name in names:
            self._made[name].await_health()
        return [self._made[name] for name in names]

    def launch(self, name: str) -> None:
        """Start the server if it is not running, without waiting for it."""
        if name not in self._launched:
            self._launched.add(name)
            self._stack.callback(self._made[name].stop)
            self._made[name].launch()
            if self._one_by_one:  # each measures the free memory of the whole card at its start
                self._made[name].await_health()


@pytest.fixture(scope="module")
def servers(
    served: tuple[str, Path], subject: Subject, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """The servers, not yet started; they are always stopped at the end."""
    folder = tmp_path_factory.mktemp("servers")
    # the smallest block pool that vLLM accepts, so that six concurrent requests do not fit
    pool = ("--num-gpu-blocks-override", str(LONGEST // block_size(device) + 1))
    flags = ("--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(CHUNK), *pool)
    made = {
        name: server_of(served, subject, device, folder / name, *flags, alone=False, **environment)
        for name, environment in (
            ("plain", {"VLLM_PLUGINS": "", **_ONE_ENGINE_PROCESS}),
            ("off", {"ENABLE_TRIATTENTION": "0", **_ONE_ENGINE_PROCESS}),
            ("on", {}),  # the configuration of users
        )
    }
    with ExitStack() as stack:
        yield Servers(made, stack, one_by_one=device != "cpu")


@pytest.fixture(scope="module")
def on(servers: Servers) -> Server:
    """The server with the plugin on."""
    return servers("on")[0]


@pytest.fixture(scope="module")
def same(servers: Servers) -> dict[str, Answer]:
    """The answers of the servers to one short request, by server name."""
    names = ("plain", "off", "on")
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda one: complete(one, STORY, _SHORT), servers(*names)), strict=True))


@pytest.fixture(scope="module")
def decode(servers: Servers, on: Server) -> dict[str, Answer]:
    """The answer to a request that exceeds the budget during decoding.

    ``grown`` is the same request without the plugin, sent at the same time if that server is already running.
    """
    asked = {"decode": on, **({"grown": servers("off")[0]} if servers.launched("off") else {})}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda server: complete(server, *_DECODED), asked.values())
        return dict(zip(asked, answers, strict=True))


@pytest.fixture(scope="module")
def grown(servers: Servers, decode: dict[str, Answer]) -> tuple[Step, ...]:
    """The scheduler steps of that request without the plugin."""
    (off,) = servers("off")
    answer = decode.get("grown") or complete(off, *_DECODED)
    off.idle()
    return trace_of(off).steps(answer.id)


@pytest.fixture(scope="module")
def busy(on: Server) -> dict[str, Answer]:
    """Answers from a block pool that is too small: long prompts, shared prefixes, concurrency, a client that hangs up.

    ``beside`` is a concurrent request that was not preempted, and ``alone`` is the same request afterwards.
    """
    long = " ".join(STORY + f"It has {n} wagons." for n in range(24))
    answers = {"chunked_prefill": complete(on, long, 40)}
    with ThreadPoolExecutor(8) as pool:
        # the second finds the first's prompt in the prefix cache while that is being compressed, the third afterwards
        shared = [pool.submit(complete, on, long[:1800] + what, 60) for what in ASKED[:2]]
        answers |= {f"shared_prefix_{n}": each.result() for n, each in enumerate(shared)}
        answers["shared_prefix_2"] = complete(on, long[:1800] + ASKED[2], 30)
        several = [pool.submit(complete, on, f"This is about {what}. {STORY * 8}", _BESIDE) for what in ASKED]
        hung_up = pool.submit(_hang_up, on)
        answers |= {f"concurrent_{n}": each.result() for n, each in enumerate(several)}
        hung_up.result()
    # vLLM preempts the latest request, so at least the earliest was not preempted
    calm = trace_of(on)
    beside = next(
        answer for name, answer in answers.items()
        if name.startswith("concurrent") and not any(step.preempted for step in calm.steps(answer.id))
    )  # fmt: skip
    on_its_own = complete(on, beside.prompt, _BESIDE)
    on.idle()
    return answers | {"beside": beside, "alone": on_its_own}


def _hang_up(server: Server) -> None:
    """Drop the connection of a streaming request that is above the budget."""
    body = {"prompt": STORY * 14, "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    chunks = server.stream("/v1/completions", body)
    for _ in range(60):
        next(chunks)
    chunks.close()


@check(
    "p7.engine", gate="soft", cases="imports", plan="5.1", capability="environment",
    claim="vLLM imports and is new enough.",
    reason=COMMON["reason"], remedy="pip install vllm, or build it from source for a GPU its wheel does not support.",
)  # fmt: skip
def test_engine(case: str, subject: Subject) -> None:
    import subprocess
    import sys

    if importlib.util.find_spec("vllm") is None:
        skip("PKG_MISSING", "vllm is not installed")
    child = subprocess.run(
        [sys.executable, "-c", "import vllm; print(vllm.__version__)"], capture_output=True, text=True, timeout=100,
        env={**subject.environment(), "VLLM_PLUGINS": ""},
    )  # fmt: skip
    assert child.returncode == 0, f"import vllm failed: {child.stderr.strip().splitlines()[-1]}"
    found = child.stdout.split()[-1]
    minimum = SUITE_MINIMUMS.vllm
    assert minimum is None or at_least(found, minimum), f"vLLM is {found}, the minimum is {minimum}"


@check(
    "p7.plugin", plan="5.2", cases="activates", **{**COMMON, "needs": ("p1.identity", "p7.engine")},
    claim="vLLM discovers the installed plugin, and every process of a server activates it.",
    tolerance="No process activates it when it is switched off.",
)  # fmt: skip
def test_plugin(case: str, servers: Servers, measure: Measure) -> None:
    off, text = (server.text() for server in servers("off", "on"))
    servers.launch("plain")  # needed later; it starts in the meantime
    said = [line for line in text.splitlines() if _ACTIVATED in line]
    assert said, (
        f"not observed: no process logged {_ACTIVATED!r}, so whether the plugin is active is not known; the log ends "
        f"with: {telling(text)}"
    )
    for process in ("EngineCore", "Worker"):
        there = f"({process}" in text or f"(Vllm{process}" in text
        activated = any(process in line for line in said)
        assert activated or not there, f"the process {process} did not activate the plugin: {said}"
    measure("processes that activate it though switched off", off.count(_ACTIVATED), 0)


@check(
    "p7.server", plan="5.3", cases={"models": "models", "chat": "chat"}, **COMMON,
    claim="The server lists its model, and answers What is 2+2? with 4.",
)  # fmt: skip
def test_server(case: str, on: Server) -> None:
    if case == "models":
        listed = on.models()
        assert listed == ["model"], f"/v1/models lists {listed}"
        return
    body = {"messages": [{"role": "user", "content": "What is 2+2?"}], "max_tokens": 64, "temperature": 0}
    answer = answer_of(on.chat(body))
    assert re.search(r"\b(4|four)\b", answer.text), f"the answer to What is 2+2? is {answer.text!r}"
    assert answer.finish_reason == "stop", f"the answer ended with {answer.finish_reason!r}"


@check(
    "p7.stream", cases={"completion": "completion", "chat": "chat"}, **COMMON,
    claim="Streamed and unstreamed answers are the same, and usage counts every token, including evicted ones.",
    tolerance="Token ids and counts are equal: the same greedy request twice, with or without a prefix cache hit.",
)  # fmt: skip
def test_stream(case: str, on: Server, measure: Measure) -> None:
    new = 16  # the prompt alone exceeds the budget
    asked: dict[str, Any]
    if case == "chat":
        path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": STORY * 16}]}
    else:
        path, asked = "/v1/completions", {"prompt": STORY * 16}
    body = {**asked, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = answer_of(on.chat(body) if case == "chat" else on.complete(**body))
    streamed = assembled(list(on.stream(path, {**body, "stream_options": {"include_usage": True}})))
    measure("tokens that differ", differing(whole.tokens, streamed.tokens), 0, where=f"{case}, {new} tokens")
    assert whole.text == streamed.text, "the texts differ"
    for answer in (whole, streamed):
        counted = {
            "prompt_tokens": len(whole.prompt),
            "completion_tokens": new,
            "total_tokens": len(whole.prompt) + new,
        }
        found = {name: answer.usage[name] for name in counted}
        assert found == counted, f"usage says {found}, but the token counts are {counted}"
        assert answer.finish_reason == "length", f"the answer ended with {answer.finish_reason!r}"


_ANSWERS = {
    "decode": ["decode"], "chunked_prefill": ["chunked_prefill"],
    "shared_prefix": [f"shared_prefix_{n}" for n in range(3)],
    "concurrent": [f"concurrent_{n}" for n in range(len(ASKED))], "alone": ["alone"],
}  # fmt: skip


@check(
    "p7.replay", cases=_ANSWERS, **COMMON,
    claim="The served tokens match those of an independent model that uses the oracle's keep sets and repeats the "
    "scheduler's chunks, rounds and preemptions.",
    tolerance=REPLAYED,
)  # fmt: skip
def test_replay(case: list[str], on: Server, judge: Judge, measure: Measure, request: pytest.FixtureRequest) -> None:
    rounds = anew = 0
    answers = request.getfixturevalue("decode" if case == ["decode"] else "busy")
    on.idle()
    trace = trace_of(on)
    for name in case:
        found = judge(answers[name], trace.steps(answers[name].id), measure, name)
        rounds, anew = rounds + found.rounds, anew + found.preemptions
    assert rounds >= len(case), f"only {rounds} rounds happened in {len(case)} answers: expected one per answer"
    if len(case) == len(ASKED):
        assert anew, "no request was preempted, so recomputation was not tested"


@check(
    "p7.together", cases="equals_alone", **COMMON,
    claim="A request served concurrently with others, without preemption, generates the same tokens as alone.",
    tolerance="Token ids are equal, unless a near tie was decided by batch-size-dependent rounding (see p7.replay).",
)  # fmt: skip
def test_together(case: str, on: Server, busy: dict[str, Answer], judge: Judge, measure: Measure) -> None:
    beside, alone = busy["beside"], busy["alone"]
    trace = trace_of(on)
    replays = [judge.replay(answer, trace.steps(answer.id)) for answer in (beside, alone)]
    ties = sum(found.near_ties for found in replays)
    measure("near ties that went the other way", ties, math.inf)
    if not ties:
        measure("tokens that differ", differing(beside.tokens, alone.tokens), 0, where=f"{_BESIDE} tokens")


@check(
    "p7.blocks", cases="bounded", **COMMON,
    claim="The number of KV blocks of a request stays bounded during decoding; without the plugin it keeps growing.",
    tolerance="The blocks of budget + divide_length - 1 + one step's tokens, rounded up.",
)  # fmt: skip
def test_blocks(
    case: str,
    on: Server,
    decode: dict[str, Answer],
    grown: tuple[Step, ...],
    judge: Judge,
    measure: Measure,
    curve: Draw,
) -> None:
    on.idle()
    answer = decode["decode"]
    bounded(answer, trace_of(on).steps(answer.id), grown, judge.rule, measure, curve)


@check(
    "p7.leaks", cases="pool_is_full_again", **COMMON,
    claim="After preemptions, shared prefixes and a dropped connection, every KV block is back in the pool.",
    tolerance="No block may be missing.",
)  # fmt: skip
def test_leaks(case: str, on: Server, busy: dict[str, Answer], measure: Measure) -> None:
    # an idle scheduler makes no step; one more request shows what the previous ones left
    complete(on, "What is left?", 2)
    last = trace_of(on).records[-1]
    missing = last.pool - last.free - sum(last.held.values())
    measure("blocks lost or freed twice", abs(missing), 0, unit="blocks")
    idle = on.idle()
    measure("KV cache usage of an idle server", idle["vllm:kv_cache_usage_perc"], 0)
    assert idle["vllm:num_preemptions_total"] > 0, "no request was preempted"


@check(
    "p7.counters", cases="metrics", **COMMON,
    claim="The plugin's counters in /metrics match the scheduler's trace, and no round was missed.",
    tolerance="Counts equal those of the scheduler's trace.",
)  # fmt: skip
def test_counters(case: str, on: Server, busy: dict[str, Answer], measure: Measure) -> None:
    rounds = evicted = 0
    metrics = on.idle()
    for steps in trace_of(on).requests.values():
        for before, step in zip([None, *steps[:-1]], steps, strict=True):
            more = step.evicted - (0 if before is None or admitted(before, step) else before.evicted)
            rounds, evicted = rounds + (more > 0), evicted + more
    for name, count in (("rounds_total", rounds), ("evicted_tokens_total", evicted), ("rounds_missed_total", 0)):
        measure(f"{name}: difference from the trace", abs(metrics[f"triattention:{name}"] - count), 0)
    carried_out = metrics["triattention:round_seconds_count"]
    measure("rounds that the worker did not carry out", abs(rounds - carried_out), 0)
    assert metrics["triattention:blocks_freed_total"] > 0, "blocks_freed_total is 0"
    assert metrics["triattention:round_seconds_sum"] > 0, "round_seconds is 0"


@check(
    "p7.chat", cases="agent_turns", **COMMON,
    claim="A multi-turn agent conversation with a tool call is served correctly above the budget.",
    tolerance=REPLAYED,
)  # fmt: skip
def test_chat(case: str, on: Server, judge: Judge, measure: Measure) -> None:
    rounds = 0
    for number, answer in enumerate(converse(on, 64)):
        assert answer.usage["prompt_tokens"] == len(answer.prompt), f"usage says {answer.usage}"
        assert answer.usage["completion_tokens"] == len(answer.tokens), f"usage says {answer.usage}"
        steps = trace_of(on).steps(answer.id)
        rounds += judge(answer, steps, measure, f"turn {number + 1}, ended by {answer.finish_reason}").rounds
    assert rounds, "the conversation stayed below the budget"


@check(
    "p7.untouched", cases={"switched_off": "off", "below_budget": "on"}, **COMMON,
    claim="With the plugin switched off, or below the budget, the tokens are those of vLLM without the plugin.",
    tolerance="Token ids are equal: nothing is evicted, so the arithmetic is the same.",
)  # fmt: skip
def test_untouched(case: str, same: dict[str, Answer], measure: Measure) -> None:
    plain, here = same["plain"], same[case]
    assert len(plain.tokens) == _SHORT, f"{len(plain.tokens)} tokens came back for {_SHORT}"
    measure("tokens that differ", differing(plain.tokens, here.tokens), 0, where=f"{_SHORT} tokens, greedy, float32")
