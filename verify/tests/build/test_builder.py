"""Builds ahead of time: each in its own place, whatever becomes of the others, and kept by source and toolchain."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from verify.build import compiler, resources
from verify.build.builder import Order, Progress, compile_ahead, failed
from verify.errors import ConfigurationError
from verify.record.builds import Build, Code, Compilation
from verify.tests.kernels import GOOD, TEMPERS, order, write_subject
from verify.tests.tree import REPOSITORY


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")


def built(what: Order) -> tuple[list[Compilation], int]:
    """The compilations, and how many builds were made for them."""
    made: list[str] = []
    return compile_ahead(what, Progress(ended=lambda name, answer: made.append(name))), len(made)


def verdicts(compilation: Compilation) -> dict[str, str]:
    return {build.kernel: build.verdict.value for build in compilation.builds}


def workers(own: Path, module: bytes = b"verify.build.compiler") -> list[Path]:
    """The processes of this test that live and run a module, whoever is their parent by now."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            ours = str(own).encode() in (process / "environ").read_bytes()
            if ours and module in (process / "cmdline").read_bytes():
                found.append(process)
    return found


def until(answer: Callable[[], object], limit_s: float = 60.0) -> bool:
    end = time.monotonic() + limit_s
    while not (found := answer()) and time.monotonic() < end:
        time.sleep(0.1)
    return bool(found)


def test_a_build_that_dies_or_never_ends_costs_its_own_place_only(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "theirs", TEMPERS)
    found = compile_ahead(order(subject, "90,120", limit_s=10.0))  # a build takes one second, or some on a busy machine
    assert [verdicts(one) for one in found] == 2 * [
        {
            "good": "OK",
            "mistyped": "COMPILE_ERROR",
            "refused_by_ptxas": "COMPILE_ERROR",
            "aborts_in_llvm": "CRASH",
            "dies_silently": "CRASH",
            "is_killed": "CRASH",
            "never_ends": "TIMEOUT",
        }
    ]
    said = {build.kernel: build.message for build in found[0].builds}
    assert re.search(r"256 and 512.*\(line 2 of mistyped\)", said["mistyped"])
    assert re.search(r"error\s*: ", said["refused_by_ptxas"])
    assert "couldn't allocate output register" in said["aborts_in_llvm"]
    assert said["dies_silently"] == "the compiler's process ended with exit code 1 and printed nothing"
    assert "died of signal 9" in said["is_killed"]
    assert said["never_ends"] == "no answer within 10 s"
    assert str(tmp_path) not in " ".join(said.values())
    assert failed(found)
    assert workers(tmp_path) == []


def test_builds_are_kept_by_source_and_toolchain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = GOOD.replace("good[grid]", "other[grid](x, o, n, B=256)\n    good[grid]") + (
        "\n@triton.jit\ndef other(x, o, n, B: tl.constexpr):\n    tl.store(o + tl.arange(0, B), 1.0)\n"
    )
    subject = write_subject(tmp_path / "theirs", two)
    first, made = built(order(subject))
    assert made == 3  # the control kernel among them
    assert built(order(subject)) == (first, 0)
    # another kernel's source, or a comment, is not this kernel's
    write_subject(tmp_path / "theirs", "# new\n" + two.replace("B), 1.0)", "B), 2.0)"))
    assert built(order(subject))[1] == 1
    # longer patience builds nothing else, another number of warps does
    assert built(order(subject, limit_s=21.0))[1] == 0
    fewer_warps = two.replace("good[grid](x, o, n, B=256)", "good[grid](x, o, n, B=256, num_warps=2)")
    write_subject(tmp_path / "theirs", fewer_warps)
    assert built(order(subject))[1] == 1
    assert built(order(subject, fresh=True))[1] == 3
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    assert built(order(subject))[1] == 3


def test_a_capture_that_hangs_does_not_outlive_a_killed_parent(tmp_path: Path) -> None:
    write_subject(tmp_path / "theirs", "def launch(x, o, n, grid):\n    __import__('time').sleep(600)\n")
    command = ["compile", "--sm", "90", "--subject", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    child = subprocess.Popen([sys.executable, "-m", "verify", *command], cwd=REPOSITORY, stderr=subprocess.DEVNULL)
    assert until(lambda: workers(tmp_path, b"verify.build.capture"))
    time.sleep(3)  # into its imports, at the head of which it asks for it
    child.kill()
    child.wait()
    assert until(lambda: not workers(tmp_path, b"verify.build.capture"))


def test_a_build_needs_no_leave_to_be_the_one_that_runs_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "not here")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(compiler, "end_with_parent", lambda: None)
    monkeypatch.setattr("sys.stdin", [])
    reading, writing = os.pipe()
    monkeypatch.setattr("sys.argv", ["compiler", str(writing)])
    assert compiler.main() == 0
    os.close(reading)


def test_a_failure_of_the_machine_is_not_kept(tmp_path: Path) -> None:
    body = TEMPERS[: TEMPERS.index("def launch")] + GOOD.replace("good[grid]", "is_killed[grid]")
    subject = write_subject(tmp_path / "theirs", body)
    assert [built(order(subject))[1] for _ in range(2)] == [2, 1]


def test_a_launch_with_something_that_has_no_type_is_named(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "theirs", GOOD.replace("(x, o, n, B", "(x, object(), n, B"))
    with pytest.raises(ConfigurationError, match=r"kernel good is launched with o=<object .*has no Triton type"):
        compile_ahead(order(subject))


def test_a_launch_is_specialised_as_the_jit_does_it(tmp_path: Path) -> None:
    """Against the binder of the pinned Triton itself, in a process where kernels are not interpreted."""
    program = """
import torch, triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler.compiler import make_backend
from triton.runtime.jit import create_function_from_signature
from verify.build.compiler import specialised
from verify.subject.launches import _described

@triton.jit(do_not_specialize=["N"], do_not_specialize_on_alignment=["M"])
def kernel(a, b, c, one, sixteen, odd, big, N, M, flag, real, nothing, mask, typed: tl.int64, half: tl.float16,
           brain: tl.bfloat16, bit: tl.int1, place: "*fp32", K: tl.constexpr, T: tl.constexpr):
    pass

memory = torch.empty(64, dtype=torch.bfloat16)
arguments = (memory, memory[1:], torch.empty(4, dtype=torch.int32), 1, 48, 7, 1 << 40, 16, 16, True, 0.5, None,
             torch.empty(4, dtype=torch.bool), 32, 16, 32, 48, torch.empty(4))
backend = make_backend(GPUTarget("cuda", 90, 32))
binder = create_function_from_signature(kernel.signature, kernel.params, backend)
bound, found, options = binder(*arguments, K=16, T=tl.float16)
options, signature, constants, attributes = kernel._pack_args(backend, {}, bound, found, options)
launch = _described(kernel.fn, kernel.arg_names, arguments, {"K": 16, "T": tl.float16, "num_warps": 2}, (1,))
mine = specialised(launch, kernel.params)
assert mine[0] == signature, (mine[0], signature)
assert mine[1] == constants, (mine[1], constants)
assert mine[2] == {place: value for place, value in attributes.items() if value}, (mine[2], attributes)
assert launch.options == {"num_warps": 2}
"""
    file = tmp_path / "program.py"  # Triton reads the source of a kernel from its file
    file.write_text(program)
    own = {"TRITON_INTERPRET": "0", "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env={**os.environ, **own})
    assert child.returncode == 0, child.stderr[-2000:]


def test_a_full_disk_is_a_crash_and_no_fault_of_the_kernel(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk: it reaches Triton, ptxas and cuobjdump as a full one does."""
    program = """
import resource, sys, tempfile, json
from pathlib import Path
from verify.build.builder import _CONTROL
from verify.build.compiler import Job, build
from triton import knobs
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
print(build(Job(launch=_CONTROL, keys=128, sm=90, limit_s=60), Path(tempfile.gettempdir())).model_dump_json())
"""
    for allowed, verdict in ((100, "CRASH"), (2000, "CRASH"), (1 << 22, "OK")):
        own = {"TRITON_INTERPRET": "0", "TMPDIR": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / str(allowed))}
        child = subprocess.run(
            [sys.executable, "-c", program, str(allowed)],
            capture_output=True, text=True, timeout=120, env={**os.environ, **own},
        )  # fmt: skip
        assert child.returncode == 0, child.stderr[-1000:]
        assert f'"verdict":"{verdict}"' in child.stdout.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_compilation_leaves_no_process_and_no_record(tmp_path: Path, number: signal.Signals) -> None:
    write_subject(tmp_path / "theirs", TEMPERS)
    command = ["compile", "--sm", "90", "--subject", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    child = subprocess.Popen(
        [sys.executable, "-m", "verify", *command], cwd=REPOSITORY, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )  # fmt: skip
    assert until(lambda: workers(tmp_path))
    time.sleep(1)
    child.send_signal(number)
    assert child.wait(30) == 2
    assert "no record was written" in child.stderr.read()
    assert workers(tmp_path) == []
    assert not (tmp_path / "out").exists()


def compilation(registers: int, stack: int = 0, triton: str = "3.7.1") -> Compilation:
    used = {
        "registers": registers,
        "stack_bytes": stack,
        "shared_bytes": 0,
        "warps": 4,
        "occupancy": None,
        "code": None,
    }
    build = {"kernel": "k", "variants": ["v"], "verdict": "OK", "duration_s": 1.0, "resources": used}
    build |= {"ptx_sha256": "0" * 64, "cubin_sha256": "0" * 64}
    return Compilation(sm=120, triton=triton, ptxas="13.1", builds=[Build.model_validate(build)])


@pytest.mark.parametrize(("registers", "within"), [(100, True), (110, True), (111, False), (60, True)])
def test_registers_may_grow_by_a_tenth(registers: int, within: bool) -> None:
    (found,) = resources.registers(compilation(registers, triton="3.9.0"), compilation(100))
    assert found.within is within
    assert found.where == ("k on sm120, v: 100 in the last record (triton 3.9.0, was 3.7.1)")


def test_instructions_per_key_may_grow_by_a_tenth_where_they_can_be_counted() -> None:
    def counted(per_key: float | None) -> Compilation:
        found = compilation(100)
        used = found.builds[0].resources
        code = Code(
            instructions=10, spill_store_bytes=0, spill_load_bytes=0, loads={}, special_functions=0,
            warp_instructions_per_key=per_key, uncounted="" if per_key else "a loop depends on data",
        )  # fmt: skip
        build = found.builds[0].model_copy(update={"resources": used.model_copy(update={"code": code})})
        return found.model_copy(update={"builds": [build]})

    for now, within in ((11.0, True), (11.1, False)):
        (found,) = resources.instructions(counted(now), counted(10.0))
        assert (found.within, found.name) == (within, "warp instructions per key")
    assert resources.instructions(counted(None), counted(10.0)) == []
    assert resources.instructions(compilation(100), counted(10.0)) == []


def test_any_stack_is_a_failure_that_names_kernel_and_sm() -> None:
    (found,) = resources.stack(compilation(100, stack=8), None)
    assert not found.within
    assert found.told == "stack: measured 8 bytes, allowed 0 bytes at k on sm120, v"


def test_without_an_earlier_record_nothing_is_compared() -> None:
    assert resources.registers(compilation(100), None) == []
    other = replace_kernel(compilation(100))
    assert resources.registers(compilation(100), other) == []


def test_configurations_of_one_kernel_are_compared_each_with_itself() -> None:
    def configured(*registers: int) -> Compilation:
        builds = [
            compilation(number).builds[0].model_copy(update={"constants": {"B": 64 << place}})
            for place, number in enumerate(registers)
        ]
        return compilation(1).model_copy(update={"builds": builds})

    found = resources.registers(configured(40, 200), configured(40, 100))
    assert [(one.measured, one.allowed) for one in found] == [(40, pytest.approx(44)), (200, pytest.approx(110))]
    # one that is new among several is like none before
    assert len(resources.registers(configured(40, 200, 30), configured(40, 100))) == 2
    # and one alone is the same launch with whatever constant
    (alone,) = resources.registers(configured(80), compilation(40))
    assert (alone.measured, alone.within) == (80, False)


def replace_kernel(one: Compilation) -> Compilation:
    return one.model_copy(update={"builds": [build.model_copy(update={"kernel": "other"}) for build in one.builds]})
