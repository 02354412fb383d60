"""A subject with the published layout and the faults of published implementations: each fault fails its own check.

The faults are marked by these names in ``verify/tests/published``.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from verify.record.reading import read_record
from verify.record.schema import FAILING, CheckResult, Record, Verdict
from verify.tests.tree import REPOSITORY

_SUBJECT = REPOSITORY / "verify" / "tests" / "faulty"

#: What a failure of class B says, in the magnitude of a wrong formula or of a coarse one.
_FORMULA, _COARSE = r"class C, \d\.\d+e\+0[5-9] units", r"class C, \d\.\d+e\+0[23] units"

_FAULTS = {
    "bf16-norms": ("p4.pytorch_oracle.n33", _COARSE),
    "bf16-norms-plan": ("p4.plan.triton_vs_pytorch", r"the PyTorch path is wrong \(.*\), the Triton path is right"),
    "layout": ("p4.pytorch_oracle.d64-interleaved", _FORMULA),
    "kernel-mlr": ("p4.triton_oracle.no_mlr", _FORMULA),
    "trig-option": (
        "p4.options.triton-disable_trig",
        r"disable_trig=True: every score is as without the option",
    ),
    "top-n": (
        "p4.high_frequencies.pytorch",
        r"every score is as without disable_top_n_high_freq=2",
    ),
    "grouped": ("p4.gqa.triton-mean", r"shape \(1, 2, 65\), expected \(1, 6, 65\)$"),
    "fp32-phases": ("p4.accuracy_class.triton-mean-t1000000", r"allowed 8 x 2\^-24 T"),
    "table-row": ("p5.between.t129", r"error: measured \d+\.?\d*, allowed 0\.0"),
    "table-errors": ("p5.errors.off_interval", r"get_trig_values\(200\) .* was accepted"),
    "eps": ("p4.zero.triton", r"largest score: measured 0\.\d+, allowed 0 at Triton path"),
    "compressor-z": (
        "p4.compressor_protects.prompt",
        r"best evicted over worst kept score: measured 0\.\d+, allowed 0",
    ),
    "ties": ("p4.compressor_order.ties", r"indices that do not ascend: measured \d+, allowed 0"),
    "compressor-file": ("p4.compressor_statistics.no_file", r"raised AttributeError at triattention/"),
    "table-end": ("p5.beyond_table.scoring", r"a round at 8320 was scored"),
}
#: It refuses the plan's configuration in words, as the published code does; no published document promises it.
_REFUSED = ("p2.config.plan_budget", r"refused at triattention/vllm/core/config\.py:\d+ \(ValueError: window_size")
#: What the subject does right beside them.
_RIGHT = ("p2.names.vllm-core-scoring-compute_scores", "p4.triton_oracle.n33", "p5.table.last")

#: Phase 6 takes a live model.
_LIVE_FAULTS = {
    "flags": ("p6.cli.sdpa", r"unrecognized arguments: .*--attn-implementation sdpa"),
    "full": ("p6.cli_full.sdpa", r"argument --method: invalid choice: 'full'"),
    "trigger": ("p6.prefill.chunked", r"cache after a chunk: measured \d+ tokens"),
    "z-region": ("p6.keep_set.prompt_protected_by_layer", r"best evicted over worst kept score: measured"),
    "row-0": ("p6.batch.padded_equals_single", r"tokens that differ: measured"),
}


def _pytest(*nodes: str) -> Record:
    """The record of a pytest run of some checks on the faulty subject."""
    command = [sys.executable, "-m", "pytest", f"--subject={_SUBJECT}", "--device=cpu", "-q", "-p", "no:cacheprovider"]
    child = subprocess.run([*command, *nodes], capture_output=True, text=True, cwd=REPOSITORY, timeout=550)
    assert child.returncode == 1, child.stdout[-2000:] + child.stderr[-2000:]
    place = REPOSITORY / re.search(r"^record: (.*)$", child.stdout, re.MULTILINE)[1]
    try:
        return read_record(place)
    finally:
        shutil.rmtree(place.parent)


def _nodes(ids: list[str]) -> list[str]:
    from verify.checks import catalogue

    nodes = {check.id: check.node for check in catalogue()}
    return [nodes[each] for each in ids]


@pytest.fixture(scope="module")
def results() -> dict[str, CheckResult]:
    record = _pytest(*_nodes([*(check_id for check_id, _ in _FAULTS.values()), *_RIGHT, _REFUSED[0]]))
    assert record.state == "complete"
    return {result.id: result for result in record.results}


@pytest.mark.parametrize("fault", _FAULTS)
def test_a_fault_fails_its_check_with_its_number(results: dict[str, CheckResult], fault: str) -> None:
    check_id, told = _FAULTS[fault]
    assert results[check_id].verdict is Verdict.FAIL, results[check_id].message
    assert re.search(told, results[check_id].message), results[check_id].message


@pytest.mark.parametrize("check_id", _RIGHT)
def test_what_is_right_beside_the_faults_passes(results: dict[str, CheckResult], check_id: str) -> None:
    assert results[check_id].verdict is Verdict.PASS, results[check_id].message


def test_what_it_refuses_is_no_failure(results: dict[str, CheckResult]) -> None:
    found = results[_REFUSED[0]]
    assert found.verdict is Verdict.REFUSED
    assert re.search(_REFUSED[1], found.message), found.message


@pytest.mark.slow
def test_the_record_is_complete_and_no_failure_is_the_suites_own(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "verify", "run", "--subject", str(_SUBJECT), "--phases", "1-5", "--device", "cpu"]
    child = subprocess.run([*command, "--out", str(tmp_path)], capture_output=True, text=True, cwd=REPOSITORY)
    assert child.returncode == 1, child.stdout[-2000:] + child.stderr[-2000:]
    (place,) = tmp_path.glob("*/record.json")
    record = read_record(place)
    assert record.state == "complete"
    assert {result.verdict for result in record.results if result.verdict in FAILING} == {Verdict.FAIL}
    assert "scoring without Triton: class C" in " ".join(child.stdout.split())


@pytest.mark.slow
def test_a_fault_of_the_live_model_fails_its_check() -> None:
    found = {
        result.id: result for result in _pytest(*_nodes([check_id for check_id, _ in _LIVE_FAULTS.values()])).results
    }
    for check_id, told in _LIVE_FAULTS.values():
        assert found[check_id].verdict is Verdict.FAIL, found[check_id].message
        assert re.search(told, found[check_id].message), found[check_id].message
