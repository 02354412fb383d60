"""Atomic operations, and reductions within a warp: PTX ISA 8.x, sections 9.7.13.15, 9.7.13.16 and 9.7.13.20.

Atomic operations of one instruction run one thread after the other. PTX leaves the order open, so the machine notes
where a result depends on it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from verify.simulator import floats
from verify.simulator.decode import Decoder, Effect
from verify.simulator.effects import require_members, warp_mask
from verify.simulator.errors import Fault, Unsupported
from verify.simulator.opcodes import operation
from verify.simulator.operation import Modifiers, dtype_of
from verify.simulator.ptx import Instruction
from verify.simulator.state import Run, State

U32, U64, I64 = np.uint32, np.uint64, np.int64

#: The new value, from the old one and the operands.
_Change = Callable[..., np.ndarray]
_INTEGERS = ("u32", "s32", "u64", "s64")
#: How an operation finds the new value, and the types that it has.
_CHANGES: Mapping[str, tuple[_Change, tuple[str, ...]]] = {
    "add": (lambda old, b: old + b, ("u32", "s32", "u64", "f16", "f16x2", "bf16", "bf16x2", "f32", "f64")),
    "min": (np.minimum, _INTEGERS),
    "max": (np.maximum, _INTEGERS),
    "and": (np.bitwise_and, ("b32", "b64")),
    "or": (np.bitwise_or, ("b32", "b64")),
    "xor": (np.bitwise_xor, ("b32", "b64")),
    "exch": (lambda old, b: b, ("b32", "b64")),
    "cas": (lambda old, b, c: np.where(old == b, c, old), ("b16", "b32", "b64")),
    "inc": (lambda old, b: np.where(old >= b, U32(0), old + U32(1)), ("u32",)),
    "dec": (lambda old, b: np.where((old == 0) | (old > b), b, old - U32(1)), ("u32",)),
}
#: Operations after which the place holds the same, whatever the order, except sums that round.
_COMMUTE = ("add", "min", "max", "and", "or", "xor", "inc", "dec")
_FLOATS = ("f16", "f16x2", "bf16", "bf16x2", "f32", "f64")


def _atomic(decoder: Decoder, instruction: Instruction) -> Run:
    """atom and red, on global and shared memory."""
    words, returns = Modifiers(instruction.opcode), instruction.base == "atom"
    space = words.choice(("global", "shared__cta", "shared")).removesuffix("__cta")
    words.choice(("relaxed", "acquire", "release", "acq_rel"), "")
    words.choice(("cta", "gpu", "sys"), "")
    how = words.choice(_CHANGES)
    change, kinds = _CHANGES[how]
    kind = words.kind(*kinds)
    if words.flag("noftz") != (kind in ("f16", "f16x2", "bf16", "bf16x2")):
        raise Unsupported(instruction.opcode)
    words.end()
    if kind in _FLOATS:
        change = _sum(kind, space)
    dtype = np.dtype(U32) if kind.endswith("x2") else dtype_of(kind)
    bits = np.dtype(f"u{dtype.itemsize}")
    target, (place, *sources) = (instruction.operands[0] if returns else "_"), instruction.operands[returns:]
    if len(sources) != (2 if how == "cas" else 1):
        raise Unsupported(instruction.text)
    get, gets = decoder.address(place), [decoder.read(one, dtype) for one in sources]
    put = decoder.write(target, bits)
    register = decoder.register(target) if target != "_" else -1
    exact = how in _COMMUTE and kind not in _FLOATS

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        threads, addresses = machine.threads(active), machine.flat(get(machine), active)
        values = [machine.flat(one(machine), active) for one in gets]
        old, several = np.zeros(len(addresses), dtype), False
        if space == "global":
            for buffer, chosen in machine.memory.groups(addresses, dtype.itemsize, threads, instruction):
                start = (addresses[chosen] - U64(buffer.base)).astype(I64)
                at, shared = buffer.change(start, dtype.itemsize, threads.some(chosen), instruction)
                several |= shared
                old[chosen] = _in_turn(
                    buffer.words[dtype.itemsize].view(dtype), at, change, [one[chosen] for one in values],
                    machine.backwards,
                )  # fmt: skip
        else:
            start = machine.shared.starts(addresses, dtype.itemsize, threads, instruction)
            at, several = machine.shared.change(start, dtype.itemsize, threads, instruction)
            content = machine.shared.words[dtype.itemsize].view(dtype)
            old = _in_turn(content, at, change, values, machine.backwards)
        if several and not (exact and register not in decoder.ever_read):
            machine.order_left_open = True
        put(machine, machine.spread(old.view(bits), active), mask)

    return run


def _sum(kind: str, space: str) -> _Change:
    """A sum that rounds; float32 in global memory flushes subnormal numbers."""
    if kind == "f64":
        return lambda old, b: old + b
    found = operation({"f32": "add.rn.ftz.f32" if space == "global" else "add.rn.f32"}.get(kind, f"add.rn.{kind}"), 2)
    return found.compute


def _in_turn(
    content: np.ndarray, at: np.ndarray, change: _Change, values: list[np.ndarray], backwards: bool
) -> np.ndarray:
    """Change the places ``at`` one after the other; what each thread found there."""
    old = np.zeros(len(at), content.dtype)
    order = np.arange(len(at))[:: -1 if backwards else 1]
    order = order[np.argsort(at[order], kind="stable")]
    first = np.r_[True, np.diff(at[order]) != 0]
    begins = np.flatnonzero(first)
    turn = np.arange(len(at)) - np.repeat(begins, np.diff(np.r_[begins, len(at)]))
    by_turn = np.argsort(turn, kind="stable")
    ends = np.cumsum(np.bincount(turn))
    for begin, end in zip(np.r_[0, ends[:-1]], ends, strict=True):
        now = order[by_turn[begin:end]]
        place = at[now]
        old[now] = content[place]
        content[place] = change(old[now], *(one[now] for one in values)).astype(content.dtype, copy=False)
    return old


#: What a lane that takes no part counts as.
_REDUCTIONS: Mapping[str, tuple[np.ufunc, tuple[str, ...]]] = {
    "add": (np.add, ("u32", "s32")), "min": (np.minimum, ("u32", "s32")), "max": (np.maximum, ("u32", "s32")),
    "and": (np.bitwise_and, ("b32",)), "or": (np.bitwise_or, ("b32",)), "xor": (np.bitwise_xor, ("b32",)),
}  # fmt: skip


def _reduction(decoder: Decoder, instruction: Instruction) -> Run:
    """redux.sync: one value from those of all lanes of a warp; float32 only with ``.NaN`` or without."""
    words = Modifiers(instruction.opcode)
    words.choice(("sync",))
    how = words.choice(_REDUCTIONS)
    combine, kinds = _REDUCTIONS[how]
    kind = words.kind(*kinds, *(["f32"] if how in ("min", "max") else []))
    keeps_nan = kind == "f32" and words.flag("NaN")
    words.end()
    target, source, member = instruction.operands
    dtype = dtype_of(kind)
    get, put = decoder.read(source, dtype), decoder.write(target, dtype)
    number = warp_mask(member) if not member.startswith("%") else None
    get_members = decoder.read(member, np.dtype(U32)) if number is None else None

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        members = number
        if get_members is not None:
            chosen = np.unique(machine.flat(get_members(machine), active))
            if len(chosen) > 1:
                raise Fault("shuffle", "the threads of a warp name different members", instruction)
            members = warp_mask(str(int(chosen[0])))
        assert members is not None
        require_members(machine, active, members, instruction)
        taking = machine.by_warp(np.ones((1, 1), bool) if active is None else active)
        values = machine.by_warp(get(machine))
        found = values[..., 0]
        begun = taking[..., 0]
        for lane in range(1, 32):
            both = taking[..., lane] & begun
            one = values[..., lane]
            joined = (
                floats.larger(found, one, sign=1 if how == "max" else -1, keeps_nan=keeps_nan)
                if kind == "f32"
                else combine(found, one)
            )
            found = np.where(both, joined, np.where(taking[..., lane], one, found))
            begun = begun | taking[..., lane]
        put(machine, np.repeat(found, 32, axis=1)[:, : machine.shape[1]], mask)

    return run


EFFECTS: Mapping[str, Effect] = {"atom": _atomic, "red": _atomic, "redux": _reduction}
