"""Judges the rounds of a live model against the oracle: what is protected, how many tokens stay, and which."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import suppress
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from verify.checks import Measure
from verify.errors import Wrong
from verify.model.live_model import LiveModel
from verify.model.observed import Round
from verify.model.settings import EVICT_PROMPT, FED, NEAR, PROMPT_STEP
from verify.model.tiny import tiny, tokens
from verify.record import pictures, trail
from verify.record.causes import ONE_FOR_ALL, RANKED
from verify.record.pictures import KeptSet

if TYPE_CHECKING:
    import numpy as np

    from verify.judge.keep_set import Selection


def mode_of(options: Mapping[str, Any]) -> str:
    """The mode that the options of a patch choose."""
    if "pruning_mode" in options:
        return options["pruning_mode"]
    if options.get("per_layer_perhead_pruning"):
        return "per_layer_per_head"
    return "per_head" if options.get("per_head_pruning") else "union"


def judge(
    live: LiveModel, taken: Generator[Round, None, None], options: Mapping[str, Any], measure: Measure, *,
    prompt: int, rounds: int, layers: Sequence[int] | None = None,
) -> None:  # fmt: skip
    """Compare the first ``rounds`` of ``taken`` with the oracle, for a prompt of ``prompt`` tokens.

    ``options`` are those of the patch; ``layers[i]`` is the layer whose statistics rank layer i. Raises AssertionError
    if fewer rounds happen, heads that share a set hold different tokens, or a set lacks a protected token or has
    another size than the budget.
    """
    given, count = {**live.defaults, **options}, 0
    for round_ in islice(taken, rounds):
        count += 1
        _judge_round(live, round_, count, given, measure, prompt, layers)
    taken.close()
    if count != rounds:
        due = count == 0 and prompt >= given["kv_budget"] + given["divide_length"]
        raise Wrong(
            f"{count} of {rounds} rounds happened after a prompt of {prompt} tokens: the budget is "
            f"{given['kv_budget']}, divide_length {given['divide_length']}; look at the trigger",
            PROMPT_STEP if due and given.get("allow_prefill_compression") else "",
        )


def _judge_round(
    live: LiveModel, round_: Round, number: int, given: Mapping[str, Any], measure: Measure, prompt: int,
    layers: Sequence[int] | None,
) -> None:  # fmt: skip
    import numpy as np

    from verify.judge.keep_set import select, sets_of

    mode, window = mode_of(given), given.get("window_size", 0)
    first = 0 if given.get("allow_prefill_compression") else prompt
    limit = given["kv_budget"] + (0 if given.get("count_prompt_tokens") else prompt)
    position = np.arange(round_.seen)
    protected = (position < first) | (position >= round_.seen - window)
    size = max(limit, int(protected.sum()))
    # the prompt first: of two things that are wrong, the lost tokens say more than the number of those that are left
    _require_protected(round_, number, protected, f"prompt {first}, window {window}")
    sizes = round_.kept.sum(-1)
    for layer, head in np.argwhere(sizes != size)[:1].tolist():
        raise AssertionError(
            f"after round {number} layer {layer}, KV head {head} holds {sizes[layer, head]} tokens, expected {size}: "
            f"the budget is {given['kv_budget']}, {int(protected.sum())} are protected"
        )
    sets_of(round_.kept, mode)
    found, groups = [], _sharing(mode, *round_.kept.shape[:2])
    for some, heads in groups:
        held = round_.before[some[0], heads[0]].nonzero()[0]
        cases = [
            live.oracle_case(
                n if layers is None else layers[n], round_.keys[n][:, heads][:, :, held], round_.seen, given, held,
                heads[0] if len(heads) == 1 else None,
            )
            for n in some
        ]  # fmt: skip
        selection = select(
            cases, ~protected[held],
            mode=mode, normalize=given.get("normalize_scores", False),
            group=given.get("layer_perhead_aggregation", "max"),
        )  # fmt: skip
        kept, free = round_.kept[some[0], heads[0]][None, held], ~protected[held]
        inversion = selection.inversion(kept, free)
        which = f"{f'layer {some[0]}' if len(some) == 1 else 'all layers'}, {_told(heads)}"
        found.append((inversion, selection.allowed, which))
        if number == 1:
            parts = (kept[0], _own(selection, kept[0], free), ~free)
            pictures.show(KeptSet.between(which, *(part.tolist() for part in parts)))
    inversion, allowed, where = max(found, key=lambda one: one[0] / one[1])
    first_set, *others = (round_.kept[some[0], heads[0]] for some, heads in groups)
    cause = ONE_FOR_ALL if others and all(np.array_equal(first_set, one) for one in others) else ""
    if not inversion <= allowed:
        cause = cause or _plain(live)
    measure("best evicted over worst kept score", inversion, allowed, where=f"round {number}, {where}", cause=cause)


def _own(selection: Selection, kept: np.ndarray, free: np.ndarray) -> np.ndarray:
    """The oracle's keep set of the size of ``kept``, bool ``[N]``; only ``free`` tokens can be evicted."""
    import numpy as np

    own = kept & ~free
    best_first = np.argsort(np.where(free, -selection.scores[0], np.inf), kind="stable")
    own[best_first[: int((kept & free).sum())]] = True
    return own


#: The cause, if there is one, that a plain model shows, by subject and device.
_PLAIN: dict[tuple[str, str], str] = {}


def _plain(live: LiveModel) -> str:
    """RANKED if the keys of a tiny model are ranked wrongly too, without any option but the recommended ones: then a
    wrong keep set says nothing more about what another check tests.
    """
    key = (live.subject.option, live.model.device.type)
    if key in _PLAIN:
        return _PLAIN[key]
    _PLAIN[key] = ""  # while it is found out
    wrong: list[bool] = []

    def note(name: str, measured: float, allowed: float, **more: Any) -> None:
        wrong.append(not measured <= allowed)

    with (
        TemporaryDirectory() as folder,
        trail.aside(),
        pictures.aside(),
        suppress(Exception),
    ):  # any failure of a subject
        plain = tiny(Path(folder), live.subject, live.model.device.type, 0)
        options = plain.offered(EVICT_PROMPT)
        plain.apply(**options)
        judge(plain, plain.rounds(tokens(plain, FED, 0), NEAR), options, note, prompt=NEAR, rounds=1)
    _PLAIN[key] = RANKED if any(wrong) else ""
    return _PLAIN[key]


def _require_protected(round_: Round, number: int, protected: Any, told: str) -> None:
    lost = round_.before & ~round_.kept & protected
    for layer, head, token in zip(*(axis[:1].tolist() for axis in lost.nonzero()), strict=True):
        raise AssertionError(
            f"round {number} evicted {int(lost[layer, head].sum())} protected tokens of layer {layer}, KV head {head}; "
            f"the first is token {token} ({told}, {round_.seen} tokens seen)"
        )


def _told(heads: list[int]) -> str:
    return f"KV head {heads[0]}" if len(heads) == 1 else "all KV heads"


def _sharing(mode: str, n_layers: int, n_heads: int) -> list[tuple[list[int], list[int]]]:
    """The groups of layers and KV heads that share one keep set in a mode."""
    layers, heads = list(range(n_layers)), list(range(n_heads))
    if mode == "union":
        return [(layers, heads)]
    if mode == "per_head":
        return [(layers, [head]) for head in heads]
    if mode == "per_layer":
        return [([layer], heads) for layer in layers]
    return [([layer], [head]) for layer in layers for head in heads]
