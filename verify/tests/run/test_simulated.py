"""A run on a simulated GPU: what it selects, what its results are, and what a subject cannot hide."""

from __future__ import annotations

import os
import signal
from collections import Counter
from pathlib import Path

import pytest

from verify.architectures import Architecture, find
from verify.checks import CheckSpec, catalogue
from verify.errors import ConfigurationError, Exit
from verify.record.without_gpu import can_be_simulated
from verify.run.request import RunRequest, parse_device, simulated_sm
from verify.run.simulate import Ended, _tell_how_to_go_on, simulate
from verify.run.simulated import BRIEF
from verify.simulator.errors import NotAvailable
from verify.tests.tree import Tree, make_tree

_WORDS = {"claim": "It holds.", "reason": "It matters.", "remedy": "Mend it.", "gate": "soft", "cases": {"one": 1}}

_KERNELS = """
import torch
import triton
import triton.language as tl


@triton.jit
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < n
    tl.store(out_ptr + offsets, 2 * tl.load(x_ptr + offsets, mask=inside), mask=inside)


@triton.jit
def beyond_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.load(x_ptr + offsets + 1))


@triton.jit
def fused_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, BLOCK))
    tl.store(out_ptr + tl.arange(0, BLOCK), tl.fma(x, x, x))


@triton.jit
def root_kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, tl.rsqrt(tl.load(x_ptr + offsets)))


def double(x):
    out = torch.empty_like(x)
    double_kernel[(triton.cdiv(x.numel(), 64),)](x, out, x.numel(), BLOCK=64)
    return out


def run(kernel, dtype=torch.float32):
    x = torch.arange(1, 65).to(dtype)
    out = torch.zeros_like(x)
    kernel[(1,)](x, out, BLOCK=64)
    return out


def reads_unwritten():
    x = torch.empty(64)
    x[:60] = 1
    double_kernel[(1,)](x, torch.empty(64), 64, BLOCK=64)


def hides(kernel):
    try:
        run(kernel)
    except Exception:
        pass
"""

_PHASE = """
SEEN = []


@check("p4.runs", gate="hard", cases="one", **WORDS)
def test_runs(case, measure):
    import torch
    from triattention.kernels import double

    x = torch.arange(100.0)
    measure("wrong elements", int((double(x) != 2 * x).sum()), 0)


@check("p4.launches_nothing", gate="hard", cases="one", **WORDS)
def test_launches_nothing(case):
    pass


@check("p4.reads_beyond", gate="hard", cases="one", **WORDS)
def test_reads_beyond(case):
    from triattention import kernels

    kernels.run(kernels.beyond_kernel)


@check("p4.hidden", gate="hard", cases="one", **WORDS)
def test_hidden(case):
    from triattention import kernels

    kernels.hides(kernels.beyond_kernel)


@check("p4.unwritten", gate="hard", cases="one", **WORDS)
def test_unwritten(case):
    from triattention import kernels
    from verify.judge.guarded import call

    call(kernels.reads_unwritten, {})


@check("p4.unknown", gate="hard", cases="one", **WORDS)
def test_unknown(case):
    import torch
    from triattention import kernels

    kernels.run(kernels.fused_kernel, torch.float64)


@check("p4.every_rounding", gate="hard", cases="one", **WORDS)
def test_every_rounding(case, measure):
    from triattention import kernels

    SEEN.append(kernels.run(kernels.root_kernel).double().sum().item())
    measure("lowest sums", int(len(SEEN) > 1 and SEEN[-1] < SEEN[0]), 0)


@check("p4.wants_a_gpu", gate="hard", cases="one", needs_gpu=True, **WORDS)
def test_wants_a_gpu(case):
    pass
"""


@pytest.mark.parametrize(
    ("text", "device", "sm"),
    [
        ("auto", "auto", None),
        ("cpu", "cpu", None),
        ("sim:sm120", "sim:sm120", 120),
        ("sim:12.0", "sim:sm120", 120),
        ("sim:SM_90", "sim:sm90", 90),
    ],
)
def test_a_device_is_named(text: str, device: str, sm: int | None) -> None:
    assert (parse_device(text), simulated_sm(parse_device(text))) == (device, sm)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("gpu", "device 'gpu' is unknown; use auto, cpu, cuda, or a simulated GPU such as sim:sm120"),
        ("sim:emulated", "does not name a GPU"),
        ("sim:sm75", "'sm75' is not a GPU architecture that this suite covers"),
    ],
)
def test_another_device_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=complaint):
        RunRequest(device=text)


def test_a_simulated_gpu_cannot_be_expected() -> None:
    with pytest.raises(ConfigurationError, match="--device sim:sm90 and --expect sm90 contradict each other"):
        RunRequest(device="sim:sm90", expect=90)


@pytest.mark.parametrize(
    ("family", "needs_gpu", "selected"),
    [
        ("p2.a", False, False),
        ("p3.a", False, True),
        ("p5.a", False, True),
        ("p4.a", True, False),
        ("p6.a", False, False),
        ("p6.rope", False, True),
        ("p7.a", False, False),
    ],
)
def test_checks_that_launch_kernels_and_need_no_card_are_selected(family: str, needs_gpu: bool, selected: bool) -> None:
    assert can_be_simulated(CheckSpec(family=family, needs_gpu=needs_gpu, **_WORDS)) == selected


@pytest.fixture(scope="module")
def simulated(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """A run of the phase above on a simulated sm90."""
    tree = make_tree(tmp_path_factory.mktemp("tree"))
    (tree.root / "triattention" / "kernels.py").write_text(_KERNELS)
    tree.write_phase(1, '@check("p1.first", gate="hard", cases="one", **WORDS)\ndef test_first(case): pass\n')
    tree.write_phase(4, _PHASE)
    ended = tree.pytest("phases", "--device", "sim:sm90")
    assert ended.returncode == 1, ended.stdout + ended.stderr
    return tree


@pytest.mark.parametrize(
    ("check", "verdict", "evidence", "said"),
    [
        ("p4.runs.one", "PASS", "simulated", ""),
        ("p4.launches_nothing.one", "PASS", "emulated", ""),
        ("p4.reads_beyond.one", "FAIL", "simulated", "byte 256 of the storage of x_ptr, which has 256"),
        ("p4.hidden.one", "FAIL", "simulated", "an access outside the tensors of the launch"),
        ("p4.unwritten.one", "FAIL", "simulated", "a read of memory that nobody wrote: reads x_ptr[60]"),
        ("p4.unknown.one", "SKIP", "simulated", "the simulator does not execute fma.rn.f64"),
        (
            "p4.every_rounding.one",
            "FAIL",
            "simulated",
            "where approximate instructions give the lowest value that their error allows: lowest sums: measured 1",
        ),
    ],
)
def test_a_result_says_what_was_executed(simulated: Tree, check: str, verdict: str, evidence: str, said: str) -> None:
    found = simulated.results()[check]
    assert (found.verdict, found.evidence) == (verdict, evidence)
    assert said in found.message


def test_the_record_says_what_was_simulated(simulated: Tree) -> None:
    record = simulated.records()[-1]
    assert (record.target, record.environment.gpu, record.state) == ("sm90", None, "complete")
    assert {result.id.partition(".")[0] for result in record.results} == {"p4"}
    assert "p4.wants_a_gpu.one" not in simulated.results()
    assert "--device sim:sm90" in record.results[0].repeat
    known = record.simulation
    assert known is not None
    # by name: Triton's cache decides whether two specialisations are one code, because code names its source file
    launches: Counter[str] = Counter()
    for kernel in known.kernels:
        launches[kernel.kernel] += kernel.launches
    assert launches == {"beyond_kernel": 2, "double_kernel": 2, "root_kernel": 2}
    assert all(kernel.census is not None and kernel.census.equal for kernel in known.kernels)
    assert simulated.verify("check", str(simulated.root / "reports" / "runs" / record.run_id)).returncode == 0


def test_a_gpu_that_the_toolchain_cannot_build_for_is_told_and_not_counted(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def refuse(sm: int) -> None:
        raise NotAvailable(f"--device sim:sm{sm} is not available: ptxas does not know it; build for another")

    monkeypatch.setattr("verify.run.runner.require", refuse)
    assert simulate("88,107", out=tmp_path) == 3
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"sm{sm}: not simulated (--device sim:sm{sm} is not available: ptxas does not know it)" for sm in (88, 107)
    ]


def test_an_interrupted_simulation_says_how_to_go_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("verify.run.simulate.carry_out", lambda *_, **__: (2, tmp_path / "RUN"))
    monkeypatch.chdir(tmp_path)
    assert simulate("89-100", phases="4", subject="installed", out=tmp_path) == 2
    words = "--sm sm89,sm90,sm100 --resume RUN --phases 4 --subject installed --out ."
    assert capsys.readouterr().out.splitlines()[1:] == [f"interrupted; go on with: python -m verify simulate {words}"]


def test_runs_that_were_interrupted_beside_each_other_are_all_resumed(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    gpus = [find(sm) for sm in (80, 86, 90, 100, 120)]
    runs = {80: (0, "GREEN"), 86: (2, ""), 90: (2, "ONE"), 100: (2, "OTHER")}
    ended = [Ended(find(sm), code, run=run) for sm, (code, run) in runs.items()]
    options = {"--phases": None, "-m": "hard", "--subject": None, "--out": "a b"}
    _tell_how_to_go_on(gpus, ended, options, Console())
    told = " ".join(capsys.readouterr().out.split())
    simulate_again = "python -m verify simulate --sm sm86,sm90,sm120 --resume ONE -m hard --out 'a b'"
    assert told == f"interrupted; go on with: python -m verify run --resume OTHER --out 'a b'; {simulate_again}"


def _dies(*_: object) -> Ended:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def _answers(gpu: Architecture, request: RunRequest) -> Ended:
    return Ended(gpu, Exit.OK, gap="a test")


def test_a_process_that_dies_is_the_machine_s_fault_and_costs_no_other(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("verify.run.simulate._one_beside_others", _dies)
    assert simulate("80,90", jobs=2, out=tmp_path) == 3
    words = "not simulated (its process ended without an answer, perhaps for want of memory)"
    assert capsys.readouterr().out.splitlines()[1:] == [f"sm80: {words}", f"sm90: {words}"]


def test_an_interruption_that_only_the_parent_gets_is_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("verify.run.simulate._one_beside_others", _answers)
    monkeypatch.setattr("verify.run.simulate.wait", interrupt)
    assert simulate("80,86,89,90,100", jobs=2, out=tmp_path) == 2
    assert "go on with: python -m verify simulate --sm " in capsys.readouterr().out


def test_the_brief_checks_are_checks() -> None:
    assert {check.id for check in catalogue()} >= BRIEF


def test_only_phases_that_launch_kernels_can_be_simulated() -> None:
    with pytest.raises(ConfigurationError, match="--phases 7 cannot be simulated; use phases among 3-6"):
        simulate("90", phases="7")
