"""Which published parameters a function takes."""

from typing import Any

from verify.judge.parameters import options, takes
from verify.subject.published import Renamed

_PUBLISHED = ("model", "kv_budget", "disable_trig")


def _patch(model: Any, budget: int, window_size: int = 0) -> None: ...


def _any_option(model: Any, **options: Any) -> None: ...


class _Unreadable:
    __signature__ = "none"

    def __call__(self) -> None: ...


def test_options_have_their_published_names() -> None:
    renamed = Renamed(_patch, ("model", "kv_budget", "divide_length"), {"kv_budget": "budget", "divide_length": None})
    assert options(renamed, _PUBLISHED) == {"model", "kv_budget", "budget", "window_size"}
    assert options(_patch, _PUBLISHED) == {"model", "budget", "window_size"}
    assert {"kv_budget", "disable_trig"} <= {*options(_any_option, _PUBLISHED)}
    assert "window_size" not in options(_any_option, _PUBLISHED)


def test_an_argument_is_not_taken_if_its_author_says_so_and_is_if_nobody_can_tell() -> None:
    assert not takes(Renamed(_any_option, (), {"kv_budget": None}), "kv_budget")
    assert takes(_Unreadable(), "anything")
