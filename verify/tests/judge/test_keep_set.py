"""The oracle's keep set: which tokens are right, and how wrong a set can honestly be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from verify.judge import oracle
from verify.judge.keep_set import select, sets_of
from verify.judge.problems import Shape, make

N, KEPT = 24, 16


@pytest.fixture
def cases() -> list[oracle.Case]:
    return [make(Shape(n=N, d=16, h=2, g=2, t=N, dtype="float32"), seed, "cpu").case for seed in (1, 2, 3)]


def _best(scores: np.ndarray, count: int = KEPT) -> np.ndarray:
    kept = np.zeros(scores.shape, dtype=bool)
    np.put_along_axis(kept, np.argsort(-scores, axis=-1, kind="stable")[:, :count], True, axis=-1)
    return kept


@pytest.mark.parametrize("per_head", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_the_best_have_no_inversion_and_a_swap_is_far_outside_the_error(
    cases: list[oracle.Case], per_head: bool, normalize: bool
) -> None:
    everything = np.ones(N, dtype=bool)
    selection = select(cases, everything, mode="per_head" if per_head else "union", normalize=normalize)
    assert selection.scores.shape == (2 if per_head else 1, N)
    kept = _best(selection.scores)
    assert selection.inversion(kept, everything) == 0
    best, worst = selection.scores[0].argmax(), selection.scores[0].argmin()
    kept[0, [best, worst]] = kept[0, [worst, best]]
    assert selection.inversion(kept, everything) > 10 * selection.allowed


def test_per_head_is_the_mean_over_layers_of_the_groups_maximum(cases: list[oracle.Case]) -> None:
    everything = np.ones(N, dtype=bool)
    by_hand = []
    for case in cases:
        scores = oracle.scores(case)[0]
        z = (scores - scores.mean(-1, keepdims=True)) / scores.std(-1, keepdims=True)
        by_hand.append(np.stack([np.maximum(z[0], z[1]), np.maximum(z[2], z[3])]))
    np.testing.assert_allclose(select(cases, everything, mode="per_head", normalize=True).scores, np.mean(by_hand, 0))
    union = select(cases, everything, mode="union", normalize=True).scores
    np.testing.assert_allclose(union[0], np.max(by_hand, axis=(0, 1)))
    per_layer = select(cases, everything, mode="per_layer", normalize=True).scores
    np.testing.assert_allclose(per_layer, np.max(by_hand, axis=1))
    every = select(cases, everything, mode="per_layer_per_head", normalize=True).scores
    np.testing.assert_allclose(every, np.concatenate(by_hand))


def test_sets_that_should_be_shared_and_are_not_are_named() -> None:
    kept = np.zeros((3, 2, 5), dtype=bool)
    kept[:, 0, :2] = kept[:, 1, 2:4] = True
    assert sets_of(kept, "per_head").tolist() == kept[0].tolist()
    assert sets_of(kept, "per_layer_per_head").shape == (6, 5)
    with pytest.raises(
        AssertionError, match="layer 0, KV head 1 holds other tokens than the rest of its per_layer set"
    ):
        sets_of(kept, "per_layer")
    kept[2, 0, :2] = [True, False]
    with pytest.raises(AssertionError, match=r"layer 2, KV head 0 .* per_head set"):
        sets_of(kept, "per_head")


def test_only_sets_that_keep_and_evict_something_are_compared(cases: list[oracle.Case]) -> None:
    selection = select(cases[:1], np.ones(N, dtype=bool), mode="per_layer_per_head", normalize=True)
    kept = np.stack([np.arange(N) < 3, np.ones(N, dtype=bool)])
    assert selection.compares(kept, np.ones(N, dtype=bool)).tolist() == [True, False]
    assert selection.compares(kept, np.arange(N) >= 3).tolist() == [False, False]


def test_protected_tokens_take_no_part(cases: list[oracle.Case]) -> None:
    evictable = np.arange(N) >= 6
    loud = replace(cases[0], k0=np.where((np.arange(N) < 6)[None, None, :, None], 100 * cases[0].k0, cases[0].k0))
    quiet = select(cases[:1], evictable, mode="per_head", normalize=True).scores[:, evictable]
    np.testing.assert_allclose(select([loud], evictable, mode="per_head", normalize=True).scores[:, evictable], quiet)


def test_launches_are_counted() -> None:
    import torch

    from verify.build.control import add_kernel
    from verify.subject.launches import counted

    device = "cuda" if torch.cuda.is_available() else "cpu"
    x, out = torch.randn(128, device=device), torch.empty(128, device=device)
    with counted() as names:
        assert names == []
        add_kernel[(1,)](x, x, out, 128)
        add_kernel[(1,)](x, x, out, 128)
    add_kernel[(1,)](x, x, out, 128)
    assert names == ["add_kernel", "add_kernel"]
