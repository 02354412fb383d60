"""What a served request should have returned: its steps, replayed with transformers and the oracle's keep sets.

The replay is teacher-forced. The served tokens are fed, in chunks cut where the engine evicted, and at each sampled
position the model here must choose the token that was served. When a round happened and how much it evicted is taken
from the engine, and both must be what the rule says; which tokens to keep is decided here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, combinations, product
from typing import TYPE_CHECKING, Any

from verify.judge.keep_set import select
from verify.judge.live_case import scoring_problem
from verify.judge.tolerance import ATTENTION_LOG_PROB, KEEP_SET_TIE, NEAR_TIE
from verify.model.observed import with_cache
from verify.serving.trace import Step

if TYPE_CHECKING:
    import numpy as np

#: Tokens fed at once; their logits take the memory.
_CHUNK = 256
#: If an answer has no more undecided keep sets than this, every combination of them is tried.
_MOST_TIES = 4


@dataclass(frozen=True)
class Rule:
    """When a paged engine evicts how many blocks. Lengths are in tokens; ``mode`` is per_head or per_layer_per_head."""

    kv_budget: int
    divide_length: int
    window: int
    block_size: int
    protect_prefill: bool = False
    count_prompt: bool = True
    mode: str = "per_head"

    def due(self, length: int, prompt: int) -> int:
        """Blocks to evict from a request of physical ``length`` with ``prompt`` prompt tokens; 0 if no round is due."""
        limit = self.kv_budget + (0 if self.count_prompt else prompt)
        protected = self.blocks(self.window) + (self.blocks(prompt) if self.protect_prefill else 0)
        if length < max(limit, self.block_size * (1 + protected)) + self.divide_length:
            return 0
        return min(self.blocks(length - limit), self.blocks(length) - 1 - protected)

    def evictable(self, sources: int, length: int, prompt: int) -> np.ndarray:
        """Which of the first ``sources`` of ``length`` tokens may be evicted, bool ``[sources]``."""
        import numpy as np

        index = np.arange(sources)
        return (index < length - self.window) & (index >= (prompt if self.protect_prefill else 0))

    def blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_size)


@dataclass(frozen=True)
class WrongToken:
    """At ``position``, ``served`` was sampled, but the model prefers ``expected`` by ``gap`` of a logit."""

    position: int
    served: int
    expected: int
    gap: float


@dataclass(frozen=True)
class Replay:
    """The result: ``tokens`` compared, those ``wrong``, and the number that differ by less than NEAR_TIE of a logit.

    ``rounds`` were seen, ``late`` steps postponed a round because too few blocks were free, ``longest`` is the largest
    physical length and ``narrowest`` the smallest score difference between a kept and an evicted token. If a difference
    is below KEEP_SET_TIE, either set is right; ``ties`` counts the sets that had to differ from the oracle's for the
    answer to agree. ``drift`` is the largest difference of a served token's log-probability from the one here, 0 if
    none were given. A repetitive text has the right tokens whatever was kept, but not the right log-probabilities.
    """

    tokens: int
    wrong: list[WrongToken]
    near_ties: int
    rounds: int
    preemptions: int
    longest: int
    late: int
    narrowest: float
    drift: float
    ties: int
    violations: list[str]

    @property
    def agrees(self) -> bool:
        return not self.wrong and self.drift <= ATTENTION_LOG_PROB


def replay(
    model: Any,
    statistics: Mapping[str, Any],
    rule: Rule,
    prompt: Sequence[int],
    served: Sequence[int],
    steps: Sequence[Step],
    log_probs: Sequence[float] = (),
) -> Replay:
    """Replay the ``steps`` of a request with the token ids ``prompt`` that was answered with ``served``.

    ``model`` is transformers' in float32, ``statistics`` the content of the statistics file (format version 2),
    ``log_probs`` the server's log-probabilities of the served tokens, if requested.
    """

    def once(other_way: Collection[int]) -> tuple[Replay, list[int]]:
        sequence = _Sequence(model, statistics, rule.mode, other_way)
        return _once(_Run(sequence, rule, list(prompt), list(served), list(log_probs)), steps), sequence.ties

    found, ties = once(())
    if found.agrees or not 0 < len(ties) <= _MOST_TIES:
        return found
    others = chain.from_iterable(combinations(ties, number) for number in range(1, len(ties) + 1))
    return next((other for chosen in others if (other := once(chosen)[0]).agrees), found)


def _once(run: _Run, steps: Sequence[Step]) -> Replay:
    served = run.served
    for step in steps:
        # an engine may compute a few tokens more than the client got
        if step.start > len(run.ids) or not run.take(step):
            break
    run.feed()
    if not run.violations and len(run.compared) < len(served):
        run.violations.append(f"{len(served)} tokens were served, but the trace samples {len(run.compared)}")
    differing = [found for found in run.compared if found is not None]
    return Replay(
        tokens=len(run.compared),
        wrong=[found for found in differing if found.gap >= NEAR_TIE],
        near_ties=sum(found.gap < NEAR_TIE for found in differing),
        rounds=run.rounds,
        preemptions=run.preemptions,
        longest=run.longest,
        late=run.late,
        narrowest=run.narrowest,
        drift=run.drift,
        ties=len(run.sequence.other_way),
        violations=run.violations,
    )


@dataclass
class _Run:
    """The state of a replay: the tokens before ``end`` are computed, ``evicted`` of them are evicted."""

    sequence: _Sequence
    rule: Rule
    prompt: list[int]
    served: list[int]
    log_probs: list[float]
    compared: list[WrongToken | None] = field(default_factory=list)
    sampled: list[int] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)
    end: int | None = None
    evicted: int = 0
    rounds: int = 0
    preemptions: int = 0
    longest: int = 0
    late: int = 0
    narrowest: float = float("inf")
    drift: float = 0.0

    @cached_property
    def ids(self) -> list[int]:
        return self.prompt + self.served

    def take(self, step: Step) -> bool:
        """Replay ``step``, except for feeding its tokens; returns whether the replay can continue."""
        where = f"step {step.number}, token {step.start}"
        if self.end is None:
            self._begin(step, where)
        elif step.preempted or step.start < self.end:
            self.feed()
            self.preemptions += 1
            self._begin(step, where)
        elif step.start > self.end:
            self.violations.append(f"{where}: the tokens from {self.end} on were never computed")
            return False
        elif not self._round(step, where):
            return False
        self.end = step.end
        self.longest = max(self.longest, step.end - step.evicted)
        needed = self.rule.blocks(step.end - step.evicted)
        if step.blocks != needed:
            self.violations.append(f"{where}: {step.blocks} blocks hold {step.end - step.evicted} tokens, not {needed}")
        # after a preemption the tokens sampled before it are computed again, but not sampled again
        if step.end == len(self.prompt) + len(self.compared) + len(self.sampled) and step.end < len(self.ids):
            self.sampled.append(step.end - 1)
        return True

    def _begin(self, step: Step, where: str) -> None:
        """Begin with an empty cache; what the step does not compute itself came complete from the prefix cache."""
        self.sequence.clear()
        self.evicted = step.evicted
        if step.evicted:
            self.violations.append(f"{where}: a request that just got its blocks lacks {step.evicted} tokens")

    def _round(self, step: Step, where: str) -> bool:
        """Check that the step begins with the round that the rule requires, and replay the round it begins with."""
        length, gone = step.start - self.evicted, step.evicted - self.evicted
        size = self.rule.block_size
        sources = (self.rule.blocks(length) - 1) * size
        due = self.rule.due(length, len(self.prompt)) * size
        if due and not gone and step.free * size < sources - due:
            self.late += 1
        elif gone != due:
            self.violations.append(f"{where}: {gone} of {length} tokens were evicted, the rule says {due}")
        if gone <= 0:
            return not gone  # no round, or evicted tokens that came back
        evictable = self.rule.evictable(sources, length, len(self.prompt))
        if gone > evictable.sum():
            self.violations.append(f"{where}: {gone} tokens were evicted, but only {evictable.sum()} are not protected")
            return False
        self.feed()
        self.narrowest = min(self.narrowest, self.sequence.evict(gone, evictable, step.start))
        self.evicted, self.rounds = step.evicted, self.rounds + 1
        return True

    def feed(self) -> None:
        """Feed the pending tokens, and compare the model's choices with what was served."""
        for position, logits in zip(
            self.sampled, self.sequence.feed(self.ids[: self.end or 0], self.sampled), strict=True
        ):
            served, best = self.ids[position + 1], int(logits.argmax())
            gap = float(logits[best] - logits[served])
            if self.log_probs:
                here = float(logits.log_softmax(-1)[served])
                self.drift = max(self.drift, abs(here - self.log_probs[len(self.compared)]))
            self.compared.append(None if best == served else WrongToken(position + 1, served, best, gap))
        self.sampled = []


class _Sequence:
    """The cache of one sequence: rotated keys and values, and the position of each.

    ``positions`` is int ``[L, H, P]``: keep sets differ by KV head, and by layer if the mode says so. ``ties`` are the
    numbers of the keep sets that were undecided; those in ``other_way`` keep the token that just lost.
    """

    def __init__(self, model: Any, statistics: Mapping[str, Any], mode: str, other_way: Collection[int] = ()) -> None:
        self._model, self._statistics, self._mode = model, statistics, mode
        self.other_way, self.ties, self._decided = other_way, [], 0
        self.clear()

    def clear(self) -> None:
        import numpy as np
        from transformers import DynamicCache

        config = self._model.config
        self._cache, self._fed = DynamicCache(config=config), 0
        self._positions = np.empty((config.num_hidden_layers, config.num_key_value_heads, 0), dtype=int)

    def feed(self, ids: Sequence[int], sampled: Sequence[int]) -> Iterator[Any]:
        """Feed the ``ids`` not fed yet; yields the logits ``[vocabulary]`` at each position in ``sampled``."""
        import numpy as np
        import torch

        device, shape = self._model.device, (*self._positions.shape[:2], -1)
        for start in range(self._fed, len(ids), _CHUNK):
            positions = torch.arange(start, min(start + _CHUNK, len(ids)))
            wanted = [position - start for position in sampled if start <= position < start + _CHUNK]
            with torch.inference_mode():
                logits = self._model(
                    input_ids=torch.tensor([ids[start : start + _CHUNK]], device=device),
                    position_ids=positions[None].to(device),
                    use_cache=True,
                    logits_to_keep=torch.tensor(wanted, dtype=torch.long, device=device),
                    **with_cache(self._model, self._cache),
                ).logits[0]
            yield from logits
            new = np.broadcast_to(positions.numpy(), (*shape[:2], len(positions)))
            self._positions = np.concatenate([self._positions, new], axis=-1)
        self._fed = len(ids)

    def evict(self, count: int, evictable: np.ndarray, t: int) -> float:
        """Evict ``count`` of the ``evictable`` tokens (bool, of the first ones), scored at position ``t``.

        Returns the smallest score difference between a kept and an evicted token; inf if no evictable token was kept.
        """
        import numpy as np
        import torch

        layers, heads, length = self._positions.shape
        together = [range(layers)] if self._mode == "per_head" else [[layer] for layer in range(layers)]
        kept, narrowest = np.empty((layers, heads, length - count), dtype=int), np.inf
        for members, head in product(together, range(heads)):
            scores = self._scores(members, head, evictable, t)
            order = evictable.nonzero()[0]
            order = order[np.argsort(-scores[order], kind="stable")]
            if len(order) > count:
                gap = scores[order[-count - 1]] - scores[order[-count]]
                narrowest = min(narrowest, gap)
                if gap < KEEP_SET_TIE:
                    self.ties.append(self._decided)
                if self._decided in self.other_way:
                    order[[-count - 1, -count]] = order[[-count, -count - 1]]
            kept[members, head] = np.setdiff1d(np.arange(length), order[-count:])
            self._decided += 1
        self._positions = np.take_along_axis(self._positions, kept, axis=-1)
        for layer, rows in zip(self._cache.layers, torch.from_numpy(kept), strict=True):
            index = rows[None, :, :, None].to(layer.keys.device).expand(*layer.keys.shape[:2], -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)
        return float(narrowest)

    def _scores(self, layers: Sequence[int], head: int, evictable: np.ndarray, t: int) -> np.ndarray:
        """The oracle's scores ``[N]`` by which ``layers`` choose a shared keep set of one KV head."""
        sources = len(evictable)
        problems = [
            scoring_problem(
                self._statistics, layer, self._cache.layers[layer].keys[:, head : head + 1, :sources], t, {},
                self._positions[layers[0], head, :sources], head,
            )
            for layer in layers
        ]  # fmt: skip
        return select(problems, evictable, mode="per_head", normalize=True).scores[0]
