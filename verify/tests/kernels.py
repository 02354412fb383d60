"""Small subjects with kernels of every temper, to build ahead of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from verify.architectures import parse_targets
from verify.build.builder import Order
from verify.judge.problems import Shape
from verify.subject.find import find_subject
from verify.subject.subject import Subject

_HEADER = """
import triton
import triton.language as tl


@triton.constexpr_function
def fate(how):
    # imported here, so that Triton does not take it for source of the kernel
    return __import__("triattention.fates", fromlist=["meet"]).meet(how)


@triton.jit
def good(x, o, n, B: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), mask=i < n)


def create_trig_cache(max_seq_len, compress_interval, offsets, omega, device):
    return ()


def triattention_scoring(
    K_rot, position_indices, q_mean_real, q_mean_imag, q_abs_mean, freq_scale_sq, omega, offsets, round_start,
    aggregation="max", trig_cache=None, trig_values=None, rope_style="interleaved", disable_mlr=False,
):
    import torch  # whoever builds a kernel has no need of it, and it takes seconds to import

    keys = K_rot.shape[0] * K_rot.shape[1] * K_rot.shape[2]
    out = torch.empty(K_rot.shape[0], q_mean_real.shape[0], K_rot.shape[2])
    launch(K_rot, out, keys, (triton.cdiv(keys, 256),))
    return out
"""

_FATES = """
import os, signal, time

def meet(how):
    if how == "silence":
        os._exit(1)
    if how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    while how == "forever":
        time.sleep(1)
"""

#: A kernel for each way to end, by the name that says which.
TEMPERS = """
@triton.jit
def mistyped(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B) + tl.arange(0, 2 * B)
    tl.store(o + i, 1.0)


@triton.jit
def refused_by_ptxas(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    y = tl.inline_asm_elementwise("no.such $0, $1;", "=r,r", [i], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(o + i, y.to(tl.float32))


@triton.jit
def aborts_in_llvm(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)
    y = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=Z,q", [i], dtype=tl.int32, is_pure=True, pack=1)
    tl.store(o + i, y.to(tl.float32))


@triton.jit
def dies_silently(x, o, n, B: tl.constexpr):
    fate("silence")
    tl.store(o + tl.arange(0, B), 1.0)


@triton.jit
def is_killed(x, o, n, B: tl.constexpr):
    fate("kill")
    tl.store(o + tl.arange(0, B), 1.0)


@triton.jit
def never_ends(x, o, n, B: tl.constexpr):
    fate("forever")
    tl.store(o + tl.arange(0, B), 1.0)


def launch(x, o, n, grid):
    for kernel in (good, mistyped, refused_by_ptxas, aborts_in_llvm, dies_silently, is_killed, never_ends):
        kernel[grid](x, o, n, B=256)
"""

#: Kernels that are to be found by other ways than their own name, and one that is not.
HELD = """
def make(scale):
    @triton.jit
    def scaled(o, B: tl.constexpr):
        tl.store(o + tl.arange(0, B), scale)
    return scaled


def plain(o, B: tl.constexpr):
    tl.store(o + tl.arange(0, B), 3.0)


once, twice = make(tl.constexpr(1.0)), make(tl.constexpr(2.0))
renamed = triton.jit(plain)
_hidden = [make(tl.constexpr(4.0))]


def launch(x, o, n, grid):
    for kernel in [once, twice, renamed, *_hidden]:
        kernel[grid](o, B=256)
"""

GOOD = """
def launch(x, o, n, grid):
    good[grid](x, o, n, B=256)
"""


#: The published call of a checkout with several bodies: the only offset is the number of the one to call.
_SEVERAL = """
import importlib
from triattention.vllm.core.kernels.{first} import create_trig_cache

NAMES = {names}


def triattention_scoring(offsets, **named):
    body = importlib.import_module("triattention.vllm.core.kernels." + NAMES[int(offsets[0])])
    return body.triattention_scoring(offsets=offsets, **named)
"""


def write_subject(root: Path, body: str = GOOD) -> Subject:
    """A checkout whose published kernel module is the header above and ``body``, which defines ``launch``."""
    return _write(root, {"triton_scoring": _HEADER + body})


def write_several(root: Path, bodies: Mapping[str, str], besides: str = "") -> Subject:
    """A checkout with a kernel module for each body, to be built by ``several``: asking it once takes as long as asking
    another one. ``besides`` stands in the published module.
    """
    published = _SEVERAL.format(first=next(iter(bodies)), names=[*bodies]) + besides
    return _write(root, {"triton_scoring": published} | {name: _HEADER + body for name, body in bodies.items()})


def _write(root: Path, sources: Mapping[str, str]) -> Subject:
    module = root / "triattention" / "vllm" / "core" / "kernels"
    module.mkdir(parents=True, exist_ok=True)
    for package in (module, *module.parents[:3]):
        (package / "__init__.py").touch()
    for name, source in sources.items():
        (module / f"{name}.py").write_text(source)
    (root / "triattention" / "fates.py").write_text(_FATES)
    return find_subject(str(root), root)


def order(subject: Subject, sm: str = "90", **fields: object) -> Order:
    """One variant for ``sm``, on both cores."""
    variants = {"small": Shape(n=65, d=64, offsets=(1.0,))}
    return Order(subject, parse_targets(sm), **{"variants": variants, "jobs": 2, "limit_s": 20.0} | fields)


def several(subject: Subject, bodies: Iterable[str], sm: str = "90", **fields: object) -> Order:
    """A variant for each body of a checkout of ``write_several``, by its name."""
    variants = {name: Shape(n=65, d=64, offsets=(float(place),)) for place, name in enumerate(bodies)}
    return order(subject, sm, **{"variants": variants} | fields)
