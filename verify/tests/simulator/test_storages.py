"""A large storage is held in parts, those around the elements of its views, and accesses elsewhere are found."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from verify.simulator.storages import buffers_of
from verify.tests.simulator.small import fault, run

_FAR = 2**30


@pytest.fixture(scope="module")
def far() -> torch.Tensor:
    """The numbers 1, 2 and 3, each 4 GiB after the one before, at an offset of 8 elements. Few pages are used."""
    storage = torch.empty(2 * _FAR + 64, dtype=torch.int32).untyped_storage()
    one = torch.empty(0, dtype=torch.int32).set_(storage, 8, (3, 1), (_FAR, 1))
    return one.copy_(torch.tensor([[1], [2], [3]]))


def test_only_the_pages_with_elements_are_held(far: torch.Tensor) -> None:
    buffers, (value, number) = buffers_of([("keys", far), ("n", 5)], None)
    assert (value, number) == ((0, 32), 5)
    assert [(one.begin, one.size) for one, _ in buffers] == [(0, 4096), (4 * _FAR, 4096), (8 * _FAR, 256)]
    assert [one.content.view("i4")[8] for one, _ in buffers] == [1, 2, 3]
    assert buffers[1][0].described(32) == "keys[1, 0]"
    buffers[2][1][32:36] = np.array([7], "i4").view("u1")
    assert far[2, 0] == 7
    far[2, 0] = 3


_LOAD = "mov.u64 %rd9, {}; add.s64 %rd9, %rd1, %rd9; ld.global.b32 %r10, [%rd9];"


def test_each_part_is_read_at_its_own_distance_and_written_there(far: torch.Tensor) -> None:
    parts = [one for one, _ in buffers_of([("keys", far)], None)[0]]
    run(_LOAD.format(8 * _FAR + 32) + " st.global.b32 [%rd1+32], %r10;", parts)
    assert parts[0].content.view("i4")[8] == 3
    assert parts[0].written.sum() == 4
    assert parts[1].written is None


@pytest.mark.parametrize(
    ("byte", "kind", "told"),
    [
        (36, "elements", "reads 4 bytes at byte 36 of the storage of keys, which has 8589934848"),
        (4096, "elements", "byte 4096 of the storage of keys, which has 8589934848"),
        (4 * _FAR + 36, "elements", "byte 4294967332 of the storage of keys"),
        (8 * _FAR - 4, "elements", "byte 8589934588 of the storage of keys"),
        (8 * _FAR + 256, "bounds", "byte 8589934848 of the storage of keys, which has 8589934848"),
        (-4, "bounds", "byte -4 of the storage of keys"),
    ],
)
def test_what_lies_between_the_parts_is_not_touched(far: torch.Tensor, byte: int, kind: str, told: str) -> None:
    found = fault(_LOAD.format(byte), [one for one, _ in buffers_of([("keys", far)], None)[0]])
    assert found.kind == kind
    assert told in str(found)


def test_views_of_one_large_storage_are_all_held(far: torch.Tensor) -> None:
    middle = torch.empty(0, dtype=torch.int32).set_(far.untyped_storage(), _FAR // 2, (2,), (1,))
    nothing = torch.empty(0, dtype=torch.int32).set_(far.untyped_storage(), _FAR // 4, (0,), (1,))
    buffers, values = buffers_of([("keys", far), ("middle", middle), ("nothing", nothing)], None)
    assert [one.begin for one, _ in buffers] == [0, 2 * _FAR, 4 * _FAR, 8 * _FAR]
    assert values == [(0, 32), (0, 2 * _FAR), 0]


def test_a_tensor_without_elements_holds_one_page(far: torch.Tensor) -> None:
    nothing = torch.empty(0, dtype=torch.int32).set_(far.untyped_storage(), 0, (0,), (1,))
    assert [one.size for one, _ in buffers_of([("nothing", nothing)], None)[0]] == [4096]
