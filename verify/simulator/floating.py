"""Floating-point instructions, and the opcodes that they share with integers: PTX ISA 8.x, sections 9.7.3 and 9.7.4."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from verify.simulator import floats, integers
from verify.simulator.errors import Unsupported
from verify.simulator.operation import Maker, Modifiers, Operation, alike, dtype_of

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64
FLOATS = ("f16", "bf16", "f16x2", "bf16x2", "f32", "f32x2", "f64")
#: The sign of every element of a type that is held as bits.
_SIGNS = {"bf16": 0x8000, "bf16x2": 0x80008000, "f16": 0x8000, "f16x2": 0x80008000, "f32": 1 << 31, "f64": 1 << 63}


def _is_float(words: Modifiers) -> bool:
    return words.opcode.rpartition(".")[2] in FLOATS


def _split(part: np.dtype, compute: Callable[..., Any]) -> Callable[..., Any]:
    """A function of packed registers from one of their elements, which have the type ``part``, lowest first."""
    whole = np.dtype(f"u{2 * part.itemsize}")
    bits = np.dtype(f"u{part.itemsize}")

    def both(*packed: np.ndarray) -> np.ndarray:
        low = compute(*(one.astype(bits).view(part) for one in packed))
        high = compute(*((one >> whole.type(8 * part.itemsize)).astype(bits).view(part) for one in packed))
        return low.view(bits).astype(whole) | (high.view(bits).astype(whole) << whole.type(8 * part.itemsize))

    return both


def _with_flushing(compute: Callable[..., Any]) -> Callable[..., Any]:
    return lambda *values: floats.flushed(compute(*(floats.flushed(one) for one in values)))


def _elementwise(words: Modifiers, kind: str, count: int, of: Callable[[str, str], Callable[..., Any]]) -> Operation:
    """An operation on elements of ``kind``, with rounding and flushing; ``of(element, rounding)`` computes it.

    ``element`` is f16, bf16, f32 or f64; only f32 has roundings other than to nearest, and flushing. A packed one
    does not saturate.
    """
    rounding, ftz, sat = words.choice(floats.ROUNDINGS, "rn"), words.flag("ftz"), words.flag("sat")
    words.end()
    element = kind.removesuffix("x2")
    if (element != "f32" and (rounding != "rn" or ftz)) or (sat and kind != "f32"):
        raise Unsupported(words.opcode)
    compute = of(element, rounding)
    if ftz:
        compute = _with_flushing(compute)
    if sat:
        unbounded = compute
        compute = lambda *x: floats.saturated(unbounded(*x))  # noqa: E731
    if not kind.endswith("x2"):
        return alike(kind, count, compute)
    part = dtype_of(element)
    packed = np.dtype(f"u{2 * part.itemsize}")
    return Operation(packed, (packed,) * count, _split(part, compute))


def _basic(of_f32: Callable[..., Any], plain: Callable[..., Any]) -> Callable[[str, str], Callable[..., Any]]:
    """add, sub and mul: in half precision the exact result of float64 is rounded once."""

    def of(element: str, rounding: str) -> Callable[..., Any]:
        if element == "f32":
            return lambda a, b: of_f32(a, b, rounding)
        if element == "f64":
            return plain
        if element == "f16":
            return lambda a, b: floats.canonical(plain(a.astype(F64), b.astype(F64)).astype(F16))
        return lambda a, b: floats.to_bfloat16(of_f32(floats.widened(a), floats.widened(b), "odd"))

    return of


def _odd(of_f32: Callable[..., Any], fused: Callable[..., Any]) -> Callable[..., Any]:
    """``of_f32`` that for the rounding ``odd`` returns float64 rounded to odd, from ``fused``."""
    return lambda a, b, rounding: fused(a, b) if rounding == "odd" else of_f32(a, b, rounding)


def _subtract(a: np.ndarray, b: np.ndarray, rounding: str) -> np.ndarray:
    return floats.add(a, -b, rounding)


def _odd_sum(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return floats.to_odd(*floats.exact_sum(a.astype(F64), b.astype(F64)))


_SUM = _basic(_odd(floats.add, _odd_sum), np.add)
_DIFFERENCE = _basic(_odd(_subtract, lambda a, b: _odd_sum(a, -b)), np.subtract)
_PRODUCT = _basic(_odd(floats.multiply, lambda a, b: a.astype(F64) * b), np.multiply)


def _fused(element: str, rounding: str) -> Callable[..., Any]:
    if element == "f32":
        return lambda a, b, c: floats.fma(a, b, c, rounding)
    if element == "f64":
        raise Unsupported("fma.rn.f64")
    return floats.fma_half


def _sum(words: Modifiers, count: int, of: Callable[..., Any], integer: Callable[..., Any]) -> Operation:
    if not _is_float(words):
        return integers.sum_or_difference(words, count, integer)
    kind = words.kind(*FLOATS)
    if kind in ("f16", "bf16") and words.flag("f32"):  # of a half and a float, sm_100 and newer
        words.flag("rn")
        words.end()
        wide = _wide(kind)
        single = of("f32", "rn")
        return Operation(np.dtype(F32), (dtype_of(kind), np.dtype(F32)), lambda a, b: single(wide(a), b))
    return _elementwise(words, kind, 2, of)


def _wide(kind: str) -> Callable[[np.ndarray], np.ndarray]:
    return floats.widened if kind == "bf16" else lambda a: a.astype(F32)


def _product(words: Modifiers, count: int) -> Operation:
    if not _is_float(words):
        return integers.product(words, addend=False)
    return _elementwise(words, words.kind(*FLOATS), 2, _PRODUCT)


def _fma(words: Modifiers, count: int) -> Operation:
    kind = words.kind(*FLOATS)
    if kind in ("f16", "bf16") and words.flag("f32"):  # of two halves and a float, sm_100 and newer
        words.choice(("rn",))
        words.end()
        wide, half = _wide(kind), dtype_of(kind)
        return Operation(
            np.dtype(F32), (half, half, np.dtype(F32)), lambda a, b, c: floats.fma(wide(a), wide(b), c)
        )  # fmt: skip
    if not any(f".{one}" in words.opcode for one in floats.ROUNDINGS):
        raise Unsupported(words.opcode)
    return _elementwise(words, kind, 3, _fused)


def _extremum(words: Modifiers, count: int, sign: int) -> Operation:
    if not _is_float(words):
        return (integers.maximum if sign > 0 else integers.minimum)(words, count)
    kind, ftz, keeps_nan = words.kind("f16", "bf16", "f16x2", "bf16x2", "f32"), words.flag("ftz"), words.flag("NaN")
    words.end()
    inputs = 3 if count == 3 and kind == "f32" else 2

    def of_two(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return floats.larger(a, b, sign=sign, keeps_nan=keeps_nan)

    def compute(a: np.ndarray, b: np.ndarray, *third: np.ndarray) -> np.ndarray:
        found = of_two(a, b)
        return of_two(found, *third) if third else found

    element = kind.removesuffix("x2")
    if element == "bf16":
        narrow = compute
        compute = lambda *x: floats.to_bfloat16(narrow(*(floats.widened(one) for one in x)))  # noqa: E731
    if ftz:
        if kind != "f32":
            raise Unsupported(words.opcode)
        compute = _with_flushing(compute)
    if not kind.endswith("x2"):
        return alike(kind, inputs, compute)
    part = dtype_of(element)
    packed = np.dtype(f"u{2 * part.itemsize}")
    return Operation(packed, (packed,) * inputs, _split(part, compute))


def _sign(words: Modifiers, count: int, *, remove: bool) -> Operation:
    """neg and abs: the sign bit alone, so a NaN keeps its other bits; PTX leaves open which NaN it becomes."""
    if not _is_float(words):
        return (integers.absolute if remove else integers.negated)(words, count)
    kind, ftz = words.kind(*_SIGNS), words.flag("ftz")
    words.end()
    if ftz and kind != "f32":
        raise Unsupported(words.opcode)
    dtype = np.dtype(U32) if kind.endswith("x2") else dtype_of(kind)
    bits = np.dtype(f"u{dtype.itemsize}")
    mask = bits.type(_SIGNS[kind])

    def compute(a: np.ndarray) -> np.ndarray:
        found = (a.view(bits) & ~mask if remove else a.view(bits) ^ mask).view(dtype)
        return floats.flushed(found) if ftz else found

    return Operation(dtype, (dtype,), compute)


def _copied_sign(words: Modifiers, count: int) -> Operation:
    kind = words.kind("f32", "f64")
    words.end()
    return alike(kind, 2, lambda a, b: np.copysign(b, a))


def _approximate(name: str, exact: Callable[..., Any] | None = None, inputs: int = 1) -> Maker:
    """An instruction with ``.approx``; ``exact`` is the same correctly rounded, where there is one."""

    def make(words: Modifiers, count: int) -> Operation:
        words.kind("f32")
        ftz = name != "tanh" and words.flag("ftz")
        if exact is not None and words.flag("rn"):
            words.end()
            once = lambda *x: floats.canonical(exact(*x))  # noqa: E731
            return alike("f32", inputs, _with_flushing(once) if ftz else once)
        called = f"div.{words.choice(('approx', 'full'))}" if name == "div" else name
        if name != "div":
            words.choice(("approx",))
        words.end()

        def compute(mode: str, *values: np.ndarray) -> np.ndarray:
            if not ftz:
                return floats.approximate(called, mode, *values)
            return floats.flushed(floats.approximate(called, mode, *(floats.flushed(one) for one in values)))

        return alike("f32", inputs, compute, approximate=True)

    return make


def _quotient(words: Modifiers, count: int) -> Operation:
    if not _is_float(words):
        return integers.divided(words, count)
    if words.opcode in ("div.rn.f64",):
        return alike("f64", 2, np.divide)
    return _approximate("div", np.divide, 2)(words, count)


MAKERS: Mapping[str, Maker] = {
    "add": lambda words, count: _sum(words, count, _SUM, np.add),
    "sub": lambda words, count: _sum(words, count, _DIFFERENCE, np.subtract),
    "mul": _product, "fma": _fma, "div": _quotient, "copysign": _copied_sign,
    "max": lambda words, count: _extremum(words, count, 1),
    "min": lambda words, count: _extremum(words, count, -1),
    "neg": lambda words, count: _sign(words, count, remove=False),
    "abs": lambda words, count: _sign(words, count, remove=True),
    "sqrt": _approximate("sqrt", np.sqrt), "rcp": _approximate("rcp", np.reciprocal),
    **{name: _approximate(name) for name in ("rsqrt", "ex2", "lg2", "sin", "cos", "tanh")},
}  # fmt: skip
