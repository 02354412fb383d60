"""A live model: what is seen of its cache, what undoes a patch, and what counts as a refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import DynamicCache

from verify.errors import Refused, SubjectLacks
from verify.model import tiny as models
from verify.model.live_case import judge
from verify.model.live_model import LiveModel
from verify.model.settings import BUDGET, EVICT_PROMPT, NEAR
from verify.record.causes import ONE_FOR_ALL, RANKED

Step = Callable[[Any], Any]


class Here:
    """A subject whose patch is a function of this module: ``after`` turns the cache of each step into the next one."""

    folder = Path(__file__).parent
    option = "here"
    patch_offers: dict[str, tuple[Any, ...]] = {}  # noqa: RUF012

    def __init__(self, after: Step) -> None:
        self.after = after

    def owns(self, file: Path) -> bool:
        return file == Path(__file__)

    def attribute(self, module: str, name: str) -> Any:
        return self.apply

    def apply(
        self, model: Any, *, stats_path: str, model_path: str, kv_budget: int, mode: str = "", **more: Any
    ) -> None:
        if mode == "refused":
            raise ValueError("mode is 'refused'")
        if mode == "crash":
            raise KeyError(mode)
        forward = model.forward

        def patched(**given: Any) -> Any:
            out = forward(**given)
            out.past_key_values = self.after(out.past_key_values)
            return out

        model.forward = patched
        model.model.layers[0].register_forward_hook(lambda *_: None)
        model.model.layers[0].self_attn.forward = model.model.layers[0].self_attn.forward


def _newest(cache: Any) -> Any:
    """A new cache with the newest BUDGET tokens, once there are 16 more."""
    made, full = DynamicCache(), cache.layers[0].keys.shape[2] >= BUDGET + 16
    for number, layer in enumerate(cache.layers):
        first = -BUDGET if full else 0
        made.update(layer.keys[:, :, first:], layer.values[:, :, first:], number)
    return made


def _live(folder: Path, after: Step) -> LiveModel:
    return models.tiny(folder, Here(after), "cpu", 1)  # type: ignore[arg-type]


def _rounds(live: LiveModel, count: int = 100, *steps: int) -> list[Any]:
    live.patch(**EVICT_PROMPT)
    return list(live.rounds(models.tokens(live, count, 1), *(steps or (NEAR,))))


def test_rounds_are_seen_in_caches_that_are_made_again_at_every_step(tmp_path: Path) -> None:
    first, second = _rounds(_live(tmp_path, _newest))
    assert (first.seen, second.seen) == (80, 96)
    assert first.before.all()
    for round_ in (first, second):
        assert round_.kept[..., -BUDGET:].all()
        assert round_.kept.sum(-1).tolist() == [[BUDGET] * 2] * 3
    assert second.before[..., 16:].all()
    assert not second.before[..., :16].any()


def test_a_sequence_that_is_fed_at_once_has_no_step_after_it(tmp_path: Path) -> None:
    (only,) = _rounds(_live(tmp_path, _newest), 90, 90)
    assert only.seen == 90


@pytest.mark.parametrize(
    ("after", "said"),
    [
        (lambda cache: None, "returns a NoneType that shows no keys by layer"),
        (lambda cache: tuple(cache.layers), "returns a tuple that shows no keys"),
    ],
)
def test_a_cache_that_shows_nothing_is_not_observed(after: Step, said: str, tmp_path: Path) -> None:
    with pytest.raises(SubjectLacks, match=f"^not observed: .*{said}"):
        _rounds(_live(tmp_path, after))


def test_keys_that_pass_by_the_caches_of_transformers_are_not_observed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Own(DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *args: Any, **kwargs: Any) -> Any:
            while len(self.layers) <= layer:
                self.layers.append(self.layer_class_to_replicate())
            return self.layers[layer].update(keys, values)

    live = _live(tmp_path, lambda cache: cache)
    monkeypatch.setattr(LiveModel, "new_cache", lambda self: Own())
    with pytest.raises(SubjectLacks, match=r"^not observed: layer 0 has passed 0 of 72 tokens"):
        _rounds(live)


def _spoiled(change: Callable[[Any], None]) -> Step:
    def after(cache: Any) -> Any:
        made = _newest(cache)
        if made.layers[0].keys.shape[2] < cache.layers[0].keys.shape[2]:
            change(made.layers[1])
        return made

    return after


def _shift_values(layer: Any) -> None:
    layer.values = layer.values.roll(1, 2)


def _round_keys(layer: Any) -> None:
    layer.keys = layer.keys.bfloat16().float()


def _lose_a_value(layer: Any) -> None:
    layer.values = layer.values[:, :, 1:]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_shift_values, "layer 1, KV head 0 holds values of other tokens than its keys"),
        (_round_keys, "layer 1, KV head 0: .* held keys equal no cached key bit for bit"),
        (_lose_a_value, r"layer 1 holds values of shape \[1, 2, 63, 16\]"),
    ],
)
def test_wrong_rows_are_named(change: Callable[[Any], None], said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        _rounds(_live(tmp_path, _spoiled(change)))


def test_a_patch_is_undone_in_every_part_of_the_model(tmp_path: Path) -> None:
    live = _live(tmp_path, _newest)
    first, names = live.model.model.layers[0], set(vars(live.model))
    for _ in range(2):
        live.patch(**EVICT_PROMPT)
        assert len(first._forward_hooks) == 1
    live.restore()
    assert set(vars(live.model)) == names
    assert not first._forward_hooks
    assert "forward" not in vars(first.self_attn)


def _judge(live: LiveModel, prompt: int, rounds: int, **options: Any) -> list[tuple[float, float, str]]:
    measured = []
    live.patch(**EVICT_PROMPT)
    judge(
        live, live.rounds(models.tokens(live, 100, 1), NEAR), {**EVICT_PROMPT, **options},
        lambda name, got, allowed, *, unit="", where="", cause="": measured.append((got, allowed, where)),
        prompt=prompt, rounds=rounds,
    )  # fmt: skip
    return measured


def test_the_judge_measures_the_worst_set_of_each_round(tmp_path: Path) -> None:
    found = _judge(_live(tmp_path, _newest), NEAR, 2, per_head_pruning=False, per_layer_perhead_pruning=True)
    assert [where.partition(",")[0] for _, _, where in found] == ["round 1", "round 2"]
    assert all(got > allowed for got, allowed, _ in found)


@pytest.mark.parametrize(
    ("options", "rounds", "said"),
    [
        ({}, 3, "2 of 3 rounds happened after a prompt of 72 tokens"),
        ({"kv_budget": 63}, 1, "after round 1 layer 0, KV head 0 holds 64 tokens, expected 63"),
        (
            {"allow_prefill_compression": False}, 1,
            r"evicted 16 protected tokens of layer 0, KV head 0; the first is token 0 \(prompt 72",
        ),
    ],
)  # fmt: skip
def test_the_judge_names_what_is_wrong(options: dict[str, Any], rounds: int, said: str, tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=said):
        _judge(_live(tmp_path, _newest), NEAR, rounds, **options)


def test_a_refused_option_is_refused_only_if_the_plain_patch_is_accepted(tmp_path: Path) -> None:
    live = _live(tmp_path, _newest)
    with pytest.raises(Refused, match=r"^mode=refused: refused at .*test_live_model.py:\d+ \(ValueError"):
        live.patch(**EVICT_PROMPT, mode="refused")
    with pytest.raises(KeyError):
        live.patch(**EVICT_PROMPT, mode="crash")


def test_an_option_that_the_patch_lacks_is_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "attribute", lambda *_: lambda model, stats_path, model_path, kv_budget: None)
    with pytest.raises(SubjectLacks, match=r"^the subject's patch has no allow_prefill_compression$"):
        _live(tmp_path, _newest).patch(**EVICT_PROMPT)


def test_options_that_are_not_offered_are_refused_or_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Here, "patch_offers", {"normalize_scores": (True,), "per_head_pruning": (False,)})
    live, given = _live(tmp_path, _newest), []
    monkeypatch.setattr(Here, "apply", lambda _, model, stats_path, model_path, kv_budget, **more: given.append(more))
    assert not live.defaults["per_head_pruning"], "the recommended setting is not offered"
    assert live.offered({"per_head_pruning": True, "kv_budget": 3}) == {"per_head_pruning": False, "kv_budget": 3}
    with pytest.raises(Refused, match="per_head_pruning=True: not offered"):
        live.patch(kv_budget=BUDGET, per_head_pruning=True)
    live.apply_bare(kv_budget=BUDGET)
    monkeypatch.setattr(Here, "apply", lambda _, model, stats_path, model_path, kv_budget: given.append({}))
    live.apply_bare(kv_budget=BUDGET)
    # its published default is False; a patch that has no such option need not be given one
    assert given == [{"normalize_scores": True}, {}]


def test_a_wrong_ranking_of_a_plain_model_is_the_cause(tmp_path: Path) -> None:
    live, causes = _live(tmp_path, _newest), []

    def measure(name: str, found: float, allowed: float, where: str = "", cause: str = "") -> None:
        causes.append((found > allowed, cause))

    for mode in ({}, {"per_head_pruning": False}):  # one keep set for all heads, where they may have their own or not
        live.apply(**EVICT_PROMPT, **mode)
        taken = live.rounds(models.tokens(live, 100, 1), NEAR)
        judge(live, taken, {**EVICT_PROMPT, **mode}, measure, prompt=NEAR, rounds=1)
    assert causes == [(True, ONE_FOR_ALL), (True, RANKED)]
