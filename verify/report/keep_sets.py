"""Keep sets in words, and the result whose keep sets a report about a check shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from verify.record.pictures import KeptSet
from verify.record.schema import CheckResult, Verdict
from verify.report.matrix import count, listed

#: How many positions are named; the others are only counted.
_NAMED = 4


def kept_words(one: KeptSet) -> str:
    """A keep set in a sentence, such as ``KV head 1: 64 of 80 tokens kept, 1 differs from the oracle: 7 is kept instead
    of 3; 16 protected``.
    """
    kept, oracle = one.of("kept"), one.of("oracle")
    wrong = [at for at in range(one.tokens) if kept[at] and not oracle[at]]
    lost = [at for at in range(one.tokens) if oracle[at] and not kept[at]]
    told = f"{one.name}: {sum(kept)} of {count(one.tokens, 'token')} kept, "
    told += f"{len(wrong) or 'none'} {'differs' if len(wrong) < 2 else 'differ'} from the oracle"
    if wrong:
        told += f": {_places(wrong)} {'is' if len(wrong) == 1 else 'are'} kept instead of {_places(lost)}"
    protected = sum(one.of("protected"))
    return f"{told}; {protected} protected" if protected else told


def _places(places: Sequence[int]) -> str:
    more = len(places) - _NAMED
    return listed([*map(str, places[:_NAMED]), *([f"{more} more"] if more > 0 else [])])


def most_telling(results: Iterable[CheckResult]) -> CheckResult | None:
    """The first of ``results`` that has keep sets and did not pass, or else the first that has some."""
    found = [one for one in results if one.kept]
    return next((one for one in found if one.verdict is not Verdict.PASS), found[0] if found else None)
