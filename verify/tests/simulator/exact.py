"""Exact floating-point arithmetic on bits, in Python's integers: what the simulator's is compared with.

A number is a whole multiple of a power of two. Sums and products of such numbers are exact, and each operation rounds
once, when it makes bits of its result.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from math import isqrt

#: Bits of the result of an operation, from the bits of its operands.
Function = Callable[..., int]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format; ``nan`` is the NaN that arithmetic makes, None where any will do."""

    name: str
    width: int
    fraction: int
    nan: int | None

    @cached_property
    def sign(self) -> int:
        return 1 << (self.width - 1)

    @cached_property
    def infinity(self) -> int:
        return self.sign - (1 << self.fraction)

    @cached_property
    def largest(self) -> int:
        return self.infinity - 1

    @cached_property
    def bias(self) -> int:
        return (1 << (self.width - self.fraction - 2)) - 1

    @cached_property
    def smallest(self) -> int:
        """The exponent of the smallest subnormal number."""
        return 1 - self.bias - self.fraction

    @cached_property
    def a_nan(self) -> int:
        return self.sign - 1 if self.nan is None else self.nan

    @cached_property
    def one(self) -> int:
        return self.bias << self.fraction


F16 = Format("f16", 16, 10, 0x7FFF)
BF16 = Format("bf16", 16, 7, 0x7FFF)
F32 = Format("f32", 32, 23, 0x7FFFFFFF)
F64 = Format("f64", 64, 52, None)
TF32 = Format("tf32", 19, 10, 0x3FFFF)
FORMATS = {one.name: one for one in (F16, BF16, F32, F64)}
ROUNDINGS = ("rn", "rz", "rm", "rp")


def is_nan(kind: Format, bits: int) -> bool:
    return bits & (kind.sign - 1) > kind.infinity


def is_infinite(kind: Format, bits: int) -> bool:
    return bits & (kind.sign - 1) == kind.infinity


def parts(kind: Format, bits: int) -> tuple[int, int]:
    """A finite number as (m, e), which is m 2^e."""
    size = bits & (kind.sign - 1)
    exponent, fraction = size >> kind.fraction, size & ((1 << kind.fraction) - 1)
    whole = fraction | (1 << kind.fraction) if exponent else fraction
    return (-whole if bits & kind.sign else whole), kind.smallest + max(exponent - 1, 0)


@cache
def number(kind: Format, bits: int) -> float:
    """The value of any format as a Python float, exactly."""
    if kind is F64:
        return float(struct.unpack("<d", struct.pack("<Q", bits))[0])
    if is_nan(kind, bits):
        return float("nan")
    m, e = parts(kind, bits & (kind.sign - 1)) if not is_infinite(kind, bits) else (0, 0)
    size = float("inf") if is_infinite(kind, bits) else m * 2.0**e
    return -size if bits & kind.sign else size


def rounded(kind: Format, m: int, e: int, rounding: str = "rn", zero: int = 0) -> int:
    """The bits of m 2^e; ``zero`` are those of a result that is exactly zero."""
    if not m:
        return zero
    sign, size = (kind.sign if m < 0 else 0), abs(m)
    unit = max(e + size.bit_length() - kind.fraction - 1, kind.smallest)
    if unit <= e:
        whole = size << (e - unit)
    else:
        shift = unit - e
        whole, rest, half = size >> shift, size & ((1 << shift) - 1), 1 << (shift - 1)
        if rounding == "rn":
            away = rest > half or (rest == half and whole & 1)
        elif rounding == "rna":
            away = rest >= half
        else:
            away = rest and ((rounding == "rm" and sign) or (rounding == "rp" and not sign))
        whole += bool(away)
    bits = ((unit - kind.smallest) << kind.fraction) + whole
    if bits >= kind.infinity:
        towards = rounding in ("rn", "rna") or (rounding == "rm" and sign) or (rounding == "rp" and not sign)
        bits = kind.infinity if towards else kind.largest
    return sign | bits


def converted(source: Format, target: Format, bits: int, rounding: str = "rn") -> int:
    if is_nan(source, bits):
        return target.a_nan
    sign = target.sign if bits & source.sign else 0
    if is_infinite(source, bits):
        return sign | target.infinity
    return rounded(target, *parts(source, bits), rounding, sign)


def fused(kind: Format, a: int, b: int, c: int, rounding: str = "rn", factors: Format | None = None) -> int:
    """a b + c of bits; ``factors`` is the format of a and b, if it is another."""
    inner = factors or kind
    if is_nan(inner, a) or is_nan(inner, b) or is_nan(kind, c):
        return kind.a_nan
    negative = bool((a ^ b) & inner.sign)
    below = bool(c & kind.sign)
    if is_infinite(inner, a) or is_infinite(inner, b):
        none = not a & (inner.sign - 1) or not b & (inner.sign - 1)
        if none or (is_infinite(kind, c) and negative != below):
            return kind.a_nan
        return kind.infinity | (kind.sign if negative else 0)
    if is_infinite(kind, c):
        return c
    (p, d), (q, f), (m, e) = parts(inner, a), parts(inner, b), parts(kind, c)
    product, lower = p * q, min(d + f, e)
    total = (product << (d + f - lower)) + (m << (e - lower))
    minus = (negative and below) or (negative != below and rounding == "rm")
    return rounded(kind, total, lower, rounding, kind.sign if minus else 0)


def added(kind: Format, a: int, b: int, rounding: str = "rn") -> int:
    return fused(kind, kind.one, a, b, rounding)


def subtracted(kind: Format, a: int, b: int, rounding: str = "rn") -> int:
    return fused(kind, kind.one, a, b if is_nan(kind, b) else b ^ kind.sign, rounding)


def multiplied(kind: Format, a: int, b: int, rounding: str = "rn") -> int:
    zero = (a ^ b) & kind.sign
    return fused(kind, a, b, zero, rounding)


def divided(kind: Format, a: int, b: int) -> int:
    """a / b, rounded to nearest; the bit below those of the quotient says whether anything is left."""
    sign = (a ^ b) & kind.sign
    big, none = is_infinite(kind, a), not a & (kind.sign - 1)
    if is_nan(kind, a) or is_nan(kind, b) or (big and is_infinite(kind, b)) or (none and not b & (kind.sign - 1)):
        return kind.a_nan
    if big or not b & (kind.sign - 1):
        return kind.infinity | sign
    if none or is_infinite(kind, b):
        return sign
    (m, e), (n, f) = parts(kind, a & (kind.sign - 1)), parts(kind, b & (kind.sign - 1))
    shift = 3 * kind.fraction
    quotient, rest = divmod(m << shift, n)
    size = rounded(kind, 2 * quotient + bool(rest), e - f - shift - 1)
    return size | sign


def root(kind: Format, a: int) -> int:
    """The square root, rounded to nearest."""
    if not a & (kind.sign - 1):
        return a
    if is_nan(kind, a) or a & kind.sign:
        return kind.a_nan
    if is_infinite(kind, a):
        return a
    m, e = parts(kind, a)
    shift = 2 * kind.fraction + 4 + (e & 1)
    size = isqrt(m << shift)
    return rounded(kind, 2 * size + (size * size != m << shift), (e - shift) // 2 - 1)


def flushed(bits: int) -> int:
    """float32 bits, with a zero of the same sign in place of a subnormal number."""
    return bits if bits & F32.infinity else bits & F32.sign


def saturated(kind: Format, bits: int) -> int:
    """Bits limited to the range from 0 to 1; a NaN is +0."""
    if is_nan(kind, bits) or bits & kind.sign:
        return 0
    return min(bits, kind.one)


def whole_number(kind: Format, bits: int, rounding: str) -> int:
    """The value of a finite number, rounded to an integer by rni, rzi, rmi or rpi."""
    m, e = parts(kind, bits)
    if e >= 0:
        return m << e
    below, rest, half = m >> -e, m & ((1 << -e) - 1), 1 << (-e - 1)
    if rounding == "rni":
        return below + bool(rest > half or (rest == half and below & 1))
    return below + bool(rest and (rounding == "rpi" or (rounding == "rzi" and m < 0)))


def edges(kind: Format) -> list[int]:
    """Bits of values at which formats, roundings and special cases change, of both signs."""
    unit = 1 << kind.fraction
    sizes = [
        0, 1, 2, unit - 1, unit, unit + 1, kind.one - 1, kind.one, kind.one + 1, kind.one - unit, kind.one + unit // 2,
        kind.one + unit, kind.one + unit + unit // 2, kind.largest - 1, kind.largest, kind.infinity,
        kind.infinity + unit // 2, kind.infinity + 1, kind.sign - 1, kind.infinity + unit // 2 + 5,
    ]  # fmt: skip
    return [*sizes, *(kind.sign | one for one in sizes)]


def some_edges(kind: Format) -> Sequence[int]:
    """Fewer, for operations with three operands."""
    unit = 1 << kind.fraction
    sizes = [0, 1, unit - 1, unit, kind.one, kind.one + 1, kind.largest, kind.infinity, kind.infinity + 1]
    return [*sizes, *(kind.sign | one for one in sizes)]
