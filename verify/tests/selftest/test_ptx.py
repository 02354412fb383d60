"""Faults of compiled code: how an edit is made, that no record can be made of it, and what catches it."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from pydantic import ValidationError

from verify.checks import Check, catalogue
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.machine.device import prepare
from verify.record.kills import Matrix, Outcome, Row
from verify.record.schema import Verdict
from verify.run import events
from verify.run.manifest import freeze, survey, utc_now
from verify.run.mutation import Mutation, PtxEdit, mutated
from verify.selftest import Fault, load_faults, trial
from verify.selftest.records import good_record
from verify.selftest.terminal import false_claims, print_matrix
from verify.selftest.trial import Bench
from verify.selftest.verb import Choice, _uncaught, selftest
from verify.subject.find import find_subject
from verify.tests.tree import REPOSITORY

FAULTS = [fault for fault in load_faults() if fault.layer == "ptx"]

_PTX = """\
.visible .entry kernel(
\t.param .u64 kernel_param_0
)
{
\t.reg .b32 \t%r<9>;
\tmov.u32 \t%r1, %tid.x;                // a comment
\t.loc\t1 5 3
\tadd.s32 \t%r2, %r1, 1;
$L__tmp0:
\tadd.s32 \t%r3, %r2, %r1;
$L__BB0_1:
\t// begin inline asm
\t@%p1 ld.global.b32 { %r4 }, [ %rd1 + 0 ];
\t// end inline asm
\tadd.s32 \t%r5, %r4, %r3;
\tret;
}
"""


def _edited(find: str, to: str, nth: int | None = None) -> list[str] | None:
    """The lines that an edit leaves which were not there before; None if it does not apply."""
    found = mutated(_PTX, [PtxEdit(find=find, to=to, nth=nth)])
    return None if found is None else [line for line in found.split("\n") if line not in _PTX.split("\n")]


def test_an_edit_is_made_once_from_either_end_or_everywhere() -> None:
    assert _edited(r"add\.s32 (.*)", r"sub.s32 \1", 1) == ["\tsub.s32 %r2, %r1, 1;"]
    assert _edited(r"add\.s32 (.*)", r"sub.s32 \1", -1) == ["\tsub.s32 %r5, %r4, %r3;"]
    assert len(_edited(r"add\.s32 (.*)", r"sub.s32 \1")) == 3
    assert _edited(r"@(%p\d+) (ld\..*)", r"@!\1 \2") == ["\t@!%p1 ld.global.b32 { %r4 }, [ %rd1 + 0 ];"]


def test_instructions_that_follow_each_other_are_changed_together_within_a_basic_block() -> None:
    swapped = mutated(_PTX, [PtxEdit(find=r"(add\.s32 [^;]*); (add\.s32 [^;]*)", to=r"\2; \1")])
    assert swapped.index("add.s32 %r3, %r2, %r1;") < swapped.index("add.s32 %r2, %r1, 1;")
    assert _edited(r"(add\.s32 [^;]*); (@.*)", r"\2; \1") is None, "a branch may go to the label between them"


def test_an_instruction_is_dropped_or_becomes_several_with_registers_of_their_own() -> None:
    assert "%tid.x" not in mutated(_PTX, [PtxEdit(find=r"mov\.u32 .*", to="")])
    found = _edited(r"add\.s32 (%r5), .*", r"{ .reg .b32 %t; mov.u32 %t, 7; add.s32 \1, %t, %t; }")
    assert found == ["\t{ .reg .b32 %t;", "\tmov.u32 %t, 7;", "\tadd.s32 %r5, %t, %t;", "\t}"]


@pytest.mark.parametrize("nth", [4, -4])
def test_what_is_not_there_leaves_the_launch_alone(nth: int) -> None:
    assert _edited(r"add\.s32 (.*)", r"sub.s32 \1", nth) is None
    there, missing = PtxEdit(find=r"ret", to="exit"), PtxEdit(find=r"bar\.sync 0", to="")
    assert mutated(_PTX, [there, missing]) is None, "the edits of a fault are made together"
    assert mutated(_PTX, [PtxEdit(find=r"(mov\.u32 %r1, %tid\.x)", to=r"mov.u32 %r1, %tid.x", nth=2)]) is None


def test_each_kernel_that_is_changed_is_noted_once() -> None:
    noted: list[str] = []
    alter = Mutation(fault="ptx.sample", edits=[PtxEdit(find="ret", to="exit")]).alteration(noted.append)
    assert alter("kernel", _PTX) == alter("kernel", _PTX) == _PTX.replace("ret;", "exit;")
    assert alter("other", "no PTX") == "no PTX"
    assert noted == ["kernel"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"find": "(", "to": ""}, "not a regular expression and its replacement"),
        ({"find": "ret", "to": r"\1"}, "not a regular expression and its replacement"),
        ({"find": "ret", "to": "", "nth": 0}, "nth counts from 1"),
    ],
)
def test_an_edit_that_cannot_be_made_is_refused(fields: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        PtxEdit.model_validate(fields)


def _fault(**fields) -> Fault:
    base = {"layer": "ptx", "name": "sample", "what": "A sample.", "ptx": [{"find": "ret", "to": "exit"}]}
    return Fault.model_validate(base | fields)


def test_what_is_no_mistake_names_checks_that_must_pass_and_a_mistake_those_that_fail() -> None:
    assert _fault(kills=["p4.plan"]).mutation == Mutation(fault="ptx.sample", edits=[PtxEdit(find="ret", to="exit")])
    assert _fault(passes=["p4.plan"], equivalent="Both end the thread.").harmless
    for wrong in ({}, {"passes": ["p4.plan"]}, {"kills": ["p4.plan"], "right": True}):
        with pytest.raises(ValidationError, match="a mistake has kills"):
            _fault(**wrong)


#: What can go wrong in compiled code, with faults that are an example of it.
_FAMILIES = {
    "a dropped barrier": ["no_barrier", "no_barrier_max", "no_barrier_before_reuse", "no_barrier_in_loop"],
    "the distance of a shuffle": ["shuffle_distance", "shuffle_distance_of_first_step"],
    "the mode or the clamp of a shuffle": ["shuffle_down", "shuffle_up", "shuffle_index", "shuffle_clamp"],
    "the mask of a shuffle": ["shuffle_mask"],
    "the predicate of a load": ["load_predicate_removed", "load_predicate_negated"],
    "the predicate of a store": ["store_predicate_removed", "store_predicate_negated"],
    "an address off by an element": [
        "load_off_by_an_element", "store_off_by_an_element", "shared_load_off_by_an_element",
        "shared_store_off_by_an_element",
    ],
    "an address off by two bytes": [
        "load_off_by_two_bytes", "store_off_by_two_bytes", "shared_load_off_by_two_bytes",
        "shared_store_off_by_two_bytes",
    ],
    "the sign or the extension of a stride": ["stride_extended_without_sign", "stride_negated", "stride_in_16_bits"],
    "a product cut to 32 bits": ["offsets_in_32_bits"],
    "operands swapped": ["addend_for_factor", "difference_reversed"],
    "signs": ["sum_minus", "product_negated", "address_negation_dropped"],
    "rounding": ["sums_toward_zero", "products_toward_zero", "scores_truncated_to_bf16"],
    "flushing to zero": ["products_flushed", "sums_flushed"],
    "a maximum": ["maximum_without_nan", "minimum"],
    "the width of a load": ["wide_load", "narrow_load", "narrow_shared_load"],
    "a conversion": ["no_conversion", "wrong_half", "bf16_as_f16", "f16_as_bf16"],
    "the length of a loop": [
        "loop_starts_late", "loop_ends_late", "loop_of_heads_ends_early", "loop_of_heads_ends_late",
    ],
    "the axis of a block": ["head_from_axis_x", "keys_from_axis_y", "row_from_axis_y"],
    "the bits of a thread's number": ["bits_of_thread", "too_few_bits_of_thread", "mask_of_thread"],
    "a bound": ["bound_of_keys", "bound_of_store", "bound_of_frequencies"],
    "and for or": ["store_predicate_or", "load_predicate_or"],
    "a root": ["root_dropped", "one_root_dropped"],
    "a score rounded before its store": ["scores_in_bf16"],
    "a store by one warp only": ["store_by_one_warp"],
    "a warp that ends early": ["warp_exits_before_its_store", "warp_exits_before_barrier"],
    "a special register": ["lane_for_thread", "number_of_heads"],
}  # fmt: skip


def test_there_are_mutations_of_every_family_and_right_changes() -> None:
    mistakes = {fault.name for fault in FAULTS if not fault.right}
    assert [name for names in _FAMILIES.values() for name in names if name not in mistakes] == []
    assert len(mistakes) >= 40
    assert sum(fault.right for fault in FAULTS) >= 10
    assert all(fault.ptx for fault in FAULTS)
    assert sum("plain" in fault.subjects for fault in FAULTS) >= 40


def test_a_mutated_run_makes_no_record(tmp_path: Path) -> None:
    subject = find_subject("bundled", REPOSITORY)
    surroundings = survey("cpu", subject, REPOSITORY, simulated=90)
    fields = {"subject": subject, "model": "embedded", "seed": 0, "selection": "a test", "selected": ()}
    mutation = Mutation(fault="ptx.sample", edits=[PtxEdit(find="ret", to="exit")])
    with pytest.raises(ValidationError, match="only the code of a simulated GPU"):
        freeze(surroundings, device="cpu", mutation=mutation, **fields)
    planted = freeze(surroundings, device="sim:sm90", mutation=mutation, **fields)
    events.create(tmp_path / "planted", planted)
    events.update(tmp_path / "planted", planted)
    assert events.read_manifest(tmp_path / "planted").mutation == mutation
    usual = freeze(surroundings, device="sim:sm90", **fields)
    events.create(tmp_path / "usual", usual)
    (tmp_path / "usual" / events.RECORD).unlink()
    # without the mutation in its manifest, the log still tells
    events.append_mutated(tmp_path / "usual", "ptx.sample", "kernel")
    for folder in ("planted", "usual"):
        with pytest.raises(ConfigurationError, match="mutates compiled code, so it makes no record"):
            events.compose(tmp_path / folder, "complete")
        assert not (tmp_path / folder / events.RECORD).exists()


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    prepare("cpu", "embedded")
    subject = find_subject("bundled", REPOSITORY)
    surroundings = survey("cpu", subject, REPOSITORY)
    return Bench(
        REPOSITORY, subject, surroundings, "embedded", 0, lambda: 0, cache=tmp_path_factory.mktemp("cache")
    )  # fmt: skip


def _tried(bench: Bench, fault: Fault) -> Row:
    checks: list[Check] = fault.claimed(catalogue())[:1]
    return bench.row(fault, checks, {checks[0].id: Verdict.PASS})


def _named(name: str) -> Fault:
    return next(fault for fault in FAULTS if fault.name == name)


def test_a_mutation_is_killed_and_leaves_no_record(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def kept(prefix: str) -> Iterator[str]:
        yield str(tmp_path)

    monkeypatch.setattr(trial.tempfile, "TemporaryDirectory", kept)
    row = _tried(bench, _named("no_barrier"))
    assert (row.outcome, row.caught_by) == (Outcome.KILLED, ["p4.triton_oracle.n33"])
    assert "two threads access one place in memory" in row.killers[0].message
    run = tmp_path / "run"
    assert events.read_mutated(run) == ["score_kernel"]
    assert events.read_results(run).keys() == {"p4.triton_oracle.n33"}
    assert not [event for event in events.read_events(run) if event["event"] == "launched"]
    assert not (run / events.RECORD).exists()


def test_a_right_change_is_harmless(bench: Bench) -> None:
    row = _tried(bench, _named("commuted_sums"))
    assert (row.outcome, row.right, _uncaught(row)) == (Outcome.HARMLESS, True, False)


def test_an_edit_that_applies_nowhere_is_an_error_of_the_fault(bench: Bench) -> None:
    fault = _fault(kills=["p4.triton_oracle.n1"], ptx=[{"find": "there is no such instruction", "to": ""}])
    with pytest.raises(ConfigurationError, match=r"ptx\.sample applies to no kernel that its checks launch"):
        _tried(bench, fault)


def test_a_check_that_needs_a_gpu_is_not_tried_on_a_simulated_one(bench: Bench) -> None:
    fault = _named("offsets_in_32_bits").model_copy(update={"kills": ("p4.sanitizer",)})
    checks = fault.claimed(catalogue())
    baseline = bench.baseline(checks, "sim:sm90")
    assert {*baseline.values()} == {Verdict.SKIP}
    row = bench.row(fault, checks, baseline)
    assert (row.outcome, _uncaught(row)) == (Outcome.NOT_RUN, False)


def test_a_matrix_tells_mistakes_from_what_is_harmless(capsys: pytest.CaptureFixture[str]) -> None:
    outcomes = {"no_barrier": "killed", "commuted_sums": "false alarm", "store_by_every_thread": "harmless"}
    rows = [
        Row(
            id=f"ptx.{name}", what=_named(name).what, duration_s=0, right=_named(name).right,
            equivalent=_named(name).equivalent,
            cells=[{"check": "p4.triton_oracle.n33", "outcome": outcome, "verdict": "PASS"}],
        )
        for name, outcome in outcomes.items()
    ]  # fmt: skip
    matrix = Matrix(
        time_utc=utc_now(), subject=good_record("sm120").subject, instrument_sha256="0" * 64, versions={},
        selection="everything", seed=0, rows=rows, idle=[],
    )  # fmt: skip
    assert false_claims(matrix) == []
    assert [_uncaught(row) for row in rows] == [False, True, False]
    print_matrix(matrix, "markdown", None)
    told = capsys.readouterr().out
    assert "1 of 1 planted fault caught" in told
    assert "0 of 1 right change passed every check" in told
    assert "equivalent ptx.store_by_every_thread: " in told
    assert "FALSE ALARM ptx.commuted_sums: " in told


def test_a_device_that_no_fault_can_be_tried_on_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="--device cuda does not fit"):
        Choice(device="cuda")
    with pytest.raises(ConfigurationError, match="no check of these faults can run on sim:sm90"):
        selftest(Choice(only=["record"], device="sim:sm90"), "bundled", 1, "json", None)


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["bundled", "plain"])
def test_ptxas_accepts_every_mutation_and_each_barrier_is_dropped(subject: str, tmp_path: Path) -> None:
    faults = [fault for fault in FAULTS if subject in fault.subjects]
    checks = {check.id: check for fault in faults for check in fault.claimed(catalogue()) if not check.spec.needs_gpu}
    option = "bundled" if subject == "bundled" else "verify/examples/plain"
    command = [sys.executable, "-m", "pytest", "-q", f"--scratch={tmp_path / 'run'}", f"--subject={option}"]
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path / "cache")}
    child = subprocess.run(
        [*command, "--device=sim:sm90", *(check.node for check in checks.values())],
        cwd=repository_root(), env=environment, capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-2000:] + child.stderr[-2000:]
    launched = _launched(tmp_path / "run", tmp_path / "cache")
    everything = {ptx for kernels in launched.values() for ptx in kernels}
    for check in {fault.kills for fault in faults if fault.name.startswith("no_barrier") and fault.ptx[0].nth}:
        dropped = {fault.ptx[0].nth for fault in faults if fault.name.startswith("no_barrier") and fault.kills == check}
        barriers = launched[check[0]][0].count("bar.sync")
        assert dropped == {*range(1, barriers + 1)}, f"{check[0]} launches a kernel with {barriers} barriers"
    work = []
    for fault in faults:
        mine = {ptx for check in fault.claimed(catalogue()) for ptx in launched.get(check.id, ())}
        # a check that needs a GPU launched nothing here
        changed = [found for ptx in sorted(mine or everything) if (found := mutated(ptx, fault.ptx))]
        assert changed, f"{fault.id} applies to no kernel of its checks"
        work += [(fault.id, ptx) for ptx in changed]
    with ThreadPoolExecutor(2) as pool:
        told = [*pool.map(lambda one: _refused(one[1], tmp_path), work)]
    assert {name: why for (name, _), why in zip(work, told, strict=True) if why} == {}


def _launched(run: Path, cache: Path) -> dict[str, list[str]]:
    """The PTX that each check launched."""
    texts = {hashlib.sha256(path.read_bytes()).hexdigest(): path.read_text() for path in cache.rglob("*.ptx")}
    found: dict[str, list[str]] = {}
    kernels: list[str] = []
    for event in events.read_events(run):
        if event["event"] == "start":
            kernels = found.setdefault(event["id"], [])
        elif event["event"] == "launched":
            kernels += [texts[one["ptx_sha256"]] for one in event["kernels"]]
    return found


def _refused(ptx: str, folder: Path) -> str:
    """What ptxas objects to; empty if it accepts the PTX."""
    from triton import knobs

    target = re.search(r"^\.target (\S+)", ptx, re.M)[1]
    with tempfile.NamedTemporaryFile("w", suffix=".ptx", dir=folder) as file:
        file.write(ptx)
        file.flush()
        done = subprocess.run(
            [knobs.nvidia.ptxas.path, f"--gpu-name={target}", file.name, "-o", f"{file.name}.cubin"],
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    return "" if done.returncode == 0 else done.stdout + done.stderr
