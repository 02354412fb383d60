"""The scheduler's half of the vLLM plugin against vLLM's real schedulers, thousands of steps of random traffic.

``python -m triattention.tests.vllm_simulation --out FILE`` runs every case on the vLLM that is importable and writes
the outcomes to FILE, beside those of other versions.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import logging
import os
import random
import re
import sys
import tempfile
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from triattention.tests.vllm_invariants import Invariants
from triattention.tests.vllm_scheduler import STOP, VOCABULARY, abort, make_request, make_scheduler, runner_output
from triattention.tests.vllm_worker import Text, Worker
from triattention.vllm.runtime.eviction import Evictor, Rule
from triattention.vllm.runtime.metrics import Counters

#: Rules and policies that traffic alternates between; blocks are small so that everything happens often.
TRAFFIC = {
    "plain": (Rule(32, 8, 4, 4), "fcfs"),
    "window over blocks, budget off blocks": (Rule(37, 5, 11, 4), "priority"),
    "prompt protected": (Rule(40, 8, 6, 4, protect_prefill=True), "fcfs"),
    "prompt beside the budget": (Rule(20, 6, 5, 4, include_prefill_in_budget=False), "priority"),
    "prompt protected, beside the budget": (Rule(16, 4, 0, 4, True, False), "fcfs"),
    "floor above the limit": (Rule(20, 3, 17, 8), "priority"),
    "only the newest block stays": (Rule(5, 39, 0, 4), "fcfs"),
}
_STEMS, _STEM = 3, 96
_MODEL_LENGTH = 240


@dataclass
class Outcome:
    """What happened in a run, counted; ``longest`` is the greatest physical length in tokens."""

    steps: int = 0
    finished: int = 0
    aborts: int = 0
    preemptions: int = 0
    resets: int = 0
    prefix_hits: int = 0
    rounds: int = 0
    rounds_put_off: int = 0
    longest: int = 0

    def __iadd__(self, other: Outcome) -> Outcome:
        for name, value in dataclasses.asdict(other).items():
            mine = getattr(self, name)
            setattr(self, name, max(mine, value) if name == "longest" else mine + value)
        return self


@dataclass
class Simulation:
    """One scheduler, one worker, and the loop of vLLM's engine core between them; asserts at every step.

    In ``asynchronous`` mode the output of a step comes back after the next one was scheduled, as in the engine's queue
    of batches. ``evictor`` stands in for the plugin's, to see whether a wrong one is noticed.
    """

    rule: Rule
    folder: Path
    asynchronous: bool
    caching: bool
    num_blocks: int
    policy: str = "fcfs"
    seed: int = 0
    max_model_len: int = _MODEL_LENGTH
    max_num_batched_tokens: int = 48
    evictor: type[Evictor] = Evictor
    outcome: Outcome = field(default_factory=Outcome)

    def __post_init__(self) -> None:
        self.scheduler = make_scheduler(
            self.rule, self.folder, num_blocks=self.num_blocks, asynchronous=self.asynchronous, caching=self.caching,
            policy=self.policy, max_model_len=self.max_model_len, max_num_batched_tokens=self.max_num_batched_tokens,
        )  # fmt: skip
        assert type(self.scheduler._triattention) is Evictor
        assert type(self.scheduler).__mro__[1].__name__ == ("AsyncScheduler" if self.asynchronous else "Scheduler")
        self.scheduler._triattention = self.evictor(self.rule, Counters())
        self.texts: dict[str, Text] = {}
        self.worker = Worker(self.rule, self.num_blocks, self.texts)
        self.invariants = Invariants(self.scheduler, self.worker, self.rule)
        self.alive: dict[str, Any] = {}
        self._queue: deque[tuple[Any, Any]] = deque()
        self._abort_rate = 0.0
        self._random = random.Random(self.seed)
        self._stems = [[self._token() for _ in range(_STEM)] for _ in range(_STEMS)]

    def traffic(self, steps: int) -> Outcome:
        """So many steps of random arrivals, aborts and resets, then everything to its end."""
        draw = self._random
        calm, self._abort_rate = 0, 0.01
        for _ in range(steps):
            calm = draw.randint(40, 120) if calm == 0 and draw.random() < 0.004 else max(0, calm - 1)
            if not calm and len(self.alive) < 14 and draw.random() < 0.3:
                stem = draw.choice(self._stems)[: draw.randint(0, _STEM)]
                prompt = stem + [self._token() for _ in range(draw.randint(1, 12))]
                self.add(prompt, draw.randint(1, 120), priority=draw.randint(0, 3))
            if self.alive and draw.random() < self._abort_rate:
                self._abort(draw.choice(list(self.alive)))
            if not self.alive and not self._queue:
                assert self.scheduler.reset_prefix_cache(), "the prefix cache cannot be reset: a block is still in use"
                self.outcome.resets += 1
            elif draw.random() < 0.003 and not self._loses_tokens():
                self.scheduler.reset_prefix_cache(reset_running_requests=True)
                self.outcome.resets += 1
            self.step()
        return self.drain()

    def add(self, prompt: list[int], max_tokens: int, priority: int = 0) -> None:
        """A request arrives; what it will sample is settled here, so that a token says whether it is the right one."""
        name = f"r{len(self.texts)}"
        # one token more: in async mode a step is scheduled before the stop is known
        sampled = [STOP if self._random.random() < 0.005 else self._token() for _ in range(max_tokens + 1)]
        self.texts[name] = Text(len(prompt), np.array(prompt + sampled))
        request = make_request(name, prompt, max_tokens, self.rule.block_size, priority, float(len(self.texts)))
        self.alive[name] = request
        self.scheduler.add_request(request)

    def drain(self) -> Outcome:
        """Step until nothing is left, in the scheduler as in the worker."""
        for _ in range(20_000):
            if not self.scheduler.has_requests() and not self._queue:
                break
            self.step()
        assert not self.alive, f"{sorted(self.alive)} never end"
        self.invariants.nothing_left()
        self.outcome.longest = self.worker.longest
        return self.outcome

    def step(self) -> None:
        """What ``EngineCore.step`` does, or ``step_with_batch_queue`` in async mode."""
        if self.scheduler.has_requests():
            before = {name: request.num_preemptions for name, request in self.alive.items()}
            hashes = self.invariants.hashes()
            output = self.scheduler.schedule()
            self._count(output, before)
            self.invariants.plan(output)
            sampled, writes = self.worker.execute(output)
            self.invariants.writes(writes, hashes)
            self.invariants.tables(output)
            self._queue.append((output, runner_output(sampled)))
            if self.asynchronous and len(self._queue) < 2:
                return
        if self._queue:
            if self.alive and self._random.random() < self._abort_rate:
                self._abort(self._random.choice(list(self.alive)))
            self.scheduler.update_from_output(*self._queue.popleft())
            self._collect()
            self.invariants.pool()

    def _loses_tokens(self) -> bool:
        """vLLM 0.19, async: after a reset while requests run, a prompt's first token may be dropped; plugin or not."""
        return self.asynchronous and any(hasattr(one, "discard_latest_async_tokens") for one in self.alive.values())

    def _token(self) -> int:
        return self._random.randrange(STOP + 1, VOCABULARY)

    def _abort(self, name: str) -> None:
        abort(self.scheduler, name)
        self.outcome.aborts += 1
        self._collect()

    def _collect(self) -> None:
        """Take out the requests that are done, which must have got the tokens that were sampled for them, in order."""
        for name, request in list(self.alive.items()):
            text, sampled = self.texts[name], list(request.output_token_ids)
            if name not in self.scheduler.requests:
                expected = text.tokens[text.prompt : text.prompt + len(sampled)].tolist()
                assert sampled == expected, f"{name} was given {sampled} and {expected} was sampled"
                del self.alive[name]
                self.outcome.finished += 1

    def _count(self, output: Any, before: dict[str, int]) -> None:
        self.outcome.steps += 1
        self.outcome.rounds += len(output.triattention.evictions)
        self.outcome.rounds_put_off += len(output.triattention.put_off)
        self.outcome.prefix_hits += sum(new.num_computed_tokens > 0 for new in output.scheduled_new_reqs)
        self.outcome.preemptions += sum(
            request.num_preemptions - before[name] for name, request in self.alive.items() if name in before
        )


def run_traffic(asynchronous: bool, caching: bool, steps: int, seed: int, **options: Any) -> Outcome:
    """``steps`` steps over all of ``TRAFFIC``, after which the pool was full again each time."""
    total = Outcome()
    with tempfile.TemporaryDirectory() as folder:
        for number, (rule, policy) in enumerate(TRAFFIC.values()):
            blocks = _MODEL_LENGTH // rule.block_size + 2
            simulation = Simulation(
                rule, Path(folder), asynchronous, caching, blocks, policy, seed=seed + number, **options
            )
            total += simulation.traffic(steps // len(TRAFFIC))
    return total


def run_long_prompt(asynchronous: bool) -> Outcome:
    """A prompt of 40,000 tokens in chunks of 1,024 at a budget of 12,000."""
    with tempfile.TemporaryDirectory() as folder:
        simulation = Simulation(
            Rule(12_000, 128, 128, 32), Path(folder), asynchronous, True, num_blocks=1_300, max_model_len=40_600,
            max_num_batched_tokens=1_024,
        )  # fmt: skip
        simulation.add([simulation._token() for _ in range(40_000)], 500)
        return simulation.drain()


def main() -> int:
    """Run every case and write the outcome; 1 where one of them failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the JSON file; other versions stay in it")
    parser.add_argument("--steps", type=int, default=3_000, help="steps of each case of random traffic")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "0")  # the worker reads what the V1 runner is sent
    logging.disable(logging.WARNING)
    import vllm

    records = []
    for asynchronous, mode in ((False, "sync"), (True, "async")):
        for caching, cache in ((False, "off"), (True, "on")):
            run = functools.partial(run_traffic, asynchronous, caching, options.steps, options.seed)
            records.append({"case": f"{mode}, prefix caching {cache}"} | _recorded(run))
        run = functools.partial(run_long_prompt, asynchronous)
        records.append({"case": f"{mode}, long prompt"} | _recorded(run))
    records = [{"vllm": vllm.__version__, "seed": options.seed} | record for record in records]
    known = json.loads(options.out.read_text()) if options.out.exists() else []
    known = [record for record in known if record["vllm"] != vllm.__version__] + records
    known.sort(key=lambda record: [int(part) for part in re.findall(r"\d+", record["vllm"])])
    # a line each, so that a difference shows which case changed
    options.out.write_text("[\n" + ",\n".join(map(json.dumps, known)) + "\n]\n")
    print(*records, sep="\n")
    return int(any(record["result"] != "passed" for record in records))


def _recorded(run: Callable[[], Outcome]) -> dict[str, Any]:
    try:
        return {"result": "passed", **dataclasses.asdict(run())}
    except (AssertionError, RuntimeError, ValueError) as error:
        return {"result": f"failed: {error}"}


if __name__ == "__main__":
    sys.exit(main())
