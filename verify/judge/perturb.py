"""Plants an error of known size in the result that a check is about to judge, to measure how sharp the check is.

The comparisons of ``tolerance`` and ``keep_set`` pass the subject's result through ``judged``, which returns it
unchanged unless an internal run plants an error. A check that compares in this way is numeric: it allows a
floating-point tolerance, not a count or a yes or no.
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

#: In units of the allowed error: every HARD numeric check must fail on the first and pass on the second.
CAUGHT, TOLERATED = 30.0, 0.3

#: Halvings of the interval from 0 to ``CAUGHT``: they find a limit to 5e-4.
_HALVINGS = 16


class Limit(Strict):
    """The smallest planted error that a comparison caught.

    ``factor`` is in units of the error allowed there, ``absolute`` in units of the result; ``value`` is the number it
    was added to, if known. The factor is infinite if even ``CAUGHT`` was not caught.
    """

    factor: float
    absolute: float
    value: float | None


@dataclass(frozen=True)
class Error(Generic[T]):
    """A result with a planted error of ``factor`` times what is allowed; see ``Limit``."""

    result: T
    factor: float
    absolute: float
    value: float | None


@dataclass
class Plant:
    """The error to plant, in units of what is allowed, and its seed; ``limits`` gets one entry per comparison."""

    factor: float
    seed: int
    limits: list[Limit] = field(default_factory=list)


_ACTIVE: ContextVar[Plant | None] = ContextVar("plant", default=None)


@contextmanager
def planting(plant: Plant) -> Iterator[Plant]:
    """Inside, plant into every result that is judged."""
    token = _ACTIVE.set(plant)
    try:
        yield plant
    finally:
        _ACTIVE.reset(token)


def judged(result: T, put: Callable[[float, int], Error[T] | None], judge: Callable[[T], float]) -> T:
    """``result``, or ``put(factor, seed)``, the result with an error, if one is planted.

    ``judge`` returns the used share of what is allowed: at most 1 passes, and NaN does not.
    """
    plant = _ACTIVE.get()
    if plant is None:
        return result
    error = put(plant.factor, plant.seed)
    if error is None:
        return result

    def of_size(factor: float) -> Error[T]:
        found = put(factor, plant.seed)
        assert found is not None  # the seed, not the size of the error, decides which element is off
        return found

    plant.limits.append(_limit(of_size, judge))
    return error.result


def element(
    errors: np.ndarray, allowed: np.ndarray, result: np.ndarray | None
) -> Callable[[float, int], Error[np.ndarray] | None]:
    """Adds an error to one element whose allowed error is not 0, chosen by the seed. ``errors`` are those of ``result``
    where it is given.
    """

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
