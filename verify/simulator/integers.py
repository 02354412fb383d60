"""Integer arithmetic, logic, shifts, comparisons and selections: PTX ISA 8.x, sections 9.7.1, 9.7.6 and 9.7.8."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from verify.simulator.errors import Unsupported
from verify.simulator.floats import flushed, widened
from verify.simulator.operation import Maker, Modifiers, Operation, alike, dtype_of

U8, U32, U64, I64 = np.uint8, np.uint32, np.uint64, np.int64
INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
_BITS = ("b16", "b32", "b64")
_PREDICATE = np.dtype(bool)


def _plain(compute: Callable[..., Any], kinds: tuple[str, ...] = INTEGERS, inputs: int = 2) -> Maker:
    """An operation without modifiers, on operands of one type."""

    def make(words: Modifiers, count: int) -> Operation:
        kind = words.kind(*kinds)
        words.end()
        return alike(kind, inputs, compute)

    return make


def sum_or_difference(words: Modifiers, count: int, compute: Any) -> Operation:
    """add and sub of integers; they wrap, and ``.sat`` clamps s32."""
    kind = words.kind(*INTEGERS)
    if not words.flag("sat"):
        words.end()
        return alike(kind, 2, compute)
    words.end()
    if kind != "s32":
        raise Unsupported(words.opcode)
    low, high = np.iinfo(np.int32).min, np.iinfo(np.int32).max
    return alike(kind, 2, lambda a, b: np.clip(compute(a.astype(I64), b.astype(I64)), low, high).astype(np.int32))


def high_product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The upper half of the product of two arrays of one integer type."""
    if a.dtype.itemsize < 8:
        wide = np.dtype(f"{a.dtype.kind}{2 * a.dtype.itemsize}")
        return ((a.astype(wide) * b.astype(wide)) >> wide.type(8 * a.dtype.itemsize)).astype(a.dtype)
    x, y = a.astype(U64), b.astype(U64)
    mask, half = U64(0xFFFFFFFF), U64(32)
    low = (x & mask) * (y & mask)
    first, second = (x >> half) * (y & mask) + (low >> half), (x & mask) * (y >> half)
    middle = (first & mask) + second
    high = (x >> half) * (y >> half) + (first >> half) + (middle >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, U64(0)) - np.where(b < 0, x, U64(0))
    return high.astype(a.dtype)


def product(words: Modifiers, addend: bool) -> Operation:
    """mul and mad of integers, in ``.lo``, ``.hi`` and ``.wide``."""
    kind, part = words.kind(*INTEGERS), words.choice(("lo", "hi", "wide"))
    words.end()
    dtype = result = dtype_of(kind)
    if part == "wide":
        if dtype.itemsize == 8:
            raise Unsupported(words.opcode)
        result = np.dtype(f"{dtype.kind}{2 * dtype.itemsize}")

    def multiplied(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        if part == "hi":
            return high_product(a, b)
        return a.astype(result) * b.astype(result)

    if not addend:
        return Operation(result, (dtype, dtype), multiplied)
    return Operation(result, (dtype, dtype, result), lambda a, b, c: multiplied(a, b) + c)


def _divided(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Division towards zero. By zero it gives all ones here; PTX leaves the value open."""
    safe = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // safe
    if a.dtype.kind == "i":  # NumPy rounds down
        quotient = quotient + ((a - quotient * safe != 0) & ((a < 0) != (safe < 0))).astype(a.dtype)
        quotient = np.where((a == np.iinfo(a.dtype).min) & (safe == -1), a, quotient)
    return np.where(b == 0, np.array(-1).astype(a.dtype), quotient)


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """What division towards zero leaves. By zero it gives the dividend here; PTX leaves the value open."""
    safe = np.where((b == 0) | (b == np.array(-1).astype(b.dtype)) & (b.dtype.kind == "i"), b.dtype.type(1), b)
    return np.where(b == 0, a, np.fmod(a, safe))


def _shift(words: Modifiers, count: int, *, left: bool) -> Operation:
    """shl and shr: a distance of the width or more moves everything out."""
    kind = words.kind(*_BITS, *([] if left else INTEGERS))
    words.end()
    dtype = dtype_of(kind)
    width = 8 * dtype.itemsize

    def shifted(value: np.ndarray, distance: np.ndarray) -> np.ndarray:
        near = np.minimum(distance, U32(width - 1)).astype(dtype)
        moved = value << near if left else value >> near
        return moved if dtype.kind == "i" else np.where(distance >= width, dtype.type(0), moved)

    return Operation(dtype, (dtype, np.dtype(U32)), shifted)


def _funnel(words: Modifiers, count: int) -> Operation:
    words.kind("b32")
    way, mode = words.choice(("l", "r")), words.choice(("wrap", "clamp"))
    words.end()

    def shifted(low: np.ndarray, high: np.ndarray, distance: np.ndarray) -> np.ndarray:
        steps = (distance & U32(31) if mode == "wrap" else np.minimum(distance, U32(32))).astype(U64)
        both = (high.astype(U64) << U64(32)) | low
        return ((both << steps) >> U64(32) if way == "l" else both >> steps).astype(U32)

    return alike("b32", 3, shifted)


def _extracted(words: Modifiers, count: int) -> Operation:
    """bfe: a field of bits, extended by its sign for signed types."""
    kind = words.kind("u32", "s32", "u64", "s64")
    words.end()
    dtype = dtype_of(kind)
    width = 8 * dtype.itemsize

    def extract(value: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, size = (position & U32(255)).astype(I64), (length & U32(255)).astype(I64)
        bits = value.astype(f"u{dtype.itemsize}").astype(U64)
        kept = np.where(start < width, bits >> np.minimum(start, 63).astype(U64), U64(0))
        mask = np.where(size >= 64, ~U64(0), (U64(1) << np.minimum(size, 63).astype(U64)) - U64(1))
        field = kept & mask
        if dtype.kind == "i":
            last = np.minimum(start + size - 1, width - 1)
            negative = (size > 0) & ((bits >> np.maximum(last, 0).astype(U64)) & U64(1) == 1)
            size_here = np.maximum(np.minimum(size, width - start), 0)
            above = np.where(size_here >= 64, U64(0), ~((U64(1) << np.minimum(size_here, 63).astype(U64)) - U64(1)))
            field = np.where(negative, field | above, field)
        return field.astype(f"u{dtype.itemsize}").view(dtype)

    return Operation(dtype, (dtype, np.dtype(U32), np.dtype(U32)), extract)


def _inserted(words: Modifiers, count: int) -> Operation:
    """bfi: the lowest bits of one value put into another."""
    kind = words.kind("b32", "b64")
    words.end()
    dtype = dtype_of(kind)
    width = 8 * dtype.itemsize

    def insert(field: np.ndarray, into: np.ndarray, position: np.ndarray, length: np.ndarray) -> np.ndarray:
        start, size = (position & U32(255)).astype(I64), (length & U32(255)).astype(I64)
        ones = np.where(size >= 64, ~U64(0), (U64(1) << np.minimum(size, 63).astype(U64)) - U64(1))
        at = np.minimum(start, 63).astype(U64)
        mask = np.where(start < width, ones << at, U64(0)).astype(dtype)
        return (into & ~mask) | (np.where(start < width, field.astype(U64) << at, U64(0)).astype(dtype) & mask)

    return Operation(dtype, (dtype, dtype, np.dtype(U32), np.dtype(U32)), insert)


def _counted(compute: Callable[[np.ndarray], np.ndarray]) -> Maker:
    """popc and clz, whose result has 32 bits."""

    def make(words: Modifiers, count: int) -> Operation:
        kind = words.kind("b32", "b64")
        words.end()
        return Operation(np.dtype(U32), (dtype_of(kind),), lambda a: compute(a).astype(U32))

    return make


def _bits_of(values: np.ndarray) -> np.ndarray:
    """The bits of each value, the highest first, in a new last axis."""
    parts = np.ascontiguousarray(values.astype(values.dtype.newbyteorder(">")))[..., None].view(U8)
    return np.unpackbits(parts, axis=-1)


def _leading_zeros(values: np.ndarray) -> np.ndarray:
    bits = _bits_of(values)
    return np.where(bits.any(-1), bits.argmax(-1), bits.shape[-1])


def _reversed(values: np.ndarray) -> np.ndarray:
    backwards = np.ascontiguousarray(np.packbits(_bits_of(values)[..., ::-1], axis=-1))
    return backwards.view(values.dtype.newbyteorder(">"))[..., 0].astype(values.dtype)


def _permuted(words: Modifiers, count: int) -> Operation:
    """prmt without a mode: four bytes of two words, each chosen by four bits."""
    words.kind("b32")
    words.end()

    def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
        both = (b.astype(U64) << U64(32)) | a
        found = np.zeros(np.broadcast_shapes(both.shape, selector.shape), U64)
        for place in range(4):
            four = (selector.astype(U64) >> U64(4 * place)) & U64(15)
            byte = (both >> ((four & U64(7)) * U64(8))) & U64(255)
            sign = np.where(byte & U64(128), U64(255), U64(0))
            found |= np.where(four & U64(8), sign, byte) << U64(8 * place)
        return found.astype(U32)

    return alike("b32", 3, permute)


def _looked_up(words: Modifiers, count: int) -> Operation:
    """lop3: any logical function of three words, by its truth table."""
    words.kind("b32")
    words.end()

    def look_up(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
        found = np.zeros(np.broadcast_shapes(a.shape, b.shape, c.shape), U32)
        for row in range(8):
            here = (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
            found |= np.where((table >> U32(row)) & U32(1), here, U32(0))
        return found

    return alike("b32", 4, look_up)


_COMPARISONS: Mapping[str, Callable[..., Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal,
    "lo": np.less, "ls": np.less_equal, "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
_ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
_UNORDERED = (*(f"{name}u" for name in _ORDERED), "num", "nan")
_UNSIGNED = ("lo", "ls", "hi", "hs")
_COMBINED = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _floating_comparison(how: str) -> Callable[..., Any]:
    def unordered(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.isnan(a) | np.isnan(b)

    if how == "nan":
        return unordered
    if how == "num":
        return lambda a, b: ~unordered(a, b)
    if how in _UNORDERED:
        return lambda a, b: _COMPARISONS[how[:-1]](a, b) | unordered(a, b)
    if how == "ne":  # NumPy's is true for NaN
        return lambda a, b: (a != b) & ~unordered(a, b)
    return _COMPARISONS[how]


def _compared(words: Modifiers, count: int) -> Operation:
    """setp: a comparison, perhaps combined with a predicate."""
    kind = words.kind(*INTEGERS, *_BITS, "f16", "bf16", "f32", "f64")
    floating = kind in ("f16", "bf16", "f32", "f64")
    names = ["eq", "ne"] if kind in _BITS else [*_ORDERED, *(_UNORDERED if floating else ())]
    how = words.choice([*names, *(_UNSIGNED if kind.startswith("u") else ())])
    ftz = kind == "f32" and words.flag("ftz")
    combined = words.choice(_COMBINED, "none")
    words.end()
    test = _floating_comparison(how) if floating else _COMPARISONS[how]

    def compare(a: np.ndarray, b: np.ndarray, *predicate: np.ndarray) -> np.ndarray:
        a, b = (widened(a), widened(b)) if kind == "bf16" else (a, b)
        a, b = (flushed(a), flushed(b)) if ftz else (a, b)
        return _COMBINED[combined](test(a, b), *predicate) if predicate else test(a, b)

    dtype = dtype_of(kind)
    return Operation(_PREDICATE, (dtype, dtype, *([_PREDICATE] if combined != "none" else [])), compare)


def _selected(words: Modifiers, count: int) -> Operation:
    kind = words.kind(*INTEGERS, *_BITS, "f32", "f64")
    words.end()
    dtype = dtype_of(kind)
    return Operation(dtype, (dtype, dtype, _PREDICATE), lambda a, b, chosen: np.where(chosen, a, b))


def _address(words: Modifiers, count: int) -> Operation:
    """cvta: spaces have addresses of their own here, and a global address is a generic one."""
    kind = words.kind("u64")
    words.flag("to")
    words.choice(("global",))
    words.end()
    return alike(kind, 1, lambda a: a)


MAKERS: Mapping[str, Maker] = {
    "mad": lambda words, count: product(words, addend=True),
    "rem": _plain(_remainder),
    "and": _plain(np.bitwise_and, (*_BITS, "pred")),
    "or": _plain(np.bitwise_or, (*_BITS, "pred")),
    "xor": _plain(np.bitwise_xor, (*_BITS, "pred")),
    "not": _plain(np.invert, (*_BITS, "pred"), 1),
    "shl": lambda words, count: _shift(words, count, left=True),
    "shr": lambda words, count: _shift(words, count, left=False),
    "shf": _funnel, "bfe": _extracted, "bfi": _inserted, "prmt": _permuted, "lop3": _looked_up,
    "popc": _counted(lambda a: _bits_of(a).sum(-1)), "clz": _counted(_leading_zeros),
    "brev": _plain(_reversed, ("b32", "b64"), 1),
    "setp": _compared, "selp": _selected, "cvta": _address,
    "mov": _plain(lambda a: a, (*INTEGERS, *_BITS, "f32", "f64", "pred"), 1),
}  # fmt: skip

#: Integer forms of opcodes that also have floating-point forms.
divided = _plain(_divided)
negated = _plain(np.negative, ("s16", "s32", "s64"), 1)
absolute = _plain(np.abs, ("s16", "s32", "s64"), 1)
maximum = _plain(np.maximum)
minimum = _plain(np.minimum)
