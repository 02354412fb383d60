"""Pictures of keep sets: which tokens a round kept, next to those that the oracle keeps."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from pydantic import Field, model_validator

from verify.record.strict import Strict

#: How many keep sets a result has at most: those that differ most from the oracle's.
MOST = 4

#: The keep sets of the running check.
_SHOWN: list[KeptSet] = []


class KeptSet(Strict):
    """One keep set of one round over ``tokens`` tokens, in the order of their positions.

    ``kept``, ``oracle`` and ``protected`` have a bit for each token, as hexadecimal digits: the first token is the
    highest bit of the first digit, and the last digit is filled with zeros. ``oracle`` is the oracle's keep set of the
    same size; tokens whose scores differ by less than their error may be swapped in a right one.
    """

    name: str = Field(min_length=1)
    tokens: int = Field(ge=1, le=1 << 20)
    kept: str
    oracle: str
    protected: str

    @model_validator(mode="after")
    def _bits(self) -> KeptSet:
        digits, spare = -(-self.tokens // 4), -self.tokens % 4
        for name in ("kept", "oracle", "protected"):
            text = getattr(self, name)
            if len(text) != digits or text.strip("0123456789abcdef") or int(text, 16) % (1 << spare):
                raise ValueError(f"{self.name}: {name} does not have a bit for each of {self.tokens} tokens")
        if sum(self.of("kept")) != sum(self.of("oracle")):
            raise ValueError(f"{self.name}: the oracle's keep set has another size")
        return self

    @classmethod
    def between(cls, name: str, kept: Sequence[bool], oracle: Sequence[bool], protected: Sequence[bool]) -> KeptSet:
        """The keep set from a truth value for each token."""
        packed = {"kept": _hex(kept), "oracle": _hex(oracle), "protected": _hex(protected)}
        return cls(name=name, tokens=len(kept), **packed)

    def of(self, name: str) -> list[bool]:
        """``kept``, ``oracle`` or ``protected`` as a truth value for each token."""
        bits = (digit >> place & 1 for digit in (int(one, 16) for one in getattr(self, name)) for place in (3, 2, 1, 0))
        return [bool(bit) for bit in bits][: self.tokens]

    @property
    def swapped(self) -> int:
        """How many tokens it keeps that the oracle evicts."""
        return sum(ours and not theirs for ours, theirs in zip(self.of("kept"), self.of("oracle"), strict=True))


def _hex(bits: Iterable[bool]) -> str:
    text = "".join("1" if bit else "0" for bit in bits)
    return "".join(f"{int(text[start : start + 4].ljust(4, '0'), 2):x}" for start in range(0, len(text), 4))


def show(one: KeptSet) -> None:
    """Note a keep set of the running check."""
    _SHOWN.append(one)


def begin() -> None:
    """A check begins: forget the keep sets of the one before."""
    _SHOWN.clear()


def shown(said: str = "") -> list[KeptSet]:
    """The keep sets of the check that just ended: the one that its message names, and then those which differ most from
    the oracle's; of equal ones, the first.
    """
    named = [f", {one.name};" in f"{said};" for one in _SHOWN]
    worst = sorted(range(len(_SHOWN)), key=lambda number: (not named[number], -_SHOWN[number].swapped, number))[:MOST]
    return [_SHOWN[number] for number in sorted(worst)]


@contextmanager
def aside() -> Iterator[None]:
    """Inside, keep sets are looked at to understand a failure, and are not noted."""
    before = len(_SHOWN)
    try:
        yield
    finally:
        del _SHOWN[before:]
