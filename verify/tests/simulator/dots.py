"""``tl.dot`` on a simulated GPU: ``python -m verify.tests.simulator.dots 80`` runs every case, as ``launches`` does."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from verify.record.simulation import MODES
from verify.simulator.driver import SimulatedGpu
from verify.simulator.errors import Fault, Unsupported
from verify.simulator.launch import Settings, run_grid
from verify.simulator.machine import Program
from verify.simulator.ptx import parse
from verify.tests.simulator.launches import main
from verify.tests.simulator.small import tensor

_KINDS = (torch.bfloat16, torch.float16, torch.float32)
_SHAPES = ((16, 16, 16), (16, 64, 32), (64, 64, 64))


@triton.jit
def _dot(a, b, c, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    x = tl.load(a + m * K + tl.arange(0, K)[None, :])
    y = tl.load(b + tl.arange(0, K)[:, None] * N + n)
    tl.store(c + m * N + n, tl.dot(x, y))


@triton.jit
def _in_stages(a, b, c, S, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, stages: tl.constexpr):
    m, n = tl.arange(0, M)[:, None], tl.arange(0, N)[None, :]
    ka, kb = tl.arange(0, K)[None, :], tl.arange(0, K)[:, None]
    total = tl.zeros((M, N), tl.float32)
    for i in tl.range(0, S, K, num_stages=stages):
        x = tl.load(a + m * S + ka + i, mask=ka + i < S, other=0.0)
        y = tl.load(b + (kb + i) * N + n, mask=kb + i < S, other=0.0)
        total = tl.dot(x, y, total)
    tl.store(c + m * N + n, total)


@triton.jit
def _twice(a, b, c, M: tl.constexpr):
    """Two products of which the second takes the first, as attention does, and a transposed factor."""
    m, n = tl.arange(0, M)[:, None], tl.arange(0, M)[None, :]
    x, y = tl.load(a + m * M + n), tl.load(b + m * M + n)
    tl.store(c + m * M + n, tl.dot(tl.dot(x, tl.trans(y)).to(x.dtype), y))


def _random(kind: torch.dtype, *shape: int) -> torch.Tensor:
    return torch.randn(shape).to(kind)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """The values that a tensor core takes, exactly; of float32 the upper 19 bits."""
    if values.dtype == torch.float32:
        values = (values.view(torch.int32) & -8192).view(torch.float32)
    return values.double()


def _require_near(found: torch.Tensor, a: torch.Tensor, b: torch.Tensor, chained: int) -> None:
    """Each of ``chained`` instructions may lose 1.5 K units of what it adds, and their sums one more each."""
    exact, size = _wide(a) @ _wide(b), _wide(a).abs() @ _wide(b).abs()
    allowed = size * 2.0**-23 * (1.5 * a.shape[1] + chained)
    assert ((found.double() - exact).abs() <= allowed).all()
    assert ((found.double() - exact).abs() <= 1e-5 * size + 1e-30).all()


def case_products_are_within_their_bound(gpu: SimulatedGpu) -> None:
    for kind in _KINDS:
        for m, n, k in _SHAPES if gpu.sm == 80 else _SHAPES[::2]:
            a, b = _random(kind, m, k), _random(kind, k, n)
            results = []
            for mode in MODES:
                gpu.begin(mode)
                c = torch.full((m, n), 9.0)
                _dot[(1,)](a, b, c, m, n, k)
                _require_near(c, a, b, k // 8)
                results.append(c)
            assert gpu.depends_on_mode
            nearest, lowest, highest = results
            assert (lowest <= nearest).all(), (kind, m)
            assert (nearest <= highest).all(), (kind, m)
            assert (lowest < highest).any(), (kind, m)


def case_small_integers_are_exact_in_every_mode(gpu: SimulatedGpu) -> None:
    for kind in _KINDS:
        for m, n, k in _SHAPES if gpu.sm == 80 else _SHAPES[::2]:
            a, b = (torch.randint(-16, 17, shape).to(kind) for shape in ((m, k), (k, n)))
            for mode in MODES:
                gpu.begin(mode)
                c = torch.full((m, n), 9.0)
                _dot[(1,)](a, b, c, m, n, k)
                assert torch.equal(c.double(), a.double() @ b.double()), (kind, m, n, k, mode)
                assert not gpu.depends_on_mode


def case_warps_share_the_work(gpu: SimulatedGpu) -> None:
    for warps in (1, 2, 8):
        a, b = _random(torch.bfloat16, 64, 32), _random(torch.bfloat16, 32, 64)
        c = torch.zeros(64, 64)
        _dot[(1,)](a, b, c, 64, 64, 32, num_warps=warps)
        _require_near(c, a, b, 4)


def case_loops_in_stages(gpu: SimulatedGpu) -> None:
    """Copies of the next stages are under way while one is multiplied; the last stage is not full."""
    for kind in _KINDS:
        for stages in (1, 3) if gpu.sm == 80 else (3,):
            a, b = _random(kind, 32, 144), _random(kind, 144, 32)
            c = torch.zeros(32, 32)
            _in_stages[(1,)](a, b, c, 144, 32, 32, 32, stages)
            _require_near(c, a, b, 20)


def case_a_product_of_a_product(gpu: SimulatedGpu) -> None:
    for kind in (torch.bfloat16, torch.float16):
        a, b = _random(kind, 32, 32), _random(kind, 32, 32)
        c = torch.zeros(32, 32)
        _twice[(1,)](a, b, c, 32)
        inner = (a.double() @ b.double().T).to(kind)
        close = (c.double() - inner.double() @ b.double()).abs()
        assert (close <= 2.0**-6 * (inner.double().abs() @ b.double().abs())).all()


def _text(gpu: SimulatedGpu, launch: Callable[[], object]) -> str:
    gpu.executed()
    launch()
    (ran,) = gpu.executed()
    return ran.ptx


def _again(
    ptx: str, a: torch.Tensor, b: torch.Tensor, rows: int, columns: int, shared: int, *numbers: int
) -> np.ndarray:
    """What a text computes from two tensors."""
    given = [tensor(one.view(torch.int16).numpy(), name, "i2") for one, name in ((a, "a"), (b, "b"))]
    given.append(tensor(np.zeros((rows, columns), "f4"), "c", "f4"))
    run_grid(Program(parse(ptx)), given, [(0, 0), (1, 0), (2, 0), *numbers], (1, 1, 1), shared, Settings())
    return given[2].content.view("f4").reshape(rows, columns)


def case_a_wrong_register_of_a_fragment_is_found(gpu: SimulatedGpu) -> None:
    a, b = _random(torch.bfloat16, 32, 32), _random(torch.bfloat16, 32, 32)
    c = torch.zeros(32, 32)
    ptx = _text(gpu, lambda: _dot[(1,)](a, b, c, 32, 32, 32))
    assert np.array_equal(_again(ptx, a, b, 32, 32, 8192), c.numpy())
    line = re.search(r"mma\.sync\S+ \{.*?\}, \{ (%r\d+), (%r\d+), (%r\d+), (%r\d+) \}, \{ (%r\d+), (%r\d+) \}", ptx)
    assert line is not None
    swaps = ((1, 2), (2, 3), (1, 4), (5, 6))
    for first, second in swaps:
        wrong = line[0]
        x, y = line[first], line[second]
        wrong = re.sub(rf"({x}|{y})\b", lambda one, x=x, y=y: y if one[1] == x else x, wrong)
        assert wrong != line[0]
        found = _again(ptx.replace(line[0], wrong), a, b, 32, 32, 8192)
        assert not np.allclose(found, c.numpy(), rtol=1e-3, atol=1e-3)


def case_a_dropped_wait_or_barrier_is_found(gpu: SimulatedGpu) -> None:
    a, b = _random(torch.bfloat16, 32, 160), _random(torch.bfloat16, 160, 32)
    c = torch.zeros(32, 32)
    ptx = _text(gpu, lambda: _in_stages[(1,)](a, b, c, 160, 32, 32, 32, 3))
    assert np.array_equal(_again(ptx, a, b, 32, 32, 16384, 160), c.numpy())
    waits, barriers = ([one.start() for one in re.finditer(what, ptx)] for what in (r"cp\.async\.wait", r"bar\.sync"))
    found = {place: _race(ptx[:place] + ptx[ptx.index(";", place) + 1 :], a, b) for place in (*waits, *barriers)}
    assert "is still copying to" in found[waits[0]]
    assert sum(map(bool, found.values())) >= 3
    early = re.sub(r"(cp\.async\.wait_group\s+)(\d+)", lambda one: f"{one[1]}{int(one[2]) + 2}", ptx, count=1)
    assert "is still copying to" in _race(early, a, b)


def _race(ptx: str, a: torch.Tensor, b: torch.Tensor) -> str:
    """What is wrong with a text that multiplies in stages, if anything."""
    try:
        _again(ptx, a, b, 32, 32, 16384, a.shape[1])
    except Fault as error:
        return str(error) if error.kind in ("race", "uninitialised") else ""
    return ""


def case_what_a_large_tile_needs_is_refused_by_name(gpu: SimulatedGpu) -> None:
    sizes = {(place,): 64 for place in (3, 4, 5)}
    for kind in ("bf16", "fp16", "fp32"):
        signature = {
            "a": f"*{kind}",
            "b": f"*{kind}",
            "c": "*fp32",
            "M": "constexpr",
            "N": "constexpr",
            "K": "constexpr",
        }
        for sm, named in ((90, "wgmma."), (100, "tcgen05."), (gpu.sm, "")):
            source = triton.compiler.ASTSource(_dot, signature, sizes)
            ptx = triton.compile(source, target=GPUTarget("cuda", sm, 32)).asm["ptx"]
            what = ""
            try:
                Program(parse(ptx))
            except Unsupported as error:
                what = error.what
            assert what.startswith(named), (sm, what)
            assert bool(what) == bool(named), (sm, what)


if __name__ == "__main__":
    main({name: one for name, one in globals().items() if name.startswith("case_")})
