"""The process that builds kernels: ``python -m verify.build.compiler FD`` reads jobs on stdin and answers on FD.

It is a separate process because LLVM aborts the whole process on code that it cannot build, and a build may hang. One
JSON line per job: a ``Job`` is answered with an ``Answer``; a list of launches under ``sources`` with the digest of
each kernel's source, which covers everything that the kernel calls, or null if there is none. Answers do not go to
stdout, because Triton prints there.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from verify.architectures import find
from verify.build.sass import Program
from verify.build.warp import Undetermined, executed
from verify.machine.workers import end_with_parent
from verify.record.builds import BuildVerdict, Code, Resources
from verify.record.strict import Strict
from verify.subject.launches import Dtype, Exchanged, Launch, Tensor

_TOOL_LIMIT_S = 60

#: The columns of tensor memory of one multiprocessor, on a GPU that has any.
_TENSOR_MEMORY_COLUMNS = 512

#: What ptxas prints if it is too old for an architecture or a PTX version.
_TOO_OLD = re.compile(r"is not defined for option 'gpu-name'|requires PTX ISA|Unsupported \.version")
_USEFUL = re.compile(r"fatal|error", re.IGNORECASE)
#: What the disassembler prints, after registers and stack, for an architecture that it does not know.
_NOT_DECODED = "Cannot decode architecture"

#: Names of temporary files, which would make a message different in every build.
_TEMPORARY = re.compile(r"\S*/tmp\w+\.ptx\b")


class Job(Exchanged):
    """One launch, which scores ``keys`` keys, to build for one architecture within ``limit_s`` seconds."""

    launch: Launch
    keys: int
    sm: int
    limit_s: float


class Answer(Strict):
    """The outcome of a job.

    ``lasting`` is whether another try of the same job would end the same way, ``passed_over`` whether an autotuner
    would skip this configuration and try the next one.
    """

    verdict: BuildVerdict
    message: str = ""
    lasting: bool = True
    passed_over: bool = False
    duration_s: float = 0.0
    ptxas: str = ""
    ptx_sha256: str | None = None
    cubin_sha256: str | None = None
    resources: Resources | None = None


def function_of(launch: Launch) -> Any:
    """The JIT function of a launch, without the autotuner around it. Raises LookupError, and what an import raises."""
    if not launch.attribute:
        raise LookupError(f"no module has {launch.kernel} as an attribute; bind it to a name at the top level of one")
    found: Any = importlib.import_module(launch.module)
    for name in launch.attribute.split("."):
        found = getattr(found, name, None)
    while not hasattr(found, "cache_key") and hasattr(found, "fn"):
        found = found.fn
    if getattr(found, "__qualname__", None) != launch.kernel or not hasattr(found, "cache_key"):
        raise LookupError(f"{launch.place} is not {launch.kernel} in a process where kernels are not interpreted")
    return found


def source_digest(launch: Launch) -> str | None:
    """The digest of a kernel's source, of all that it calls and reads, and of how it is compiled.

    None if Triton cannot compute one.
    """
    try:
        function = function_of(launch)
        # Triton's own digest covers neither the decorator's arguments nor types read from outside the kernel
        parts: list[Any] = [function.cache_key, function.debug, function.noinline]
        parts += [(one.do_not_specialize, one.do_not_specialize_on_alignment) for one in function.params]
        parts += [(name, str(value)) for (name, _), (value, _) in function.used_global_vals.items()]
    except Exception:  # its build will report what is wrong with the kernel
        return None
    return hashlib.sha256(str(parts).encode()).hexdigest()


def specialised(
    launch: Launch, parameters: list[Any]
) -> tuple[dict[str, str], dict[tuple[int], Any], dict[tuple[int], Any]]:
    """Signature, constants and attributes of ``triton.compile`` for a launch's arguments, as the JIT would choose them.

    An integer 1 becomes a constant, unless the kernel annotates its type, and an integer or an address divisible by 16
    is marked so. A kernel may disable both.
    """
    from triton import language

    signature, constants, attributes = {}, {}, {}
    for place, parameter in enumerate(parameters):
        value = launch.arguments[parameter.name]
        annotated = "" if parameter.is_constexpr else parameter.annotation_type
        kind = "constexpr" if parameter.is_constexpr else parameter.annotation_type
        value = language.dtype(value.dtype) if isinstance(value, Dtype) else value
        if not kind:
            one = type(value) is int and value == 1 and not parameter.do_not_specialize
            kind = "constexpr" if one else _type_of(value, parameter.is_const)
        signature[parameter.name] = kind
        if kind == "constexpr":
            constants[(place,)] = value
            continue
        if annotated == "u1" or annotated.startswith(("fp", "bf")):
            continue  # the argument is not an integer in the kernel
        divides = value.aligned if isinstance(value, Tensor) else type(value) is int and value % 16 == 0
        if divides and not (parameter.do_not_specialize or parameter.do_not_specialize_on_alignment):
            attributes[(place,)] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _type_of(value: Any, is_const: bool) -> str:
    if isinstance(value, Tensor):
        return f"*{'k' if is_const else ''}{value.element}"
    if isinstance(value, bool):
        return "u1"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64" if value < 2**63 else "u64"
    return "fp32" if isinstance(value, float) else "constexpr"


def build(job: Job, scratch: Path) -> Answer:
    """Build a job and read the cubin; files are written only under ``scratch``."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    begun = time.perf_counter()
    try:
        function = function_of(job.launch)
    except (OSError, MemoryError) as error:
        return Answer(verdict=BuildVerdict.CRASH, message=f"{type(error).__name__}: {error}", lasting=False)
    except Exception as error:  # a failed look-up says nothing about the kernel
        message = f"it cannot be looked up in the compiler's process ({type(error).__name__}: {error})"
        return Answer(verdict=BuildVerdict.NOT_FOUND, message=message, lasting=False)
    try:
        signature, constants, attributes = specialised(job.launch, function.params)
        source = ASTSource(function, signature, constants, attributes)
        built = triton.compile(source, target=GPUTarget("cuda", job.sm, 32), options=_options(job.launch, function))
        program = _disassembled(built.asm["cubin"], built.metadata.name, scratch)
        _refuse_what_does_not_fit(job.sm, built, program)
    except (OSError, MemoryError, subprocess.SubprocessError) as error:
        return Answer(verdict=BuildVerdict.CRASH, message=f"{type(error).__name__}: {error}", lasting=False)
    except Exception as error:  # any exception of the compiler is its verdict on this kernel
        return _refused(error, scratch)
    resources = _resources(job, built, program, _scalars(job.launch, signature))
    return Answer(
        verdict=BuildVerdict.OK,
        duration_s=time.perf_counter() - begun,
        ptx_sha256=hashlib.sha256(built.asm["ptx"].encode()).hexdigest(),
        cubin_sha256=hashlib.sha256(built.asm["cubin"]).hexdigest(),
        resources=resources,
    )


def _options(launch: Launch, function: Any) -> dict[str, Any]:
    """The options of a launch, with the debug settings of the kernel and the environment, as the JIT adds them."""
    from triton import knobs

    debug = launch.options.get("debug", function.debug) or knobs.runtime.debug
    return {**launch.options, "debug": debug, "instrumentation_mode": knobs.compilation.instrumentation_mode}


def _refuse_what_does_not_fit(sm: int, built: Any, program: Program) -> None:
    """Raise OutOfResources if one program needs more than there is; Triton detects that only on loading a kernel."""
    from triton.runtime.errors import OutOfResources

    warps, shared = built.metadata.num_warps, built.metadata.shared
    limits = find(sm).limits
    if limits is not None and shared > limits.shared_bytes_per_block:
        raise OutOfResources(shared, limits.shared_bytes_per_block, "shared memory in bytes")
    if (columns := getattr(built.metadata, "tmem_size", None) or 0) > _TENSOR_MEMORY_COLUMNS:
        raise OutOfResources(columns, _TENSOR_MEMORY_COLUMNS, "columns of tensor memory")
    if limits is not None and not limits.occupancy(program.registers, warps, shared):
        raise OutOfResources(program.registers * warps * 32, 4 * 16_384, "registers")


def _refused(error: Exception, scratch: Path) -> Answer:
    """The answer for an exception of the compiler. A full disk is a CRASH, which ptxas reports like a bad kernel."""
    try:
        with tempfile.TemporaryFile(dir=scratch) as filler:
            filler.write(bytes(1 << 20))
    except OSError as full:
        return Answer(verdict=BuildVerdict.CRASH, message=f"{type(full).__name__}: {full}", lasting=False)
    from triton.compiler.errors import CompileTimeAssertionFailure
    from triton.runtime.errors import OutOfResources, PTXASError

    verdict = BuildVerdict.TOOLCHAIN_TOO_OLD if _TOO_OLD.search(str(error)) else BuildVerdict.COMPILE_ERROR
    verdict = BuildVerdict.OUT_OF_RESOURCES if isinstance(error, OutOfResources) else verdict
    passed_over = isinstance(error, OutOfResources | CompileTimeAssertionFailure | PTXASError)
    return Answer(verdict=verdict, message=_told(error), passed_over=passed_over)


def _told(error: BaseException) -> str:
    """The first useful line: the assembler's complaint, or what Triton's front end reports and where."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    if (node := getattr(error, "node", None)) is not None:
        said = str(error.error_message or "").strip()
        if not said and error.__cause__ is not None:
            return _told(error.__cause__)  # raised in a function that the kernel calls
        # the front end prints the source, then its complaint on the last line; a failed assertion has its own message
        sentence = said.splitlines()[-1] if said else ast.unparse(node) if isinstance(node, ast.AST) else lines[-1]
        name = re.search(r"def (\w+)", error.src or "")
        line = f" (line {node.lineno} of {name[1]})" if name and hasattr(node, "lineno") else ""
        return f"{type(error).__name__}: {sentence}{line}"
    useful = [line for line in lines[1:] if _USEFUL.search(line)] or lines
    return _TEMPORARY.sub("<ptx>", useful[0])


def _disassembled(cubin: bytes, kernel: str, scratch: Path) -> Program:
    """The machine code of ``kernel``. Raises OSError if the tool does not print it."""
    from triton import knobs

    file = scratch / "kernel.cubin"
    file.write_bytes(cubin)
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TOOL_LIMIT_S)
    if done.returncode and _NOT_DECODED not in done.stderr:
        raise OSError(f"cuobjdump ended with exit code {done.returncode}: {done.stderr.strip()}")
    try:
        return Program.parse(done.stdout, kernel)
    except ValueError as error:
        raise OSError(str(error)) from error


def _scalars(launch: Launch, signature: dict[str, str]) -> list[int | None]:
    """The values of the arguments passed at run time, in order; None for those that are not integers."""
    passed = (launch.arguments[name] for name, kind in signature.items() if kind != "constexpr")
    return [int(value) if isinstance(value, int) else None for value in passed]


def parameters(ptx: str) -> tuple[list[tuple[int, int]], int]:
    """Offset and size in bytes of each parameter of the kernel in ``ptx``, and their total size."""
    head = ptx[ptx.index(".entry") :]
    places, end = [], 0
    for bits in re.findall(r"\.param \.[a-z](\d+)", head[: head.index("{")]):
        size = int(bits) // 8
        start = -(-end // size) * size
        places.append((start, size))
        end = start + size
    return places, end


def _resources(job: Job, built: Any, program: Program, scalars: list[int | None]) -> Resources:
    warps, shared = built.metadata.num_warps, built.metadata.shared
    return Resources(
        registers=program.registers,
        stack_bytes=program.stack_bytes,
        shared_bytes=shared,
        warps=warps,
        occupancy=find(job.sm).occupancy(program.registers, warps, shared),
        code=_code(job, built, program, scalars) if program.instructions else None,
    )


def _code(job: Job, built: Any, program: Program, scalars: list[int | None]) -> Code:
    places, total = parameters(built.asm["ptx"])
    base = program.constant_bytes - total  # the parameters are at the end of the bank
    constants = {
        base + start + 4 * part: (value >> 32 * part) & 0xFFFFFFFF
        for (start, size), value in zip(places, scalars, strict=False)
        if value is not None
        for part in range(size // 4)
    }
    per_key, uncounted = None, ""
    try:
        warps = range(built.metadata.num_warps)
        per_key = sum(executed(program, constants, warp) for warp in warps) * job.launch.programs / job.keys
    except Undetermined as error:
        uncounted = str(error)
    return Code(
        instructions=len(program.instructions),
        spill_store_bytes=program.local_bytes("STL"),
        spill_load_bytes=program.local_bytes("LDL"),
        loads=program.loads_by_width,
        special_functions=program.count("MUFU"),
        warp_instructions_per_key=per_key,
        uncounted=uncounted,
    )


def main() -> int:
    """Answer jobs until stdin ends. The first line says that the imports are done."""
    from triton.backends.nvidia.compiler import get_ptxas  # a slow import, done before a job's time runs

    scratch = Path(tempfile.gettempdir())
    # if memory runs out, Linux should kill this process, not its parent, which must report the failure
    with suppress(OSError):  # not every container allows this
        Path("/proc/self/oom_score_adj").write_text("1000")
    end_with_parent()
    with os.fdopen(int(sys.argv[1]), "w") as answers:
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            job = json.loads(line)
            if "sources" in job:
                launches = [Launch.model_validate(launch) for launch in job["sources"]]
                answer: dict[str, Any] = {"sources": [source_digest(launch) for launch in launches]}
            else:
                asked = Job.model_validate(job)
                built = build(asked, scratch)
                answer = built.model_copy(update={"ptxas": get_ptxas(asked.sm).version}).model_dump(mode="json")
                shutil.rmtree(os.environ["TRITON_CACHE_DIR"], ignore_errors=True)
            print(json.dumps(answer), file=answers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
