"""The comparison of signatures: what counts as the published one."""

from __future__ import annotations

import pytest

from verify.subject.published import Name, signature_differs

_NAME = Name("m", "f", "a, b=2, c='x'")


def _same(a, b=2, c="x"): ...
def _more(a, b=2, c="x", *, d=None): ...
def _positional_extra(a, b=2, c="x", d=None): ...
def _required_extra(a, b=2, c="x", *, d): ...
def _reordered(a, c="x", b=2): ...
def _default(a, b=3, c="x"): ...
def _missing(a, b=2): ...


@pytest.mark.parametrize("found", [_same, _more])
def test_the_published_signature_and_keyword_only_additions_are_accepted(found) -> None:
    assert signature_differs(_NAME, found) == ""


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (_positional_extra, "d is not published"),
        (_required_extra, "d is not published"),
        (_reordered, "parameter 2 is c, published is b"),
        (_default, "b has default 3, published is 2"),
        (_missing, "parameter 3 is nothing, published is c"),
    ],
)
def test_what_differs_is_named(found, words: str) -> None:
    assert words in signature_differs(_NAME, found)
