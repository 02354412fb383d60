"""Judges what the published compressor keeps: right by one lawful reading of the method, or wrong for a named cause."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import TYPE_CHECKING, Any

from verify.checks import Measure
from verify.errors import Wrong
from verify.judge.compressing import Kept
from verify.judge.compressor import BUDGET, Caches, as_bfloat16, frequencies
from verify.judge.keep_set import Selection
from verify.record.causes import ONE_FOR_ALL

if TYPE_CHECKING:
    import numpy as np
    import torch


#: The tolerance of checks that use ``Judge``.
TOLERANCE = "The oracle's set; scores closer than twice the class B error may swap (verify/judge/keep_set.py)."


#: Causes of wrong keep sets.
_WINDOW_EVICTED = "protected tokens of the window are evicted"
UNSORTED = "the largest scores are taken unsorted: indices do not ascend, and equal keys are kept by no rule"
#: Causes of a wrong number of kept tokens.
LATER = "after a round, of this layer or another, the next one does not happen"
UNEVEN = "trigger, budget and selection do not treat a protected prompt alike"


def _miscount(kept: Kept, number: int, prompt: int) -> str:
    """Why a round may have kept another number of tokens."""
    if number > 1:
        return LATER if kept.untouched else ""
    return UNEVEN if prompt else ""


@dataclass(frozen=True)
class Reading:
    """A way to come from scores to a keep set, in words, as departures from the specified one (``Caches.selection``,
    and ``t`` and ``options``).
    """

    words: str = ""
    departs: Mapping[str, Any] = field(default_factory=dict)


#: Over which tokens z-scores are taken. No published text says it.
REGION = (
    Reading("z-scores over the evictable tokens"),
    Reading("z-scores over all cached tokens", {"everywhere": True}),
)
#: How ``per_layer`` joins its KV heads; the published scores of that mode are means.
PER_LAYER = (
    Reading("per_layer takes the maximum over the KV heads"),
    Reading("per_layer takes the mean of the KV heads' scores", {"mean_heads": True}),
)
#: Whether the statistics are rounded to ``compute_dtype``.
ROUNDED = (
    Reading("the statistics are used in float32"),
    Reading("the statistics are rounded to compute_dtype", {"rounded": True}),
)


@dataclass
class Judge:
    """Judges the rounds of one check, all by the same of its lawful ``readings``, of which the first is specified.

    After a round, ``readings`` are those by which every round so far is right.
    """

    caches: Caches
    options: Mapping[str, Any]
    measure: Measure
    readings: Sequence[Reading] = (Reading(),)

    def __post_init__(self) -> None:
        self._offered = len(self.readings)

    def round(
        self, kept: Kept, layer: int, *, keys: torch.Tensor, t: int, number: int = 1, expected: int = BUDGET,
        prompt: int = 0, window: int = 0,
    ) -> None:  # fmt: skip
        """Compare what one round keeps of ``keys`` with the oracle, for the next token at position ``t``.

        The first ``prompt`` and the last ``window`` tokens are protected.
        """
        import numpy as np

        length = keys.shape[2]
        protected = f" (protected: a prompt of {prompt}, a window of {window})" if prompt or window else ""
        kept.must_count(expected, f"round {number}", f"layer {layer}{protected}", _miscount(kept, number, prompt))
        evictable = (np.arange(length) >= prompt) & (np.arange(length) < length - window)
        for row in range(keys.shape[0]):
            held, place = kept.mask(row), f"round {number}, layer {layer}{protected}, row {row}"
            for head, lost in enumerate(~held & ~evictable):
                if lost.any():
                    raise Wrong(
                        f"{lost.sum()} of {(~evictable).sum()} protected tokens were evicted in {place}, KV head "
                        f"{head}: {np.flatnonzero(lost)[:8].tolist()}",
                        UNEVEN if lost[:prompt].any() else _WINDOW_EVICTED,
                    )
            if self.options.get("pruning_mode") == "per_layer":
                assert (held == held[:1]).all(), f"the KV heads keep different tokens in mode per_layer in {place}"
                held = held[:1]
            self._scores(held, evictable, place, _Round(self.caches, layer, row, keys, t, evictable, self.options))

    def _scores(self, held: np.ndarray, evictable: np.ndarray, place: str, found: _Round) -> None:
        right = [one for one in self.readings if found.selection(one).fits(held, evictable)]
        self.readings = right or self.readings
        selection, causes = found.selection(self.readings[0]), [""]
        if not selection.compares(held, evictable).any():
            # nothing was ranked
            self.measure("protected tokens evicted", int((~held & ~evictable).sum()), 0, where=place)
            return
        if not right:
            alike = [ONE_FOR_ALL] if len(held) > 1 and (held == held[0]).all() else [""]
            causes = found.causes(held, self.readings) or alike
            place += f", {selection.told(held, evictable)}; the model's RoPE base is {self.caches.theta:.0f}"
            place += causes[0] and f"; cause: {', and '.join(causes)}"
        inversion = selection.inversion(held, evictable)
        self.measure("best evicted over worst kept score", inversion, selection.allowed, where=place, cause=causes[0])

    def tell(self, choose: Callable[[str], None]) -> None:
        """Record which reading the subject follows, where the rounds have told them apart."""
        if len(self.readings) < self._offered:
            choose(self.readings[0].words)


@dataclass(frozen=True)
class _Round:
    """One row of one layer at one round, as the oracle sees it."""

    caches: Caches
    layer: int
    row: int
    keys: torch.Tensor
    t: int
    evictable: np.ndarray
    options: Mapping[str, Any]

    def selection(self, *readings: Reading) -> Selection:
        departs: dict[str, Any] = {"t": self.t, "options": self.options}
        for one in readings:
            departs |= one.departs
        return self.caches.selection(self.layer, self.row, self.keys, evictable=self.evictable, **departs)

    def causes(self, held: np.ndarray, readings: Sequence[Reading]) -> list[str]:
        """The fewest known mistakes by which ``held`` would be right, in words; none if no mixture of them is."""
        mixtures = sorted(product(*self._suspects()), key=lambda mixture: sum(bool(one.words) for one in mixture))
        for mixture in mixtures:
            if any(self.selection(reading, *mixture).fits(held, self.evictable) for reading in readings):
                return [one.words for one in mixture if one.words]
        return []

    def _suspects(self) -> Iterator[tuple[Reading, ...]]:
        """Groups of known mistakes, of which each may be made or not."""
        caches, length = self.caches, self.keys.shape[2]
        rounded = as_bfloat16(caches.omega)
        off = abs(rounded / caches.omega - 1).max()
        omega = [Reading(f"omega is rounded to bf16 (relative error {off:.1%})", {"omega": rounded})]
        if caches.theta != 1e4:
            fallback = "RoPE base 10000 is used, not the model's own"
            omega.append(Reading(fallback, {"omega": frequencies(1e4)}))
        yield Reading(), *omega
        if caches.group > 1:
            words = "the statistics of a group's query heads are averaged instead of taking the maximum of their scores"
            yield Reading(), Reading(words, {"averaged": True})
        positions = {self.t - 1: "one less", length: "the length of the cache", 0: "0"}
        yield (
            Reading(),
            *(
                Reading(f"the position of the next token is {words} instead of {self.t}", {"t": t})
                for t, words in positions.items()
                if t != self.t
            ),
        )
        yield (
            Reading(),
            *(
                Reading(f"{name}={value} is ignored", {"options": {k: v for k, v in self.options.items() if k != name}})
                for name, value in self.options.items()
            ),
        )


def unsorted(kept: Kept) -> int:
    """How many of the kept indices do not ascend."""
    return int((kept.indices.diff(dim=-1) <= 0).sum())


def lowest_first(kept: Kept, measure: Measure) -> None:
    """Of the equal keys of ``tied`` caches, those with the lowest indices must be kept."""
    cause = UNSORTED if unsorted(kept) else ""
    for number, head in enumerate(kept.mask(0)):
        equal = cut(head, number)
        late = int(equal[equal.argmin() :].sum())
        measure("equal keys kept after an evicted one", late, 0, where=f"KV head {number}", cause=cause)


def cut(head: np.ndarray, number: int) -> np.ndarray:
    """Which of the equal keys of ``tied`` caches a KV head keeps. Raises AssertionError unless it is some of them."""
    equal = head[::2]
    assert 0 < equal.sum() < len(equal), (
        f"KV head {number} keeps {equal.sum()} of {len(equal)} equal keys; 24 keys score higher and 24 lower, so it "
        f"must keep {BUDGET - 24}"
    )
    return equal
