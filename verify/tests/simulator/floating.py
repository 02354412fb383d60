"""References of the floating-point instructions that round once, from exact arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from verify.tests.simulator import exact
from verify.tests.simulator.cases import PACKED, Case, flags, halves
from verify.tests.simulator.exact import BF16, F16, F32, F64, FORMATS, ROUNDINGS, Format, Function

_BASIC: dict[str, Callable[..., int]] = {"add": exact.added, "sub": exact.subtracted, "mul": exact.multiplied}
_HALVES = ("f16", "bf16", "f16x2", "bf16x2")


def _of(kind: str) -> Format:
    """The format of a type, or of the elements of a packed one."""
    return FORMATS[PACKED.get(kind, kind)]


def _packed(kind: str, reference: Function) -> Function:
    return halves(_of(kind), reference) if kind in PACKED else reference


def _modified(reference: Function, modifiers: str) -> Function:
    """A function of float32 bits with ``.ftz``, which flushes operands and result, and then with ``.sat``."""

    def compute(*operands: int) -> int:
        if ".ftz" not in modifiers:
            found = reference(*operands)
        else:
            found = exact.flushed(reference(*map(exact.flushed, operands)))
        return exact.saturated(F32, found) if ".sat" in modifiers else found

    return compute


def _rounded_once(name: str, count: int, compute: Callable[..., int], roundings: tuple[str, ...]) -> Iterator[Case]:
    """Cases of f32 and f32x2 in every rounding; "" is the rounding to nearest without its name."""
    for rounding in roundings:
        how = rounding or "rn"
        plain: Function = lambda *x, r=how: compute(F32, *x, r)  # noqa: E731
        word = f".{rounding}" if rounding else ""
        for modifiers in flags("ftz", "sat"):
            case = f"{name}{word}{modifiers}.f32"
            yield Case(case, ("f32",) * count, "f32", _modified(plain, modifiers))
        for modifiers in flags("ftz"):
            both = halves(F32, _modified(plain, modifiers))
            yield Case(f"{name}{word}{modifiers}.f32x2", ("f32x2",) * count, "f32x2", both)


def sums_and_products() -> Iterator[Case]:
    for name, compute in _BASIC.items():
        yield from _rounded_once(name, 2, compute, ("", *ROUNDINGS))
        for word in flags("rn"):
            for kind in (*_HALVES, "f64"):
                plain = lambda a, b, f=compute, k=kind: f(_of(k), a, b)  # noqa: E731
                reference = _packed(kind, plain)
                yield Case(f"{name}{word}.{kind}", (kind, kind), kind, reference, kind == "f64")
            if name != "mul":
                for form in (F16, BF16):
                    mixed = lambda a, b, f=compute, k=form: f(F32, exact.converted(k, F32, a), b)  # noqa: E731
                    yield Case(f"{name}{word}.f32.{form.name}", (form.name, "f32"), "f32", mixed)


def fused() -> Iterator[Case]:
    yield from _rounded_once("fma", 3, exact.fused, ROUNDINGS)
    for kind in _HALVES:
        reference = _packed(kind, lambda a, b, c, k=kind: exact.fused(_of(k), a, b, c))
        yield Case(f"fma.rn.{kind}", (kind,) * 3, kind, reference)
    for form in (F16, BF16):
        mixed = lambda a, b, c, k=form: exact.fused(F32, a, b, c, "rn", k)  # noqa: E731
        yield Case(f"fma.rn.f32.{form.name}", (form.name, form.name, "f32"), "f32", mixed)


def quotients_and_roots() -> Iterator[Case]:
    for modifiers in flags("ftz"):
        plain: dict[str, Function] = {
            "div": lambda a, b: exact.divided(F32, a, b),
            "rcp": lambda a: exact.divided(F32, F32.one, a),
            "sqrt": lambda a: exact.root(F32, a),
        }
        for name, reference in plain.items():
            count = 2 if name == "div" else 1
            yield Case(f"{name}.rn{modifiers}.f32", ("f32",) * count, "f32", _modified(reference, modifiers))
    yield Case("div.rn.f64", ("f64", "f64"), "f64", lambda a, b: exact.divided(F64, a, b), True)


def _order(form: Format, bits: int) -> int:
    """A number that grows with the value, and is greater for +0 than for -0."""
    return -1 - (bits ^ form.sign) if bits & form.sign else bits


def _extremum(form: Format, choose: Callable[..., int], keeps_nan: bool) -> Function:
    """max or min of any number of operands, two at a time."""

    def compute(first: int, *others: int) -> int:
        found = first
        for one in others:
            nans = exact.is_nan(form, found), exact.is_nan(form, one)
            if all(nans) or (keeps_nan and any(nans)):
                found = form.a_nan
            elif any(nans):
                found = one if nans[0] else found
            else:
                found = choose(found, one, key=lambda bits: _order(form, bits))
        return found

    return compute


def extrema() -> Iterator[Case]:
    for name, choose in (("max", max), ("min", min)):
        for nan in flags("NaN"):
            for ftz in flags("ftz"):
                reference = _modified(_extremum(F32, choose, bool(nan)), ftz)
                for count in (2, 3):
                    yield Case(f"{name}{ftz}{nan}.f32", ("f32",) * count, "f32", reference)
            for kind in _HALVES:
                of_two = _packed(kind, _extremum(_of(kind), choose, bool(nan)))
                yield Case(f"{name}{nan}.{kind}", (kind, kind), kind, of_two)


def signs() -> Iterator[Case]:
    """neg, abs and copysign change the sign bit alone; which NaN neg and abs make of one is open in PTX."""
    for kind in (*_HALVES, "f32", "f64"):
        sign = _of(kind).sign
        for ftz in flags("ftz") if kind == "f32" else [""]:
            changed: dict[str, Function] = {"neg": lambda a, s=sign: a ^ s, "abs": lambda a, s=sign: a & (s - 1)}
            for name, compute in changed.items():
                reference = _modified(compute, ftz) if kind == "f32" else _packed(kind, compute)
                yield Case(f"{name}{ftz}.{kind}", (kind,), kind, reference)
        if kind in ("f32", "f64"):  # the first operand has the sign
            reference = lambda a, b, s=sign: (a & s) | (b & (s - 1))  # noqa: E731
            yield Case(f"copysign.{kind}", (kind, kind), kind, reference)


CASES = (*sums_and_products(), *fused(), *quotients_and_roots(), *extrema(), *signs())
