"""Launches of small Triton kernels on a simulated GPU: ``python -m verify.tests.simulator.launches 80`` runs every
function ``case_...`` of the module and prints what went wrong with each.

It needs a process of its own, because a simulated GPU replaces Triton's driver.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from verify.simulator.driver import SimulatedGpu, install
from verify.simulator.errors import Fault, Unsupported

_LINES = Path(__file__).read_text("utf-8").split("\n")


@contextmanager
def _raised(kind: type[Fault] | type[Unsupported]) -> Iterator[list[Any]]:
    found: list[Any] = []
    try:
        yield found
    except kind as error:
        found.append(error)
        return
    raise AssertionError(f"no {kind.__name__}")


@triton.jit
def _copy(x, out, n, offset: tl.constexpr, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(out + i, tl.load(x + i + offset, mask=i < n), mask=i < n)


def case_a_copy(gpu: SimulatedGpu) -> None:
    for kind in (torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int64,
                 torch.float64, torch.bool):  # fmt: skip
        x = torch.arange(1000).to(kind)
        out = torch.zeros_like(x)
        _copy[(8,)](x, out, 900, 0, 128)
        assert torch.equal(out[:900], x[:900]), kind
        assert not out[900:].any(), kind


def case_an_access_outside_is_found_with_its_line(gpu: SimulatedGpu) -> None:
    x, out = torch.arange(256.0), torch.full((256,), 7.0)
    before = gpu.launches
    with _raised(Fault) as found:
        _copy[(2,)](x, out, 256, 1, 128)
    (error,) = found
    assert error.kind == "bounds"
    assert error.thread[0] == (1, 0, 0)
    assert "byte 1024 of the storage of x" in str(error)
    assert "launches.py:" in str(error)
    line = int(str(error).split("launches.py:")[1].split(")")[0])
    assert "tl.load(x + i + offset" in _LINES[line - 1]
    assert gpu.faults[-1] is error
    assert gpu.launches == before
    assert (out == 7).all()


def case_an_exception_leaves_the_tensors_as_they_were(gpu: SimulatedGpu) -> None:
    x = torch.arange(512.0)
    with _raised(Fault):
        _copy[(5,)](x, x, 512 + 128, 0, 128)
    assert torch.equal(x, torch.arange(512.0))


def case_a_view_with_an_offset(gpu: SimulatedGpu) -> None:
    storage, out = torch.arange(300), torch.zeros(100, dtype=torch.int64)
    _copy[(1,)](storage[100:200], out, 100, 0, 128)
    assert torch.equal(out, torch.arange(100, 200))
    with _raised(Fault) as found:
        _copy[(1,)](storage[100:200], out, 100, 1, 128)
    assert found[0].kind == "elements"
    _copy[(1,)](storage, out, 100, 1, 128)


def case_two_arguments_in_one_storage(gpu: SimulatedGpu) -> None:
    storage = torch.arange(256)
    _copy[(1,)](storage[:100], storage[128:228], 100, 0, 128)
    assert torch.equal(storage[128:228], torch.arange(100))
    assert torch.equal(storage[228:], torch.arange(228, 256))
    with _raised(Fault) as found:
        _copy[(1,)](storage[:100], storage[156:], 101, 0, 128)
    assert found[0].kind == "elements"


def case_no_blocks_and_no_elements(gpu: SimulatedGpu) -> None:
    before = gpu.launches
    _copy[(0,)](torch.zeros(0), torch.zeros(0), 0, 0, 128)
    assert gpu.launches == before
    _copy[(1,)](torch.zeros(0), torch.zeros(0), 0, 0, 128)
    assert gpu.launches == before + 1
    with _raised(Fault) as found:
        _copy[(1,)](torch.zeros(0), torch.zeros(0), 1, 0, 128)
    assert found[0].kind == "bounds"


def case_a_grid_may_be_a_function(gpu: SimulatedGpu) -> None:
    x = torch.arange(1000.0)
    out = torch.zeros(1000)
    _copy[lambda meta: (triton.cdiv(1000, meta["B"]),)](x, out, 1000, 0, B=256)
    assert torch.equal(x, out)


@triton.jit
def _numbers(out, a, b, c, d, e, missing, flag: tl.constexpr):
    if missing is None:
        tl.store(out + 7, 1.0)
    if flag:
        tl.store(out + 6, 1.0)
    tl.store(out + 0, a)
    tl.store(out + 1, b)
    tl.store(out + 2, c)
    tl.store(out + 3, d)
    tl.store(out + 4, e)


def case_numbers_and_none(gpu: SimulatedGpu) -> None:
    for a, b, c, d, e in (
        (-5, 1 << 40, 0.5, True, (1 << 63) + 8),
        (3, -(1 << 40), -1e30, False, 2**31),
        (1, 16, 1.0, 1, 0),
    ):
        out = torch.zeros(8, dtype=torch.float64)
        _numbers[(1,)](out, a, b, c, d, e, None, a > 0)
        wanted = [float(a), float(b), float(np.float32(c)), float(d), float(e), 0.0, float(a > 0), 1.0]
        assert out.tolist() == wanted, (out.tolist(), wanted)
    out = torch.zeros(8, dtype=torch.float64)
    _numbers[(1,)](out, 2, 3, 4.0, 5, 6, out, False)
    assert out.tolist() == [2, 3, 4, 5, 6, 0, 0, 0]


@triton.jit
def _of_a_tuple(tensors, sizes, out, B: tl.constexpr):
    i = tl.arange(0, B)
    total = tl.load(tensors[0] + i, mask=i < sizes[0], other=0.0)
    if tensors[1] is not None:
        total += tl.load(tensors[1] + i, mask=i < sizes[1][0], other=0.0)
    tl.store(out + i, total * sizes[1][1])


def case_tuples(gpu: SimulatedGpu) -> None:
    x, y, out = torch.arange(32.0), torch.full((32,), 0.5), torch.zeros(32)
    _of_a_tuple[(1,)]((x, y), (32, (16, 2.5)), out, 32)
    assert torch.equal(out, (x + y * (torch.arange(32) < 16)) * 2.5)
    _of_a_tuple[(1,)]((x, None), (7, (1, 2.0)), out, 32)
    assert torch.equal(out, x * (torch.arange(32) < 7) * 2)
    with _raised(Fault) as found:
        _of_a_tuple[(1,)]((x, y[:8].clone()), (32, (16, 2.5)), out, 32)
    assert "tensors.1" in str(found[0])


@triton.autotune(
    configs=[
        triton.Config({"B": 65536, "how": 1}, num_warps=4),
        triton.Config({"B": 1024, "how": 2}, num_warps=4),
        triton.Config({"B": 1024, "how": 3}, num_warps=4),
    ],
    key=["n"],
)
@triton.jit
def _tuned(x, out, n, B: tl.constexpr, how: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.gather(tl.load(x + i % n), i ^ 1, 0), mask=i < n)
    tl.store(out + 1024, how)


def case_the_first_configuration_that_fits_is_taken_and_nothing_else_runs(gpu: SimulatedGpu) -> None:
    x = torch.randperm(1024, dtype=torch.int32)
    out = torch.zeros(1025, dtype=torch.int32)
    before = gpu.launches
    _tuned[(1,)](x, out, 1024)
    assert out.tolist() == [*x[torch.arange(1024) ^ 1].tolist(), 2]
    assert gpu.launches == before + 1
    _tuned[(1,)](x, out, 1024)
    assert gpu.launches == before + 2


@triton.heuristics({"B": lambda given: triton.next_power_of_2(given["n"])})
@triton.jit
def _with_heuristics(x, out, n, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


def case_heuristics(gpu: SimulatedGpu) -> None:
    x = torch.arange(100)
    out = torch.zeros_like(x)
    _with_heuristics[(1,)](x, out, 100)
    assert torch.equal(out, 2 * x)


@triton.jit
def _nothing(x, n):
    if n > 5:
        tl.device_print("never")


@triton.jit
def _only_reads(x, B: tl.constexpr):
    tl.load(x + tl.arange(0, B))


def case_kernels_that_store_nothing(gpu: SimulatedGpu) -> None:
    before = gpu.launches
    _only_reads[(1,)](torch.zeros(32), 32)
    assert gpu.launches == before + 1


def case_a_function_of_the_device_is_refused_by_name(gpu: SimulatedGpu) -> None:
    with _raised(Unsupported) as found:
        _nothing[(1,)](torch.zeros(32), 3)
    assert found[0].what == "a function beside the kernel"
    assert gpu.unsupported[-1] is found[0]


@triton.jit
def _coordinates(out, B: tl.constexpr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n = x + tl.num_programs(0) * (y + tl.num_programs(1) * z)
    i = tl.arange(0, B)
    tl.store(out + n * B + i, x + 100 * y + 10000 * z + 0 * i)


def case_grids_of_three_dimensions(gpu: SimulatedGpu) -> None:
    out = torch.zeros(4, 5, 60, 32, dtype=torch.int32)
    _coordinates[(60, 5, 4)](out, 32)
    z, y, x = torch.meshgrid(torch.arange(4), torch.arange(5), torch.arange(60), indexing="ij")
    assert torch.equal(out, (x + 100 * y + 10000 * z)[..., None].expand(-1, -1, -1, 32).int())


@triton.jit
def _far(x, out, stride, wide: tl.constexpr):
    row = tl.program_id(0)
    if wide:
        row = row.to(tl.int64)
    tl.store(out + tl.program_id(0), tl.load(x + row * stride))


def case_an_offset_of_32_bits_that_overflows(gpu: SimulatedGpu) -> None:
    """Rows so far apart that a product of 32 bits overflows; the tensor has one byte of memory for all of them."""
    far = torch.zeros(1, dtype=torch.int8)
    out = torch.zeros(2, dtype=torch.int8)
    for wide, told in ((True, "byte 3000000000"), (False, "byte -1294967296")):
        with _raised(Fault) as found:
            _far[(2,)](far, out, 3_000_000_000 if wide else 1_500_000_000 * 2 - 2**32, wide)
        assert told in str(found[0]), str(found[0])


@triton.jit
def _inner(x):
    return tl.load(x + 5)


@triton.jit
def _outer(x, out):
    tl.store(out, _inner(x))


def case_a_function_that_was_inlined_is_named_by_its_call(gpu: SimulatedGpu) -> None:
    with _raised(Fault) as found:
        _outer[(1,)](torch.zeros(5), torch.zeros(1))
    line = int(str(found[0]).split("launches.py:")[1].split(")")[0])
    assert "tl.store(out, _inner(x))" in _LINES[line - 1]


@triton.jit
def _exponential(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + i, tl.exp2(tl.load(x + i)))


def case_modes_and_what_was_executed(gpu: SimulatedGpu) -> None:
    x = torch.linspace(-3, 3, 128)
    results = {}
    for mode in ("nearest", "lowest", "highest"):
        gpu.begin(mode)
        assert (gpu.launches, gpu.depends_on_mode, gpu.faults, gpu.unsupported) == (0, False, [], [])
        out = torch.zeros(128)
        gpu.executed()
        _exponential[(1,)](x, out, 128)
        assert gpu.depends_on_mode
        (ran,) = gpu.executed()
        assert (ran.name, ran.launches) == ("_exponential", 1)
        assert ran.thread_instructions % 128 == 0
        assert len(ran.ptx_sha256) == 64
        assert gpu.executed() == []
        results[mode] = out
    assert (results["lowest"] <= results["nearest"]).all()
    assert (results["nearest"] <= results["highest"]).all()
    assert (results["lowest"] < results["highest"]).any()
    gpu.begin("nearest")
    _copy[(1,)](x, x.clone(), 100, 0, 128)
    assert not gpu.depends_on_mode


@triton.jit
def _reductions(x, out, R: tl.constexpr, C: tl.constexpr):
    r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
    v = tl.load(x + r * C + c)
    tl.store(out + tl.arange(0, R), tl.max(v, 1))
    tl.store(out + R + tl.arange(0, R), tl.argmin(v, 1).to(v.dtype))
    tl.store(out + 2 * R + tl.arange(0, C), tl.min(v, 0))
    tl.store(out + 2 * R + C + c + r * C, tl.cumsum(v, 1))
    tl.store(out + 2 * R + C + R * C + c + r * C, tl.trans(tl.sort(v)).reshape(R, C))
    tl.store(out + 2 * R + C + 2 * R * C + c + r * C, tl.flip(v, 1))


def case_reductions_scans_and_sorts(gpu: SimulatedGpu) -> None:
    for kind, warps in ((torch.float32, 4), (torch.int32, 2), (torch.int64, 8), (torch.int16, 1)):
        x = torch.randperm(16 * 64).reshape(16, 64).sub(500)
        x = (x % 30 if kind == torch.int16 else x).to(kind)
        out = torch.zeros(32 + 64 + 3 * 1024, dtype=kind)
        _reductions[(1,)](x, out, 16, 64, num_warps=warps)
        wanted = [
            x.max(1).values, torch.from_numpy(x.numpy().argmin(1)).to(kind), x.min(0).values,
            x.double().cumsum(1).to(kind).ravel(), x.sort(1).values.T.ravel(), x.flip(1).ravel(),
        ]  # fmt: skip
        assert torch.equal(out, torch.cat(wanted)), kind


@triton.jit
def _loops(x, out, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    total = tl.zeros((B,), tl.int32)
    for k in range(n):
        if k % 3 == tl.program_id(0) % 3:
            total += v * k
    while tl.max(total, 0) > 100:
        total = total // 2
    tl.store(out + i, total)


def case_loops(gpu: SimulatedGpu) -> None:
    x = torch.randint(-9, 9, (512,), dtype=torch.int32)
    out = torch.zeros_like(x)
    _loops[(4,)](x, out, 11, 128)
    for block in range(4):
        v = x[128 * block : 128 * block + 128]
        total = v * sum(k for k in range(11) if k % 3 == block % 3)
        while total.max() > 100:
            total = torch.div(total, 2, rounding_mode="trunc")
        assert torch.equal(out[128 * block : 128 * block + 128], total)


@triton.jit
def _atomics(x, totals, bits, counts, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    v = tl.load(x + i)
    tl.atomic_add(totals + v % 4, v)
    tl.atomic_max(bits + 0 + 0 * i, v)
    tl.atomic_min(bits + 1 + 0 * i, v)
    tl.atomic_or(bits + 2 + 0 * i, v)
    tl.atomic_xor(bits + 3 + 0 * i, v)
    tl.atomic_and(bits + 4 + 0 * i, v)
    tl.atomic_add(counts, 1)


def case_atomic_operations(gpu: SimulatedGpu) -> None:
    x = torch.randint(0, 1 << 30, (512,), dtype=torch.int32)
    totals, counts = torch.zeros(4, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    bits = torch.tensor([0, 1 << 30, 0, 0, -1], dtype=torch.int32)
    _atomics[(4,)](x, totals, bits, counts, 128)
    values = x.numpy()
    assert totals.tolist() == [int(values[values % 4 == one].sum(dtype="i4")) for one in range(4)]
    found = [
        values.max(),
        values.min(),
        *(one.reduce(values) for one in (np.bitwise_or, np.bitwise_xor, np.bitwise_and)),
    ]
    assert bits.tolist() == [int(one) for one in found]
    assert counts.tolist() == [4]
    assert not gpu.depends_on_mode


@triton.jit
def _sums(x, total, B: tl.constexpr):
    tl.atomic_add(total, tl.sum(tl.load(x + tl.program_id(0) * B + tl.arange(0, B)), 0))


def case_a_sum_whose_order_is_left_open(gpu: SimulatedGpu) -> None:
    x = torch.randn(64, 128)
    results = {}
    for mode in ("nearest", "lowest"):
        gpu.begin(mode)
        results[mode] = torch.zeros(1)
        _sums[(64,)](x, results[mode], 128)
        assert gpu.depends_on_mode
        assert abs(results[mode].item() - x.double().sum().item()) < 1e-3
    assert results["nearest"] != results["lowest"]


@triton.jit
def _tickets(counter, out):
    tl.store(out + tl.atomic_add(counter, 1, sem="relaxed"), tl.program_id(0))


def case_tickets(gpu: SimulatedGpu) -> None:
    """Which block gets which ticket is left open, and so is no fault."""
    out, counter = torch.zeros(50, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _tickets[(50,)](counter, out)
    assert sorted(out.tolist()) == [*range(50)]
    assert gpu.depends_on_mode


@triton.jit
def _locked(lock, total, x):
    value = tl.load(x + tl.program_id(0))
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.atomic_add(total, value)
    tl.atomic_xchg(lock, 0)


def case_a_lock(gpu: SimulatedGpu) -> None:
    x = torch.arange(8, dtype=torch.int32)
    lock, total = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    _locked[(8,)](lock, total, x)
    assert (lock.item(), total.item()) == (0, 28)


@triton.jit
def _counts(x, out, B: tl.constexpr, N: tl.constexpr):
    tl.store(out + tl.arange(0, N), tl.histogram(tl.load(x + tl.arange(0, B)), N))


def case_a_histogram(gpu: SimulatedGpu) -> None:
    for warps in (1, 4):
        x, out = torch.randint(0, 32, (512,), dtype=torch.int32), torch.zeros(32, dtype=torch.int32)
        _counts[(1,)](x, out, 512, 32, num_warps=warps)
        assert torch.equal(out.long(), torch.bincount(x, minlength=32))


@triton.jit
def _mixed(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(x + i % 2, 0)
    tl.atomic_add(x + i % 2, i)


def case_a_store_next_to_atomic_operations_is_a_race(gpu: SimulatedGpu) -> None:
    with _raised(Fault) as found:
        _mixed[(2,)](torch.ones(2, dtype=torch.int32), torch.zeros(1), 128)
    assert found[0].kind == "race"


@triton.jit
def _unordered(x, out, B: tl.constexpr):
    i = tl.arange(0, B)
    tl.store(out + (i * 0), i)


def case_threads_that_disagree_are_found(gpu: SimulatedGpu) -> None:
    with _raised(Fault) as found:
        _unordered[(1,)](torch.zeros(1), torch.zeros(1, dtype=torch.int32), 128)
    assert found[0].kind == "conflict"
    assert "out[0]" in str(found[0])


def case_a_simulated_gpu_says_what_it_is(gpu: SimulatedGpu) -> None:
    driver = triton.runtime.driver.active
    assert driver.get_current_target().arch == gpu.sm
    assert driver.get_device_capability() == divmod(gpu.sm, 10)
    assert str(driver.get_active_torch_device()) == "cpu"
    assert driver.utils.get_device_properties(0)["warpSize"] == 32


def main(cases: dict[str, Callable[[SimulatedGpu], None]]) -> None:
    """Run the cases that the command line names after the SM, or all, and print {name: what went wrong, or nothing}."""
    gpu, told = install(int(sys.argv[1])), {}
    for name, case in cases.items():
        if sys.argv[2:] and name not in sys.argv[2:]:
            continue
        gpu.begin("nearest")
        torch.manual_seed(1)  # its default differs from process to process
        try:
            case(gpu)
            told[name] = ""
        except Exception:
            told[name] = traceback.format_exc()
    print(json.dumps(told))


if __name__ == "__main__":
    main({name: one for name, one in globals().items() if name.startswith("case_")})
