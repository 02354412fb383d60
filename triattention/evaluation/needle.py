"""Needle retrieval: a sentence with a secret number, hidden in a long text about other things."""

from __future__ import annotations

import random
from typing import NamedTuple

from triattention.evaluation.questions import Question

DEFAULT_WORDS = 1024
MIN_WORDS, MAX_WORDS = 16, 1_000_000

_QUESTION = "What is the secret number that this text mentions?"
_INSTRUCTION = "Reply with the number alone."
_CUE = "The secret number is"

_OPENINGS = (
    "In the evening", "After the rain", "Before the harvest", "Long ago", "On market days", "Now and then",
    "At the end of the road", "Under the old bridge", "When the wind turned", "Early in the spring", "Most of the time",
    "As far as anybody knew",
)  # fmt: skip
_PEOPLE = (
    "baker", "ferryman", "schoolteacher", "carpenter", "gardener", "watchmaker", "shepherd", "postman", "librarian",
    "miller", "sailor", "painter", "beekeeper", "neighbour", "traveller", "weaver", "innkeeper", "clerk", "miner",
    "fiddler",
)  # fmt: skip
_QUALITIES = (
    "patient", "quiet", "cheerful", "tired", "curious", "careful", "stubborn", "young", "gentle", "absent-minded",
    "grey-haired", "hungry", "sleepy", "generous",
)  # fmt: skip
_ACTIONS = (
    "carried", "mended", "painted", "borrowed", "forgot", "described", "cleaned", "admired", "hid", "found", "sold",
    "measured", "wrapped", "polished", "sketched", "watched over",
)  # fmt: skip
_THINGS = (
    "basket", "lantern", "ladder", "letter", "violin", "kettle", "blanket", "bicycle", "map", "barrel", "mirror",
    "boat", "hammer", "umbrella", "clock", "chair", "bell", "rope", "window", "teapot",
)  # fmt: skip
_LOOKS = (
    "wooden", "blue", "heavy", "broken", "little", "rusty", "green", "dusty", "crooked", "shining", "plain", "faded",
    "narrow", "striped",
)  # fmt: skip
_PLACES = (
    "near the harbour", "behind the mill", "in the cellar", "beside the river", "at the edge of the forest",
    "on the hill", "across the square", "in the orchard", "by the garden gate", "under the chestnut trees",
    "along the canal", "in the empty barn", "next to the station", "below the lighthouse",
)  # fmt: skip
_ENDINGS = (
    "and nobody asked why", "while the children were asleep", "because the day was long", "as people had always done",
    "without saying a word", "though it was getting cold", "and went home by the other path", "until the bells rang",
    "with great care", "as if nothing had happened", "and thought of the sea", "while the soup was boiling",
)  # fmt: skip


class Recall(NamedTuple):
    """A needle question for a teacher-forced evaluation.

    ``answer`` starts with a space, so that ``context + answer`` is plain text; a model recalls the needle if it
    predicts the tokens of ``answer`` after those of ``context``. ``depth`` is the requested position of the needle as a
    share of the text's words, 0 at the start and 1 at the end; the needle is at the nearest sentence boundary.
    """

    context: str
    answer: str
    depth: float


class _Needle(NamedTuple):
    text: str
    number: str
    depth: float


def needle_questions(words: int = DEFAULT_WORDS, count: int = 20, seed: int = 0) -> tuple[Question, ...]:
    """``count`` questions on texts of ``words`` words or up to a sentence more, with evenly spaced depths 0 to 1."""
    return tuple(
        Question(f"{needle.text}\n\n{_QUESTION}", needle.number, grader="number", instruction=_INSTRUCTION)
        for needle in _needles(words, count, seed)
    )


def needle_recalls(words: int = DEFAULT_WORDS, count: int = 20, seed: int = 0) -> tuple[Recall, ...]:
    """The needles of ``needle_questions`` as texts to complete, for evaluation without generation."""
    return tuple(
        Recall(f"{needle.text}\n\n{_CUE}", f" {needle.number}", needle.depth) for needle in _needles(words, count, seed)
    )


def _needles(words: int, count: int, seed: int) -> list[_Needle]:
    source = random.Random(f"needle {words} {seed}")
    return [_needle(source, words, depth=place / max(count - 1, 1)) for place in range(count)]


def _needle(source: random.Random, words: int, depth: float) -> _Needle:
    number = str(source.randrange(100_000, 1_000_000))
    needle = f"Remember that the secret number is {number}."
    sentences: list[str] = []
    starts = [0]  # of every sentence, and the end of the last, in words
    while starts[-1] < words - len(needle.split()):
        sentences.append(_sentence(source))
        starts.append(starts[-1] + len(sentences[-1].split()))
    place = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * starts[-1]))
    return _Needle(" ".join([*sentences[:place], needle, *sentences[place:]]), number, depth)


def _sentence(source: random.Random) -> str:
    """A sentence of 12 to 25 words without digits."""
    opening, place, ending = (source.choice(parts) for parts in (_OPENINGS, _PLACES, _ENDINGS))
    who = f"the {source.choice(_QUALITIES)} {source.choice(_PEOPLE)}"
    what = f"{source.choice(_ACTIONS)} the {source.choice(_LOOKS)} {source.choice(_THINGS)}"
    form = source.randrange(3)
    if form == 0:
        return f"{opening}, {who} {what} {place}, {ending}."
    if form == 1:
        return f"{who.capitalize()} {what} {place} {ending}."
    return f"{opening}, {place}, {who} {what}."
