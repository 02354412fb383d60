"""Guarded calls see what a subject does besides returning scores."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import triton
import triton.language as tl

from verify.judge import guarded
from verify.judge.problems import Shape, drawn, make


@triton.jit
def _ones(out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, 1.0, mask=i < n)


def _launch(out: torch.Tensor, n: int) -> torch.Tensor:
    _ones[(1,)](out, n, B=64)
    return out


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(3, 5),
        lambda: torch.empty_like(torch.ones(3, 5)),
        lambda: torch.ones(2).new_empty((3, 5)),
        lambda: torch.empty_strided((3, 5), (8, 1), dtype=torch.bfloat16),
        lambda: torch.empty((3, 5), dtype=torch.float64),
    ],
)
def test_what_is_allocated_without_a_value_is_nan(allocate) -> None:
    found = guarded.call(allocate, {})
    assert found.result.shape == (3, 5)
    assert found.result.isnan().all()


def test_what_is_allocated_with_a_value_has_it() -> None:
    assert torch.equal(guarded.call(lambda: torch.zeros(7), {}).result, torch.zeros(7))
    assert torch.equal(guarded.call(lambda: torch.full((7,), 3), {}).result, torch.full((7,), 3))


def test_strides_dtype_and_alignment_are_those_asked_for() -> None:
    (made,) = guarded.call(lambda: (torch.empty_strided((4, 6), (1, 4), dtype=torch.float16),), {}).result
    assert (made.stride(), made.dtype, made.data_ptr() % 16) == ((1, 4), torch.float16, 0)


@pytest.mark.parametrize(("first", "told"), [(-1, "4 bytes before"), (10, "4 bytes after"), (4, "")])
def test_a_write_beside_a_tensor_is_told_with_its_side(first: int, told: str) -> None:
    def write() -> None:
        torch.empty(10).as_strided((1,), (1,), guarded.GUARD_BYTES // 4 + first).fill_(1.0)

    overruns = guarded.call(write, {}).overruns
    assert (told in overruns[0]) if told else overruns == ()


@pytest.mark.parametrize("allocate", [torch.empty, torch.zeros])
def test_a_kernel_that_stores_past_its_tensor_is_told(allocate) -> None:
    found = guarded.call(lambda: _launch(allocate(40), 64), {})
    assert found.launched == ("_ones",)
    assert found.overruns == ("wrote 96 bytes after a tensor [40] of torch.float32",)
    assert guarded.call(lambda: _launch(allocate(40), 40), {}).overruns == ()


def test_an_input_that_is_changed_by_one_bit_is_named() -> None:
    given = {"keys": torch.zeros(4), "nan": torch.full((4,), torch.nan)}
    assert guarded.call(lambda: given["nan"].clone(), given).changed == ()
    assert guarded.call(lambda: given["keys"].mul_(-1.0), given).changed == ("keys",)  # 0 becomes -0


def test_a_call_that_raises_leaves_no_poison_behind() -> None:
    def raises() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        guarded.call(raises, {})
    with mock.patch.object(guarded, "_between_guards", side_effect=AssertionError("still poisoned")):
        torch.empty(3)


def test_drawn_shapes_depend_on_the_seed_alone() -> None:
    assert drawn(3, 8) == drawn(3, 8) != drawn(4, 8)
    assert {shape.dtype for shape in drawn(3, 8, dtype=("float16",))} == {"float16"}
    assert "n=" in Shape(n=9).told()


def test_a_changed_problem_has_the_oracle_of_its_new_parts() -> None:
    problem = make(Shape(n=9, d=64), 0, "cpu")
    doubled = problem.changed(keys=problem.keys * 2)
    assert abs(doubled.case.k0 - 2 * problem.case.k0).max() == 0
    assert doubled.keys is not problem.keys
