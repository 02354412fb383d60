"""Clients that keep a server busy: requests of mixed lengths, some with a shared prompt prefix, some that hang up."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

from verify.serving.server import Answer, Server, answer_of

_NOUNS = ("train", "river", "town", "clock", "market", "letter", "dog", "boat", "storm", "bridge", "garden", "song")
_VERBS = ("finds", "loses", "carries", "hears", "forgets", "follows", "paints", "sells", "hides", "remembers")
_SHARED = "You are telling stories to a child. Keep to plain words, and never end a story before its end. " * 4
#: The share of requests with a common prompt prefix, and of those that hang up before the end of their answer.
_SHARING, _HANGING_UP = 0.3, 0.15


@dataclass
class Load:
    """The result of a load: the complete answers, and how many requests were hung up."""

    answers: list[Answer] = field(default_factory=list)
    hung_up: int = 0


def story(draw: random.Random, sentences: int) -> str:
    """A prompt of about nine tokens per sentence, different for each seed."""
    made = (f"The {draw.choice(_NOUNS)} {draw.choice(_VERBS)} the {draw.choice(_NOUNS)} of a {draw.choice(_NOUNS)}."
            for _ in range(sentences))  # fmt: skip
    return " ".join(made)


def run(server: Server, seed: int, *, clients: int, seconds: float, longest: int, each_s: Callable[[], None]) -> Load:
    """Keep ``clients`` requests in flight for ``seconds``; none has more than ``longest`` tokens including its answer.

    ``each_s`` is called once a second meanwhile. Raises what a client raised.
    """
    until, load = time.monotonic() + seconds, Load()

    def client(number: int) -> None:
        draw = random.Random(f"{seed} {number}")
        while time.monotonic() < until:
            new = draw.randint(20, 400)
            sentences = draw.randint(1, max(1, (longest - new - 120) // 14))
            prompt = (_SHARED if draw.random() < _SHARING else "") + story(draw, sentences)
            if draw.random() < _HANGING_UP:
                _hang_up(server, prompt, new, after=draw.randint(1, new))
                load.hung_up += 1
            else:
                load.answers.append(answer_of(server.complete(prompt, new, ignore_eos=True, logprobs=0)))

    with ThreadPoolExecutor(clients) as pool:
        running = [pool.submit(client, number) for number in range(clients)]
        while not all(one.done() for one in running):
            each_s()
            time.sleep(1)
        for one in running:
            one.result()
    return load


def _hang_up(server: Server, prompt: str, new: int, after: int) -> None:
    body = {"prompt": prompt, "max_tokens": new, "temperature": 0, "ignore_eos": True}
    chunks = server.stream("/v1/completions", body)
    for _ in zip(range(after), chunks, strict=False):
        pass
    chunks.close()
