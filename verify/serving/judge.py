"""Phase 7: its settings, a server with the plugin, and what must hold for every answer of that server."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from verify.judge.tolerance import ATTENTION_LOG_PROB
from verify.model.live_model import LiveModel
from verify.serving.replay import Replay, Rule, replay
from verify.serving.server import Answer, Server, answer_of, block_size
from verify.serving.trace import LOGGED, VARIABLE, Step, Trace, read_trace
from verify.subject.subject import Subject

#: So small that short answers have several rounds, and that six requests do not fit into a pool of LONGEST tokens.
BUDGET, DIVIDE, WINDOW, CHUNK, LONGEST = 256, 64, 32, 128, 1536

STORY = "Tell me a long story about a train that travels west along the river, and about the people of the town. "
ASKED = ("a dog", "a boat", "an old clock", "a girl who could not sleep", "the market", "a letter that came late")

#: The fields that the declarations of the checks share.
COMMON: dict[str, Any] = {
    "gate": "soft", "needs": ("p1.identity", "p7.plugin"), "timeout_s": 600,
    "reason": "Serving is where compression pays off, and where occasional wrong tokens are hardest to notice.",
    "remedy": "Read server.log of the run; repeat the request alone with VLLM_LOGGING_LEVEL=DEBUG, which logs rounds.",
}  # fmt: skip
REPLAYED = (
    "Greedy tokens are equal, except where the oracle's logit of the served token is within 1e-3 of its best "
    "(counted); log-probabilities of the served tokens are within 1e-3 (ATTENTION_LOG_PROB)."
)


def server_of(
    served: tuple[str, Path], subject: Subject, device: str, folder: Path, *flags: str, dtype: str = "float32",
    alone: bool = False, **environment: str,
) -> Server:  # fmt: skip
    """A server of the model, with the plugin enabled at a small budget unless ``environment`` overrides that."""
    folder.mkdir()
    settings = {"KV_BUDGET": BUDGET, "DIVIDE_LENGTH": DIVIDE, "WINDOW_SIZE": WINDOW, "SPARSE_STATS_PATH": served[1]}
    named = {f"TRIATTN_RUNTIME_{name}": str(value) for name, value in settings.items()}
    usual = ["--dtype", dtype, "--served-model-name", "model", "--enable-auto-tool-choice"]
    usual += ["--tool-call-parser", "hermes"]
    if device != "cpu":
        usual += ["--gpu-memory-utilization", "0.2"]  # three servers share the GPU
    env = {
        **subject.environment(),
        **named,
        VARIABLE: str(folder / "trace.jsonl"),
        LOGGED: subject.package,
        **environment,
    }
    return Server(served[0], env, folder / "server.log", *usual, *flags, device=device, alone=alone)


def complete(server: Server, prompt: str | list[int], new: int) -> Answer:
    """The greedy answer of ``new`` tokens, with their log-probabilities."""
    return answer_of(server.complete(prompt, new, ignore_eos=True, logprobs=0))


def trace_of(server: Server) -> Trace:
    """What the scheduler of a ``server_of`` has done so far."""
    return read_trace(server.log.with_name("trace.jsonl"))


def differing(one: list[int], other: list[int]) -> int:
    """The number of places where two lists of tokens differ, including those that only one has."""
    return sum(a != b for a, b in zip(one, other, strict=False)) + abs(len(one) - len(other))


def rule(device: str) -> Rule:
    """When a ``server_of`` evicts, and what."""
    return Rule(BUDGET, DIVIDE, WINDOW, block_size(device))


@dataclass(frozen=True)
class Judge:
    """Replays each answer of a server once, and checks what must hold for every answer."""

    model: LiveModel
    statistics: Mapping[str, Any]
    rule: Rule
    _replayed: dict[str, Replay] = field(default_factory=dict)

    def replay(self, answer: Answer, steps: Sequence[Step]) -> Replay:
        if answer.id not in self._replayed:
            self._replayed[answer.id] = replay(
                self.model.model, self.statistics, self.rule, answer.prompt, answer.tokens, steps, answer.log_probs
            )
        return self._replayed[answer.id]

    def __call__(self, answer: Answer, steps: Sequence[Step], measure, where: str) -> Replay:
        found = self.replay(answer, steps)
        where = f"{where}: {found.tokens} tokens, {found.rounds} rounds, {found.preemptions} preemptions"
        wrong = [f"token {one.position - len(answer.prompt)} by {one.gap:.3g} of a logit" for one in found.wrong]
        measure("wrong tokens", len(wrong), 0, where=f"{where} {'; '.join(wrong[:3])}")
        assert len(answer.log_probs) == len(answer.tokens), f"{where}: the server returned no log-probabilities"
        # a repetitive text has the right tokens whatever was kept, but other log-probabilities
        measure("largest difference of a log-probability", found.drift, ATTENTION_LOG_PROB, where=where)
        measure("near ties that went the other way", found.near_ties + found.ties, math.inf, where=where)
        assert not found.violations, f"{where}: {found.violations[0]}"
        measure("steps that a round waited for free blocks", found.late, math.inf, where=where)
        if not found.late:
            # tokens from the prefix cache are there at once, and evicted at the next step
            hits = [
                step.start for before, step in zip([None, *steps[:-1]], steps, strict=True) if admitted(before, step)
            ]
            longest = max(self.rule.kv_budget + self.rule.divide_length - 1, *hits) + CHUNK
            measure("most tokens held at once", found.longest, longest, unit="tokens", where=where)
        return found


def admitted(before: Step | None, step: Step) -> bool:
    """Whether a request begins with this step, for the first time or again."""
    return before is None or step.preempted or step.start < before.end


def bounded(answer: Answer, steps: Sequence[Step], grown: Sequence[Step], rule: Rule, measure, curve) -> None:
    """Measure and draw that the blocks of a request stay bounded; ``grown`` are its steps without the plugin."""
    for name, those in (("with the plugin", steps), ("without it", grown)):
        points = [(max(step.end - len(answer.prompt), 0), step.blocks) for step in those]
        curve(name, points, x="generated tokens", y="KV blocks")
    bound = rule.blocks(rule.kv_budget + rule.divide_length - 1 + max(step.tokens for step in steps))
    measure("most KV blocks of the request", max(step.blocks for step in steps), bound, unit="blocks")
    plainly = rule.blocks(len(answer.prompt) + len(answer.tokens) - 1)
    most = max(step.blocks for step in grown)
    assert most == plainly, f"without the plugin it held {most} blocks instead of {plainly}"
