"""Instructions that do more than compute a value: memory, carries, exchanges within a warp, barriers of a warp."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from verify.simulator.decode import Decoder, Effect, compute, parts_of
from verify.simulator.errors import Fault, Unsupported
from verify.simulator.integers import product
from verify.simulator.operation import Modifiers, dtype_of
from verify.simulator.ptx import Instruction
from verify.simulator.state import Run, State

U16, U32, U64, I64 = np.uint16, np.uint32, np.uint64, np.int64

#: Modifiers that steer caches, and do not change what is loaded or stored.
_CACHE = (
    "nc", "ca", "cg", "cs", "lu", "cv", "wb", "wt", "weak", "L1__evict_first", "L1__evict_last", "L1__evict_normal",
    "L1__no_allocate", "L2__evict_first", "L2__evict_last", "L2__evict_normal", "L2__64B", "L2__128B", "L2__256B",
)  # fmt: skip


def _access(instruction: Instruction, operand: str) -> tuple[str, np.dtype]:
    """The space and the type of a load or store of ``operand``, a register or a vector of them."""
    words = Modifiers(instruction.opcode)
    try:
        kind = dtype_of(words.kind())
    except KeyError as error:
        raise Unsupported(instruction.opcode) from error
    space = words.choice(("global", "shared__cta", "shared", "local", "param"))
    for name in _CACHE:
        words.flag(name)
    vector = words.choice(("v2", "v4", "v8"), "v1")
    words.end()
    if kind.kind == "b" or int(vector[1:]) != len(parts_of(operand)) or int(vector[1:]) * kind.itemsize > 32:
        raise Unsupported(instruction.opcode)
    return space.removesuffix("__cta"), kind


def _load(decoder: Decoder, instruction: Instruction) -> Run:
    if len(instruction.operands) != 2:  # a cache policy
        raise Unsupported(instruction.text)
    target, place = instruction.operands
    space, kind = _access(instruction, target)
    bits = np.dtype(f"u{kind.itemsize}")
    puts = [decoder.write(name, kind) for name in parts_of(target)]
    if space == "param":
        return _load_parameter(decoder, instruction, kind)
    get, size = decoder.address(place), kind.itemsize * len(puts)

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        threads, addresses = machine.threads(active), machine.flat(get(machine), active)
        if space == "global":
            values = [np.zeros(len(addresses), bits) for _ in puts]
            for buffer, chosen in machine.memory.groups(addresses, size, threads, instruction):
                start = (addresses[chosen] - U64(buffer.base)).astype(I64)
                found = buffer.read(start, bits.itemsize, len(puts), threads.some(chosen), instruction)
                for value, one in zip(values, found, strict=True):
                    value[chosen] = one
        else:
            memory = machine.shared if space == "shared" else machine.local
            start = memory.starts(addresses, size, threads, instruction)
            values = memory.read(start, bits.itemsize, len(puts), threads, instruction)
        for put, value in zip(puts, values, strict=True):
            put(machine, machine.spread(value, active).view(kind), mask)

    return run


def _load_parameter(decoder: Decoder, instruction: Instruction, kind: np.dtype) -> Run:
    target, place = instruction.operands
    name = place.strip("[] ")
    sizes = {name: dtype_of(kind).itemsize for name, kind in decoder.kernel.parameters}
    if sizes.get(name) != kind.itemsize:
        raise Unsupported(f"{instruction.text} (a part of a parameter)")
    put = decoder.write(target, kind)
    return lambda machine, active, mask: put(machine, machine.parameters[name].view(kind), mask)


def _store(decoder: Decoder, instruction: Instruction) -> Run:
    if len(instruction.operands) != 2:
        raise Unsupported(instruction.text)
    place, source = instruction.operands
    space, kind = _access(instruction, source)
    if space == "param":
        raise Unsupported(instruction.opcode)
    bits = np.dtype(f"u{kind.itemsize}")
    get = decoder.address(place)
    gets = [decoder.read(one, bits) for one in parts_of(source)]
    size = bits.itemsize * len(gets)

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        threads, addresses = machine.threads(active), machine.flat(get(machine), active)
        values = [machine.flat(one(machine), active) for one in gets]
        if space == "global":
            for buffer, chosen in machine.memory.groups(addresses, size, threads, instruction):
                start = (addresses[chosen] - U64(buffer.base)).astype(I64)
                buffer.write(start, [value[chosen] for value in values], threads.some(chosen), instruction)
        else:
            memory = machine.shared if space == "shared" else machine.local
            memory.write(memory.starts(addresses, size, threads, instruction), values, threads, instruction)

    return run


def _with_carry(decoder: Decoder, instruction: Instruction) -> Run:
    """mad.lo.cc.u32 and madc.hi.u32, which carry from one to the next (add and addc alike)."""
    words = Modifiers(instruction.opcode)
    sets, takes = words.flag("cc"), instruction.base.endswith("c")
    kind = words.kind("u32", "s32")
    part = words.choice(("lo", "hi")) if instruction.base.startswith("mad") else ""
    words.end()
    target, *sources = instruction.operands
    dtype = np.dtype(U32)
    gets = [decoder.read(text, dtype) for text in sources]
    put = decoder.write(target, dtype)
    multiply = product(Modifiers(f"mul.{part}.{kind}"), addend=False) if part else None

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        first, *rest = [get(machine) for get in gets]
        if multiply is not None:
            signed = multiply.inputs[0]
            first, rest = multiply.compute(first.view(signed), rest[0].view(signed)).view(U32), rest[1:]
        total = first.astype(U64) + rest[0] + (machine.carry.astype(U64) if takes else U64(0))
        if sets:
            carry = total >> U64(32) != 0
            machine.carry = carry if mask is None else np.where(mask, carry, machine.carry)
        put(machine, total.astype(U32), mask)

    return run


def _plain_or_carry(decoder: Decoder, instruction: Instruction) -> Run:
    return (_with_carry if "cc" in instruction.modifiers else compute)(decoder, instruction)


def warp_mask(text: str) -> np.ndarray:
    """The lanes that a member mask names. Raises Unsupported unless it is a number."""
    if not re.fullmatch(r"-?(0x[0-9a-fA-F]+|\d+)", text):
        raise Unsupported(f"the member mask {text}")
    number = int(text, 0) & 0xFFFFFFFF
    return np.array([number >> lane & 1 for lane in range(32)], bool)


def require_members(machine: State, active: np.ndarray | None, members: np.ndarray, by: Instruction) -> None:
    """Raise Fault unless in each warp either none or exactly the named lanes that have not ended are active."""
    if active is None and members.all() and machine.shape[1] % 32 == 0:
        return
    warps = machine.by_warp(np.ones((1, 1), bool) if active is None else active)
    wrong = warps.any(-1, keepdims=True) & (warps != (members & machine.by_warp(machine.living)))
    if wrong.any():
        block, warp, lane = (int(one) for one in np.argwhere(wrong)[0])
        told = f"lane {lane} is " + ("not there" if members[lane] else "there and not in the member mask")
        raise Fault("shuffle", told, by, machine.named(block, warp * 32 + lane))


def _require_sources(machine: State, active: np.ndarray | None, distance: np.ndarray, by: Instruction) -> None:
    """Raise Fault if a lane takes its value from one that is not there, since it has ended."""
    if active is None and machine.shape[1] % 32 == 0:
        return
    taking = np.pad(machine.whole(np.ones((1, 1), bool) if active is None else active), ((0, 0), (0, 32)))
    columns = np.arange(machine.shape[1]) + machine.whole(distance)
    wrong = taking[:, : machine.shape[1]] & ~np.take_along_axis(taking, columns, axis=1)
    if wrong.any():
        block, thread = (int(one) for one in np.argwhere(wrong)[0])
        told = f"lane {thread % 32} takes the value of lane {int(columns[block, thread]) % 32}, which is not there"
        raise Fault("shuffle", told, by, machine.named(block, thread))


def _shuffle(decoder: Decoder, instruction: Instruction) -> Run:
    """shfl.sync: a value from another lane (PTX ISA 9.7.9.6)."""
    words = Modifiers(instruction.opcode)
    words.kind("b32")
    words.choice(("sync",))
    how = words.choice(("up", "down", "bfly", "idx"))
    words.end()
    target, *sources = instruction.operands
    value_name, _, predicate_name = target.partition("|")
    get, lane_of, clamp_of = (decoder.read(text, np.dtype(U32)) for text in sources[:3])
    members = warp_mask(sources[3])
    put = decoder.write(value_name, np.dtype(U32))
    put_predicate = decoder.write(predicate_name, np.dtype(bool)) if predicate_name else None
    numbers = np.arange(decoder.kernel.threads)[None, :]
    fixed = None
    if all(re.fullmatch(r"\d+", one) for one in sources[1:3]):
        fixed = _sources(how, numbers, *(np.array([[int(one)]]) for one in sources[1:3]))

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        require_members(machine, active, members, instruction)
        columns, found = fixed or _sources(how, numbers, lane_of(machine), clamp_of(machine))
        _require_sources(machine, active, columns - numbers, instruction)
        values = get(machine)
        if values.shape[1] > 1:
            values = (
                values[:, columns[0]]
                if len(columns) == 1
                else np.take_along_axis(machine.whole(values), machine.whole(columns), axis=1)
            )
        put(machine, values, mask)
        if put_predicate is not None:
            put_predicate(machine, found, mask)

    return run


def _sources(how: str, numbers: np.ndarray, distance: np.ndarray, control: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Which thread each takes its value from, and whether that lane is one that it may take from (else its own)."""
    distance, control = distance.astype(I64) & 31, control.astype(I64)
    clamp, segment = control & 31, control >> 8 & 31
    lane = numbers % 32
    first = lane & segment
    last = first | (clamp & ~segment)
    source = {"up": lane - distance, "down": lane + distance, "bfly": lane ^ distance}.get(how)
    if source is None:
        source = first | (distance & ~segment)
    found = source >= last if how == "up" else source <= last
    return numbers - lane + np.where(found, source, lane), found


def _vote(decoder: Decoder, instruction: Instruction) -> Run:
    """vote.sync: all, any, uni, and the ballot of a predicate over the members of each warp."""
    words = Modifiers(instruction.opcode)
    kind = words.kind("pred", "b32")
    words.choice(("sync",))
    how = words.choice(("ballot",) if kind == "b32" else ("all", "any", "uni"))
    words.end()
    target, source, member = instruction.operands
    get, members = decoder.read(source, np.dtype(bool)), warp_mask(member)
    put = decoder.write(target, dtype_of(kind))

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        require_members(machine, active, members, instruction)
        taking = machine.by_warp(np.ones((1, 1), bool) if active is None else active)
        holds = machine.by_warp(get(machine)) & taking
        if how == "ballot":
            found = (holds.astype(U64) << np.arange(32, dtype=U64)).sum(-1).astype(U32)
        else:
            every, some = (holds == taking).all(-1), holds.any(-1)
            found = {"all": every, "any": some, "uni": every | ~some}[how]
        put(machine, np.repeat(found, 32, axis=1)[:, : machine.shape[1]], mask)

    return run


def _warp_barrier(decoder: Decoder, instruction: Instruction) -> Run:
    members = warp_mask(instruction.operands[0])

    def run(machine: State, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        require_members(machine, active, members, instruction)
        machine.pass_warp_barrier(active)

    return run


def _fence(decoder: Decoder, instruction: Instruction) -> Run:
    """Fences order accesses, which happen in order here; they do not replace a barrier."""
    return lambda machine, active, mask: None


#: By the beginning of the opcode.
EFFECTS: Mapping[str, Effect] = {
    "ld": _load, "st": _store, "shfl": _shuffle, "vote": _vote, "bar.warp": _warp_barrier,
    "madc": _with_carry, "addc": _with_carry, "mad": _plain_or_carry, "add": _plain_or_carry,
    "membar": _fence, "fence.acq_rel": _fence, "fence.sc": _fence, "fence.proxy.async": _fence,
}  # fmt: skip
