"""Phase 7 under load: speed, a small block pool, and five minutes of many clients (plan 5.1 to 5.3). All are slow."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from verify import Draw, Measure, check
from verify.serving.judge import (
    ASKED,
    CHUNK,
    COMMON,
    LONGEST,
    REPLAYED,
    STORY,
    Judge,
    bounded,
    complete,
    differing,
    server_of,
    trace_of,
)
from verify.serving.load import run
from verify.serving.server import Answer, Server, answer_of, block_size
from verify.serving.trace import Step, Trace
from verify.subject.subject import Subject


def _alone(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, blocks_of_32: int, *flags: str, dtype: str,
    **environment: str,
) -> Server:  # fmt: skip
    """A server that has the machine to itself, with a pool that holds ``blocks_of_32`` x 32 tokens."""
    blocks = blocks_of_32 * 32 // block_size(device)
    pool = ("--num-gpu-blocks-override", str(blocks + 1))  # one is the null block
    return server_of(served, subject, device, folder, *pool, *flags, dtype=dtype, alone=True, **environment)


def _off_and_on(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, ask: Callable[[str, Server], Any],
    *, dtype: str,
) -> dict[str, Any]:  # fmt: skip
    """The results of ``ask`` for vLLM with the plugin off and on: warm, alone, with a pool of 128 x 32 tokens."""
    found = {}
    for name, environment in (("plain", {"ENABLE_TRIATTENTION": "0"}), ("on", {})):
        flags = ("--max-model-len", "2048")
        with _alone(served, subject, device, folder / name, 128, *flags, dtype=dtype, **environment) as server:
            complete(server, STORY, 8)
            found[name] = ask(name, server)
    return found


_SPEED = {
    **COMMON, "timeout_s": 3600,
    "reason": "Compression is useless if it costs more time than it saves, or frees no room for other requests.",
    "remedy": "Compare triattention:round_seconds with the total time; profile one round (VLLM_LOGGING_LEVEL=DEBUG).",
}  # fmt: skip


@pytest.mark.slow
@check(
    "p7.long", cases="one_request", **_SPEED,
    claim="Over 1,500 tokens of one request the KV blocks stay bounded, and decoding is as fast as without the plugin.",
    tolerance="At least plain vLLM's tokens per second in the same run; rounds take at most 5 % of the time.",
)  # fmt: skip
def test_long(
    case: str,
    served: tuple[str, Path],
    subject: Subject,
    device: str,
    judge: Judge,
    tmp_path: Path,
    measure: Measure,
    curve: Draw,
) -> None:
    new = 1500

    def ask(name: str, server: Server) -> tuple[Answer, tuple[Step, ...], float, Mapping[str, float]]:
        begun = time.perf_counter()
        answer = complete(server, STORY * 4, new)
        seconds = time.perf_counter() - begun
        measure(f"seconds, {name}", seconds, math.inf, unit="s", where=f"{new / seconds:.2f} tokens/s")
        return answer, trace_of(server).steps(answer.id), seconds, server.idle()

    found = _off_and_on(served, subject, device, tmp_path, ask, dtype="float32")
    answer, steps, seconds, metrics = found["on"]
    bounded(answer, steps, found["plain"][1], judge.rule, measure, curve)
    judge(answer, steps, measure, "alone")
    measure("time with the plugin over without", seconds / found["plain"][2], 1.0, where=f"{new} tokens")
    share = metrics["triattention:round_seconds_sum"] / seconds
    measure("share of time spent in rounds", share, 0.05, where=f"{metrics['triattention:rounds_total']:g} rounds")


@pytest.mark.slow
@check(
    "p7.pool", cases="eight_requests", **_SPEED,
    claim="With the plugin, eight requests of 1,200 tokens fit into a pool of 4,096 tokens and run 1.6 times as fast.",
    tolerance="No preemption, while plain vLLM has at least two; 1.6 times its tokens per second in the same run.",
)  # fmt: skip
def test_pool(
    case: str, served: tuple[str, Path], subject: Subject, device: str, tmp_path: Path, measure: Measure
) -> None:  # fmt: skip
    new = 1200
    prompts = [f"Tell me a long story about {what} and {other}." for what in ASKED[:4] for other in ASKED[4:]]

    def ask(name: str, server: Server) -> tuple[float, float]:
        with ThreadPoolExecutor(8) as pool:
            begun = time.perf_counter()
            answers = list(pool.map(lambda prompt: complete(server, prompt, new), prompts))
            seconds = time.perf_counter() - begun
        assert [len(answer.tokens) for answer in answers] == [new] * 8
        again = server.idle()["vllm:num_preemptions_total"]
        rate = f"{8 * new / seconds:.1f} tokens/s, {again:g} preemptions"
        measure(f"seconds, {name}", seconds, math.inf, unit="s", where=rate)
        return seconds, again

    found = _off_and_on(served, subject, device, tmp_path, ask, dtype="bfloat16")
    assert found["plain"][1] >= 2, f"plain vLLM preempted {found['plain'][1]:g} times: the pool is too large to test"
    measure("preemptions with the plugin", found["on"][1], 0)
    measure("time with the plugin over without", found["on"][0] / found["plain"][0], 1 / 1.6)


@pytest.mark.slow
@check(
    "p7.load", cases="five_minutes", **_SPEED | {"timeout_s": 7200},
    claim="In five minutes with 32 clients, dropped connections and preemptions, no token is wrong, no block is lost "
    "and memory does not grow.",
    tolerance=REPLAYED + " Memory of all processes grows by at most 5 % from the first minute to the last.",
)  # fmt: skip
def test_load(
    case: str, served: tuple[str, Path], subject: Subject, device: str, judge: Judge, seed: int, tmp_path: Path,
    measure: Measure,
) -> None:  # fmt: skip
    flags = ("--max-model-len", str(LONGEST), "--max-num-batched-tokens", str(CHUNK))
    memory: list[int] = []
    with _alone(served, subject, device, tmp_path / "on", 96, *flags, dtype="float32") as server:

        def each_s() -> None:
            memory.append(server.memory_bytes())

        load = run(server, seed, clients=32, seconds=300, longest=LONGEST, each_s=each_s)
        metrics, trace = server.idle(), trace_of(server)
        again = metrics["vllm:num_preemptions_total"]
        where = f"{len(load.answers)} answers, {load.hung_up} hung up, {again:g} preemptions"
        last = trace.records[-1]
        measure("blocks lost or freed twice", abs(last.pool - last.free), 0, unit="blocks", where=where)
        measure("rounds missed", metrics["triattention:rounds_missed_total"], 0, where=where)
        measure("memory, the last minute over the first", max(memory[-60:]) / max(memory[:60]), 1.05, where=where)
        assert again > 0, "no request was preempted"
        _equal_alone(server, load.answers, trace, measure)
    for number, answer in enumerate(load.answers):
        judge(answer, trace.steps(answer.id), measure, f"answer {number}")


def _equal_alone(server: Server, answers: Sequence[Answer], trace: Trace, measure: Measure) -> None:
    """Repeat requests alone; five of them with the same chunks and rounds as before must give the same tokens."""
    alike = tried = 0
    for answer in answers:
        steps = trace.steps(answer.id)
        if steps[0].tokens < len(answer.prompt) or len(steps) > len(answer.tokens):
            continue  # its prompt was chunked because of others, or it was preempted
        tried += 1
        salted = {"ignore_eos": True, "cache_salt": answer.id}
        alone = answer_of(server.complete(answer.prompt, len(answer.tokens), **salted))
        those = [(step.start, step.evicted) for step in trace_of(server).steps(alone.id)]
        if those == [(step.start, step.evicted) for step in steps]:
            alike += 1
            measure("tokens that differ from the request alone", differing(answer.tokens, alone.tokens), 0)
        if alike == 5 or tried == 20:
            break
    assert alike, f"none of {tried} requests had the same chunks and rounds when repeated alone"
