"""Keep sets as they are recorded: a bit for each token, and those that differ most from the oracle's."""

from __future__ import annotations

import random

import pytest
from pydantic import ValidationError

from verify.record import pictures
from verify.record.pictures import KeptSet


def _set(name: str, swaps: int, tokens: int = 13) -> KeptSet:
    """A keep set of the first five tokens, of which the oracle has other ones instead of the first ``swaps``."""
    kept = [place < 5 for place in range(tokens)]
    oracle = [(place < 5 and place >= swaps) or 5 <= place < 5 + swaps for place in range(tokens)]
    return KeptSet.between(name, kept, oracle, [place == 4 for place in range(tokens)])


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 63, 64, 321])
def test_what_is_packed_is_what_is_read(tokens: int) -> None:
    drawn = random.Random(tokens)
    kept = [drawn.random() < 0.5 for _ in range(tokens)]
    oracle = drawn.sample(kept, tokens)
    found = KeptSet.between("KV head 0", kept, oracle, [False] * tokens)
    assert (found.of("kept"), found.of("oracle"), found.of("protected")) == (kept, oracle, [False] * tokens)
    assert KeptSet.model_validate_json(found.model_dump_json()) == found


def test_the_first_token_is_the_highest_bit() -> None:
    assert KeptSet.between("x", [True, False, False, True, True], [True] * 3 + [False] * 2, [False] * 5).kept == "98"


def test_a_swapped_token_is_kept_here_and_evicted_by_the_oracle() -> None:
    assert [_set("x", swaps).swapped for swaps in range(4)] == [0, 1, 2, 3]


def test_the_four_that_differ_most_are_recorded_in_their_order() -> None:
    pictures.begin()
    with pictures.aside():
        pictures.show(_set("plain", 4))
    for name, swaps in zip("abcdef", (0, 0, 2, 0, 1, 0), strict=True):
        pictures.show(_set(name, swaps))
    assert [one.name for one in pictures.shown()] == ["a", "b", "c", "e"]
    assert [one.name for one in pictures.shown("measured 2, allowed 1 at round 1, f")] == ["a", "c", "e", "f"]
    pictures.begin()
    assert pictures.shown() == []


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tokens": 17}, "kept does not have a bit for each of 17 tokens"),
        ({"kept": "f80"}, "kept does not have a bit for each of 13 tokens"),
        ({"kept": "f80g"}, "kept does not have a bit"),
        ({"kept": "f801"}, "kept does not have a bit"),
        ({"oracle": "f000"}, "the oracle's keep set has another size"),
    ],
)
def test_what_cannot_be_a_keep_set_is_refused(changed: dict[str, object], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        KeptSet.model_validate(_set("x", 0, 13).model_dump() | changed)
