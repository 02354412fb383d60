"""The machine: blocks of a grid that run together, as arrays over [blocks, threads].

A value that is alike in all threads of a block, or in all blocks, is kept and computed once. Threads that part at a
branch run in groups; the group with the lowest place in the program runs first, and groups that meet go on as one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

import numpy as np

from verify.simulator.block_memory import LocalMemory, SharedMemory
from verify.simulator.copies import Copies
from verify.simulator.decode import Step, local_bytes
from verify.simulator.errors import Fault
from verify.simulator.memory import GlobalMemory
from verify.simulator.program import Program
from verify.simulator.ptx import Instruction
from verify.simulator.threads import Threads

U32, I32, I64 = np.uint32, np.int32, np.int64
#: How often threads go back in a loop while others wait, before those others run: what they wait for may be a lock.
_PATIENCE = 200


@dataclass(slots=True)
class Group:
    """Threads that are at the same ``place``; ``active`` is None for all."""

    place: int
    active: np.ndarray | None


@dataclass(frozen=True, slots=True)
class Waiting:
    """Threads that have arrived at a barrier; they go on at ``place``."""

    barrier: Instruction
    active: np.ndarray
    place: int

    @property
    def name(self) -> str:
        return self.barrier.operands[0]


@dataclass(slots=True)
class Team:
    """Warps that run until each of their threads waits or has ended, before another team does."""

    groups: list[Group]
    waiting: list[Waiting] = field(default_factory=list)
    rounds: int = 0


class Machine:
    """The state of the blocks that run together. ``blocks`` has their numbers, [blocks, 3]."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        parameters: Mapping[str, np.ndarray],
        constants: Mapping[str, np.ndarray],
        blocks: np.ndarray,
        grid: tuple[int, int, int],
        shared_bytes: int,
        *,
        mode: str,
        poison: int,
        first_lane_wins: bool,
        warp_order: Sequence[int] | None,
        step_limit: int,
    ) -> None:
        self.program, self.memory, self.parameters, self.constants = program, memory, parameters, constants
        self.shape = (len(blocks), program.kernel.threads)
        self.warps = -(-self.shape[1] // 32)
        self.special: Mapping[str, np.ndarray] = _special(program.kernel.threads, blocks, grid)
        self.shared = SharedMemory(len(blocks), shared_bytes, program.shared_part_bytes, first_wins=first_lane_wins)
        self.copies = Copies(self.shape[0] * self.shape[1])
        self.local = LocalMemory(len(blocks) * program.kernel.threads, local_bytes(program.kernel))
        self.carry: np.ndarray = np.zeros((1, 1), bool)
        self.backwards, self.order_left_open = first_lane_wins, False
        self.read_undefined = self.used_approximation = False
        self.thread_instructions = 0
        self._mode, self._order = mode, warp_order
        self._registers: list[np.ndarray | None] = [None] * len(program.types)
        self._poison = [_poison_of(dtype, poison) for dtype in program.types]
        self._coordinates = blocks
        linear = blocks[:, 0] + grid[0] * (blocks[:, 1] + grid[1] * blocks[:, 2])
        threads = np.arange(self.shape[1])
        self._thread = np.broadcast_to(threads.astype(I32), self.shape)
        self._block = np.broadcast_to(np.arange(len(blocks), dtype=I64)[:, None], self.shape)
        self._number = linear.astype(I64)[:, None] * self.shape[1] + threads
        self._epoch = np.zeros(self.shape, I32)
        self._warp_epoch = np.zeros(self.shape, I32)
        self._everyone: Threads | None = None
        #: Threads that have not ended.
        self._living = np.ones(self.shape, bool)
        self._step_limit = self._steps_left = step_limit

    # registers

    def value(self, index: int) -> np.ndarray:
        """A register; one that was never written holds the poison, and whoever reads it is noted."""
        found = self._registers[index]
        if found is None:
            self.read_undefined = True
            return self._poison[index]
        return found

    def set(self, index: int, value: np.ndarray, mask: np.ndarray | None) -> None:
        """Put a value into a register of the threads in ``mask``."""
        if mask is None:
            self._registers[index] = value
            return
        before = self._registers[index]
        if before is None:
            self.read_undefined = True  # some threads may have no value, and read it later
            before = self._poison[index]
        self._registers[index] = np.where(mask, value, before)

    def approximated(self) -> str:
        """How an approximate instruction rounds in this run."""
        self.used_approximation = True
        return self._mode

    # threads

    def whole(self, mask: np.ndarray) -> np.ndarray:
        return np.broadcast_to(mask, self.shape)

    def threads(self, active: np.ndarray | None) -> Threads:
        """The active threads, in the order of ``flat``."""
        if active is not None:
            return self._some_threads(self.whole(active))
        if self._everyone is None:
            self._everyone = self._some_threads(np.ones(self.shape, bool))
        return self._everyone

    def _some_threads(self, active: np.ndarray) -> Threads:
        parts = (self._block, self._thread, self._number, self._epoch, self._warp_epoch)
        block, thread, number, epoch, warp_epoch = (one[active] for one in parts)
        return Threads(block, thread, number, epoch, warp_epoch, self.shape[1], self._coordinates)

    def named(self, block: int, thread: int) -> tuple[tuple[int, int, int], int]:
        """A thread of one of the blocks, for a message."""
        x, y, z = (int(one) for one in self._coordinates[block])
        return (x, y, z), thread

    def flat(self, values: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """The values of the active threads, one after the other."""
        whole = np.broadcast_to(values, self.shape)
        return whole.ravel() if active is None else whole[self.whole(active)]

    def spread(self, flat: np.ndarray, active: np.ndarray | None) -> np.ndarray:
        """The opposite of ``flat``; threads that are not active get 0."""
        if active is None:
            return flat.reshape(self.shape)
        whole = np.zeros(self.shape, flat.dtype)
        whole[self.whole(active)] = flat
        return whole

    def pass_warp_barrier(self, active: np.ndarray | None) -> None:
        """A barrier of each warp that has an active thread."""
        passed = self.by_warp(np.ones((1, 1), bool) if active is None else active).any(-1)
        self._warp_epoch = self._warp_epoch + np.repeat(passed, 32, axis=1)[:, : self.shape[1]].astype(I32)
        self._everyone = None

    def by_warp(self, mask: np.ndarray) -> np.ndarray:
        """A mask as [blocks, warps, 32]; lanes that a block does not have are False."""
        whole = self.whole(mask)
        missing = self.warps * 32 - self.shape[1]
        whole = np.pad(whole, ((0, 0), (0, missing))) if missing else whole
        return whole.reshape(self.shape[0], self.warps, 32)

    @property
    def living(self) -> np.ndarray:
        """The threads that have not ended."""
        return self._living

    # scheduling

    def run(self) -> None:
        """Run every block to its end. Raises Fault."""
        teams = [Team([Group(0, mask)]) for mask in self._teams()]
        while True:
            for team in teams:
                while team.groups:
                    self._run_first(team, alone=len(teams) == 1)
            if not any(team.waiting for team in teams):
                return
            self._release(teams)

    def _teams(self) -> list[np.ndarray | None]:
        """Who runs together: all threads, or one warp after the other in the order that was asked for."""
        if self._order is None:
            return [None]
        warp = np.arange(self.shape[1]) // 32
        return [np.broadcast_to(warp == one, self.shape) for one in self._order]

    def _run_first(self, team: Team, alone: bool) -> None:
        """Run the first group that can go on until it parts, waits, ends or reaches another group.

        That is the one with the lowest place, unless it is at an instruction for which the lanes of a warp must meet,
        and some of them, which may be in code that the compiler put further down, have yet to come.
        """
        groups = team.groups
        if len(groups) > 1:
            self._meet(groups)
        group = next((one for one in groups if self._can_go_on(one, groups)), groups[0])
        until = min((one.place for one in groups if one.place > group.place), default=len(self.program.steps))
        if team.rounds > _PATIENCE and self.program.synchronises:  # what they wait for may be a lock that another holds
            team.rounds, group = 0, groups[-1]
            until = len(self.program.steps)
        active = group.active
        # registers of threads that have ended may hold anything, so that a lone group need not spare them
        alone = alone and len(groups) == 1 and not team.waiting
        mask = None if alone else active
        count = self.shape[0] * self.shape[1] if active is None else int(np.count_nonzero(self.whole(active)))
        steps, place, registers = self.program.steps, group.place, self._registers
        while place < len(steps):
            step = steps[place]
            if step.meeting and place != group.place:
                group.place = place
                if not self._can_go_on(group, groups):
                    return
            self.thread_instructions += count
            self._steps_left -= 1
            if not self._steps_left:
                place = int(np.ones(self.shape, bool).argmax() if active is None else self.whole(active).argmax())
                found = self.named(*divmod(place, self.shape[1]))
                raise Fault("endless", f"no end within {self._step_limit} steps", step.instruction, found)
            if step.kind == "run":
                self._run_step(step, active, mask)
                if alone:
                    for index in step.dead:
                        registers[index] = None
                place += 1
            elif step.kind == "branch":
                before, place = place, self._branch(step, group, groups, place)
                if place < 0:
                    return
                if place <= before and len(groups) > 1:  # others may be waiting to meet this group further down
                    group.place = place
                    team.rounds += 1
                    return
            elif step.kind == "exit":
                staying = self._exit(step, group)
                if staying is None:
                    groups.remove(group)
                    return
                group.place, group.active = place + 1, staying
                return
            else:
                groups.remove(group)
                self._arrive(step, group, team, place)
                return
            if place >= until:
                group.place = place
                return
        raise Fault("endless", "the program runs past its end", steps[-1].instruction)

    def _meet(self, groups: list[Group]) -> None:
        """Sort groups by their place, and make those at one place one group."""
        groups.sort(key=lambda group: group.place)
        place = 0
        while place + 1 < len(groups):
            if groups[place].place == groups[place + 1].place:
                groups[place].active = self._union(groups[place].active, groups.pop(place + 1).active)
            else:
                place += 1

    def _can_go_on(self, group: Group, groups: list[Group]) -> bool:
        """Whether no lane that is missing for the instruction at which a group is may still come, or end."""
        steps = self.program.steps
        if len(groups) == 1 or group.active is None or not steps[group.place].meeting:
            return True
        warps = self.by_warp(group.active)
        missing = warps.any(-1, keepdims=True) & ~warps & self.by_warp(self._living)
        for other in groups:
            if other.place != group.place and (missing & self.by_warp(self._active(other))).any():
                ends = steps[other.place].kind == "exit" and steps[other.place].guard < 0
                if ends or self.program.reaches(other.place, group.place):
                    return False
        return True

    def _active(self, group: Group) -> np.ndarray:
        return np.ones((1, 1), bool) if group.active is None else group.active

    def _union(self, one: np.ndarray | None, other: np.ndarray | None) -> np.ndarray | None:
        return None if one is None or other is None else one | other

    def _run_step(self, step: Step, active: np.ndarray | None, mask: np.ndarray | None) -> None:
        assert step.run is not None
        if step.guard < 0:
            step.run(self, active, mask)
            return
        holds = self._guard(step)
        if holds.all():
            step.run(self, active, mask)
            return
        chosen = holds if active is None else active & holds
        if chosen.any():
            step.run(self, chosen, holds if mask is None else mask & holds)

    def _guard(self, step: Step) -> np.ndarray:
        holds = self.value(step.guard)
        return ~holds if step.instruction.negated else holds

    def _branch(self, step: Step, group: Group, groups: list[Group], place: int) -> int:
        """Where the group goes on; -1 if it parts, and is in ``groups`` twice from then on."""
        if step.guard < 0:
            return step.target
        holds = self._guard(step)
        taken = holds if group.active is None else group.active & holds
        left = ~holds if group.active is None else group.active & ~holds
        if not left.any():
            return step.target
        if not taken.any():
            return place + 1
        groups.remove(group)
        groups += [Group(place + 1, self.whole(left)), Group(step.target, self.whole(taken))]
        return -1

    def _exit(self, step: Step, group: Group) -> np.ndarray | None:
        """The threads that stay; None if all end."""
        ending = np.ones((1, 1), bool) if step.guard < 0 else self._guard(step)
        ending = self.whole(ending if group.active is None else group.active & ending)
        self._living = self._living & ~ending
        staying = self.whole(~ending if group.active is None else group.active & ~ending)
        return staying if staying.any() else None

    # barriers

    def _arrive(self, step: Step, group: Group, team: Team, place: int) -> None:
        active = np.ones(self.shape, bool) if group.active is None else self.whole(group.active)
        warps, living = self.by_warp(active), self.by_warp(self._living)
        parted = warps.any(-1) & (warps != living).any(-1)
        if parted.any():
            block, warp = (int(one) for one in np.argwhere(parted)[0])
            lane = int(warps[block, warp].argmax())
            told = f"{int(warps[block, warp].sum())} threads of a warp reach it without the others"
            raise Fault("barrier", told, step.instruction, self.named(block, warp * 32 + lane))
        team.waiting.append(Waiting(step.instruction, active, place + 1))

    def _release(self, teams: list[Team]) -> None:
        """Let the blocks go on all of whose living threads wait at one barrier. Raises Fault if there is none."""
        waiting = [one for team in teams for one in team.waiting]
        done = np.zeros(self.shape[0], bool)
        for name in {one.name for one in waiting}:
            there = np.logical_or.reduce([one.active for one in waiting if one.name == name])
            done |= (there == self._living).all(1) & there.any(1)
        if not done.any():
            self._require_one_barrier(waiting)
        for team in teams:
            arrived, team.waiting = team.waiting, []
            for one in arrived:
                if (left := one.active & ~done[:, None]).any():
                    team.waiting.append(Waiting(one.barrier, left, one.place))
                if (going := one.active & done[:, None]).any():
                    team.groups.append(Group(one.place, None if going.all() else going))
        self._epoch = self._epoch + done[:, None].astype(I32)
        self._everyone = None

    def _require_one_barrier(self, waiting: list[Waiting]) -> NoReturn:
        """Raise Fault for the first block whose threads wait at several barriers."""
        block = min(int(one.active.any(1).argmax()) for one in waiting)
        first, *others = [one for one in waiting if one.active[block].any()]
        other = next(one for one in others if one.name != first.name)
        told = f"some threads wait here, and others at barrier {other.name} of {other.barrier.place}"
        raise Fault("barrier", told, first.barrier, self.named(block, int(first.active[block].argmax())))


def _poison_of(dtype: np.dtype, word: int) -> np.ndarray:
    if dtype.kind == "b":
        return np.array([[bool(word & 1)]])
    return np.array([[(word << 32 | word) & ((1 << 8 * dtype.itemsize) - 1)]], object).astype(dtype)


def _special(threads: int, blocks: np.ndarray, grid: tuple[int, int, int]) -> dict[str, np.ndarray]:
    """The special registers. Blocks are one-dimensional, as Triton's always are."""
    thread = np.arange(threads, dtype=U32)[None, :]
    zero, one = np.zeros((1, 1), U32), np.ones((1, 1), U32)
    found = {"%tid.x": thread, "%tid.y": zero, "%tid.z": zero, "%ntid.x": one * U32(threads), "%ntid.y": one}
    found |= {"%ntid.z": one, "%laneid": thread % U32(32), "%warpid": thread // U32(32)}
    for place, axis in enumerate("xyz"):
        numbers = blocks[:, place : place + 1].astype(U32)
        found[f"%ctaid.{axis}"] = numbers[:1] if (numbers == numbers[0]).all() else numbers
        found[f"%nctaid.{axis}"] = one * U32(grid[place])
    return found
