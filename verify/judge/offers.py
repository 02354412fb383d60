"""What a scoring function takes, found by asking it, so that a subject is judged within what it offers.

A refusal (``verify/subject/refusal.py``) counts only if a plainer problem is accepted. Which property is refused is
found by changing one at a time. Properties that a check does not test are then replaced by ones that are taken, and
random problems are drawn within them. A function that refuses nothing is never asked.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

from verify.errors import Refused, Wrong
from verify.judge.problems import CHOICES, OFFSETS_17, Problem, Shape, drawn, in_words, make
from verify.record.causes import NOTHING
from verify.subject.refusal import refusal
from verify.subject.subject import Subject

#: The properties that a subject may narrow, with the values that are tried. The first value is the plainest.
PROPERTIES: Mapping[str, tuple[Any, ...]] = {
    "offsets": (OFFSETS_17, (1.0, 2.0, 4.0), (1.0,)),
    "dtype": ("float32", "bfloat16", "float16"),
    "aggregation": ("mean", "max"),
    "style": ("half", "interleaved"),
    "d": (128, 64, 96, 256),
    "b": (1, 2, 3),
    "h": (2, 1, 3),
    "g": (1, 3),
    "strides": ("contiguous", "transposed", "sliced", "spread"),
    "disable_mlr": (False, True),
    "disable_trig": (False, True),
    "low_norm": (False, True),
    "weights": ("ones", "drawn"),
}

#: Tried together until one is accepted; a scorer may take one dtype or one set of offsets only.
_TOGETHER = ("offsets", "dtype", "aggregation", "style", "d", "weights")

_PLAIN = Shape(n=33, t=64)


def tested(shape: Shape, usual: Shape) -> set[str]:
    """The properties that a check with ``shape`` is about: those that differ from ``usual``."""
    return {name for name in PROPERTIES if getattr(shape, name) != getattr(usual, name)}


def require(declared: Mapping[str, tuple[Any, ...]], here: Mapping[str, Any]) -> None:
    """Raise Refused if one of the properties ``here`` has a value that is ``declared`` not to be taken."""
    if part := _outside(declared, here):
        raise Refused(f"{part}: not offered", part)


def _outside(values: Mapping[str, tuple[Any, ...]], here: Mapping[str, Any]) -> str:
    """The first property ``here`` whose value is not among ``values``, in words; empty if each is."""
    return next((in_words(name, here[name]) for name in values if name in here and here[name] not in values[name]), "")


@dataclass(eq=False)
class Offers:
    """What one scoring function takes. ``call(problem)`` calls it; ``declared`` are the values that its author says it
    takes, by property, and ``values`` those declared or found so far; a property that is not there takes every value.
    """

    subject: Subject
    call: Callable[[Problem], Any]
    device: str
    declared: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    values: dict[str, tuple[Any, ...]] = field(init=False)
    asked: bool = False
    _control: Shape | None = None
    _plainest: str = ""  #: what the plainest problem raised

    def __post_init__(self) -> None:
        self.values = dict(self.declared)

    def taken(self, name: str) -> tuple[Any, ...]:
        """The values of a property that are taken, as far as that is known."""
        return self.values.get(name, PROPERTIES[name])

    def require(self, shape: Shape) -> None:
        """Raise Refused if ``shape``, which must stay as it is, has a property that is declared not to be taken."""
        require(self.declared, vars(shape))

    def judge(self, error: Exception, at: str, shape: Shape, further: Iterable[str] = ()) -> None:
        """Raise Refused for a refusal of ``shape`` at the line ``at``, or Wrong if no problem at all is accepted.

        ``further`` are arguments that a plainer call does not have.
        """
        self.ask()
        if self._control is None:
            raise Wrong(f"{NOTHING}: {self._plainest}", NOTHING) from error
        aspect = self.refused_part(shape) or ", ".join(further) or f"the combination {shape.told()}"
        raise Refused(f"{aspect}: refused at {at} ({type(error).__name__}: {error})", aspect) from error

    def ask(self) -> None:
        """Find out what is taken; does nothing the second time."""
        if self.asked:
            return
        self.asked = True
        tried = {name: self.values.get(name, PROPERTIES[name]) for name in _TOGETHER}
        for values in product(*tried.values()):
            shape = self.fit(replace(_PLAIN, **dict(zip(tried, values, strict=True))), ())
            if self._takes(shape):
                self._control = shape
                break
        if self._control is None:
            return
        for name, values in PROPERTIES.items():
            declared = self.values.get(name, values)
            taken = tuple(one for one in declared if self._takes(replace(self._control, **{name: one}), lenient=True))
            if len(taken) < len(values):
                self.values[name] = taken

    def _takes(self, shape: Shape, *, lenient: bool = False) -> bool:
        """Whether the call returns. With ``lenient``, a crash counts as taken, so that a check shows it."""
        try:
            self.call(make(shape, 0, self.device))
        except Exception as error:  # a subject may crash in any way
            at = refusal(error, self.subject)
            self._plainest = self._plainest or f"{type(error).__name__}: {error}{f' ({at})' if at else ''}"
            return lenient and not at
        return True

    def refused_part(self, shape: Shape) -> str:
        """The first property of ``shape`` that is not taken, in words; empty if each is taken."""
        return _outside(self.values, vars(shape))

    def fit(self, shape: Shape, tested: Collection[str]) -> Shape:
        """``shape`` with every property that is not taken replaced by one that is. Raises Refused if it is one of those
        that the check tests.
        """
        for name, values in self.values.items():
            value = getattr(shape, name)
            if value in values:
                continue
            if name in tested or not values:
                part = self.refused_part(replace(shape, **{n: v[0] for n, v in self.values.items() if n != name and v}))
                raise Refused(f"{part}: not offered", part)
            shape = replace(shape, **{name: values[0]})
        return shape

    def fitted(self, shape: Shape, usual: Shape) -> Iterator[Attempt]:
        """One attempt to judge ``shape``, which tests the properties in which it differs from ``usual``, and a second
        one within what is taken if the first is refused. Raises Refused if a tested property is not taken.
        """
        yield from self._until_judged(lambda: [self.fit(shape, tested(shape, usual))])

    def several(self, shapes: Iterable[Shape]) -> Iterator[Attempt]:
        """Attempts to judge ``shapes``, each within what is taken. Raises Refused if every one of them was refused."""
        return self._until_judged(lambda: list(dict.fromkeys(self.fit(shape, ()) for shape in shapes)))

    def drawn(self, seed: int, count: int, part: slice, **choices: tuple[Any, ...]) -> Iterator[Attempt]:
        """Attempts to judge a ``part`` of up to ``count`` problems drawn from ``seed`` within what is taken.

        Raises Refused if every one of them was refused, or if none of the ``choices`` is taken.
        """

        def within() -> list[Shape]:
            taken = {}
            for name, values in self.values.items():
                wanted = choices.get(name, CHOICES.get(name, (getattr(_PLAIN, name),)))
                taken[name] = tuple(one for one in wanted if one in values)
                if not taken[name]:
                    if name in choices:
                        self.fit(replace(_PLAIN, **{name: wanted[0]}), {name})
                    taken[name] = values
            return drawn(seed, count, **choices | taken)[part]

        yield from self._until_judged(within)

    def _until_judged(self, shapes: Callable[[], list[Shape]]) -> Iterator[Attempt]:
        refused: Refused | None = None
        wrong: Wrong | None = None
        judged = 0
        for _ in range(2):
            known = dict(self.values)
            for shape in shapes():
                attempt = Attempt(shape)
                yield attempt
                judged += attempt.refused is None
                refused = attempt.refused or refused
                wrong = wrong or attempt.wrong
            if refused is None or known == self.values:
                break
        if wrong is not None:
            raise wrong
        if not judged and refused is not None:
            raise refused


@dataclass
class Attempt:
    """One problem to judge: ``with attempt as shape: ...``.

    A refusal ends the block and is noted in ``refused``; so is a failure of a known cause in ``wrong``, which must not
    hide what other problems show.
    """

    shape: Shape
    refused: Refused | None = None
    wrong: Wrong | None = None

    def __enter__(self) -> Shape:
        return self.shape

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        if isinstance(error, Refused):
            self.refused = error
        elif isinstance(error, Wrong) and error.cause:
            self.wrong = error
        return bool(self.refused or self.wrong)
