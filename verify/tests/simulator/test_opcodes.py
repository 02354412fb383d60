"""Every form of every opcode that is executed has a reference, and what has none is refused by its name."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from verify.simulator import floats
from verify.simulator.errors import Unsupported
from verify.simulator.opcodes import NAMES, operation
from verify.tests.simulator import approximations, conversions, floating, integers

_TESTED = {(case.opcode, len(case.inputs)) for case in (*integers.CASES, *floating.CASES, *conversions.CASES)} | {
    (opcode, count) for opcode, (_, count) in approximations.FORMS.items()
}
#: Modifiers of the opcodes that are executed, and some of others: those of setp, and those of the rest.
_COMPARISONS = "eq ne lt le gt ge lo ls hi hs equ neu ltu leu gtu geu num nan and or xor ftz sat rn NaN"
_WORDS = (
    "rn rz rm rp rna rni rzi rmi rpi rs ftz sat satfinite relu approx full lo hi wide cc NaN abs xorsign oob "
    "and or l r clamp wrap f4e rc8 to global shared local const f32 f64"
)
_TYPES = (
    "pred u8 u16 u32 u64 s8 s16 s32 s64 b8 b16 b32 b64 b128 f16 bf16 f32 f64 f16x2 bf16x2 f32x2 u16x2 s16x2 tf32 "
    "e4m3x2 e5m2x2 e2m1x2 ue8m0x2"
)
_REFUSED = """
    fma.rn.f64 fma.rz.f64 fma.f32 fma.f16 fma.rz.f16 fma.rn.ftz.f16 fma.rn.sat.f16 fma.rn.relu.bf16 fma.rn.sat.f32x2
    fma.rz.f32.f16 fma.rn.sat.f32.bf16 fma.rn.oob.relu.f16 mad.rn.f32 mad.f64
    add.cc.u32 add.cc.s64 addc.u32 addc.cc.u32 sub.cc.u32 subc.u32 mad.lo.cc.u32 madc.hi.u32 mul24.lo.u32 mad24.hi.s32
    add.sat.u32 sub.sat.s64 mad.hi.sat.s32 add.u16x2 add.s16x2 add.f32.f32 add.rz.f32.f16 add.sat.f32.bf16
    add.sat.f32x2 mul.sat.f32x2 add.sat.f16 add.ftz.f16 add.rz.f64 mul.rm.f64 mul.relu.bf16 mul.f32.bf16
    mul.u32 mul.s32 mul.lo.b32 mul.wide.u64 mul.wide.s64 mad.wide.u64 mad.u32 sad.u32 dp4a.s32.s32 dp2a.lo.s32.s32
    div.f32 div.full.f64 div.rz.f32 div.rp.f64 div.rn.f16 rem.f32 sqrt.f32 sqrt.rn.f64 sqrt.rz.f32 sqrt.approx.f64
    rcp.rz.f32 rcp.rn.f64 rcp.approx.ftz.f64 rsqrt.rn.f32 rsqrt.approx.f64 rsqrt.approx.ftz.f64 sqrt.full.f32
    ex2.f32 ex2.approx.f16 ex2.approx.ftz.bf16 ex2.approx.ftz.bf16x2 lg2.f32 sin.f32 cos.approx.f64 sin.approx.f16
    tanh.approx.ftz.f32 tanh.approx.f16 tanh.approx.bf16x2 tanh.f32
    max.f64 min.f64 max.ftz.f16 max.f32x2 max.xorsign.abs.f32 min.NaN.xorsign.abs.bf16 max.abs.f32 max.relu.s32
    min.s16x2 max.u16x2 max.b32 neg.u32 neg.ftz.f16 neg.ftz.f64 neg.f32x2 abs.u32 abs.ftz.bf16 copysign.f16
    copysign.ftz.f32 testp.finite.f32 fns.b32 bfind.u32 bmsk.clamp.b32 szext.clamp.s32 bfe.b32 bfi.u32 popc.u32 clz.s32
    brev.u32 brev.b16 and.u32 or.s64 xor.f32 not.u32 cnot.b32 shl.u32 shl.s32 shr.b8 shf.l.b32 shf.r.wrap.b64
    lop3.or.b32 lop3.b64 prmt.b32.f4e prmt.b32.rc16 prmt.b64
    set.lt.u32.f32 slct.s32.f32 setp.lt.b32 setp.lo.s32 setp.hs.f32 setp.ltu.s32 setp.nan.u32 setp.lt.ftz.f64
    setp.eq.ftz.f16 setp.eq.ftz.s32 setp.lt.f16x2 setp.eq.bf16x2 setp.eq.pred setp.f32 setp.eq.nand.u32
    selp.f16 selp.pred selp.b8 mov.b128 mov.f16 mov.b8 mov.v2.f32 mov.u8
    cvta.u64 cvta.shared.u64 cvta.to.shared.u64 cvta.local.u64 cvta.to.global.u32 cvta.to.global.s64
    cvt.rn.satfinite.e4m3x2.f32 cvt.rn.e5m2x2.f32 cvt.rn.f16x2.e4m3x2 cvt.rn.satfinite.e2m1x2.f32
    cvt.rz.ue8m0x2.bf16x2 cvt.rn.bf16x2.ue8m0x2 cvt.rs.f16x2.f32 cvt.rn.relu.f16.f32 cvt.rn.satfinite.bf16.f32
    cvt.rn.relu.bf16x2.f32 cvt.rn.ftz.f16x2.f32 cvt.rm.f16.f32 cvt.rn.f16.f64 cvt.rn.bf16.f64 cvt.rn.f16.bf16
    cvt.rn.bf16.f16 cvt.rni.bf16.bf16 cvt.bf16.bf16 cvt.rn.f32.f32 cvt.f16.f32 cvt.f32.f64 cvt.f32.s32 cvt.s32.f32
    cvt.rz.s32.f32 cvt.rni.f32.f16 cvt.rn.sat.f16.f32 cvt.rn.sat.f32.f64 cvt.sat.f16.f16 cvt.rz.f32.s64 cvt.rz.f64.u32
    cvt.rn.bf16.s32 cvt.rn.f16.u64 cvt.rz.f16.u32 cvt.rni.s32.s32 cvt.ftz.s32.u32 cvt.rzi.ftz.s32.f64
    cvt.rna.satfinite.tf32.f32 cvt.rn.relu.tf32.f32 cvt.rn.tf32.f64 cvt.rn.f32.b32 cvt.u32.b32 cvt.pack.sat.u16.s32
    vadd.s32.s32.s32 shfl.sync.bfly.b32 ld.global.b32 bar.sync ex3.approx.f32 add f32 .f32
"""


def _parts(opcode: str) -> tuple[str, tuple[str, ...], tuple[str, ...]]:
    """The name, the modifiers, and the type or the two types of a conversion."""
    name, *words = opcode.split(".")
    types = 2 if name == "cvt" else 1
    return name, tuple(words[:-types]), tuple(words[-types:])


def _same(opcode: str, count: int) -> tuple[object, ...]:
    """Opcodes with the same modifiers in another order are the same."""
    name, words, types = _parts(opcode)
    return name, tuple(sorted(words)), types, count


def _neighbours(opcode: str, count: int) -> Iterator[tuple[str, int]]:
    """Opcodes with a modifier or an operand more or less, or with another modifier or type."""
    name, words, types = _parts(opcode)
    known = (_COMPARISONS if name == "setp" else _WORDS).split()
    for place in range(len(words)):
        others = (*words[:place], *words[place + 1 :])
        yield ".".join((name, *others, *types)), count
        for word in known:
            yield ".".join((name, *others, word, *types)), count
    for word in known:
        yield ".".join((name, word, *words, *types)), count
    for place in range(len(types)):
        for kind in _TYPES.split():
            yield ".".join((name, *words, *types[:place], kind, *types[place + 1 :])), count
    for other in range(6):
        if other != count:
            yield opcode, other


def test_every_name_has_a_reference_and_every_reference_a_name() -> None:
    assert {opcode.partition(".")[0] for opcode, _ in _TESTED} == {*NAMES}
    assert {name for name, _ in approximations.FORMS.values()} == floats.APPROXIMATIONS.keys()


def test_no_form_is_executed_without_a_reference() -> None:
    tested = {_same(opcode, count) for opcode, count in _TESTED}
    tried = {one for opcode, count in _TESTED for one in _neighbours(opcode, count)}
    untested = []
    for opcode, count in tried:
        if _same(opcode, count) not in tested:
            try:
                operation.__wrapped__(opcode, count)
            except Unsupported:
                continue
            untested.append((opcode, count))
    assert sorted(untested) == []
    assert len(tried) > 50_000


@pytest.mark.parametrize("opcode", _REFUSED.split())
def test_what_is_not_executed_is_refused_by_its_name(opcode: str) -> None:
    for count in range(1, 5):
        with pytest.raises(Unsupported) as refusal:
            operation(opcode, count)
        assert opcode in str(refusal.value)


@pytest.mark.parametrize(
    ("opcode", "count"),
    [("add.u32", 1), ("add.f32", 3), ("rem.s32", 3), ("max.f16", 3), ("max.bf16x2", 3), ("max.f32", 4), ("not.b32", 2),
     ("sqrt.approx.f32", 2), ("div.full.f32", 1), ("cvt.rn.f16x2.f32", 1), ("setp.eq.and.u32", 2), ("fma.rn.f32", 2)],
)  # fmt: skip
def test_another_number_of_operands_is_refused(opcode: str, count: int) -> None:
    with pytest.raises(Unsupported, match=f"{opcode} with {count} inputs"):
        operation(opcode, count)
