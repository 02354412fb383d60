"""What is said of kernels of every kind once they are built: many of them in one order, since asking takes longest."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from verify.architectures import find
from verify.build.builder import Order, Progress, compile_ahead, failed
from verify.errors import ConfigurationError
from verify.files import cache_folder
from verify.record.builds import Build, BuildVerdict, Compilation
from verify.tests.kernels import GOOD, HELD, several, write_several


def _instead_of_good(call: str, kernels: str) -> str:
    """A body that launches another kernel as ``GOOD`` does its own."""
    return GOOD.replace("good[grid](x, o, n, B=256)", call) + f"\n{kernels}\n"


def _tuned(sizes: str, helper: str) -> str:
    return f"""
@triton.autotune([triton.Config({{"B": size}}) for size in ({sizes})], key=["n"])
@triton.jit
def tuned(x, o, n, B: tl.constexpr):
    {helper}
    tl.store(o + n, 1.0)

def launch(x, o, n, grid):
    tuned[lambda meta: (triton.cdiv(n, meta["B"]),)](x, o, n)
"""


#: What is built for one GPU only, by variant.
BODIES = {
    "good": GOOD,
    "held": HELD,
    "low": _instead_of_good(
        "low[grid](o, float('-inf'), B=256)",
        "@triton.jit\ndef low(o, least, B: tl.constexpr):\n    tl.store(o + tl.arange(0, B), least)",
    ),
    "types": """
SIZE = tl.constexpr(256)

@triton.jit
def cast(o, KIND: tl.constexpr, B: tl.constexpr):
    tl.store(o + tl.arange(0, B), (tl.arange(0, B) * 1.001).to(KIND).to(tl.float32))

def launch(x, o, n, grid):
    for kind in (tl.float16, tl.bfloat16):
        cast[grid](o, kind, B=SIZE)
""",
    "asserting": """
@triton.jit
def inner(B: tl.constexpr):
    tl.static_assert(B < 128, "at most 127 keys")

@triton.jit
def spoken(o, B: tl.constexpr):
    inner(B)
    tl.store(o, 1.0)

@triton.jit
def silent(o, B: tl.constexpr):
    tl.static_assert(B < 128)
    tl.store(o, 1.0)

def launch(x, o, n, grid):
    for kernel in (spoken, silent):
        kernel[grid](o, B=256)
""",
    "configured": """
@triton.autotune([triton.Config({"B": 64}, num_warps=2), triton.Config({"B": 128}, num_warps=8)], key=["n"])
@triton.heuristics({"EVEN": lambda arguments: arguments["n"] % 2 == 0})
@triton.jit
def tuned(x, o, n, B: tl.constexpr, EVEN: tl.constexpr):
    i = tl.program_id(0) * B + tl.arange(0, B)
    tl.store(o + i, tl.load(x + i, mask=i < n, other=0.0).to(tl.float32), mask=i < n)

def launch(x, o, n, grid):
    tuned[lambda meta: (triton.cdiv(n, meta["B"]),)](x, o, n)
""",
    "one_passed_over": _tuned("64, 256", "tl.static_assert(B < 128)"),
    "all_passed_over": _tuned("256, 512", "tl.static_assert(B < 128)"),
    "ended_at": _tuned("64, 100", "tl.arange(0, B)"),
}

#: What is built for several GPUs, or not at all, by variant.
ELSEWHERE = {
    "good": GOOD,
    "staged": """
@triton.jit
def staged(x, o, n, B: tl.constexpr):
    i = tl.arange(0, B)[:, None] * B + tl.arange(0, B)
    total = tl.zeros((B, B), tl.float32)
    for k in range(n):
        total = tl.dot(tl.load(x + k * B + i), tl.load(x + k * B * B + i), total)
    tl.store(o + i, total)

def launch(x, o, n, grid):
    staged[grid](x, o, n, B=64, num_stages=8)
""",
    "idle": "def launch(x, o, n, grid): pass",
    "raising": "def launch(x, o, n, grid): raise RuntimeError('not this one')",
}

#: A subject may print, even when its interpreter ends.
_PRINTS = "import atexit\natexit.register(print, 'bye')\n"


def of(compilation: Compilation, variant: str) -> Compilation:
    """What a compilation of this variant alone would be."""
    builds = [build for build in compilation.builds if variant in build.variants]
    unlaunched = {name: problem for name, problem in compilation.unlaunched.items() if name == variant}
    return compilation.model_copy(update={"builds": builds, "unlaunched": unlaunched})


def verdicts(compilation: Compilation) -> dict[str, str]:
    return {build.kernel: build.verdict.value for build in compilation.builds}


def made_for(order: Order) -> tuple[list[Compilation], list[str]]:
    """The compilations, and what had to be built for them."""
    made: list[str] = []
    return compile_ahead(order, Progress(ended=lambda name, answer: made.append(name))), made


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[pytest.MonkeyPatch]:
    """A cache of this file's own; and what sets a variable for the rest of it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRIATTENTION_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
        yield patch


@pytest.fixture(scope="module")
def order(cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Order:
    return several(write_several(tmp_path_factory.mktemp("many"), BODIES, _PRINTS), BODIES)


@pytest.fixture(scope="module")
def one(order: Order) -> Compilation:
    ((compilation,), made) = made_for(order)
    assert len(made) == len(compilation.builds) + 1  # the suite's own kernel, whatever the subject holds
    return compilation


@pytest.fixture(scope="module")
def elsewhere(cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Compilation]:
    subject = write_several(tmp_path_factory.mktemp("elsewhere"), ELSEWHERE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_STORE_BINARY_ONLY", "1")
        return {found.sm: found for found in compile_ahead(several(subject, ELSEWHERE, "80,86,88,120"))}


def test_what_a_cubin_takes_is_read(elsewhere: dict[int, Compilation]) -> None:
    (build,) = of(elsewhere[120], "good").builds
    assert (build.kernel, build.variants, build.verdict) == ("good", ["good"], BuildVerdict.OK)
    used, code = build.resources, build.resources.code
    assert 8 <= used.registers <= 32
    assert (used.stack_bytes, used.warps, code.spill_store_bytes + code.spill_load_bytes) == (0, 4, 0)
    assert used.occupancy == find(120).occupancy(used.registers, 4, used.shared_bytes)
    # 2 heads of 4096 keys are 32 programs of 256 keys
    executed = code.warp_instructions_per_key * 256 / 4
    assert executed == int(executed) <= code.instructions
    assert sum(code.loads.values()) == 1


def test_a_gap_of_the_toolchain_is_no_failure_of_the_subject(elsewhere: dict[int, Compilation]) -> None:
    gap, good = elsewhere[88], of(elsewhere[80], "good")
    assert gap.toolchain in (BuildVerdict.TOOLCHAIN_TOO_OLD, BuildVerdict.CRASH)
    assert (gap.builds, bool(gap.gap)) == ([], True)
    assert (good.toolchain, good.gap, verdicts(good)) == (BuildVerdict.OK, "", {"good": "OK"})
    assert not failed([gap, good])


def test_what_triton_is_told_to_store_does_not_make_a_gap(elsewhere: dict[int, Compilation]) -> None:
    assert [elsewhere[sm].gap for sm in (80, 86, 120)] == ["", "", ""]


def test_shared_memory_beyond_the_multiprocessor_is_refused_with_both_numbers(
    elsewhere: dict[int, Compilation],
) -> None:
    large, small = (of(elsewhere[sm], "staged") for sm in (80, 86))
    assert (verdicts(large), failed([large])) == ({"staged": "OK"}, False)
    assert (verdicts(small), failed([small])) == ({"staged": "OUT_OF_RESOURCES"}, True)
    needed, there_is = map(int, re.findall(r": (\d+)", small.builds[0].message))
    assert needed == large.builds[0].resources.shared_bytes > there_is == 99 * 1024


@pytest.mark.parametrize(
    ("variant", "problem"),
    [
        ("idle", "the subject's call launched no Triton kernel"),
        ("raising", "the subject's call raised RuntimeError: not this one"),
    ],
)
def test_a_variant_that_launches_nothing_fails_with_the_reason(
    elsewhere: dict[int, Compilation], variant: str, problem: str
) -> None:
    assert problem in elsewhere[120].unlaunched[variant]
    assert failed([of(elsewhere[120], variant)])


def test_a_subject_may_print_when_it_ends(one: Compilation) -> None:
    assert verdicts(of(one, "good")) == {"good": "OK"}


def test_a_kernel_is_found_wherever_a_module_holds_it(one: Compilation) -> None:
    held = of(one, "held")
    found = [(build.kernel, build.verdict.value) for build in held.builds]
    assert found == [*2 * [("make.<locals>.scaled", "OK")], ("plain", "OK"), ("make.<locals>.scaled", "NOT_FOUND")]
    assert len({build.cubin_sha256 for build in held.builds[:2]}) == 2
    # only its launch tells of the last one, which is no failure
    assert "no module has make.<locals>.scaled as an attribute" in held.builds[-1].message
    assert not failed([held])


def test_a_type_as_an_argument_goes_by_its_name(one: Compilation) -> None:
    builds = of(one, "types").builds
    assert [build.constants for build in builds] == [{"KIND": name, "B": 256} for name in ("fp16", "bf16")]
    assert len({build.cubin_sha256 for build in builds}) == 2


def test_an_assertion_is_told_in_its_own_words(one: Compilation) -> None:
    assert [build.message for build in of(one, "asserting").builds] == [
        "CompileTimeAssertionFailure: at most 127 keys (line 2 of inner)",
        "CompileTimeAssertionFailure: tl.static_assert(B < 128) (line 2 of silent)",
    ]


def test_a_kernel_that_is_tuned_is_built_in_each_configuration(one: Compilation) -> None:
    builds = of(one, "configured").builds
    assert [(build.kernel, build.verdict.value, build.resources.warps) for build in builds] == [
        ("tuned", "OK", 2),
        ("tuned", "OK", 8),
    ]
    assert [(build.constants, build.alternative) for build in builds] == [
        ({"B": 64, "EVEN": True}, True),
        ({"B": 128, "EVEN": True}, True),
    ]


@pytest.mark.parametrize(
    ("variant", "each", "needed"),
    [
        ("one_passed_over", "OK COMPILE_ERROR", "OK"),
        ("all_passed_over", "COMPILE_ERROR COMPILE_ERROR", "COMPILE_ERROR COMPILE_ERROR"),
        ("ended_at", "OK COMPILE_ERROR", "OK COMPILE_ERROR"),
    ],
)
def test_a_tuned_kernel_needs_one_of_the_configurations_that_are_passed_over(
    one: Compilation, variant: str, each: str, needed: str
) -> None:
    tuned = of(one, variant)
    assert [build.verdict.value for build in tuned.builds] == each.split()
    assert [build.verdict.value for build in tuned.of(variant)] == needed.split()
    assert [build.verdict.value for build in tuned.needed] == needed.split()
    assert failed([tuned]) is ("ERROR" in needed)


def test_only_the_kernels_that_are_named_are_built(order: Order, one: Compilation) -> None:
    ((few,), made) = made_for(replace(order, kernels=("good", "cast")))
    assert ({build.kernel for build in few.builds}, made) == ({"good", "cast"}, [])
    with pytest.raises(ConfigurationError, match=r"launches no kernel 'nope'; it launches .*good"):
        compile_ahead(replace(order, kernels=("nope",)))


def test_an_infinite_argument_is_the_same_when_kept(order: Order, one: Compilation) -> None:
    # the launch is kept and its build is not
    for file in (cache_folder() / "compile" / "built").iterdir():
        file.unlink()
    ((again,), made) = made_for(replace(order, kernels=("low",)))
    assert (verdicts(again), made) == ({"low": "OK"}, ["sm90 add_kernel", "sm90 low"])


def test_what_is_kept_and_damaged_is_built_again(order: Order, one: Compilation) -> None:
    for file in (cache_folder() / "compile").rglob("*.json"):
        file.write_text(file.read_text()[:-20])
    ((again,), made) = made_for(replace(order, kernels=("good",)))
    assert (verdicts(again), made) == ({"good": "OK"}, ["sm90 add_kernel", "sm90 good"])


#: By variant, a kernel before and after a change of something that its source does not show.
CHANGED = {
    "outside": (
        _instead_of_good(
            "outer[grid](x, o, n, B=256)",
            "import sys\nsys.path.append('{}')\nimport helpers\n"
            "@triton.jit\ndef outer(x, o, n, B: tl.constexpr):\n    tl.store(o + tl.arange(0, B), helpers.value())",
        ),
        ("", ""),
    ),
    "read_type": (
        _instead_of_good(
            "cast[grid](o, B=256)",
            "KIND = tl.float16\n\n@triton.jit\ndef cast(o, B: tl.constexpr):\n"
            "    tl.store(o + tl.arange(0, B), (tl.arange(0, B) * 1.001).to(KIND).to(tl.float32))",
        ),
        ("tl.float16", "tl.bfloat16"),
    ),
    # a name that a function of the suite's has for an argument too
    "any_name": (
        _instead_of_good(
            "named[grid](o, 2)", "@triton.jit\ndef named(o, limit_s: tl.constexpr):\n    tl.store(o, limit_s)"
        ),
        ("(o, 2)", "(o, 3)"),
    ),
    "debugged": (
        _instead_of_good(
            "checked[grid](x, o, n, B=256)",
            "@triton.jit\ndef checked(x, o, n, B: tl.constexpr):\n    i = tl.arange(0, B)\n"
            "    tl.device_assert(n > 8, 'too few')\n    tl.store(o + i, 1.0)",
        ),
        ("@triton.jit\ndef checked", "@triton.jit(debug=True)\ndef checked"),
    ),
    "good": (GOOD, ("", "")),
}
_HELPER = "import triton\n\n@triton.jit\ndef value():\n    return {}\n"


@pytest.fixture(scope="module")
def changes(
    cache: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Compilation, Compilation, list[str]]:
    """The builds before and after the changes, and which were made for the second time."""
    root = tmp_path_factory.mktemp("changed")
    (root / "elsewhere").mkdir()
    found = []
    for number, value in enumerate(("1.0", "2.0")):
        (root / "elsewhere" / "helpers.py").write_text(_HELPER.format(value))
        bodies = {
            name: body.replace("{}", str(root / "elsewhere")).replace(change[0], change[number])
            for name, (body, change) in CHANGED.items()
        }
        found.append(made_for(several(write_several(root / "theirs", bodies), bodies)))
    ((before,), _), ((after,), made) = found
    return before, after, made


@pytest.mark.parametrize("variant", ["outside", "read_type", "any_name"])
def test_what_a_kernel_reads_from_outside_its_source_is_part_of_what_is_kept(
    changes: tuple[Compilation, Compilation, list[str]], variant: str
) -> None:
    (before,), (after,) = (of(one, variant).builds for one in changes[:2])
    assert (before.verdict, after.verdict) == (BuildVerdict.OK, BuildVerdict.OK)
    assert before.cubin_sha256 != after.cubin_sha256


def test_what_did_not_change_is_not_built_again(changes: tuple[Compilation, Compilation, list[str]]) -> None:
    assert sorted(changes[2]) == ["sm90 cast", "sm90 checked", "sm90 named", "sm90 outer"]


def _instructions(builds: list[Build]) -> int:
    (build,) = builds
    return build.resources.code.instructions


@pytest.mark.parametrize("asked", ["debug=True", "TRITON_DEBUG"])
def test_a_kernel_is_built_with_the_assertions_that_are_asked_for(
    changes: tuple[Compilation, Compilation, list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, asked: str
) -> None:
    before, after, _ = changes
    if asked == "TRITON_DEBUG":
        monkeypatch.setenv(asked, "1")
        body = {"debugged": CHANGED["debugged"][0]}
        (after,) = compile_ahead(several(write_several(tmp_path / "theirs", body), body))
    assert _instructions(of(before, "debugged").builds) < _instructions(of(after, "debugged").builds)


def test_what_changes_the_code_is_part_of_what_is_kept(
    order: Order, one: Compilation, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("DISABLE_PTXAS_OPT", "PTXAS_OPTIONS", "DISABLE_MMA_V3"):
        with monkeypatch.context() as patch:
            patch.setenv(variable, "1" if variable.startswith("DISABLE") else "--opt-level=1")
            _, made = made_for(replace(order, kernels=("good",)))
        assert made == ["sm90 add_kernel", "sm90 good"], variable
