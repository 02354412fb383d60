"""Rounding where it is hard: next to ties, after cancellation, among subnormal numbers and before infinity."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from random import Random

import pytest

from verify.tests.simulator import conversions, exact, floating
from verify.tests.simulator.cases import Case, differences, width
from verify.tests.simulator.exact import BF16, F16, F32, F64, FORMATS, TF32, Format

_CASES = {case.opcode: case for case in (*floating.CASES, *conversions.CASES) if len(case.inputs) != 2}
_FEW, _MANY, _PART, _ALONE = 20_000, 1_000_000, 50_000, 1000
_CONVERSIONS = (
    "cvt.rn.f16.f32", "cvt.rz.f16.f32", "cvt.rn.bf16.f32", "cvt.rz.bf16.f32", "cvt.rna.tf32.f32", "cvt.rn.tf32.f32",
    "cvt.rz.tf32.f32", "cvt.rn.f32.f64", "cvt.rz.f32.f64", "cvt.rm.f32.f64", "cvt.rp.f32.f64", "cvt.rn.ftz.f32.f64",
    "cvt.rn.f32.s32", "cvt.rz.f32.u32", "cvt.rm.f32.s32", "cvt.rp.f32.s32", "cvt.rn.f32.s64", "cvt.rn.f32.u64",
    "cvt.rn.f64.s64", "cvt.rn.f64.u64", "cvt.rn.f16.s32", "cvt.rni.s32.f32", "cvt.rzi.u64.f32", "cvt.rmi.s64.f64",
    "cvt.rpi.u32.f64", "cvt.rni.s16.f16", "cvt.f32.f16", "cvt.f32.bf16", "cvt.rni.f32.f32",
)  # fmt: skip
_FUSED = ("fma.rn.f32", "fma.rz.f32", "fma.rm.f32", "fma.rp.f32", "fma.rn.ftz.f32", "fma.rn.f16", "fma.rn.bf16")


def _finite(form: Format, random: Random, low: int = 0, high: int | None = None) -> int:
    """A random finite number with a biased exponent in [low, high]."""
    top = (form.infinity >> form.fraction) - 1
    exponent = random.randint(low, top if high is None else high)
    return random.getrandbits(1) * form.sign | exponent << form.fraction | random.getrandbits(form.fraction)


def _near_ties(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    """a b is half a unit of c, or what float64 takes for it: (1 + j u) (1 - j u) is 1 - j^2 u^2."""
    top, unit = (form.infinity >> form.fraction) - 1, 1 << form.fraction
    while True:
        place = random.choice((random.randint(0, top), random.randint(0, 3)))
        c = place * unit | random.choice((random.getrandbits(form.fraction), 0, 1, unit - 1))
        half = max(place, 1) - form.fraction - 1 + form.bias  # the sum of the biased exponents of a and b
        first = random.randint(max(1, half - top), min(top, half - 1))
        j = random.choice((0, 1, 1, 2, 3, random.getrandbits(form.fraction // 2)))
        a, b = first * unit + j, (half - first) * unit - 2 * j
        signs = random.getrandbits(2)
        yield a, b | (signs & 1) * form.sign, c | (signs >> 1) * form.sign


def _cancelling(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    """c is nearly -a b, so that the result is what the rounding of a b lost, or a few units more."""
    while True:
        a, b = _finite(form, random), _finite(form, random)
        c = exact.multiplied(form, a, b) ^ form.sign
        if c & (form.sign - 1) < form.infinity:
            near = min(max((c & (form.sign - 1)) + random.randint(-2, 2), 0), form.largest)
            yield a, b, c & form.sign | near


def _tiny(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    """Results among the subnormal numbers, where the exact sum often lies half-way between two."""
    bias = form.bias
    while True:
        first = random.randint(1, bias)
        second = max(min(bias - first + random.randint(-form.fraction - 3, 4), bias), 0)
        a, b = _finite(form, random, first, first), _finite(form, random, second, second)
        if random.random() < 0.5:  # few bits, so that ties occur
            a, b = a & ~((1 << form.fraction - 2) - 1), b & ~((1 << form.fraction - 2) - 1)
        c = random.choice((0, form.sign, _finite(form, random, 0, 2), 1, form.sign | 1))
        yield a, b, c


def _huge(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    """Results about the largest number, and half a unit above it."""
    top = (form.infinity >> form.fraction) - 1
    while True:
        c = random.getrandbits(1) * form.sign | form.largest - random.choice((0, 0, 1, 2, random.getrandbits(5)))
        half = (top - form.fraction - 1 + random.randint(-1, 1)) << form.fraction
        a, b = form.one + random.choice((0, 0, 1, 3)), half - random.choice((0, 0, 1, 2, 3))
        if random.random() < 0.3:  # a product that is as large
            first = random.randint(1, top)
            second = min(top, top + form.bias - first)
            a, b = _finite(form, random, first, first), _finite(form, random, second, second)
        yield a, b | random.getrandbits(1) * form.sign, c


def _any(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    while True:
        yield random.getrandbits(form.width), random.getrandbits(form.width), random.getrandbits(form.width)


_FAMILIES: tuple[Callable[[Format, Random], Iterator[tuple[int, int, int]]], ...] = (
    _near_ties, _cancelling, _tiny, _huge, _any,
)  # fmt: skip


def _operands(form: Format, random: Random) -> Iterator[tuple[int, int, int]]:
    families = [family(form, random) for family in _FAMILIES]
    while True:
        for family in families:
            yield next(family)


def _float_inputs(source: Format, target: Format | None, random: Random) -> Iterator[int]:
    """Numbers next to the middle between two of the format that they become, or between two integers."""
    while True:
        yield random.getrandbits(source.width)
        m, e = random.getrandbits(random.randrange(source.fraction)), 0
        if target is not None:
            m, e = exact.parts(target, random.randrange(target.infinity))
        near = exact.rounded(source, 2 * m + 1, e - 1) + random.choice((-2, -1, 0, 0, 0, 1, 2))
        yield random.getrandbits(1) * source.sign | max(near, 0)


def _integer_inputs(kind: str, target: Format, random: Random) -> Iterator[int]:
    bits = width(kind)
    while True:
        yield random.getrandbits(bits)
        length = random.randint(1, bits)
        value = random.getrandbits(length) | 1 << (length - 1)
        extra = max(length - target.fraction - 1, 0)
        middle = (value >> extra << extra) + (1 << extra >> 1) + random.choice((-1, 0, 0, 1))
        yield random.choice((1, -1)) * middle & ((1 << bits) - 1)


def _conversion_inputs(case: Case, random: Random) -> Iterator[tuple[int]]:
    (source,) = case.inputs
    target = TF32 if "tf32" in case.opcode else FORMATS.get(case.result)
    if source in FORMATS:
        whole = target is None or target is FORMATS[source]
        values = _float_inputs(FORMATS[source], None if whole else target, random)
    else:
        values = _integer_inputs(source, target or F32, random)
    for value in values:
        yield (value,)


def _wrong(opcode: str, count: int) -> list[str]:
    case, random = _CASES[opcode], Random(opcode)
    fused = opcode.startswith("fma")
    values = _operands(FORMATS[case.result], random) if fused else _conversion_inputs(case, random)
    # the first ones alone, since what is done to one number in an array may not be done where it is by itself
    alone = _ALONE if fused else _ALONE // 10
    wrong = [told for row in islice(values, alone) for told in differences(case, [row])]
    for _ in range(0, count, _PART):
        wrong += differences(case, list(islice(values, min(count, _PART))))
    return wrong


@pytest.mark.parametrize("opcode", [*_FUSED, *_CONVERSIONS])
def test_none_of_thousands_of_hard_roundings_is_wrong(opcode: str) -> None:
    assert _wrong(opcode, _FEW if opcode == "fma.rn.f32" else _FEW // 5) == []


@pytest.mark.slow
@pytest.mark.parametrize("opcode", [*_FUSED, *_CONVERSIONS])
def test_none_of_a_million_hard_roundings_is_wrong(opcode: str) -> None:
    assert _wrong(opcode, _MANY) == []


def test_the_operands_meet_what_they_are_made_for() -> None:
    """Of every kind there are enough: ties and near ties, results that cancel, subnormal, largest and infinite."""
    random = Random("kinds")
    found = {"inexact": 0, "float64 is wrong": 0, "subnormal": 0, "largest or infinite": 0, "cancels": 0}
    for a, b, c in islice(_operands(F32, random), _FEW // 4):
        once, down, up = (exact.fused(F32, a, b, c, rounding) for rounding in ("rn", "rm", "rp"))
        wide = [exact.converted(F32, F64, one) for one in (a, b, c)]
        twice = exact.converted(F64, F32, exact.fused(F64, wide[0], wide[1], wide[2]))
        size = once & (F32.sign - 1)
        found["inexact"] += down != up
        found["float64 is wrong"] += twice != once
        found["subnormal"] += 0 < size < 1 << F32.fraction
        found["largest or infinite"] += size in (F32.largest, F32.infinity)
        found["cancels"] += size + (8 << F32.fraction) < c & (F32.sign - 1) < F32.infinity
    assert min(found.values()) > 50, found


def test_formats_that_the_references_use() -> None:
    assert [one.bias for one in (F16, BF16, F32, F64, TF32)] == [15, 127, 127, 1023, 127]
    assert [one.largest for one in (F16, BF16, F32)] == [0x7BFF, 0x7F7F, 0x7F7FFFFF]
    assert [one.smallest for one in (F16, BF16, F32, F64)] == [-24, -133, -149, -1074]
