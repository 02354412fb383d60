"""References of the integer instructions and of those that move or compare values, in Python's integers."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from functools import partial

from verify.tests.simulator import exact
from verify.tests.simulator.cases import Case, signed, width
from verify.tests.simulator.exact import FORMATS, Function

INTEGERS = ("u16", "u32", "u64", "s16", "s32", "s64")
SIGNED = ("s16", "s32", "s64")
BITS = ("b16", "b32", "b64")


def _arithmetic(kind: str, compute: Callable[..., int], result: str = "") -> Function:
    """A function of bits from one of integers, whose result wraps."""
    mask = (1 << width(result or kind)) - 1
    return lambda *operands: compute(*(signed(kind, one) for one in operands)) & mask


def _quotient(a: int, b: int) -> int:
    """Division towards zero. PTX leaves division by zero open; the simulator says -1."""
    if not b:
        return -1
    size = abs(a) // abs(b)
    return -size if (a < 0) != (b < 0) else size


def _rest(a: int, b: int) -> int:
    """What is left has the sign of the dividend. PTX leaves division by zero open; the simulator leaves all of it."""
    return a - _quotient(a, b) * b


def _limited(compute: Callable[[int, int], int]) -> Function:
    return _arithmetic("s32", lambda a, b: max(-(1 << 31), min(compute(a, b), (1 << 31) - 1)))


def _added_product(kind: str, wide: str) -> Function:
    """mad: the addend of ``.wide`` is as wide as the result."""
    mask = (1 << width(wide)) - 1
    return lambda a, b, c: (signed(kind, a) * signed(kind, b) + signed(wide, c)) & mask


def arithmetic() -> Iterator[Case]:
    for kind in INTEGERS:
        bits = width(kind)
        two: dict[str, Function] = {
            "add": operator.add, "sub": operator.sub, "mul.lo": operator.mul, "div": _quotient, "rem": _rest,
            "min": min, "max": max, "mul.hi": lambda a, b, n=bits: (a * b) >> n,
        }  # fmt: skip
        for name, compute in two.items():
            yield Case(f"{name}.{kind}", (kind, kind), kind, _arithmetic(kind, compute))
        three: dict[str, Function] = {
            "mad.lo": lambda a, b, c: a * b + c, "mad.hi": lambda a, b, c, n=bits: ((a * b) >> n) + c,
        }  # fmt: skip
        for name, sum_of in three.items():
            yield Case(f"{name}.{kind}", (kind, kind, kind), kind, _arithmetic(kind, sum_of))
        if bits < 64:
            wide = f"{kind[0]}{2 * bits}"
            yield Case(f"mul.wide.{kind}", (kind, kind), wide, _arithmetic(kind, operator.mul, wide))
            yield Case(f"mad.wide.{kind}", (kind, kind, wide), wide, _added_product(kind, wide))
    yield Case("add.sat.s32", ("s32", "s32"), "s32", _limited(operator.add))
    yield Case("sub.sat.s32", ("s32", "s32"), "s32", _limited(operator.sub))
    for kind in SIGNED:
        yield Case(f"neg.{kind}", (kind,), kind, _arithmetic(kind, operator.neg))
        yield Case(f"abs.{kind}", (kind,), kind, _arithmetic(kind, abs))


def logic() -> Iterator[Case]:
    for kind in (*BITS, "pred"):
        mask = (1 << width(kind)) - 1
        yield Case(f"and.{kind}", (kind, kind), kind, operator.and_)
        yield Case(f"or.{kind}", (kind, kind), kind, operator.or_)
        yield Case(f"xor.{kind}", (kind, kind), kind, operator.xor)
        yield Case(f"not.{kind}", (kind,), kind, lambda a, m=mask: a ^ m)
    for kind in BITS:
        mask = (1 << width(kind)) - 1
        yield Case(f"shl.{kind}", (kind, "distance"), kind, lambda a, n, m=mask: (a << min(n, 64)) & m)
    for kind in (*BITS, *INTEGERS):
        yield Case(
            f"shr.{kind}", (kind, "distance"), kind,
            lambda a, n, k=kind: (signed(k, a) >> min(n, 64)) & ((1 << width(k)) - 1),
        )  # fmt: skip
    for mode in ("clamp", "wrap"):
        yield Case(f"shf.l.{mode}.b32", ("b32", "b32", "distance"), "b32", _funnel(mode, lambda x, n: (x << n) >> 32))
        yield Case(f"shf.r.{mode}.b32", ("b32", "b32", "distance"), "b32", _funnel(mode, lambda x, n: x >> n))
    yield Case("prmt.b32", ("b32", "b32", "b32"), "b32", _permuted)
    yield Case("lop3.b32", ("b32", "b32", "b32", "table"), "b32", _looked_up)


def _funnel(mode: str, shifted: Callable[[int, int], int]) -> Function:
    """shf: both words in a row, the first operand the lower, shifted by at most 32 or by the distance modulo 32."""
    return lambda low, high, n: (
        shifted(high << 32 | low, min(n, 32) if mode == "clamp" else n % 32) & 0xFFFFFFFF
    )  # fmt: skip


def _permuted(a: int, b: int, selector: int) -> int:
    """prmt: each four bits choose one of eight bytes, or 255 or 0 by the sign of the byte."""
    source = a.to_bytes(4, "little") + b.to_bytes(4, "little")
    chosen = []
    for place in range(4):
        four = selector >> (4 * place) & 15
        byte = source[four % 8]
        chosen.append((255 if byte > 127 else 0) if four > 7 else byte)
    return int.from_bytes(bytes(chosen), "little")


def _looked_up(a: int, b: int, c: int, table: int) -> int:
    """lop3: the bit of each place is the bit of the table that the three bits of the place number, ``a`` highest."""
    return sum((table >> ((a >> n & 1) * 4 + (b >> n & 1) * 2 + (c >> n & 1)) & 1) << n for n in range(32))


def _extracted(kind: str, bits: int, start: int, size: int) -> int:
    """bfe: Python extends a signed value by its sign without an end, as a field past the end needs it."""
    start, size = start & 255, size & 255
    field = (signed(kind, bits) >> start) & ((1 << size) - 1)
    if kind[0] == "s" and size and field >> (size - 1):
        field -= 1 << size
    return field & ((1 << width(kind)) - 1)


def _inserted(kind: str, field: int, into: int, start: int, size: int) -> int:
    start, size = start & 255, size & 255
    place = (((1 << size) - 1) << start) & ((1 << width(kind)) - 1)
    return (into & ~place) | ((field << start) & place)


def fields() -> Iterator[Case]:
    for kind in ("u32", "u64", "s32", "s64"):
        yield Case(f"bfe.{kind}", (kind, "field", "field"), kind, lambda *x, k=kind: _extracted(k, *x))
    for kind in ("b32", "b64"):
        yield Case(f"bfi.{kind}", (kind, kind, "field", "field"), kind, lambda *x, k=kind: _inserted(k, *x))
        yield Case(f"popc.{kind}", (kind,), "u32", lambda a: bin(a).count("1"))
        yield Case(f"clz.{kind}", (kind,), "u32", lambda a, k=kind: width(k) - a.bit_length())
        yield Case(f"brev.{kind}", (kind,), kind, lambda a, k=kind: int(f"{a:0{width(k)}b}"[::-1], 2))


def moves() -> Iterator[Case]:
    for kind in (*INTEGERS, *BITS, "f32", "f64"):
        yield Case(f"mov.{kind}", (kind,), kind, lambda a: a)
        yield Case(f"selp.{kind}", (kind, kind, "pred"), kind, lambda a, b, chosen: a if chosen else b)
    yield Case("mov.pred", ("pred",), "pred", lambda a: a)
    # the simulator has one space of addresses for global memory, and a generic address is one of them
    yield Case("cvta.global.u64", ("u64",), "u64", lambda a: a)
    yield Case("cvta.to.global.u64", ("u64",), "u64", lambda a: a)


_ORDERED: dict[str, Callable[..., bool]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
}  # fmt: skip
_UNSIGNED = {"lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge}
_COMBINED = {"and": operator.and_, "or": operator.or_, "xor": operator.xor}


def _ordered(test: Callable[..., bool]) -> Callable[..., bool]:
    """False where an operand is NaN, which is no number and so differs from itself."""
    return lambda a, b: a == a and b == b and test(a, b)


def _unordered(test: Callable[..., bool]) -> Callable[..., bool]:
    """True where an operand is NaN."""
    return lambda a, b: a != a or b != b or test(a, b)


def _floating_comparisons() -> dict[str, Callable[..., bool]]:
    found = {"num": _ordered(lambda a, b: True), "nan": _unordered(lambda a, b: False)}
    for name, test in _ORDERED.items():
        found |= {name: _ordered(test), f"{name}u": _unordered(test)}
    return found


def _compared(value: Callable[[int], float], test: Callable[..., bool]) -> Function:
    return lambda a, b: int(test(value(a), value(b)))


def comparisons() -> Iterator[Case]:
    """setp, of every type, alone and combined with a predicate."""
    for kind in (*INTEGERS, *BITS):
        names = {"eq": operator.eq, "ne": operator.ne} if kind in BITS else dict(_ORDERED)
        for name, test in {**names, **(_UNSIGNED if kind[0] == "u" else {})}.items():
            yield from _with_predicates(name, "", kind, _compared(partial(signed, kind), test))
    for kind, form in FORMATS.items():
        for name, test in _floating_comparisons().items():
            plain = _compared(partial(exact.number, form), test)
            yield from _with_predicates(name, "", kind, plain)
            if kind == "f32":
                flush = lambda a, b, f=plain: f(exact.flushed(a), exact.flushed(b))  # noqa: E731
                yield from _with_predicates(name, ".ftz", kind, flush)


def _with_predicates(name: str, ftz: str, kind: str, reference: Function) -> Iterator[Case]:
    yield Case(f"setp.{name}{ftz}.{kind}", (kind, kind), "pred", reference)
    for word, combine in _COMBINED.items():
        combined = lambda a, b, c, f=reference, g=combine: g(f(a, b), c)  # noqa: E731
        yield Case(f"setp.{name}.{word}{ftz}.{kind}", (kind, kind, "pred"), "pred", combined)


CASES = (*arithmetic(), *logic(), *fields(), *moves(), *comparisons())
