"""The comparison of signatures: what counts as the published one."""

from __future__ import annotations

import pytest

from verify.subject.published import Name, Renamed, signature_differs

_NAME = Name("m", "f", "api", "a, b=2, c='x'")


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


def _theirs(first, second=2): ...
def _anything(**given): ...
def _needs_more(first, second, third): ...


@pytest.mark.parametrize(
    ("found", "names", "words"),
    [
        (_theirs, {"a": "first", "b": "second", "c": None}, ""),
        (_anything, {"a": "first"}, ""),
        (_theirs, {"a": "first", "c": None}, "it has no parameter b; say in [arguments]"),
        (_theirs, {"a": "frist", "b": "second", "c": None}, "it has no parameter frist"),
        (_needs_more, {"a": "first", "b": "second", "c": None}, "its parameter third has no default"),
    ],
)
def test_a_renamed_function_is_judged_by_the_names_that_its_author_gives(found, names, words: str) -> None:
    differs = signature_differs(_NAME, Renamed(found, ("a", "b", "c"), names))
    assert words in differs
    assert bool(words) is bool(differs)
