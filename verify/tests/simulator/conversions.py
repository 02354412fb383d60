"""References of cvt, from exact arithmetic: every pair of types, rounding and saturation that the simulator takes."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from verify.tests.simulator import exact
from verify.tests.simulator.cases import Case, flags, signed, width
from verify.tests.simulator.exact import BF16, F16, F32, F64, FORMATS, ROUNDINGS, TF32, Format, Function

INTEGERS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
TO_INTEGER = ("rni", "rzi", "rmi", "rpi")


def _range(kind: str) -> tuple[int, int]:
    bits = width(kind)
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


def _limited(value: int, kind: str) -> int:
    low, high = _range(kind)
    return max(low, min(value, high)) & ((1 << width(kind)) - 1)


def between_integers() -> Iterator[Case]:
    for source, target in product(INTEGERS, INTEGERS):
        mask = (1 << width(target)) - 1
        wraps = lambda a, s=source, m=mask: signed(s, a) & m  # noqa: E731
        limits = lambda a, s=source, t=target: _limited(signed(s, a), t)  # noqa: E731
        yield Case(f"cvt.{target}.{source}", (source,), target, wraps)
        yield Case(f"cvt.sat.{target}.{source}", (source,), target, limits)


def from_integers() -> Iterator[Case]:
    for source in INTEGERS:
        small = width(source) < 64
        for form in (F32, F64, *((F16,) if small else ())):
            for rounding in ROUNDINGS if form is F32 and small else ("rn",):
                reference = lambda a, s=source, f=form, r=rounding: exact.rounded(f, signed(s, a), 0, r)  # noqa: E731
                yield Case(f"cvt.{rounding}.{form.name}.{source}", (source,), form.name, reference)


def _to_integer(form: Format, target: str, rounding: str, ftz: str) -> Function:
    """Too large ones become the nearest; a NaN is 0, or the highest bit alone where a type has 64 bits or is f64."""
    low, high = _range(target)
    wide = form is F64 or width(target) == 64

    def compute(bits: int) -> int:
        if exact.is_nan(form, bits):
            return 1 << (width(target) - 1) if wide else 0
        bits = exact.flushed(bits) if ftz else bits
        if exact.is_infinite(form, bits):
            return _limited(low if bits & form.sign else high, target)
        return _limited(exact.whole_number(form, bits, rounding), target)

    return compute


def to_integers() -> Iterator[Case]:
    for form, target, rounding in product(FORMATS.values(), INTEGERS, TO_INTEGER):
        for ftz, sat in product(flags("ftz") if form is F32 else [""], flags("sat")):
            opcode = f"cvt.{rounding}{ftz}{sat}.{target}.{form.name}"
            yield Case(opcode, (form.name,), target, _to_integer(form, target, rounding, ftz))


def _without_loss(source: Format, target: Format, rounding: str, modifiers: str) -> Function:
    """A NaN of float16 becomes the canonical one of float32; where PTX leaves it open, the case takes any."""

    def compute(bits: int) -> int:
        if ".ftz" in modifiers and source is F32:
            bits = exact.flushed(bits)
        if rounding and not exact.is_nan(source, bits) and not exact.is_infinite(source, bits):
            whole = exact.whole_number(source, bits, rounding)
            bits = exact.rounded(source, whole, 0, "rn", bits & source.sign)
        found = exact.converted(source, target, bits)
        if ".ftz" in modifiers and target is F32:
            found = exact.flushed(found)
        return exact.saturated(target, found) if ".sat" in modifiers else found

    return compute


def without_loss() -> Iterator[Case]:
    same = [(form, form, rounding) for form in (F16, F32, F64) for rounding in ("", *TO_INTEGER)]
    wider = [(F16, F32, ""), (F16, F64, ""), (BF16, F32, ""), (BF16, F64, ""), (F32, F64, "")]
    for source, target, rounding in (*same, *wider):
        words = flags(*(["ftz"] if F32 in (source, target) else []), *([] if target is F16 else ["sat"]))
        for modifiers in words:
            opcode = f"cvt{rounding and '.'}{rounding}{modifiers}.{target.name}.{source.name}"
            reference = _without_loss(source, target, rounding, modifiers)
            yield Case(opcode, (source.name,), target.name, reference, (source, target) != (F16, F32))


def narrower() -> Iterator[Case]:
    for source, target, roundings in ((F32, F16, ("rn", "rz")), (F32, BF16, ("rn", "rz")), (F64, F32, ROUNDINGS)):
        for rounding, ftz in product(roundings, flags("ftz")):

            def compute(bits: int, s: Format = source, t: Format = target, r: str = rounding, z: str = ftz) -> int:
                found = exact.converted(s, t, exact.flushed(bits) if z and s is F32 else bits, r)
                return exact.flushed(found) if z and t is F32 else found

            yield Case(f"cvt.{rounding}{ftz}.{target.name}.{source.name}", (source.name,), target.name, compute)


def _tf32(bits: int, rounding: str) -> int:
    """19 bits of a word; PTX leaves open what the others are for a NaN."""
    return 0x7FFFFFFF if exact.is_nan(F32, bits) else exact.converted(F32, TF32, bits, rounding) << 13


def packed() -> Iterator[Case]:
    """The first operand goes into the upper half."""
    for form, rounding in product((F16, BF16), ("rn", "rz")):
        reference = lambda a, b, f=form, r=rounding: (  # noqa: E731
            exact.converted(F32, f, a, r) << 16 | exact.converted(F32, f, b, r)
        )
        yield Case(f"cvt.{rounding}.{form.name}x2.f32", ("f32", "f32"), f"{form.name}x2", reference)
    for rounding in ("rna", "rn", "rz"):
        yield Case(f"cvt.{rounding}.tf32.f32", ("f32",), "b32", lambda a, r=rounding: _tf32(a, r))


CASES = (*between_integers(), *from_integers(), *to_integers(), *without_loss(), *narrower(), *packed())
