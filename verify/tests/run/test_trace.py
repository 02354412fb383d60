"""``python -m verify simulate --trace`` on the bundled kernel, in real processes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from verify import cli
from verify.errors import ConfigurationError
from verify.machine.environment import version_of
from verify.run.trace import trace
from verify.simulator.trace import differences, read_trace

KERNEL = "score_kernel"


def _file(target: str, more: str = "") -> str:
    return f"trace-{KERNEL}-{target}-triton-{version_of('triton')}{more}.npz"


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two traces: of a simulated sm90, and of the same with a fault in its compiled code."""
    out = tmp_path_factory.mktemp("traces")
    options = ["simulate", "--trace", KERNEL, "--sm", "sm90", "--fault", "ptx.root_dropped", "--out", str(out)]
    assert cli.main(options) == 0
    return out


def test_a_fault_is_found_at_its_line(traced: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["simulate", "--trace", KERNEL, "--sm", "sm80", "--out", str(traced)]
    assert cli.main([*options, "--against", str(traced / _file("sm90", "-ptx.root_dropped"))]) == 0
    told = capsys.readouterr().out
    first = (
        r"score_kernel: sm90 with ptx\.root_dropped \(Triton .*\) and sm80 \(Triton .*\) first hold different values at"
    )
    assert re.search(rf"{first} kernels\.py:\d+: b_abs = tl\.sqrt\(b_re \* b_re \+ b_im \* b_im\)\n", told), told
    one, other = (read_trace(traced / _file(name)) for name in ("sm80", "sm90"))
    assert not [*differences(one[1], other[1])]


@pytest.mark.parametrize(
    ("sm", "more", "message"),
    [
        ("all", {}, r"--trace compares two runs, and --sm all names \d+ GPUs; name two GPUs, or one and --against"),
        ("90", {}, "--sm 90 names 1 GPU; name two GPUs"),
        ("80,90", {"against": Path("x")}, "--sm 80,90 names 2 GPUs"),
        ("90", {"against": Path("absent.npz")}, r"absent\.npz is not a trace"),
    ],
)
def test_what_is_not_two_runs_is_refused(sm: str, more: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        trace(KERNEL, sm=sm, subject="bundled", out=tmp_path, **more)


@pytest.mark.slow  # fifteen seconds for one sentence
def test_a_kernel_that_is_not_launched_is_named_with_those_that_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match="launches no kernel 'absent'; --trace takes score_kernel"):
        trace("absent", sm="80,90", subject="bundled", out=tmp_path)


def test_the_trace_that_is_compared_is_not_overwritten(traced: Path) -> None:
    with pytest.raises(ConfigurationError, match="is the trace that this run would write; name another"):
        trace(KERNEL, sm="90", subject="bundled", out=traced, against=traced / _file("sm90"))


def test_options_of_a_trace_need_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["simulate", "--fault", "ptx.root_dropped"]) == 3
    assert "--against and --fault say what a trace is compared with; add --trace KERNEL" in capsys.readouterr().err
    assert cli.main(["simulate", "--trace", KERNEL, "--sm", "90", "--fault", "ptx.none"]) == 3
    assert "'ptx.none' is no fault in compiled code; name one of" in capsys.readouterr().err
    assert cli.main(["simulate", "--trace", KERNEL, "--sm", "90", "--phases", "4", "--jobs", "2"]) == 3
    assert "--trace runs no checks; drop --phases, --jobs" in capsys.readouterr().err
