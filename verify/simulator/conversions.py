"""cvt: conversions between integers and floating-point numbers, their roundings and saturation (PTX ISA 9.7.9.21)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from verify.simulator import floats
from verify.simulator.errors import Unsupported
from verify.simulator.operation import Maker, Modifiers, Operation, dtype_of

U16, U32 = np.uint16, np.uint32
F16, F32, F64 = np.float16, np.float32, np.float64
_INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
_FLOATS = ("f16", "bf16", "f32", "f64")
#: Roundings to an integer, which is what the result of a conversion to one always is.
_TO_INTEGER = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
_PACKED = ("f16x2", "bf16x2")


def _convert(words: Modifiers, count: int) -> Operation:
    source = words.kind(*_INTEGERS, *_FLOATS)
    target = words.kind(*_INTEGERS, *_FLOATS, *_PACKED, "tf32")
    if target == "tf32":
        return _to_tf32(words, source)
    if target in _PACKED:
        return _pack(words, source, target)
    if source in _FLOATS:
        return _from_float(words, source, target)
    return _from_integer(words, source, target)


def _from_integer(words: Modifiers, source: str, target: str) -> Operation:
    origin, result = dtype_of(source), dtype_of(target)
    if target in _INTEGERS:
        saturates = words.flag("sat")
        words.end()
        if not saturates:
            return Operation(result, (origin,), lambda a: a.astype(result))
        low, high = max(np.iinfo(origin).min, np.iinfo(result).min), min(np.iinfo(origin).max, np.iinfo(result).max)
        return Operation(result, (origin,), lambda a: np.clip(a, origin.type(low), origin.type(high)).astype(result))
    rounding = words.choice(floats.ROUNDINGS)
    words.end()
    if target == "f32" and (rounding == "rn" or origin.itemsize < 8):
        if rounding == "rn":
            return Operation(result, (origin,), lambda a: a.astype(F32))
        return Operation(result, (origin,), lambda a: floats.narrowed(a.astype(F64), rounding))
    if rounding == "rn" and (target == "f64" or (target == "f16" and origin.itemsize < 8)):
        return Operation(
            result, (origin,), lambda a: a.astype(F64).astype(result) if target == "f16" else a.astype(F64)
        )
    raise Unsupported(words.opcode)


def _from_float(words: Modifiers, source: str, target: str) -> Operation:
    ftz = words.flag("ftz")
    if ftz and "f32" not in (source, target):
        raise Unsupported(words.opcode)
    origin, result = dtype_of(source), dtype_of(target)

    def read(a: np.ndarray) -> np.ndarray:
        a = floats.widened(a) if source == "bf16" else a
        return floats.flushed(a) if ftz and a.dtype == F32 else a

    if target in _INTEGERS:
        to_integer = _TO_INTEGER[words.choice(_TO_INTEGER)]
        words.flag("sat")  # conversions to integers always clamp
        words.end()
        return Operation(result, (origin,), lambda a: _clamped(to_integer(read(a).astype(F64)), result, source))
    if source == target or (target == "f32" and source in ("f16", "bf16")) or (target == "f64" and source != "f64"):
        return _same_or_wider(words, read, origin, source, target)
    rounding = words.choice(floats.ROUNDINGS)
    words.end()
    narrow = {"f16": floats.to_float16, "bf16": floats.to_bfloat16}.get(target)
    if source == "f32" and narrow is not None and rounding in ("rn", "rz"):
        return Operation(result, (origin,), lambda a: narrow(read(a), rounding))
    if (source, target) == ("f64", "f32"):
        compute = lambda a: floats.canonical(floats.narrowed(a, rounding))  # noqa: E731
        return Operation(result, (origin,), (lambda a: floats.flushed(compute(a))) if ftz else compute)
    raise Unsupported(words.opcode)


def _same_or_wider(
    words: Modifiers, read: Callable[[np.ndarray], np.ndarray], origin: np.dtype, source: str, target: str
) -> Operation:
    """A conversion without loss, perhaps with a rounding to an integer or a saturation to [0, 1].

    PTX leaves open which NaN it makes of one. From float16 to float32 it is the canonical one, as in NVIDIA's
    ``cuda_fp16.hpp``; bfloat16 keeps its bits.
    """
    name = words.choice(_TO_INTEGER, "") if source == target else ""
    saturates = words.flag("sat")
    words.end()
    if (source == "bf16" and target == "bf16") or (saturates and target not in ("f32", "f64")):
        raise Unsupported(words.opcode)
    result = dtype_of(target)

    def compute(a: np.ndarray) -> np.ndarray:
        value = read(a).astype(result)
        value = _TO_INTEGER[name](value) if name else value
        value = floats.canonical(value) if (source, target) == ("f16", "f32") else value
        return floats.saturated(value) if saturates else value

    return Operation(result, (origin,), compute)


def _clamped(values: np.ndarray, result: np.dtype, source: str) -> np.ndarray:
    """Whole float64 numbers as integers: too large ones become the nearest, NaN 0, or 2^63 if 64 bits are involved."""
    low, high = np.iinfo(result).min, np.iinfo(result).max
    inside = (values >= low) & (values < float(high) + 1)  # `high` itself is no float64 where it has 64 bits
    found = np.where(inside, values, 0).astype(result)
    found = np.where(values >= float(high) + 1, result.type(high), found)
    found = np.where(values < low, result.type(low), found)
    wide = source == "f64" or result.itemsize == 8
    nan = result.type(0) if not wide else np.array(1 << (8 * result.itemsize - 1), f"u{result.itemsize}").view(result)
    return np.where(np.isnan(values), nan, found)


def _pack(words: Modifiers, source: str, target: str) -> Operation:
    """Two float32 in one register of halves; the first operand goes into the upper half."""
    rounding = words.choice(("rn", "rz"))
    words.end()
    if source != "f32":
        raise Unsupported(words.opcode)
    narrow = floats.to_float16 if target == "f16x2" else floats.to_bfloat16

    def compute(upper: np.ndarray, lower: np.ndarray) -> np.ndarray:
        high, low = (narrow(one, rounding).view(U16).astype(U32) for one in (upper, lower))
        return (high << U32(16)) | low

    return Operation(np.dtype(U32), (np.dtype(F32),) * 2, compute)


def _to_tf32(words: Modifiers, source: str) -> Operation:
    """float32 with 10 bits of mantissa; ``.rna`` rounds ties away from zero."""
    rounding = words.choice(("rna", "rn", "rz"))
    words.end()
    if source != "f32":
        raise Unsupported(words.opcode)

    def compute(a: np.ndarray) -> np.ndarray:
        bits = a.view(U32)
        even: np.ndarray = (bits >> U32(13)) & U32(1)
        half: Any = {"rna": U32(0x1000), "rn": even + U32(0xFFF), "rz": U32(0)}[rounding]
        return np.where(np.isfinite(a), (bits + half) & U32(0xFFFFE000), np.where(np.isnan(a), U32(0x7FFFFFFF), bits))

    return Operation(np.dtype(U32), (np.dtype(F32),), compute)


MAKERS: Mapping[str, Maker] = {"cvt": _convert}
