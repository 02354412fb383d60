"""A Triton driver without a GPU: what Triton compiled for an SM is executed by the simulator.

The driver's target is ``cuda`` with the SM that was asked for, so the subject's own JIT function specialises, compiles
and launches as on that GPU. Its launcher takes the PTX of the launch, its arguments and grid, and tensors in ordinary
memory.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from verify.architectures import find
from verify.errors import ConfigurationError
from verify.record.simulation import MODES
from verify.simulator import ORDER_SEED, POISONS
from verify.simulator.errors import Fault, Unsupported
from verify.simulator.kept import KeptLaunches
from verify.simulator.launch import Ran, Settings, require_same, run_grid
from verify.simulator.memory import Buffer
from verify.simulator.program import Program
from verify.simulator.ptx import parse
from verify.simulator.storages import buffers_of

#: A launch whose blocks have at most this many threads in all is also run with its warps in another order, once for
#: each kernel.
_REORDERED_THREADS = 4096
#: Shared memory of a block where the architecture's is not known: the least of any (sm_86), less what the system takes.
_SHARED_BYTES = 99 * 1024


@dataclass(slots=True)
class Launched:
    """What was executed of one kernel: its name and PTX, its launches and the instructions of all their threads.

    ``cubin`` is what ptxas made of it, for the census.
    """

    name: str
    ptx: str
    cubin: bytes
    launches: int = 0
    thread_instructions: int = 0

    @property
    def ptx_sha256(self) -> str:
        return hashlib.sha256(self.ptx.encode()).hexdigest()


@dataclass(slots=True)
class SimulatedGpu:
    """The simulated GPU of this process.

    ``mode`` is how approximate instructions round in the launches to come (``MODES``). ``launches`` counts the launches
    that were executed, ``faults`` and ``unsupported`` hold what was raised, since a subject may catch it;
    ``unwritten`` is the word in memory that was allocated and never written, None where nobody fills it;
    ``depends_on_mode`` says whether a launch since the last ``begin`` might give other results in another mode.
    ``alter``, if set, returns the PTX to execute instead of what was compiled, from the kernel's name and PTX;
    ``watch`` is given each kernel before its first launch, by name, and no launch is then answered from a kept one.
    """

    sm: int
    mode: str = MODES[0]
    launches: int = 0
    depends_on_mode: bool = False
    unwritten: int | None = None
    alter: Callable[[str, str], str] | None = None
    watch: Callable[[str, Program], None] | None = None
    faults: list[Fault] = field(default_factory=list)
    unsupported: list[Unsupported] = field(default_factory=list)
    _launched: dict[str, Launched] = field(default_factory=dict)
    _programs: dict[str, Program] = field(default_factory=dict)
    _reordered: set[str] = field(default_factory=set)
    _kept: KeptLaunches = field(default_factory=KeptLaunches)

    def executed(self) -> list[Launched]:
        """What was executed since the last call, by kernel."""
        found, self._launched = [*self._launched.values()], {}
        return found

    def begin(self, mode: str) -> None:
        """Begin to count and collect again, for launches in this mode."""
        self.mode, self.launches, self.depends_on_mode = mode, 0, False
        self.faults.clear()
        self.unsupported.clear()

    def launch(
        self, name: str, ptx: str, cubin: bytes, arguments: Sequence[tuple[str, Any]], grid: tuple[int, int, int],
        shared_bytes: int,
    ) -> None:  # fmt: skip
        """Execute one launch and store what it stored into its tensors. ``arguments`` are (name, value).

        Raises Fault for what no kernel may do, Unsupported before anything runs for what is not executed here.
        """
        if self.alter is not None:
            ptx = self.alter(name, ptx)
        try:
            program = self._program(name, ptx)
            ran, buffers = self._run(program, ptx, arguments, grid, shared_bytes)
        except Fault as error:
            self.faults.append(error)
            self._count(name, ptx, cubin, 0)
            raise
        except Unsupported as error:
            self.unsupported.append(error)
            raise
        self.launches += 1
        self.depends_on_mode |= ran.depends_on_mode
        self._count(name, ptx, cubin, ran.thread_instructions)
        for buffer, memory in buffers:
            if (written := buffer.written) is not None:
                memory[written] = buffer.content[written]

    def _count(self, name: str, ptx: str, cubin: bytes, thread_instructions: int) -> None:
        kernel = self._launched.setdefault(ptx, Launched(name, ptx, cubin))
        kernel.launches += 1
        kernel.thread_instructions += thread_instructions

    def programs(self) -> list[Program]:
        """Every kernel that was launched, decoded."""
        return [*self._programs.values()]

    def _program(self, name: str, ptx: str) -> Program:
        if ptx not in self._programs:
            self._programs[ptx] = program = Program(parse(ptx))
            if self.watch is not None:
                self.watch(name, program)
        return self._programs[ptx]

    def _run(
        self, program: Program, ptx: str, arguments: Sequence[tuple[str, Any]], grid: tuple[int, int, int],
        shared_bytes: int,
    ) -> tuple[Ran, list[tuple[Buffer, np.ndarray]]]:  # fmt: skip
        """One run, and others where the results might depend on what PTX leaves open."""

        def once(settings: Settings) -> tuple[Ran, list[tuple[Buffer, np.ndarray]]]:
            buffers, values = buffers_of(arguments, self.unwritten)
            ran = run_grid(program, [one for one, _ in buffers], values, grid, shared_bytes, settings)
            return ran, buffers

        buffers, values = buffers_of(arguments, self.unwritten)
        stored = [one for one, _ in buffers]
        if self.watch is not None:
            return run_grid(program, stored, values, grid, shared_bytes, Settings(self.mode)), buffers
        reordering = ptx not in self._reordered and program.kernel.threads * prod(grid) <= _REORDERED_THREADS
        if reordering:
            self._reordered.add(ptx)
        place = self._kept.place(program.code_sha256, stored, values, grid, shared_bytes, self.mode, reordering)
        if (kept := self._kept.read(place, stored)) is not None:
            return kept, buffers
        ran = run_grid(program, stored, values, grid, shared_bytes, Settings(self.mode))
        if ran.read_undefined:
            _, again = once(Settings(self.mode, POISONS[1]))
            require_same(stored, [one for one, _ in again], "undefined", "depends on a register that was never written")
        if reordering and not ran.order_left_open:
            _, again = once(Settings(self.mode, order_seed=ORDER_SEED))
            require_same(stored, [one for one, _ in again], "order", "differs when the warps run in another order")
        self._kept.write(place, ran, stored)
        return ran, buffers


class _Launcher:
    """What Triton calls to launch a compiled kernel."""

    def __init__(self, simulation: SimulatedGpu, dry: Callable[[], bool], source: Any, metadata: Any) -> None:
        self._simulation, self._dry, self._metadata = simulation, dry, metadata
        self._signature: Mapping[str, Any] = source.signature

    def __call__(
        self, x: int, y: int, z: int, stream: int, function: Any, packed: Any, launch_metadata: Any, enter: Any,
        leave: Any, *values: Any,
    ) -> None:  # fmt: skip
        if self._dry():
            return
        name, ptx, cubin = function
        for what in ("global_scratch_size", "profile_scratch_size"):
            if getattr(self._metadata, what, 0):
                raise Unsupported(f"{what.replace('_', ' ')} of a kernel")
        if not x * y * z:
            return
        named = zip(self._signature, self._signature.values(), values, strict=True)
        arguments = [one for name_, kind, value in named for one in _passed(name_, kind, value)]
        if enter is not None:
            enter(launch_metadata)
        self._simulation.launch(name, ptx, cubin, arguments, (x, y, z), self._metadata.shared)
        if leave is not None:
            leave(launch_metadata)


def _passed(name: str, kind: Any, value: Any) -> Iterator[tuple[str, Any]]:
    """The arguments that a value of the signature passes: none for a constant, several for a tuple."""
    if isinstance(kind, tuple):
        for number, (inner, one) in enumerate(zip(kind, value, strict=True)):
            yield from _passed(f"{name}.{number}", inner, one)
    elif kind == "constexpr":
        return
    elif str(kind).startswith(("tensordesc", "nvTmaDesc")):
        raise Unsupported("tensor descriptors (TMA)")
    else:
        yield name, 0 if value is None else value


def install(sm: int) -> SimulatedGpu:
    """Make a simulated GPU of this SM Triton's active device in this process, before a subject is imported.

    ``TRITON_INTERPRET=1`` then only tells a subject that its tensors may be on the CPU: Triton itself has decided not
    to interpret. Raises ConfigurationError if Triton is missing, or was imported and interprets.
    """
    os.environ.pop("TRITON_INTERPRET", None)
    try:
        import triton
        from triton import knobs
        from triton.backends.compiler import GPUTarget
        from triton.backends.driver import DriverBase
        from triton.runtime.driver import driver
    except ImportError as error:
        raise ConfigurationError(f"--device sim:sm{sm} needs Triton, which does not import ({error})") from error
    if not isinstance(triton.language.sum, triton.runtime.JITFunction):  # made when Triton was imported
        raise ConfigurationError(f"--device sim:sm{sm} needs a process in which Triton does not interpret its kernels")
    simulation = SimulatedGpu(sm)
    state = {"dry": False}

    class Driver(DriverBase):
        """The simulated GPU."""

        utils = _Utilities(sm)

        @classmethod
        def is_active(cls) -> bool:
            return False

        def map_python_to_cpp_type(self, ty: str) -> str:
            raise NotImplementedError(f"a simulated launch passes no {ty} through C++")

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", sm, 32)

        def get_active_torch_device(self) -> Any:
            import torch

            return torch.device("cpu")

        def get_current_device(self) -> int:
            return 0

        def set_current_device(self, device: int) -> None:
            pass

        def get_current_stream(self, device: int) -> int:
            return 0

        def get_device_capability(self, device: int = 0) -> tuple[int, int]:
            return divmod(sm, 10)

        def launcher_cls(self, source: Any, metadata: Any) -> _Launcher:
            return _Launcher(simulation, lambda: state["dry"], source, metadata)

        def get_benchmarker(self) -> Callable[..., list[float]]:
            """The autotuner's clock: the first configuration that compiles and fits is the fastest."""
            turn = count()

            def benchmark(call: Callable[[], Any], quantiles: Sequence[float] = (0.5,), **_: Any) -> list[float]:
                state["dry"] = True
                try:
                    call()
                finally:
                    state["dry"] = False
                return [float(next(turn))] * len(quantiles)

            return benchmark

    driver.set_active(Driver())
    knobs.runtime.kernel_load_start_hook.add(Driver.utils.note_files)
    os.environ["TRITON_INTERPRET"] = "1"
    if knobs.runtime.interpret:  # newer than the import, so it has to be told
        vars(knobs.runtime)["interpret"] = False
    return simulation


class _Utilities:
    """The part of a driver that loads machine code and knows the device."""

    def __init__(self, sm: int) -> None:
        found = find(sm)
        self._shared = found.limits.shared_bytes_per_block if found and found.limits else _SHARED_BYTES
        self._ptx: dict[str, str] = {}

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": self._shared, "max_num_regs": 65536, "multiprocessor_count": 1, "warpSize": 32,
            "sm_clock_rate": 1_000_000, "mem_clock_rate": 1_000_000, "mem_bus_width": 1024,
        }  # fmt: skip

    def note_files(self, module: Any, function: Any, name: str, files: Mapping[str, str], digest: str) -> None:
        """Triton's hook before it loads machine code: the files that it compiled, the PTX among them."""
        (path,) = (path for file, path in files.items() if file.endswith(".ptx"))
        self._ptx[name] = Path(path).read_text()

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[Any, Any, int, int, int]:
        """Module, function, registers, spills, most threads of a block; the function is what the launcher needs."""
        return None, (name, self._ptx.pop(name), cubin), 0, 0, 1024
