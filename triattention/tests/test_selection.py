"""Rules of the keep set: ties, protection, rows of different lengths."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from triattention.errors import TriAttentionError
from triattention.selection import evictable, group_max, keep_indices, keep_mask, z_score


def _all(n: int) -> torch.Tensor:
    return torch.ones(1, n, dtype=torch.bool)


def test_ties_keep_the_lowest_index() -> None:
    mask = keep_mask(torch.zeros(1, 2, 6), _all(6), ~_all(6), [4])
    assert keep_indices(mask, 2).tolist() == [[[0, 1], [0, 1]]]


def test_protected_tokens_stay_whatever_they_score() -> None:
    scores = torch.tensor([[[0.0, 9.0, 8.0, 7.0, -5.0]]])
    protected = torch.tensor([[True, False, False, False, True]])
    mask = keep_mask(scores, _all(5), protected, [2])
    assert keep_indices(mask, 3).tolist() == [[[0, 1, 4]]]


def test_infinite_scores_do_not_displace_protected_tokens() -> None:
    protected = torch.tensor([[False, False, False, True]])
    mask = keep_mask(torch.full((1, 1, 4), torch.inf), _all(4), protected, [2])
    assert keep_indices(mask, 2).tolist() == [[[0, 3]]]


def test_rows_of_different_lengths_are_right_aligned() -> None:
    valid = torch.tensor([[True] * 4, [False, False, True, True]])
    scores = torch.tensor([[[1.0, 4.0, 3.0, 2.0]], [[9.0, 9.0, 1.0, 2.0]]])
    mask = keep_mask(scores, valid, ~valid & False, [1, 1])
    indices = keep_indices(mask, 3)
    assert indices[0, 0].tolist() == [1, 2, 3]
    assert indices[1, 0, -1] == 3
    assert mask.sum(-1).tolist() == [[3], [1]]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.data())
def test_keep_mask_equals_a_sorted_list(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 24))
    scores = data.draw(st.lists(st.integers(-3, 3), min_size=n, max_size=n))
    protected = data.draw(st.lists(st.booleans(), min_size=n, max_size=n))
    evict = data.draw(st.integers(0, n - sum(protected)))
    mask = keep_mask(torch.tensor([[scores]]).double(), _all(n), torch.tensor([protected]), [evict])
    free = sorted((i for i in range(n) if not protected[i]), key=lambda i: (-scores[i], i))
    want = sorted([i for i in range(n) if protected[i]] + free[: len(free) - evict])
    assert keep_indices(mask, n - evict)[0, 0].tolist() == want


def test_z_score_uses_the_region_only_and_survives_a_large_offset() -> None:
    x = torch.tensor([[[1e6 + 1, 1e6 + 2, 1e6 + 3, 7.0]]])
    z = z_score(x, torch.tensor([[True, True, True, False]]))
    torch.testing.assert_close(z[0, 0, :3], torch.tensor([-(1.5**0.5), 0, 1.5**0.5], dtype=torch.float64))


def test_z_score_of_equal_scores_is_zero() -> None:
    assert not z_score(torch.full((1, 1, 5), 3.0), _all(5)).any()


def test_group_max_reads_query_head_h_for_kv_head_h_over_g() -> None:
    scores = torch.arange(6.0).view(1, 6, 1)
    assert group_max(scores, 2).flatten().tolist() == [2, 5]


@pytest.mark.parametrize(
    ("length", "budget", "protected", "evict"), [(100, 60, 10, 40), (60, 60, 10, 0), (100, 60, 80, 20), (50, 60, 70, 0)]
)
def test_evictable(length: int, budget: int, protected: int, evict: int) -> None:
    assert evictable(length, budget, protected) == evict


def test_evicting_more_than_there_is_names_the_numbers() -> None:
    with pytest.raises(TriAttentionError, match=r"evict is \[7\]; each must be from 0 to 5"):
        keep_mask(torch.zeros(1, 1, 5), _all(5), ~_all(5), [7])
