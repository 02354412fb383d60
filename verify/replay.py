"""What a served request should have answered: its own schedule replayed by transformers and the float64 oracle.

The answer's tokens are fed back in the chunks that the scheduler made of them, and at every round the oracle chooses
what stays, from the replay's own keys. So each token is judged with the cache that it should have had, whatever was
wrong before it, and of what the server computed the tokens alone take part. Source: paged engines in the algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from verify.keep_set import select
from verify.live_model import LiveModel
from verify.observer import Step
from verify.tolerance import NEAR_TIE

if TYPE_CHECKING:
    import numpy as np

#: Tokens fed at once; their logits over the vocabulary are what takes memory.
_FED_AT_ONCE = 512


@dataclass(frozen=True)
class Rule:
    """When a request is due and how many whole blocks go; counts are tokens, the budget includes the prompt."""

    kv_budget: int
    divide_length: int
    window: int
    block_size: int

    @property
    def threshold(self) -> int:
        """The physical length at which a round is due: above the budget, or above what a round cannot evict."""
        least = self.block_size * (1 + -(-self.window // self.block_size))
        return max(self.kv_budget, least) + self.divide_length

    def could_come(self, step: Step) -> bool:
        """Whether a step begins over the threshold though the pool had as many free blocks as a round could ask for.

        Blocks that others may read are not written, so what is kept may have to move to free ones, and wait for them.
        """
        due = step.start - step.evicted >= self.threshold
        return due and step.free >= -(-self.kv_budget // self.block_size)

    def tokens_to_evict(self, length: int) -> int:
        blocks = -(-length // self.block_size)
        wanted = -(-(length - self.kv_budget) // self.block_size)
        return self.block_size * min(wanted, blocks - 1 - -(-self.window // self.block_size))


@dataclass
class Replay:
    """What became of one answer.

    ``wrong`` are positions where the served token is not the oracle's, with by how much its logit is lower; those below
    ``NEAR_TIE`` are counted in ``near_ties`` instead. ``late`` are steps at which a round was due, could come and did not,
    ``broken`` rounds that are not the rule's, ``longest`` is the most tokens that the request held at once.
    """

    tokens: int = 0
    wrong: list[tuple[int, float]] = field(default_factory=list)
    near_ties: int = 0
    rounds: int = 0
    late: int = 0
    broken: list[str] = field(default_factory=list)
    preemptions: int = 0
    longest: int = 0


def replay(
    model: LiveModel, prompt: Sequence[int], tokens: Sequence[int], steps: Sequence[Step], rule: Rule | None
) -> Replay:
    """Judge the new ``tokens`` after a ``prompt`` that were served in ``steps``; without a rule no round is due."""
    ids, found = [*prompt, *tokens], Replay()
    cache = _Cache(model)
    checked: set[int] = set()
    for chunk in _chunks(steps):
        first, last = chunk[0], chunk[-1]
        if first.start < cache.seen:
            found.preemptions += 1
            cache = _Cache(model)
        if first.start > cache.seen:  # blocks that the prefix cache had
            _judge(cache.feed(ids, first.start), ids, len(prompt), cache.seen, set(range(len(ids))), found)
        if first.evicted > cache.evicted:
            _round(cache, first, rule, found)
        for step in chunk:
            found.late += rule is not None and rule.could_come(step)
        end = last.start + last.tokens
        for start in range(cache.seen, end, _FED_AT_ONCE):
            logits = cache.feed(ids, min(end, start + _FED_AT_ONCE))
            _judge(logits, ids, len(prompt), start, checked, found)
        found.longest = max(found.longest, *(step.start + step.tokens - step.evicted for step in chunk))
    found.tokens = len(checked)
    return found


def _chunks(steps: Sequence[Step]) -> Iterator[list[Step]]:
    """Runs of steps without a round or a preemption between them, which can be computed at once."""
    run: list[Step] = []
    for step in steps:
        if run and (step.evicted != run[-1].evicted or step.start != run[-1].start + run[-1].tokens):
            yield run
            run = []
        run.append(step)
    if run:
        yield run


def _judge(logits: Any, ids: Sequence[int], prompt: int, start: int, checked: set[int], found: Replay) -> None:
    """Compare the served tokens after the positions from ``start`` on with the logits ``[n, V]`` of these positions."""
    import torch

    served = torch.tensor([*ids[start + 1 : start + 1 + len(logits)]], device=logits.device)
    logits = logits[: len(served)]
    behind = (logits.amax(-1) - logits.gather(-1, served[:, None])[:, 0]).tolist()
    for position, gap in enumerate(behind, start + 1):
        if position < prompt or position in checked:
            continue
        checked.add(position)
        if gap >= NEAR_TIE:
            found.wrong.append((position - prompt, gap))
        elif gap > 0:
            found.near_ties += 1


def _round(cache: _Cache, step: Step, rule: Rule | None, found: Replay) -> None:
    found.rounds += 1
    length, evicted = cache.seen - cache.evicted, step.evicted - cache.evicted
    due = rule is not None and length >= rule.threshold
    if not due or evicted != rule.tokens_to_evict(length):
        asked = rule.tokens_to_evict(length) if due else 0
        found.broken.append(f"at position {step.start} {evicted} of {length} tokens went, and the rule says {asked}")
    if rule is not None:
        cache.evict(evicted, rule)


class _Cache:
    """The keys and values that a request holds, head by head, with the positions that they are of."""

    def __init__(self, model: LiveModel) -> None:
        self._model, self._cache = model, model.new_cache()
        self.seen = self.evicted = 0
        self._positions: np.ndarray | None = None

    def feed(self, ids: Sequence[int], end: int) -> Any:
        """Compute the tokens up to position ``end``: their logits ``[n, V]``."""
        import numpy as np
        import torch

        start, held = self.seen, self.seen - self.evicted
        device = self._model.model.device
        new = torch.arange(start, end, device=device)
        mask = torch.ones(len(new), held + len(new), dtype=torch.bool, device=device).tril(held)
        with torch.inference_mode():
            out = self._model.model(
                input_ids=torch.tensor([ids[start:end]], device=device), position_ids=new[None],
                attention_mask=mask[None, None], past_key_values=self._cache, use_cache=True,
            )  # fmt: skip
        self.seen = end
        heads = self._cache.layers[0].keys.shape[1]
        fresh = np.tile(np.arange(start, end), (heads, 1))
        self._positions = fresh if self._positions is None else np.concatenate([self._positions, fresh], axis=1)
        return out.logits[0].float()

    def evict(self, count: int, rule: Rule) -> None:
        """Let the oracle keep all but ``count`` tokens of each KV head, of equal scores the earlier ones."""
        import numpy as np
        import torch

        length = self.seen - self.evicted
        whole = (-(-length // rule.block_size) - 1) * rule.block_size
        evictable = np.arange(whole) < length - rule.window
        kept = []
        for head, positions in enumerate(self._positions):
            cases = [
                self._model.oracle_case(
                    number, layer.keys[:, head : head + 1, :whole], self.seen, {}, positions[:whole], head
                )
                for number, layer in enumerate(self._cache.layers)
            ]
            selection = select(cases, evictable, mode="per_head", normalize=True)
            scores = np.where(evictable, selection.scores[0], np.inf)
            order = np.argsort(-scores, kind="stable")
            kept.append([*sorted(order[: whole - count]), *range(whole, length)])
        indices = torch.tensor(np.array(kept), device=self._model.model.device)
        for layer in self._cache.layers:
            at = indices[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
            layer.keys, layer.values = layer.keys.gather(2, at), layer.values.gather(2, at)
        self._positions = np.take_along_axis(self._positions, np.array(kept), axis=1)
        self.evicted += count
