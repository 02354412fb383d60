"""References of the approximate instructions: 120 decimal digits, and the errors and tables of the PTX ISA."""

from __future__ import annotations

from collections.abc import Callable
from decimal import Decimal, getcontext, localcontext
from functools import cache
from random import Random

from verify.tests.simulator import exact
from verify.tests.simulator.cases import flags
from verify.tests.simulator.exact import F32

_DIGITS = 120
_SERIES_DIGITS = 40
MODES = ("nearest", "lowest", "highest")
FUNCTIONS = ("sqrt", "rsqrt", "rcp", "ex2", "lg2", "sin", "cos", "tanh", "div.approx", "div.full")
#: Every opcode with the function that it approximates and the number of its operands.
FORMS = {
    f"{name if name in ('div.approx', 'div.full') else f'{name}.approx'}{ftz}.f32": (name, 2 if "div" in name else 1)
    for name in FUNCTIONS
    for ftz in (flags("ftz") if name != "tanh" else [""])
}

_INF, _NAN, _ONE = F32.infinity, F32.a_nan, F32.one
_MINUS = F32.sign
#: The results for -infinity, -0, +0, +infinity and numbers below zero; None where they are no special case.
_SPECIAL = {
    "sqrt": (_NAN, _MINUS, 0, _INF, _NAN),
    "rsqrt": (_NAN, _MINUS | _INF, _INF, 0, _NAN),
    "rcp": (_MINUS, _MINUS | _INF, _INF, 0, None),
    "ex2": (0, _ONE, _ONE, _INF, None),
    "lg2": (_NAN, _MINUS | _INF, _MINUS | _INF, _INF, _NAN),
    "sin": (_NAN, _MINUS, 0, _NAN, None),
    "cos": (_NAN, _ONE, _ONE, _NAN, None),
    "tanh": (_MINUS | _ONE, _MINUS, 0, _ONE, None),
}
#: Errors in steps between float32 numbers from the correctly rounded result.
_STEPS = {"rcp": 1, "div.approx": 2, "div.full": 2, "ex2": 2}


def _pi() -> Decimal:
    """Machin's formula."""

    def arctangent_of_one_over(n: int) -> Decimal:
        total, power = Decimal(0), Decimal(1) / n
        for k in range(1, 2 * _DIGITS, 2):
            total += (power if k % 4 == 1 else -power) / k
            power /= n * n
        return total

    return 4 * (4 * arctangent_of_one_over(5) - arctangent_of_one_over(239))


with localcontext() as _context:
    _context.prec = _DIGITS
    PI = _pi()
    _LN2 = Decimal(2).ln()


def _sine(x: Decimal) -> Decimal:
    """The series, after whole turns have been taken off."""
    x -= (x / (2 * PI)).to_integral_value() * 2 * PI
    getcontext().prec = _SERIES_DIGITS
    total, term, n = Decimal(0), x, 1
    while term and abs(term) > abs(total) * Decimal(10) ** -_SERIES_DIGITS:
        total += term
        term *= -x * x / ((n + 1) * (n + 2))
        n += 2
    return total


def _tangent(x: Decimal) -> Decimal:
    """tanh; for small arguments from its series, as the formula would lose every digit."""
    if abs(x) < Decimal("1e-12"):
        return x - x**3 / 3 + 2 * x**5 / 15
    power = (2 * max(min(x, Decimal(100)), Decimal(-100))).exp()
    return (power - 1) / (power + 1)


_EXACT: dict[str, Callable[..., Decimal]] = {
    "sqrt": Decimal.sqrt,
    "rsqrt": lambda x: 1 / x.sqrt(),
    "rcp": lambda x: 1 / x,
    "ex2": lambda x: Decimal(2) ** max(min(x, 1000), -1000),
    "lg2": lambda x: x.ln() / _LN2,
    "sin": _sine,
    "cos": lambda x: _sine(x + PI / 2),
    "tanh": _tangent,
    "div.approx": lambda a, b: a / b,
    "div.full": lambda a, b: a / b,
}


def _bound(name: str, x: Decimal, value: Decimal) -> Decimal:
    """The documented error of a function whose error is no number of steps, at ``x``, where it is ``value``."""
    if name == "sqrt":
        return abs(value) * Decimal(2) ** -23
    if name == "rsqrt":
        return abs(value) * Decimal(2) ** Decimal("-22.9")
    if name == "lg2":
        return Decimal(2) ** -22 * (1 if Decimal("0.5") < x < 2 else abs(value))
    if name == "tanh":  # what is subnormal is passed through
        return Decimal(0) if abs(x) < Decimal(2) ** -126 else abs(value) * Decimal(2) ** -11
    return Decimal(2) ** Decimal("-20.5" if abs(x) <= 2 * PI else "-14.7")


def _bits(value: Decimal, rounding: str = "rn") -> int:
    """The float32 next to a number, in one direction; the bit below those of the quotient says if anything is left."""
    if not value:
        return 0
    above, below = abs(value).as_integer_ratio()
    shift = 40 + max(0, below.bit_length() - above.bit_length())
    quotient, rest = divmod(above << shift, below)
    whole = 2 * quotient + bool(rest)
    return exact.rounded(F32, -whole if value < 0 else whole, -shift - 1, rounding, 0)


def _number(bits: int) -> Decimal:
    return Decimal(exact.number(F32, bits))


def _above(a: int, b: int) -> bool:
    return exact.number(F32, a) > exact.number(F32, b)


def _stepped(bits: int, steps: int) -> int:
    """So many numbers up, at most to the largest number, to the smallest, or to the zero of the same sign."""
    sign, size = bits & F32.sign, bits & (F32.sign - 1)
    return sign | min(max(size + (-steps if sign else steps), 0), F32.largest)


@cache
def _value(name: str, *operands: int) -> Decimal:
    with localcontext() as context:
        context.prec = _DIGITS
        return _EXACT[name](*(_number(one) for one in operands))


def _special(name: str, bits: int) -> int | None:
    """The result for an input that has one of its own in the ISA's table; None for any other."""
    below, minus_zero, zero, above, negative = _SPECIAL[name]
    if exact.is_nan(F32, bits):
        return _NAN
    known = {_MINUS | _INF: below, _MINUS: minus_zero, 0: zero, _INF: above}
    return known[bits] if bits in known else negative if bits & F32.sign else None


def _special_quotient(name: str, a: int, b: int) -> int | None:
    numbers = all(one & (F32.sign - 1) not in (0, _INF) and not exact.is_nan(F32, one) for one in (a, b))
    if name == "div.approx" and 2.0**126 < abs(exact.number(F32, b)) < 2.0**128:  # 1 / b is 0 there
        return _NAN if exact.is_nan(F32, a) or exact.is_infinite(F32, a) else (a ^ b) & F32.sign
    return None if numbers else exact.divided(F32, a, b)


def references(opcode: str, mode: str, *operands: int) -> set[int]:
    """The bits of the result in a mode: one, or two where float64 cannot tell which of them is the last within reach.

    For instance, the limit for tanh of 20 is less than 1 + 2^-11 by 10^-17, and the float64 next to it is 1 + 2^-11.
    """
    name, _ = FORMS[opcode]
    flush = exact.flushed if ".ftz" in opcode else int
    with localcontext() as context:
        context.prec = _DIGITS
        return {flush(_reference(name, mode, more, *map(flush, operands))) for more in (0, Decimal(2) ** -51)}


def _reference(name: str, mode: str, more: Decimal | int, *operands: int) -> int:
    known = _special_quotient(name, *operands) if "div" in name else _special(name, *operands)
    if known is not None:
        return known
    value = _value(name, *operands)
    near = _bits(value)
    if not near & (F32.sign - 1) and value:  # it underflows to a zero of its own sign
        near = F32.sign if value < 0 else 0
        if name in _STEPS:
            return near
    if mode == "nearest" or exact.is_infinite(F32, near):
        return near
    up = mode == "highest"
    if name in _STEPS:
        return _stepped(near, _STEPS[name] if up else -_STEPS[name])
    error = _bound(name, _number(operands[0]), value) + more * abs(value)
    far = _bits(value + error, "rm") if up else _bits(value - error, "rp")
    return near if (_above(near, far) if up else _above(far, near)) else far


def operands(name: str, count: int) -> list[tuple[int, ...]]:
    """Inputs for which the function has an error: edges, and random numbers where it is neither 0 nor infinite."""
    random = Random(name)
    if "div" in name:
        pairs = [(a, b) for a in exact.edges(F32) for b in exact.edges(F32)]
        pairs += [(random.randrange(1 << 32), random.randrange(1 << 32)) for _ in range(count)]
        pairs += [(_near_one(random), _near_one(random)) for _ in range(count)]
        limit = 253 << F32.fraction  # 2^126, up to which div.approx has an error
        pairs += [(random.randrange(1 << 32), limit + random.randint(-2, 2)) for _ in range(count)]
        return [(a, b) for a, b in pairs if name == "div.full" or not 0 < b & (F32.sign - 1) < 1 << F32.fraction]
    found = [*exact.edges(F32), *(_near_one(random) for _ in range(count))]
    if name in ("sin", "cos"):
        turns = [_bits(PI * n / 4 * sign) for n in range(1, 400, 7) for sign in (1, -1)]
        found += [*turns, *(_bits(Decimal(random.uniform(-314, 314))) for _ in range(count))]
        found = [one for one in found if not 314.15 < abs(exact.number(F32, one)) < float("inf")]
    elif name in ("ex2", "tanh"):
        found += [_bits(Decimal(random.uniform(-152, 130))) for _ in range(count)]
        found += [_bits(Decimal(n) / 2) for n in range(-304, 262)]
    else:
        found += [random.randrange(1 << 31) for _ in range(count)]
    return [(one,) for one in found]


def _near_one(random: Random) -> int:
    """A number between 2^-6 and 2^6 of either sign."""
    return F32.one + random.randrange(-6 << F32.fraction, 6 << F32.fraction) | random.choice((0, F32.sign))
