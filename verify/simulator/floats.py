"""Floating-point arithmetic as a GPU does it: one rounding, canonical NaN, flushed subnormals, documented errors.

Arrays are NumPy's; bfloat16 is held as its 16 bits (uint16). PTX ISA 8.x, section 9.7.3 to 9.7.5.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from verify.simulator.errors import Unsupported

U16, U32, U64 = np.uint16, np.uint32, np.uint64
F16, F32, F64 = np.float16, np.float32, np.float64

_SMALLEST_NORMAL = F32(2.0**-126)
_LARGEST = np.finfo(F32).max
#: Arithmetic in float32 makes this NaN of any other. PTX (9.7.3) leaves open which one; GPUs have no other.
_NAN = U32(0x7FFFFFFF).view(F32)
_NAN_16 = U16(0x7FFF)
ROUNDINGS = ("rn", "rz", "rm", "rp")


def flushed(values: np.ndarray) -> np.ndarray:
    """``.ftz``: float32 with subnormal numbers replaced by zeros of the same sign."""
    tiny = np.abs(values) < _SMALLEST_NORMAL
    return np.where(tiny, np.copysign(F32(0), values), values) if tiny.any() else values


def saturated(values: np.ndarray) -> np.ndarray:
    """``.sat``: the range from 0 to 1. A NaN becomes +0, and so does -0, of which PTX says nothing."""
    return np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))


def canonical(values: np.ndarray) -> np.ndarray:
    """The result of arithmetic, with each NaN replaced by the one that the hardware makes."""
    if values.dtype == F64 or not np.isnan(np.add.reduce(values, axis=None)):  # one pass; infinities may cancel
        return values
    if values.dtype == F16:
        return np.where(np.isnan(values), _NAN_16.view(F16), values)
    return np.where(np.isnan(values), _NAN, values)


def widened(bits: np.ndarray) -> np.ndarray:
    """bfloat16 bits as float32, exactly."""
    return (bits.astype(U32) << U32(16)).view(F32)


def exact_sum(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The float64 sum of two float64 arrays and its exact error (Knuth's TwoSum); the error is 0 unless finite."""
    total = a + b
    part = total - a
    error = (a - (total - part)) + (b - part)
    return total, np.where(np.isfinite(total), error, 0.0)


def to_odd(total: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``total + error`` rounded to odd in float64, so that a second rounding to fewer bits is right (Boldo, Melquiond
    2008).
    """
    bits = total.view(U64)
    wrong = (error != 0) & ((bits & U64(1)) == 0)
    if not wrong.any():
        return total
    away = (error > 0) == (total > 0)
    return np.where(wrong, np.where(away, bits + U64(1), bits - U64(1)).view(F64), total)


def narrowed(exact: np.ndarray, rounding: str) -> np.ndarray:
    """float64 to float32 with one of ``ROUNDINGS``; ``exact`` may be rounded to odd."""
    near = exact.astype(F32)
    if rounding == "rn":
        return near
    wide = near.astype(F64)
    too_high, too_low = wide > exact, wide < exact
    if rounding == "rz":
        too_high, too_low = too_high & (exact > 0), too_low & (exact < 0)
    down = np.where(too_high, np.nextafter(near, F32(-np.inf)), near) if rounding != "rp" else near
    return np.where(too_low, np.nextafter(near, F32(np.inf)), down) if rounding != "rm" else down


def add(a: np.ndarray, b: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """The sum of two float32 arrays, rounded once."""
    if rounding == "rn":
        return canonical(a + b)
    total, error = exact_sum(a.astype(F64), b.astype(F64))
    result = narrowed(to_odd(total, error), rounding)
    if rounding == "rm":  # an exact zero of two numbers is negative when rounding down
        result = np.where((total == 0) & (error == 0) & (np.signbit(a) | np.signbit(b)), F32(-0.0), result)
    return canonical(result)


def multiply(a: np.ndarray, b: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """The product of two float32 arrays, rounded once; it is exact in float64."""
    return canonical(a * b if rounding == "rn" else narrowed(a.astype(F64) * b, rounding))


def fma(a: np.ndarray, b: np.ndarray, c: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """``a b + c`` of float32 arrays, rounded once.

    The product is exact in float64. The float64 sum is not: where it lies half-way between two float32 numbers, or
    where the result is subnormal, rounding it again would be wrong, so there it is first rounded to odd.
    """
    product, addend = a.astype(F64) * b, c.astype(F64)
    total = product + addend
    doubtful = (total.view(U64) & U64(0x1FFFFFFF)) == U64(0x10000000)
    doubtful |= (np.abs(total) < 2.0**-125) & (total != 0)
    if rounding != "rn" or doubtful.any():
        total, error = exact_sum(product, addend)
        total = to_odd(total, error)
    result = narrowed(total, rounding)
    if rounding == "rm":
        result = np.where((total == 0) & (np.signbit(product) | np.signbit(c)), F32(-0.0), result)
    return canonical(result)


def fma_half(a: np.ndarray, b: np.ndarray, c: np.ndarray) -> np.ndarray:
    """``a b + c`` of float16 arrays, or of the bits of bfloat16 arrays, rounded once to the same type."""
    wide = [(widened(x) if x.dtype == U16 else x).astype(F64) for x in (a, b, c)]
    exact = to_odd(*exact_sum(wide[0] * wide[1], wide[2]))
    return to_bfloat16(exact) if a.dtype == U16 else canonical(exact.astype(F16))


def to_bfloat16(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """float32, or float64 rounded to odd, to the bits of bfloat16 with one rounding; a NaN becomes 0x7FFF."""
    if values.dtype == F64:  # to odd in float32: 24 bits are enough before a rounding to 8
        near = values.astype(F32)
        cut = np.where(np.abs(near.astype(F64)) > np.abs(values), np.nextafter(near, F32(0)), near)
        inexact = (cut.astype(F64) != values) & ~np.isnan(values)
        values = (cut.view(U32) | inexact.astype(U32)).view(F32)
    bits = values.view(U32)
    if rounding == "rn":
        result = ((bits + U32(0x7FFF) + ((bits >> U32(16)) & U32(1))) >> U32(16)).astype(U16)
    else:
        result = (bits >> U32(16)).astype(U16)
    return np.where(np.isnan(values), _NAN_16, result)


def to_float16(values: np.ndarray, rounding: str = "rn") -> np.ndarray:
    """float32 to float16 with one rounding; a NaN becomes 0x7FFF."""
    near = values.astype(F16)
    if rounding == "rz":
        near = np.where(np.abs(near.astype(F32)) > np.abs(values), np.nextafter(near, F16(0)), near)
    return np.where(np.isnan(values), _NAN_16.view(F16), near)


def larger(a: np.ndarray, b: np.ndarray, *, sign: int, keeps_nan: bool) -> np.ndarray:
    """The maximum (``sign`` 1) or minimum (-1): -0 is below +0, and a NaN is dropped unless both are or ``.NaN``."""
    found = np.maximum(a, b) if sign > 0 else np.minimum(a, b)
    if not keeps_nan:  # np.fmax keeps a signalling NaN, but not in every place of an array
        found = np.where(np.isnan(a), b, np.where(np.isnan(b), a, found))
    zeros = (a == 0) & (b == 0)
    if zeros.any():
        negative = np.signbit(a) & np.signbit(b) if sign > 0 else np.signbit(a) | np.signbit(b)
        found = np.where(zeros, np.where(negative, a.dtype.type(-0.0), a.dtype.type(0.0)), found)
    return canonical(found)


def _logarithm_error(x: np.ndarray) -> np.ndarray:
    """lg2: 2^-22, absolute for inputs in (0.5, 2) and relative outside."""
    with np.errstate(all="ignore"):
        near = (x > 0.5) & (x < 2)
        return np.where(near, 2.0**-22, np.abs(np.log2(x)) * 2.0**-22)


def _periodic_error(x: np.ndarray) -> np.ndarray:
    """sin and cos: 2^-20.5 within two pi, 2^-14.7 within a hundred; there is no bound beyond."""
    if (np.abs(x[np.isfinite(x)]) > 100 * np.pi).any():
        raise Unsupported("sin.approx or cos.approx beyond 100 pi, where no error is documented")
    return np.where(np.abs(x) <= 2 * np.pi, 2.0**-20.5, 2.0**-14.7)


def _relative(bound: float, exact: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *x: np.abs(exact(*x)) * bound


def _reciprocal_root(x: np.ndarray) -> np.ndarray:
    return 1 / np.sqrt(x)


def _tangent_error(x: np.ndarray) -> np.ndarray:
    """tanh: 2^-11 of the result; subnormal numbers are passed through."""
    return np.where(np.abs(x) < _SMALLEST_NORMAL, 0.0, np.abs(np.tanh(x)) * 2.0**-11)


def _product_with_reciprocal(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """div.approx: above 2^126 the reciprocal of the divisor is 0; below 2^-126 no error is documented."""
    size = np.abs(b)
    if ((size > 0) & (size < _SMALLEST_NORMAL)).any():
        raise Unsupported("div.approx by a subnormal number, where no error is documented")
    return a / np.where((size > 2.0**126) & np.isfinite(b), np.copysign(np.inf, b), b)


#: The exact functions and the largest documented error, which is a number of float32 steps from the nearest result
#: ("ulp"), or a function of the arguments. Both functions take float64 (PTX ISA 9.7.3.8 and 9.7.3.13 to 9.7.3.22).
APPROXIMATIONS: dict[str, tuple[Callable[..., np.ndarray], Callable[..., np.ndarray] | int]] = {
    "sqrt": (np.sqrt, _relative(2.0**-23, np.sqrt)),
    "rsqrt": (_reciprocal_root, _relative(2.0**-22.9, _reciprocal_root)),
    "rcp": (np.reciprocal, 1),
    "div.approx": (_product_with_reciprocal, 2),
    "div.full": (np.divide, 2),
    "ex2": (np.exp2, 2),
    "lg2": (np.log2, _logarithm_error),
    "tanh": (np.tanh, _tangent_error),
    "sin": (np.sin, _periodic_error),
    "cos": (np.cos, _periodic_error),
}


def approximate(name: str, mode: str, *inputs: np.ndarray) -> np.ndarray:
    """An approximate instruction on float32 inputs in one of ``verify.record.simulation.MODES``.

    The result for a zero, an infinity or a NaN is documented, and so is the same in every mode; so are an overflow to
    infinity and an underflow to zero. Raises Unsupported for an input for which no error is documented.
    """
    exact, error = APPROXIMATIONS[name]
    wide = [one.astype(F64) for one in inputs]
    value = exact(*wide)
    near = value.astype(F32)
    steps, bound = (error, 0.0) if isinstance(error, int) else (0, error(*wide))
    if mode == "nearest":
        return canonical(near)
    end = F32(np.inf if mode == "highest" else -np.inf)
    settled = ~np.isfinite(near) | ((near == 0) & (steps > 0))
    for one in inputs:
        settled = settled | (one == 0) | ~np.isfinite(one)
    if steps:
        far = near
        for _ in range(steps):
            far = np.clip(np.nextafter(far, end), -_LARGEST, _LARGEST)
        far = np.where(np.signbit(far) == np.signbit(near), far, np.copysign(F32(0), near))
    else:
        limit = value + np.copysign(bound, end)
        far = limit.astype(F32)
        beyond = far.astype(F64) > limit if end > 0 else far.astype(F64) < limit
        far = np.where(beyond, np.nextafter(far, -end), far)
    return canonical(np.where(settled, near, far))
