"""Phase 6, tiny models: what a patch must do where the embedded model is not enough, each within about a second.

The models and their statistics are drawn at random. The RoPE base is none that an implementation falls back to.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from verify import Measure, check
from verify.judge.tolerance import ATTENTION_LOG_PROB
from verify.model.live_case import judge
from verify.model.live_model import LiveModel
from verify.model.observed import physical_length, positions_noted, require_counting
from verify.model.settings import BUDGET, DIVIDE, EVICT_PROMPT, FED, NEAR, PADDED, PATCHED, PER_LAYER_PER_HEAD, PROMPT
from verify.model.tiny import tiny, tokens
from verify.subject.refusal import refusable
from verify.subject.subject import Subject

#: Makes a tiny model for the running check; its arguments are those of ``tiny``.
Make = Callable[..., LiveModel]


@pytest.fixture
def make(subject: Subject, device: str, seed: int, tmp_path: Path) -> Make:
    return lambda name="model", **shape: tiny(tmp_path / name, subject, device, seed, **shape)


#: The mode with the most keep sets, which shows most.
_EVERY_SET = {**EVICT_PROMPT, **PER_LAYER_PER_HEAD}

_KEPT = {
    "tolerance": "The oracle's set; scores closer than twice the class B error may swap (verify/judge/keep_set.py).",
    "reason": "A wrong keep set raises no error, and text stays fluent a while.",
}


def _first_round(live: LiveModel, seed: int, **options: Any) -> None:
    """Patch the model and run it until its first round."""
    live.apply(**options)
    assert next(live.rounds(tokens(live, FED, seed), NEAR), None) is not None, f"no round within {FED} tokens"


def _judge_model(case: str, make: Make, seed: int, measure: Measure, **shape: Any) -> None:
    """The rounds of a model of this shape must be the oracle's, unless it is refused and a plain one is not."""
    live, plain = make(**shape), make("plain")
    options = live.offered(_EVERY_SET)
    with refusable(live.subject, f"model={case}", lambda: _first_round(plain, seed, **options)):
        live.apply(**options)
        judge(live, live.rounds(tokens(live, FED, seed), NEAR), options, measure, prompt=NEAR, rounds=3)


_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
_LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 1024,
}  # fmt: skip
_ROPE = {
    **_KEPT,
    "claim": "The keep sets are the oracle's, with the frequencies and the attention scaling of the live model.",
    "remedy": "Compare omega with the live model's inv_freq; look for a RoPE that is built from the base alone.",
}


@check("p6.rope", gate="hard", needs=PATCHED, cases={"base": {}, "llama3": _LLAMA3, "yarn": _YARN}, **_ROPE)
def test_rope(case: dict[str, Any], make: Make, seed: int, measure: Measure, request: pytest.FixtureRequest) -> None:
    _judge_model(request.node.callspec.id, make, seed, measure, rope=case)


@check(
    "p6.rope_layout", gate="soft", needs=PATCHED,
    # the published statistics have no place for the mean of dims that are not rotated
    cases={
        "interleaved": {"kind": "glm", "style": "interleaved", "rope": {"partial_rotary_factor": 1.0}},
        "partial": {"kind": "phi3", "rope": {"partial_rotary_factor": 0.5}},
    },
    **{**_ROPE, "claim": "A model that pairs neighbouring dims, or rotates only some, is compressed as the oracle "
    "says, or refused."},
)  # fmt: skip
def test_rope_layout(
    case: dict[str, Any], make: Make, seed: int, measure: Measure, request: pytest.FixtureRequest
) -> None:
    _judge_model(request.node.callspec.id, make, seed, measure, **case)


@check(
    "p6.bfloat16", gate="hard", needs=PATCHED, cases={"per_layer_per_head": _EVERY_SET, "per_head": EVICT_PROMPT},
    **{**_KEPT, "claim": "A bfloat16 model keeps the tokens that the oracle selects from its own bfloat16 keys.",
    "remedy": "Widen the keys to float32 before anything is computed, and never round omega to the model's dtype."},
)  # fmt: skip
def test_bfloat16(case: dict[str, Any], make: Make, seed: int, measure: Measure) -> None:
    live = make(dtype="bfloat16", head_dim=32)
    options = live.offered(case)
    live.patch(**options)
    judge(live, live.rounds(tokens(live, FED, seed), NEAR), options, measure, prompt=NEAR, rounds=3)


@check(
    "p6.window", gate="soft", needs=PATCHED,
    cases={"evictable_prompt": _EVERY_SET, "protected_prompt": {"kv_budget": BUDGET, **PER_LAYER_PER_HEAD}},
    **{**_KEPT, "claim": "The newest window_size tokens are protected, no more and no fewer, and have no part in the "
    "z-score.", "remedy": "Count the window from the newest token held; it ends with that token."},
)  # fmt: skip
def test_window(case: dict[str, Any], make: Make, seed: int, measure: Measure) -> None:
    live = make()
    options = {**live.offered(case), "window_size": 7}
    live.patch(**options)
    judge(live, live.rounds(tokens(live, FED, seed), PROMPT), options, measure, prompt=PROMPT, rounds=3)


#: More tokens than the budget, and so many more that every lawful reading of the budget has a round.
_LONG, _LONG_FED = BUDGET + 36, 2 * BUDGET + 36 + 3 * DIVIDE


@check(
    "p6.prompt_over_budget", gate="hard", needs=PATCHED, cases={"protected": False, "evictable": True},
    **{**_KEPT, "claim": "A prompt longer than the budget is compressed like the rest, or, if it is protected, stays "
    "whole; or the patch refuses it.",
    "reason": "A prompt that is cut off, or newer tokens that all vanish, leave the model without its question.",
    "remedy": "Protected tokens are never evicted: a round keeps the larger of the budget and what is protected."},
)  # fmt: skip
def test_prompt_over_the_budget(
    case: bool, make: Make, seed: int, choose: Callable[[str], None], measure: Measure
) -> None:
    live, options = make(), {"kv_budget": BUDGET, "allow_prefill_compression": case}
    ids = tokens(live, _LONG_FED, seed)
    if case:
        live.patch(**options)
        judge(live, live.rounds(ids, _LONG), options, measure, prompt=_LONG, rounds=2)
        return
    control = make("plain")
    with refusable(
        live.subject, "protected prompt longer than the budget", lambda: _first_round(control, seed, **options)
    ):
        live.apply(**options)
        rounds = list(live.rounds(ids, _LONG))
    assert rounds, f"no round happened in {_LONG_FED} tokens at a budget of {BUDGET}"
    extra = set()
    for number, one in enumerate(rounds, start=1):
        lost = ~one.kept[..., :_LONG]
        layer, head = divmod(int(lost.sum(-1).argmax()), lost.shape[1])
        measure(
            "prompt tokens evicted", int(lost.sum(-1).max()), 0, unit="tokens",
            where=f"round {number}, layer {layer}, KV head {head}; it keeps {int(one.kept[layer, head].sum())} tokens",
        )  # fmt: skip
        extra |= {*(one.kept.sum(-1) - _LONG).flatten().tolist()}
        measure("tokens kept besides the prompt", max(extra), BUDGET, unit="tokens", where=f"round {number}")
    choose(f"besides a protected prompt longer than the budget a round keeps {sorted(extra)} tokens")


@check(
    "p6.chunked_prompt", gate="hard", needs=PATCHED,
    # options, and the tokens of each step before those of one token
    cases={
        "protected": ({"kv_budget": BUDGET, **PER_LAYER_PER_HEAD}, (20, 20, 20)),
        "evictable": (_EVERY_SET, (37, 37, 37)),
    },
    **{**_KEPT, "claim": "A prompt in several steps is one prompt: protected as a whole, or compressed as the oracle "
    "says in and after each step.",
    "reason": "Engines feed long prompts in chunks; with only the first protected, the question itself is evicted.",
    "remedy": "Let the prompt end where the first step of one token begins."},
)  # fmt: skip
def test_prompt_in_chunks(
    case: tuple[dict[str, Any], tuple[int, ...]], make: Make, seed: int, measure: Measure
) -> None:
    (given, steps), live = case, make()
    options = live.offered(given)
    live.patch(**options)
    ids = tokens(live, 150, seed)
    with (
        positions_noted(live.model) as positions,
        refusable(live.subject, "a prompt in several steps", lambda: list(live.feed(ids[:, :NEAR], NEAR - 1))),
    ):
        judge(live, live.rounds(ids, *steps), options, measure, prompt=sum(steps), rounds=3)
    require_counting(positions)


#: One layer, so that a cached key and value depend on their own token alone, and one KV head, so that there is one set.
_ONE_SET: dict[str, Any] = {"num_hidden_layers": 1, "num_key_value_heads": 1}


@check(
    "p6.retained", gate="hard", needs=PATCHED,
    # tokens of the step that is judged; the last one is the first of its sequence
    cases={"step": 1, "chunk": 2 * DIVIDE, "prompt": FED},
    claim="Every query attends to the tokens that were held when its step began, and to the older ones of its step, as "
    "a model without eviction attends to them alone: RoPE is relative, so their distances count and nothing else.",
    reason="A round inside the step takes keys from that step's own queries, and a position that follows the length of "
    "the cache turns every later key; both leave a fluent text.",
    tolerance="1e-3 on float32 log-probabilities: the same terms, summed in another order.",
    remedy="Evict after the step, never within it; count positions by the tokens seen, not by those held.",
)  # fmt: skip
def test_retained(case: int, make: Make, seed: int, measure: Measure) -> None:
    import torch

    live, plain = make(**_ONE_SET), make("plain", **_ONE_SET)
    live.patch(**live.offered(EVICT_PROMPT))
    ids, cache, held = tokens(live, 2 * FED, seed), live.new_cache(), torch.zeros(0, dtype=torch.long)
    seen = 0
    if case != FED:
        round_, cache = live.first_round(ids, NEAR)
        seen, held = round_.seen, torch.from_numpy(round_.kept[0, 0].nonzero()[0])
    chunk = ids[:, seen : seen + case]
    with refusable(live.subject, "several tokens in a step", lambda: list(live.feed(ids[:, :NEAR], PROMPT))):
        got = live.logits(chunk, cache)
    positions = torch.cat([held, torch.arange(seen, seen + case)])
    want = plain.logits(torch.cat([ids[:, held], chunk], 1), None, position_ids=(positions - positions[0])[None])
    off = (got - want[:, -case:]).abs().amax(-1)[0]
    measure(
        "difference of log-probabilities", float(off.max()), ATTENTION_LOG_PROB,
        where=f"token {int(off.argmax())} of {case}, {len(held)} of {seen} earlier tokens held",
    )  # fmt: skip


#: New tokens of each row: enough for three rounds.
_NEW = 3 * DIVIDE


@check(
    "p6.padded_rounds", gate="hard", needs=PATCHED,
    # tokens of the two prompts, options
    cases={
        "pads_held": ((100, 84), {**EVICT_PROMPT, **PER_LAYER_PER_HEAD}),
        "pads_held_protected": ((60, 44), {"kv_budget": 16, "count_prompt_tokens": False}),
        "unequal_prompts": ((60, 44), {"kv_budget": BUDGET}),
    },
    claim="A row of a batch generates the same tokens as alone when a round comes while its padding is held, and when "
    "protected prompts differ in length.",
    reason="Padding that is scored, kept or counted moves every later eviction of its row, and no number looks wrong.",
    tolerance="Token ids are equal; in float32, gaps between scores or logits are far above their rounding errors.",
    remedy="Take length, prompt, protected range and z-score region of each row from its own real tokens.",
)  # fmt: skip
def test_padded_rounds(case: tuple[tuple[int, int], dict[str, Any]], make: Make, seed: int, measure: Measure) -> None:
    import torch

    (sizes, given), live = case, make()
    options = live.offered(given)
    longest = max(sizes)
    rows = [tokens(live, size, seed + row) for row, size in enumerate(sizes)]
    pads = [longest - size for size in sizes]
    together = {
        "input_ids": torch.cat([torch.nn.functional.pad(ids, (n, 0)) for ids, n in zip(rows, pads, strict=True)]),
        "attention_mask": torch.tensor([[0] * n + [1] * (longest - n) for n in pads], device=rows[0].device),
    }
    live.patch(**options)
    with refusable(live.subject, "a batch of two rows", lambda: live.generate({"input_ids": rows[0]}, 2)):
        got = live.generate(together, _NEW)
    for row, ids in enumerate(rows):
        alone = live.generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, _NEW)
        differs = (got[row] != alone[0]).nonzero()[:, 0].tolist()
        measure(
            "tokens that differ", len(differs), 0,
            where=f"row {row} of prompts {sizes}" + (f", from new token {differs[0]}" if differs else ""),
            cause=PADDED if pads[row] else "",
        )  # fmt: skip
        held = [physical_length(cache) for _, cache in live.decode({"input_ids": ids}, _NEW)]
        shrank = [after < before for before, after in pairwise([ids.shape[1], *held])]
        assert any(shrank), f"row {row} alone had no round in {ids.shape[1]} + {_NEW} tokens, so this shows nothing"
