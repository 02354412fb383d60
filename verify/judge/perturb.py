"""An error of known size in what a check is about to judge, so that its sharpness can be measured.

The comparisons of ``tolerance`` and ``keep_set`` pass the subject's result through ``judged``. It comes back as it is,
unless an internal run has put a plant there. A check that compares in this way is numeric: what it allows is a
floating-point tolerance, not a count and not yes or no.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Generic, TypeVar

from verify.record.strict import Strict

if TYPE_CHECKING:
    import numpy as np

T = TypeVar("T")

#: In units of what is allowed: every HARD numeric check fails on the one and passes on the other.
CAUGHT, TOLERATED = 30.0, 0.3

#: Halvings of the interval from 0 to ``CAUGHT`` that find a limit to 5e-4.
_HALVINGS = 16


class Limit(Strict):
    """The smallest planted error that a comparison caught.

    ``factor`` is in units of what is allowed there, ``absolute`` in those of the result, ``value`` what it was added
    to, where that is known. The factor is infinite where even ``CAUGHT`` was not.
    """

    factor: float
    absolute: float
    value: float | None


@dataclass(frozen=True)
class Error(Generic[T]):
    """A result with an error in it, of ``factor`` times what is allowed; see ``Limit``."""

    result: T
    factor: float
    absolute: float
    value: float | None


@dataclass
class Plant:
    """What to plant, in units of what is allowed, and with which seed; ``limits`` has one for each comparison."""

    factor: float
    seed: int
    limits: list[Limit] = field(default_factory=list)


_ACTIVE: ContextVar[Plant | None] = ContextVar("plant", default=None)


@contextmanager
def planting(plant: Plant) -> Iterator[Plant]:
    """Plant into every result that is judged inside."""
    token = _ACTIVE.set(plant)
    try:
        yield plant
    finally:
        _ACTIVE.reset(token)


def judged(result: T, put: Callable[[float, int], Error[T] | None], judge: Callable[[T], float]) -> T:
    """``result``, or what ``put(factor, seed)`` makes of it where something is planted.

    ``judge`` gives how much of what is allowed is used up: at most 1 passes, and NaN does not.
    """
    plant = _ACTIVE.get()
    if plant is None:
        return result
    error = put(plant.factor, plant.seed)
    if error is None:
        return result
    plant.limits.append(_limit(lambda factor: put(factor, plant.seed), judge))
    return error.result


def element(
    errors: np.ndarray, allowed: np.ndarray, result: np.ndarray | None
) -> Callable[[float, int], Error[np.ndarray] | None]:
    """One more error in an element that may be off at all, chosen by the seed; ``result`` is what ``errors`` are in."""

    def put(factor: float, seed: int) -> Error[np.ndarray] | None:
        import numpy as np

        room = np.broadcast_to(allowed, errors.shape)
        places = np.flatnonzero(room)
        if not len(places):
            return None
        place = np.unravel_index(np.random.default_rng(seed).choice(places), errors.shape)
        more, by = errors.copy(), factor * room[place]
        more[place] += by
        return Error(more, factor, float(by), None if result is None else float(result[place]))

    return put


def _limit(put: Callable[[float], Error[T]], judge: Callable[[T], float]) -> Limit:
    def passes(factor: float) -> bool:
        return judge(put(factor).result) <= 1

    low, high = 0.0, CAUGHT
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if passes(middle) else (low, middle)
    smallest = put(high)
    factor = float("inf") if passes(high) else smallest.factor
    return Limit(factor=factor, absolute=smallest.absolute, value=smallest.value)
