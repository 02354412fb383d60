"""Phase 7: the vLLM plugin on the real engine, as servers that are asked over HTTP (plan 5.1 to 5.3)."""

from __future__ import annotations

import importlib.util
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from verify import check, skip
from verify.chat import assembled, converse
from verify.live_model import LiveModel, load
from verify.load import run
from verify.observer import VARIABLE, Step, Trace, read_trace
from verify.published import PLUGIN, optional
from verify.replay import Replay, Rule, replay
from verify.server import Answer, Server, answer_of, block_size, telling
from verify.subject import Subject
from verify.tolerance import ATTENTION_LOG_PROB

_ACTIVATED = "[TriAttention] Runtime (V2) plugin activated: patch_scheduler=True patch_worker=True"

#: Small enough that short answers have several rounds, and a pool that six requests do not fit into.
_BUDGET, _DIVIDE, _WINDOW, _CHUNK, _LONGEST = 256, 64, 32, 128, 1536

_STORY = "Tell me a long story about a train that travels west along the river, and about the people of the town. "
_SHORT, _BESIDE = 100, 200
#: A prompt, and how many tokens are generated after it: past the budget, twice.
_DECODED = (_STORY * 8, 260)
_ASKED = ("a dog", "a boat", "an old clock", "a girl who could not sleep", "the market", "a letter that came late")

_PLUGIN = ("p1.identity", "p7.plugin")
_COMMON: dict[str, Any] = {
    "gate": "soft", "needs": _PLUGIN, "timeout_s": 600,
    "reason": "Serving is where compression pays, and where tokens that are wrong now and then are hardest to notice.",
    "remedy": "Read server.log of the run; repeat the request alone with VLLM_LOGGING_LEVEL=DEBUG, which names rounds.",
}  # fmt: skip
_REPLAYED = (
    "Greedy tokens are equal, but where the oracle's logit of the served token is within 1e-3 of its best (counted); "
    "log-probabilities of the served tokens are within 1e-3 (ATTENTION_LOG_PROB)."
)


@pytest.fixture(scope="module")
def served(subject: Subject, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The directory of the model and its statistics, where there are an engine and a plugin to serve it."""
    if importlib.util.find_spec("vllm") is None:
        skip("PKG_MISSING", "vllm is not installed")
    optional(subject, "vllm.plugin", "register_triattention_backend")
    if (place := ":".join(subject.place("vllm.plugin", "register_triattention_backend"))) != PLUGIN:
        skip("PKG_MISSING", f"vLLM's processes load the plugin as {PLUGIN}, and the subject's is {place}")
    return request.getfixturevalue("located")


def _server(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, *flags: str, dtype: str = "float32",
    **environment: str,
) -> Server:  # fmt: skip
    """A server of the model, with the plugin on at a small budget unless the environment says otherwise."""
    folder.mkdir()
    settings = {"KV_BUDGET": _BUDGET, "DIVIDE_LENGTH": _DIVIDE, "WINDOW_SIZE": _WINDOW, "SPARSE_STATS_PATH": served[1]}
    named = {f"TRIATTN_RUNTIME_{name}": str(value) for name, value in settings.items()}
    usual = [
        "--dtype",
        dtype,
        "--served-model-name",
        "model",
        "--enable-auto-tool-choice",
        "--tool-call-parser",
        "hermes",
    ]
    if device != "cpu":
        usual += ["--gpu-memory-utilization", "0.2"]  # three servers share the card
    env = {**subject.environment(), **named, VARIABLE: str(folder / "trace.jsonl"), **environment}
    return Server(served[0], env, folder / "server.log", *usual, *flags, device=device)


class Servers:
    """Three servers: ``plain`` vLLM, one with the plugin switched ``off``, and one with it ``on``.

    Those that a check asks for first are started together; what runs stays until the last check.
    """

    def __init__(self, made: Mapping[str, Server], stack: ExitStack, *, one_by_one: bool) -> None:
        self._made, self._stack, self._one_by_one = made, stack, one_by_one
        self._launched: set[str] = set()

    def launched(self, name: str) -> bool:
        return name in self._launched

    def __call__(self, *names: str) -> list[Server]:
        """The servers of these names, healthy. Raises AssertionError, again and again, for one that is not."""
        for name in names:
            self.launch(name)
        for name in names:
            self._made[name].await_health()
        return [self._made[name] for name in names]

    def launch(self, name: str) -> None:
        """Start the server where it does not run, without waiting for it."""
        if name not in self._launched:
            self._launched.add(name)
            self._stack.callback(self._made[name].stop)
            self._made[name].launch()
            if self._one_by_one:  # each measures the whole card's free memory when it starts
                self._made[name].await_health()


@pytest.fixture(scope="module")
def servers(
    served: tuple[str, Path], subject: Subject, device: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Servers]:
    """The servers, of which none runs yet; they are stopped whatever happens."""
    folder = tmp_path_factory.mktemp("servers")
    # the least pool that vLLM starts with, so that six requests at once do not fit
    pool = ("--num-gpu-blocks-override", str(_LONGEST // block_size(device) + 1))
    flags = ("--max-model-len", str(_LONGEST), "--max-num-batched-tokens", str(_CHUNK), *pool)
    environments = {"plain": {"VLLM_PLUGINS": ""}, "off": {"ENABLE_TRIATTENTION": "0"}, "on": {}}
    made = {
        name: _server(served, subject, device, folder / name, *flags, **environment)
        for name, environment in environments.items()
    }
    with ExitStack() as stack:
        yield Servers(made, stack, one_by_one=device != "cpu")


@pytest.fixture(scope="module")
def on(servers: Servers) -> Server:
    """The server with the plugin on."""
    return servers("on")[0]


@pytest.fixture(scope="module")
def same(servers: Servers) -> dict[str, Answer]:
    """One short request to each server, by its name."""
    names = ("plain", "off", "on")
    with ThreadPoolExecutor(len(names)) as pool:
        return dict(zip(names, pool.map(lambda one: _complete(one, _STORY, _SHORT), servers(*names)), strict=True))


@pytest.fixture(scope="module")
def decode(servers: Servers, on: Server) -> dict[str, Answer]:
    """One request of few prompt tokens, which passes the budget while it is generated.

    ``grown`` is the same without the plugin, asked at the same time where that server runs already.
    """
    asked = {"decode": on, **({"grown": servers("off")[0]} if servers.launched("off") else {})}
    with ThreadPoolExecutor(len(asked)) as pool:
        answers = pool.map(lambda server: _complete(server, *_DECODED), asked.values())
        return dict(zip(asked, answers, strict=True))


@pytest.fixture(scope="module")
def grown(servers: Servers, decode: dict[str, Answer]) -> list[Step]:
    """The steps of that request without the plugin."""
    (off,) = servers("off")
    answer = decode.get("grown") or _complete(off, *_DECODED)
    off.idle()
    return _trace_of(off).steps(answer.id)


@pytest.fixture(scope="module")
def busy(on: Server) -> dict[str, Answer]:
    """Requests in a pool that is too small for them: long prompts, shared prefixes, several at once, one that hangs up.

    ``beside`` is one that was not preempted, and ``alone`` is the same request afterwards.
    """
    long = " ".join(_STORY + f"It has {n} wagons." for n in range(24))
    answers = {"chunked_prefill": _complete(on, long, 40)}
    with ThreadPoolExecutor(8) as pool:
        # the second finds the first one's prompt in the prefix cache while it is compressed, the third afterwards
        shared = [pool.submit(_complete, on, long[:1800] + what, 60) for what in _ASKED[:2]]
        answers |= {f"shared_prefix_{n}": each.result() for n, each in enumerate(shared)}
        answers["shared_prefix_2"] = _complete(on, long[:1800] + _ASKED[2], 30)
        several = [pool.submit(_complete, on, f"This is about {what}. {_STORY * 8}", _BESIDE) for what in _ASKED]
        hung_up = pool.submit(_hang_up, on)
        answers |= {f"concurrent_{n}": each.result() for n, each in enumerate(several)}
        hung_up.result()
    # vLLM preempts the latest request, so the earliest was not, whichever of them that is
    calm = _trace_of(on)
    beside = next(
        answer for name, answer in answers.items()
        if name.startswith("concurrent") and not any(step.preempted for step in calm.steps(answer.id))
    )  # fmt: skip
    on_its_own = _complete(on, beside.prompt, _BESIDE)
    on.idle()
    return answers | {"beside": beside, "alone": on_its_own}


def _complete(server: Server, prompt: str, new: int) -> Answer:
    return answer_of(server.complete(prompt, new, ignore_eos=True, logprobs=0))


def _trace_of(server: Server) -> Trace:
    return read_trace(server.log.with_name("trace.jsonl"))


def _hang_up(server: Server) -> None:
    """Leave a stream of a request that is above its budget, without a word."""
    body = {"prompt": _STORY * 14, "max_tokens": 900, "temperature": 0, "ignore_eos": True}
    chunks = server.stream("/v1/completions", body)
    for _ in range(60):
        next(chunks)
    chunks.close()


@check(
    "p7.engine", gate="soft", cases="imports", plan="5.1", claim="vLLM imports and is new enough.",
    reason=_COMMON["reason"], remedy="pip install vllm, or build it from source for a GPU that its wheel lacks.",
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
    assert [int(part) for part in re.findall(r"\d+", found)[:2]] >= [0, 19], f"vLLM is {found}, the minimum is 0.19"


@check(
    "p7.plugin", plan="5.2", cases="activates", **{**_COMMON, "needs": ("p1.identity", "p7.engine")},
    claim="After installation vLLM finds the plugin by itself, and every process of a server activates it.",
    tolerance="No process activates it where it is switched off.",
)  # fmt: skip
def test_plugin(case: str, servers: Servers, measure) -> None:
    off, text = (server.text() for server in servers("off", "on"))
    servers.launch("plain")  # which is needed later, and has the time until then to start
    said = [line for line in text.splitlines() if _ACTIVATED in line]
    assert said, f"the log has no activation line; it ends: {telling(text)}"
    for process in ("EngineCore", "Worker"):
        there = f"({process}" in text or f"(Vllm{process}" in text
        activated = any(process in line for line in said)
        assert activated or not there, f"the process {process} did not activate it: {said}"
    measure("processes that activate it though switched off", off.count(_ACTIVATED), 0)


@check(
    "p7.server", plan="5.3", cases={"models": "models", "chat": "chat"}, **_COMMON,
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
    "p7.stream", cases={"completion": "completion", "chat": "chat"}, **_COMMON,
    claim="A streamed answer is the same as one that is not, and usage counts every token, evicted ones included.",
    tolerance="Token ids and counts are equal: the same greedy request twice, from a cache that is hit or not.",
)  # fmt: skip
def test_stream(case: str, on: Server, measure) -> None:
    new = 60
    if case == "chat":
        path, asked = "/v1/chat/completions", {"messages": [{"role": "user", "content": _STORY * 16}]}
    else:
        path, asked = "/v1/completions", {"prompt": _STORY * 16}
    body = {**asked, "max_tokens": new, "temperature": 0, "ignore_eos": True, "return_token_ids": True}
    whole = answer_of(on.chat(body) if case == "chat" else on.complete(**body))
    streamed = assembled(list(on.stream(path, {**body, "stream_options": {"include_usage": True}})))
    measure("tokens that differ", _differing(whole.tokens, streamed.tokens), 0, where=f"{case}, {new} tokens")
    assert whole.text == streamed.text, "the texts differ"
    for answer in (whole, streamed):
        counted = {
            "prompt_tokens": len(whole.prompt),
            "completion_tokens": new,
            "total_tokens": len(whole.prompt) + new,
        }
        found = {name: answer.usage[name] for name in counted}
        assert found == counted, f"usage says {found}, and the tokens are {counted}"
        assert answer.finish_reason == "length", f"the answer ended with {answer.finish_reason!r}"


def _differing(one: list[int], other: list[int]) -> int:
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


@check(
    "p7.untouched", cases={"switched_off": "off", "below_budget": "on"}, **_COMMON,
    claim="Switched off, or below the budget, the tokens are those of vLLM without the plugin.",
    tolerance="Token ids are equal: nothing was evicted, so the arithmetic is the same.",
)  # fmt: skip
def test_untouched(case: str, same: dict[str, Answer], measure) -> None:
    plain, here = same["plain"], same[case]
    assert len(plain.tokens) == _SHORT, f"{len(plain.tokens)} tokens came back for {_SHORT}"
    measure("tokens that differ", _differing(plain.tokens, here.tokens), 0, where=f"{_SHORT} tokens, greedy, float32")


@dataclass(frozen=True)
class Judge:
    """Replays what a server answered, and asks of the result what holds for every answer."""

    model: LiveModel
    statistics: Mapping[str, Any]
    rule: Rule

    def replay(self, answer: Answer, steps: Sequence[Step]) -> Replay:
        return replay(
            self.model.model, self.statistics, self.rule, answer.prompt, answer.tokens, steps, answer.log_probs
        )

    def __call__(self, answer: Answer, steps: Sequence[Step], measure, where: str) -> Replay:
        found = self.replay(answer, steps)
        where = f"{where}: {found.tokens} tokens, {found.rounds} rounds, {found.preemptions} preemptions"
        wrong = [f"token {one.position - len(answer.prompt)} by {one.gap:.3g} of a logit" for one in found.wrong]
        measure("wrong tokens", len(wrong), 0, where=f"{where} {'; '.join(wrong[:3])}")
        assert len(answer.log_probs) == len(answer.tokens), f"{where}: no log-probabilities came back"
        # a text that goes in circles has the right tokens whatever was kept, and other log-probabilities
        measure("largest difference of a log-probability", found.drift, ATTENTION_LOG_PROB, where=where)
        measure("near ties that went the other way", found.near_ties + found.ties, math.inf, where=where)
        assert not found.violations, f"{where}: {found.violations[0]}"
        measure("steps that a round waited for free blocks", found.late, math.inf, where=where)
        if not found.late:
            # what the prefix cache has of a request is there at once, and thinned at the step after
            hits = [
                step.start for before, step in zip([None, *steps[:-1]], steps, strict=True) if _admitted(before, step)
            ]
            longest = max(self.rule.kv_budget + self.rule.divide_length - 1, *hits) + _CHUNK
            measure("most tokens held at once", found.longest, longest, unit="tokens", where=where)
        return found


def _admitted(before: Step | None, step: Step) -> bool:
    """Whether a request begins with this step, for the first time or anew."""
    return before is None or step.preempted or step.start < before.end


@pytest.fixture(scope="module")
def judge(served: tuple[str, Path], subject: Subject, device: str) -> Judge:
    import torch

    model = load(*served, subject, device, {})
    return Judge(model, torch.load(served[1], weights_only=True), Rule(_BUDGET, _DIVIDE, _WINDOW, block_size(device)))


_ANSWERS = {
    "decode": ["decode"], "chunked_prefill": ["chunked_prefill"],
    "shared_prefix": [f"shared_prefix_{n}" for n in range(3)],
    "concurrent": [f"concurrent_{n}" for n in range(len(_ASKED))], "alone": ["alone"],
}  # fmt: skip


@check(
    "p7.replay", cases=_ANSWERS, **_COMMON,
    claim="Every token above the budget is the one that an independent model with the oracle's keep sets gives, in "
    "the chunks, rounds and preemptions that the scheduler made.",
    tolerance=_REPLAYED,
)  # fmt: skip
def test_replay(case: list[str], on: Server, judge: Judge, measure, request: pytest.FixtureRequest) -> None:
    rounds = anew = 0
    answers = request.getfixturevalue("decode" if case == ["decode"] else "busy")
    on.idle()
    trace = _trace_of(on)
    for name in case:
        found = judge(answers[name], trace.steps(answers[name].id), measure, name)
        rounds, anew = rounds + found.rounds, anew + found.preemptions
    assert rounds >= len(case), f"{rounds} rounds happened in {len(case)} answers, so nothing was compressed"
    if len(case) == len(_ASKED):
        assert anew, "no request was preempted, so nothing was computed anew"


@check(
    "p7.together", cases="equals_alone", **_COMMON,
    claim="A request that is served beside others, and not preempted, has the tokens that it has alone.",
    tolerance="Token ids are equal; batches of another size round otherwise, which near ties show (p7.replay counts).",
)  # fmt: skip
def test_together(case: str, on: Server, busy: dict[str, Answer], judge: Judge, measure) -> None:
    beside, alone = busy["beside"], busy["alone"]
    trace = _trace_of(on)
    replays = [judge.replay(answer, trace.steps(answer.id)) for answer in (beside, alone)]
    ties = sum(found.near_ties for found in replays)
    measure("near ties that went the other way", ties, math.inf)
    if not ties:
        measure("tokens that differ", _differing(beside.tokens, alone.tokens), 0, where=f"{_BESIDE} tokens")


@check(
    "p7.blocks", cases="bounded", **_COMMON,
    claim="The KV blocks of a request stay bounded while it generates; without the plugin they grow with every token.",
    tolerance="Blocks of budget + interval + one step, and one block that is begun (spec: physical length).",
)  # fmt: skip
def test_blocks(
    case: str, on: Server, decode: dict[str, Answer], grown: list[Step], judge: Judge, measure, curve
) -> None:
    on.idle()
    answer = decode["decode"]
    _bounded(answer, _trace_of(on).steps(answer.id), grown, judge.rule, measure, curve)


def _bounded(answer: Answer, steps: Sequence[Step], grown: Sequence[Step], rule: Rule, measure, curve) -> None:
    for name, those in (("with the plugin", steps), ("without it", grown)):
        points = [(max(step.end - len(answer.prompt), 0), step.blocks) for step in those]
        curve(name, points, x="generated tokens", y="KV blocks")
    bound = rule.blocks(rule.kv_budget + rule.divide_length - 1 + max(step.tokens for step in steps))
    measure("most KV blocks of the request", max(step.blocks for step in steps), bound, unit="blocks")
    plainly = rule.blocks(len(answer.prompt) + len(answer.tokens) - 1)
    most = max(step.blocks for step in grown)
    assert most == plainly, f"without the plugin it held {most} blocks, and {plainly} were expected"


@check(
    "p7.leaks", cases="pool_is_full_again", **_COMMON,
    claim="After preemptions, shared prefixes and a client that hung up, every block is back in the pool.",
    tolerance="No block may be missing.",
)  # fmt: skip
def test_leaks(case: str, on: Server, busy: dict[str, Answer], measure) -> None:
    # a scheduler that is idle makes no step: one more request shows what those before it left
    _complete(on, "What is left?", 2)
    last = _trace_of(on).records[-1]
    missing = last.pool - last.free - sum(last.held.values())
    measure("blocks that nobody holds and that are not free, or free twice", abs(missing), 0, unit="blocks")
    idle = on.idle()
    measure("KV cache usage of an idle server", idle["vllm:kv_cache_usage_perc"], 0)
    assert idle["vllm:num_preemptions_total"] > 0, "no request was preempted"


@check(
    "p7.counters", cases="metrics", **_COMMON,
    claim="The plugin's counters in /metrics tell what the scheduler did, and no round was missed.",
    tolerance="Counts are equal to those of the block tables.",
)  # fmt: skip
def test_counters(case: str, on: Server, busy: dict[str, Answer], measure) -> None:
    rounds = evicted = 0
    metrics = on.idle()
    for steps in _trace_of(on).requests.values():
        for before, step in zip([None, *steps[:-1]], steps, strict=True):
            more = step.evicted - (0 if _admitted(before, step) else before.evicted)
            rounds, evicted = rounds + (more > 0), evicted + more
    for name, count in (("rounds_total", rounds), ("evicted_tokens_total", evicted), ("rounds_missed_total", 0)):
        measure(f"{name}: difference from the trace", abs(metrics[f"triattention:{name}"] - count), 0)
    carried_out = metrics["triattention:round_seconds_count"]
    measure("rounds that the worker did not carry out", abs(rounds - carried_out), 0)
    assert metrics["triattention:blocks_freed_total"] > 0, "blocks_freed_total is 0"
    assert metrics["triattention:round_seconds_sum"] > 0, "round_seconds is 0"


@check(
    "p7.chat", cases="agent_turns", **_COMMON,
    claim="A conversation in the wire form of an agent's client, with a tool call, is served above the budget.",
    tolerance=_REPLAYED,
)  # fmt: skip
def test_chat(case: str, on: Server, judge: Judge, measure) -> None:
    rounds = 0
    for number, answer in enumerate(converse(on, 96)):
        assert answer.usage["prompt_tokens"] == len(answer.prompt), f"usage says {answer.usage}"
        assert answer.usage["completion_tokens"] == len(answer.tokens), f"usage says {answer.usage}"
        steps = _trace_of(on).steps(answer.id)
        rounds += judge(answer, steps, measure, f"turn {number + 1}, ended by {answer.finish_reason}").rounds
    assert rounds, "the conversation stayed below the budget"


def _alone(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, blocks_of_32: int, *flags: str, dtype: str,
    **environment: str,
) -> Server:  # fmt: skip
    """A server that has the machine to itself, with a pool of as many tokens as that many blocks of 32 hold."""
    blocks = blocks_of_32 * 32 // block_size(device)
    pool = ("--num-gpu-blocks-override", str(blocks + 1))  # one is the null block
    return _server(served, subject, device, folder, *pool, *flags, dtype=dtype, **environment)


def _off_and_on(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, ask: Callable[[str, Server], Any],
    *, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """What ``ask`` finds of plain vLLM and of one with the plugin: warm, with a pool of 128 blocks of 32 to itself."""
    found = {}
    for name, environment in (("plain", {"ENABLE_TRIATTENTION": "0"}), ("on", {})):
        flags = ("--max-model-len", "2048")
        with _alone(served, subject, device, folder / name, 128, *flags, dtype=dtype, **environment) as server:
            _complete(server, _STORY, 8)
            found[name] = ask(name, server)
    return found


_SPEED = {
    **_COMMON, "timeout_s": 3600,
    "reason": "Compression that costs more than it saves, or frees no room for other requests, has nothing to offer.",
    "remedy": "Compare triattention:round_seconds with the time; profile one round (VLLM_LOGGING_LEVEL=DEBUG).",
}  # fmt: skip


@pytest.mark.slow
@check(
    "p7.long", cases="one_request", **_SPEED,
    claim="Over 1,500 tokens of one request the blocks stay bounded, and decoding is as fast as without the plugin.",
    tolerance="At least plain vLLM's tokens per second in the same run; rounds at most 5 % of the time.",
)  # fmt: skip
def test_long(
    case: str, served: tuple[str, Path], subject: Subject, device: str, judge: Judge, tmp_path: Path, measure, curve
) -> None:
    new = 1500

    def ask(name: str, server: Server) -> tuple[Answer, list[Step], float, Mapping[str, float]]:
        begun = time.perf_counter()
        answer = _complete(server, _STORY * 4, new)
        seconds = time.perf_counter() - begun
        measure(f"seconds, {name}", seconds, math.inf, unit="s", where=f"{new / seconds:.2f} tokens/s")
        return answer, _trace_of(server).steps(answer.id), seconds, server.idle()

    found = _off_and_on(served, subject, device, tmp_path, ask, dtype="float32")
    answer, steps, seconds, metrics = found["on"]
    _bounded(answer, steps, found["plain"][1], judge.rule, measure, curve)
    judge(answer, steps, measure, "alone")
    measure("time with the plugin over without", seconds / found["plain"][2], 1.0, where=f"{new} tokens")
    share = metrics["triattention:round_seconds_sum"] / seconds
    measure("share of the time that rounds take", share, 0.05, where=f"{metrics['triattention:rounds_total']:g} rounds")


@pytest.mark.slow
@check(
    "p7.pool", cases="eight_requests", **_SPEED,
    claim="Eight requests of 1,200 tokens fit into a pool of 4,096 with the plugin, and are served 1.6 times as fast.",
    tolerance="No preemption, where plain vLLM has several; 1.6 times its tokens per second in the same run.",
)  # fmt: skip
def test_pool(
    case: str, served: tuple[str, Path], subject: Subject, device: str, tmp_path: Path, measure
) -> None:  # fmt: skip
    new = 1200
    prompts = [f"Tell me a long story about {what} and {other}." for what in _ASKED[:4] for other in _ASKED[4:]]

    def ask(name: str, server: Server) -> tuple[float, float]:
        with ThreadPoolExecutor(8) as pool:
            begun = time.perf_counter()
            answers = list(pool.map(lambda prompt: _complete(server, prompt, new), prompts))
            seconds = time.perf_counter() - begun
        assert [len(answer.tokens) for answer in answers] == [new] * 8
        again = server.idle()["vllm:num_preemptions_total"]
        rate = f"{8 * new / seconds:.1f} tokens/s, {again:g} preemptions"
        measure(f"seconds, {name}", seconds, math.inf, unit="s", where=rate)
        return seconds, again

    found = _off_and_on(served, subject, device, tmp_path, ask, dtype="bfloat16")
    assert found["plain"][1] >= 2, f"plain vLLM preempted {found['plain'][1]:g} times, so the pool is no test"
    measure("preemptions with the plugin", found["on"][1], 0)
    measure("time with the plugin over without", found["on"][0] / found["plain"][0], 1 / 1.6)


@pytest.mark.slow
@check(
    "p7.load", cases="five_minutes", **_SPEED | {"timeout_s": 7200},
    claim="32 clients for five minutes, with requests that hang up and a pool that forces preemptions: no wrong token, "
    "no lost block, no growing memory.",
    tolerance=_REPLAYED + " Memory of all processes: 5 % between the first minute and the last.",
)  # fmt: skip
def test_load(
    case: str, served: tuple[str, Path], subject: Subject, device: str, judge: Judge, seed: int, tmp_path: Path,
    measure,
) -> None:  # fmt: skip
    flags = ("--max-model-len", str(_LONGEST), "--max-num-batched-tokens", str(_CHUNK))
    memory: list[int] = []
    with _alone(served, subject, device, tmp_path / "on", 96, *flags, dtype="float32") as server:

        def each_s() -> None:
            memory.append(server.memory_bytes())

        load = run(server, seed, clients=32, seconds=300, longest=_LONGEST, each_s=each_s)
        metrics, trace = server.idle(), _trace_of(server)
        again = metrics["vllm:num_preemptions_total"]
        where = f"{len(load.answers)} answers, {load.hung_up} hung up, {again:g} preemptions"
        last = trace.records[-1]
        measure(
            "blocks that are not free at the end, or twice", abs(last.pool - last.free), 0, unit="blocks", where=where
        )
        measure("rounds missed", metrics["triattention:rounds_missed_total"], 0, where=where)
        measure("memory, the last minute over the first", max(memory[-60:]) / max(memory[:60]), 1.05, where=where)
        assert again > 0, "no request was preempted"
        _equal_alone(server, load.answers, trace, measure)
    for number, answer in enumerate(load.answers):
        judge(answer, trace.steps(answer.id), measure, f"answer {number}")


def _equal_alone(server: Server, answers: Sequence[Answer], trace: Trace, measure) -> None:
    """Repeat five requests alone that were computed in the same chunks and rounds then: their tokens are the same."""
    alike = tried = 0
    for answer in answers:
        steps = trace.steps(answer.id)
        if steps[0].tokens < len(answer.prompt) or len(steps) > len(answer.tokens):
            continue  # its prompt was cut by others, or it was preempted
        tried += 1
        salted = {"ignore_eos": True, "cache_salt": answer.id}
        alone = answer_of(server.complete(answer.prompt, len(answer.tokens), **salted))
        those = [(step.start, step.evicted) for step in _trace_of(server).steps(alone.id)]
        if those == [(step.start, step.evicted) for step in steps]:
            alike += 1
            measure("tokens that differ from the request alone", _differing(answer.tokens, alone.tokens), 0)
        if alike == 5 or tried == 20:
            break
    assert alike, f"none of {tried} requests had the same chunks and rounds alone"
