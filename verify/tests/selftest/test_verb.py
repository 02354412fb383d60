"""Planted faults: the data, how they are planted, and a sample of them caught live."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from verify.checks import catalogue
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.record.grounds import PACKAGE
from verify.record.kills import FOLDER, Cell, Matrix, Outcome, Row, caught_by, read
from verify.record.schema import Verdict
from verify.run.manifest import utc_now
from verify.selftest import LAYERS, Fault, load_faults
from verify.selftest.plant import copy_of, edited
from verify.selftest.records import good_record, judge
from verify.selftest.terminal import false_claims
from verify.selftest.trial import Interrupted, caught
from verify.selftest.verb import Choice, _side_by_side, chosen
from verify.subject.find import find_subject

_SOURCE = """\
class Scorer:
    def score(self, q,
              k):  # a comment
        total = (q *
                 k) + q * k
        if total > 0:
            return total
        return 0

def score(q, k):
    return q * k
"""


def _fault(**fields) -> Fault:
    edit = {"file": "scorer.py", "within": "Scorer.score", "before": "q*k", "after": "q + k", "nth": 1}
    base = {"layer": "scoring", "name": "sample", "what": "A sample.", "kills": ["p4.plan"]}
    return Fault.model_validate(base | {"bundled": [edit | fields]})


def _edited(**fields) -> str:
    fault = _fault(**fields)
    return edited(_SOURCE, fault.bundled[0], fault)


def test_there_are_faults_of_every_layer_and_each_names_checks_that_exist() -> None:
    faults, checks = load_faults(), list(catalogue())
    assert len(faults) >= 60
    assert min(Counter(fault.layer for fault in faults).values()) >= 5
    assert {fault.layer for fault in faults} == {*LAYERS}
    for fault in faults:
        assert fault.records or fault.claimed(checks)


@pytest.mark.parametrize("fault", [f for f in load_faults() if f.edits_of("bundled")], ids=lambda fault: fault.id)
def test_every_edit_applies_to_the_bundled_subject_and_leaves_python(fault: Fault) -> None:
    for edit in fault.bundled:
        text = (repository_root() / PACKAGE / edit.file).read_text("utf-8")
        assert ast.dump(ast.parse(edited(text, edit, fault))) != ast.dump(ast.parse(text))


def test_an_edit_is_found_whatever_its_formatting_and_keeps_the_rest() -> None:
    assert _edited() == _SOURCE.replace("(q *\n                 k)", "(q + k)")
    assert _edited(nth=2) == _SOURCE.replace("+ q * k", "+ (q + k)")


def test_a_statement_is_replaced_by_a_statement() -> None:
    found = _edited(before="if total>0: return total", after="pass", nth=None)
    assert "        pass\n        return 0\n" in found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"nth": None}, r"scorer.py, Scorer.score has 'q\*k' 2 times; edit its 'nth' in faults/scoring.toml"),
        ({"before": "q / k"}, r"has 'q / k' 0 times; edit its 'before'"),
        ({"within": "Scorer.rank"}, r"scorer.py has no Scorer.rank; edit its 'within'"),
        ({"after": "q +"}, r"'after' is neither an expression nor a statement"),
        ({"after": "pass"}, r"'before' is an expression and 'after' a statement"),
    ],
)
def test_a_fault_that_no_longer_applies_says_what_to_edit(fields: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        _edited(**fields)


def test_a_wrapper_is_planted_without_the_subjects_source(tmp_path: Path) -> None:
    fault = next(fault for fault in load_faults() if fault.id == "kernel.scores_in_bf16")
    subject = find_subject("bundled", repository_root())
    copy = copy_of(subject, tmp_path, fault) / PACKAGE
    module = "vllm/core/kernels/triton_scoring.py"
    before, after = ((root / module).read_text("utf-8") for root in (subject.root / PACKAGE, copy))
    assert after.startswith(before)
    assert after.removeprefix(before).strip().endswith("plant(globals())")


@pytest.mark.parametrize("fault", [f for f in load_faults() if f.records], ids=lambda fault: fault.id)
def test_a_tampered_record_is_refused_or_not_green(fault: Fault) -> None:
    assert [cell.outcome for cell in judge(fault)] == [Outcome.KILLED] * len(fault.kills)


@pytest.mark.parametrize("target", ["sm120", "emulated"])
def test_the_record_that_is_tampered_with_is_good_itself(target: str) -> None:
    tampered = {"records": [{"target": target}], "bundled": (), "kills": ["read_record", "assess"]}
    fault = Fault.model_validate(_fault().model_dump() | tampered)
    assert [cell.verdict for cell in judge(fault)] == ["passed", "passed"]
    assert good_record(target).target == target


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("kernel.toml", b"fault = 3", "kernel.toml: fault: Input should be a valid list"),
        ("kernel.toml", b"[[faults]]", "kernel.toml: faults: Extra inputs are not permitted"),
        ("kernel.toml", b"fault =", "kernel.toml is not TOML"),
        ("kernel.toml", b"fault = '\xff'", "kernel.toml is not TOML"),
        ("kernels.toml", b"", "kernels.toml does not belong to a layer; name it after one: kernel, ptx, scoring"),
        ("kernel.toml", b"[[fault]]\nname = 'a'", "kernel.toml, a: what: Field required"),
        (
            "kernel.toml",
            b"[[fault]]\nname = 'a'\nwhat = 'b'\nkills = ['c']\nsays = '('\nrecords = [{target = 'd'}]",
            r"kernel.toml, a: fault: Value error, says is not a regular expression \(missing \)",
        ),
    ],
)
def test_a_mistake_in_a_file_of_faults_is_one_sentence(tmp_path: Path, file: str, content: bytes, message: str) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(ConfigurationError, match=message):
        load_faults(tmp_path)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--subject", "module:json"], "--subject module:json cannot be copied; give bundled, or the path of"),
        (["--out", "."], "--out . is a folder; name a file"),
    ],
)
def test_what_cannot_be_tried_or_kept_is_said_at_once(tmp_path: Path, words: list[str], sentence: str) -> None:
    run = _selftest(tmp_path, *words)
    assert run.returncode == 3
    assert sentence in run.stderr


def test_a_claim_that_does_not_hold_is_found_beside_one_that_does() -> None:
    fault = next(fault for fault in load_faults() if len(fault.kills) > 1 and not fault.records)
    holds, fails = fault.kills[:2]
    cells = [Cell(check=holds, outcome="killed", verdict="FAIL"), Cell(check=fails, outcome="survived", verdict="PASS")]
    row = Row(id=fault.id, what=fault.what, cells=cells, duration_s=0)
    matrix = Matrix(
        time_utc=utc_now(), subject=good_record("sm120").subject, instrument_sha256="0" * 64, versions={},
        selection="everything", seed=0, rows=[row], idle=[],
    )  # fmt: skip
    assert row.outcome is Outcome.KILLED
    assert false_claims(matrix) == [(fault.id, fails)]


def test_a_fault_is_caught_by_a_failure_that_says_the_right_thing() -> None:
    fault = Fault.model_validate(_fault().model_dump() | {"says": "Triton path"})
    assert caught(fault, Verdict.FAIL, "Triton path: error")
    assert not caught(fault, Verdict.FAIL, "PyTorch path: error")
    assert not caught(fault, Verdict.ERROR, "Triton path: error")


def test_a_sample_is_seeded_and_spread_over_the_layers() -> None:
    faults = load_faults()
    sample = chosen(Choice(sample=len(LAYERS), seed=3), faults)
    assert sample == chosen(Choice(sample=len(LAYERS), seed=3), faults)
    assert {fault.layer for fault in sample} == {*LAYERS} - {"vllm"}, "those that need servers take minutes"
    assert sample != chosen(Choice(sample=len(LAYERS), seed=4), faults)
    assert {fault.layer for fault in chosen(Choice(sample=2, only=["vllm"]), faults)} == {"vllm"}


def test_a_selection_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--only kernels is not a planted fault"):
        chosen(Choice(only=["kernels"]), load_faults())
    with pytest.raises(ConfigurationError, match=r"an id, such as kernel\.norm_of_re, or a layer"):
        chosen(Choice(only=["norm_of_re"]), load_faults())


def test_a_row_is_killed_by_any_check_and_not_run_only_where_none_ran() -> None:
    def row(*outcomes: Outcome) -> Row:
        cells = [Cell(check="p4.plan.x", outcome=outcome, verdict="PASS") for outcome in outcomes]
        return Row(id="scoring.sample", what="A sample.", cells=cells, duration_s=0)

    assert row(Outcome.SURVIVED, Outcome.KILLED).outcome is Outcome.KILLED
    assert row(Outcome.SURVIVED, Outcome.NOT_RUN).outcome is Outcome.SURVIVED
    assert row(Outcome.NOT_RUN).outcome is Outcome.NOT_RUN


def _selftest(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "TRIATTENTION_CACHE": str(cache), "COLUMNS": "120"}
    return subprocess.run(
        [sys.executable, "-m", "verify", "selftest", *arguments],
        capture_output=True, text=True, timeout=300, cwd=repository_root(), env=environment,
    )  # fmt: skip


def test_a_sample_of_the_quick_layers_is_caught_and_kept(tmp_path: Path) -> None:
    layers = [word for layer in ("kernel", "scoring", "record", "report") for word in ("--only", layer)]
    asked = [*layers, "--sample", "6", "--out", str(tmp_path / FOLDER / "sample.json")]
    first = _selftest(tmp_path, *asked)
    assert first.returncode == 0, first.stdout + first.stderr
    matrix = read(tmp_path / FOLDER / "sample.json")
    assert len(matrix.rows) == len(matrix.of(Outcome.KILLED)) == 6
    killer = next(row.killers[0].check for row in matrix.rows if row.killers[0].check.startswith("p"))
    assert caught_by({killer}, tmp_path)["sample"]
    again = _selftest(tmp_path, *asked, "--format", "json")
    took = {row["id"]: row["duration_s"] for row in json.loads(again.stdout)["rows"]}
    # what was planted in a subject was not tried again
    assert all(took[row.id] == row.duration_s for row in matrix.rows if row.id.startswith(("kernel", "scoring")))


def test_bystanders_of_a_fault_that_was_caught_are_counted() -> None:
    outcomes = {"p4.a.one": "killed", "p4.b.one": "survived", "p4.c.one": "survived", "p4.d.one": "not run"}
    cells = [Cell(check=check, outcome=outcome, verdict="PASS") for check, outcome in outcomes.items()]
    row = Row(id="scoring.sample", what="A sample.", cells=cells, duration_s=0)
    short = row.without_bystanders({"p4.b.one"})
    assert ([cell.check for cell in short.cells], short.passed) == (["p4.a.one", "p4.b.one", "p4.d.one"], 1)
    uncaught = row.model_copy(update={"cells": cells[1:]})
    assert uncaught.without_bystanders(set()) == uncaught


def test_calls_run_side_by_side_but_for_those_that_are_to_be_alone() -> None:
    running, most = Counter(), Counter()

    def call(number: int, lonely: bool) -> int:
        running[lonely] += 1
        most[lonely] = max(most[lonely], running[lonely])
        time.sleep(0.02)
        running[lonely] -= 1
        return number

    alone = [number % 3 == 0 for number in range(12)]
    told: list[int] = []
    assert _side_by_side(call, [*enumerate(alone)], 3, alone, told.append) == [*range(12)]
    assert (most[True], most[False] > 1, sorted(told)) == (1, True, [*range(12)])


def test_a_call_that_raises_ends_those_that_have_not_begun() -> None:
    begun: list[int] = []

    def call(number: int) -> None:
        begun.append(number)
        if number == 1:
            raise Interrupted

    with pytest.raises(Interrupted):
        _side_by_side(call, [(number,) for number in range(50)], 1, [False] * 50)
    assert begun == [0, 1]
