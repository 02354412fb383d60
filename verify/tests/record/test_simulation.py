"""Simulated evidence: what a record of it may claim, and that it counts apart from every other kind."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from verify.architectures import EMULATED, find
from verify.checks import Check, derive_seed
from verify.record import checker
from verify.record.grounds import Checkout
from verify.record.index import open_index
from verify.record.schema import CheckResult, Record
from verify.record.simulation import Census, SimulatedKernel
from verify.record.verdict import Assessment, TargetVerdict, assess
from verify.tests import samples
from verify.tests.samples import HARD, checks, compiled, measured, passing, record, result, simulated, simulation, write

SM120 = find(120)
ORACLE_N1 = "p4.oracle.n1"
SHA = samples.PTX_SHA256


def of(*records: Record) -> Assessment:
    return assess(SM120, records, checks())


def cell(found: Assessment, check_id: str):
    return next(one for one in found.cells if one.check.id == check_id)


def changed(verdict: str, **fields: Any) -> list[CheckResult]:
    """Every must-pass check passed in the simulator, except one."""
    others = [one for one in passing("simulated") if one.id != ORACLE_N1]
    return [*others, result(ORACLE_N1, verdict, **({"evidence": "simulated"} | fields))]


def unsupported(**fields: Any) -> list[CheckResult]:
    return changed("SKIP", code="SIM_UNSUPPORTED", message="mma.sync is not executed", **fields)


def test_a_census_compares_ptx_and_machine_code() -> None:
    assert Census(ptx={"fma": 2}, sass={"fma": 2}).equal
    assert not Census(ptx={"mul": 1, "add": 1}, sass={"fma": 1}).equal


@pytest.mark.parametrize("fields", [{}, {"census": {"ptx": {}, "sass": {}}, "uncounted": "no disassembler"}])
def test_a_kernel_has_a_census_or_says_why_not(fields: dict) -> None:
    with pytest.raises(ValidationError, match="says why it is uncounted if it has no census, and only then"):
        SimulatedKernel.model_validate(
            {"kernel": "score", "ptx_sha256": SHA, "launches": 1, "thread_instructions": 0} | fields
        )


def test_a_simulation_may_set_the_interpreters_variable() -> None:
    whole = simulated("sm120", passing("simulated")).model_dump()
    whole["environment"]["variables"]["TRITON_INTERPRET"] = "1"
    assert Record.model_validate(whole).kind == "simulated"


GPU = record("sm120", []).environment.gpu.model_dump()
CONTRADICTIONS: dict[str, tuple[Callable[[dict], object], str]] = {
    "another target": (lambda r: r["simulation"].update(sm=90), "claims sm120, but sm90 was simulated"),
    "a GPU": (lambda r: r["environment"].update(gpu=GPU), "was simulated, but its environment has the GPU"),
    "compiled": (
        lambda r: r.update(compilation=compiled("sm120").compilation.model_dump(), results=[]),
        "has both a compilation and a simulation",
    ),
    "hardware": (
        lambda r: r["results"][0].update(evidence="hardware"), "claims hardware evidence in a simulated run"
    ),
    "compiled evidence": (
        lambda r: r["results"][0].update(evidence="compiled"), "claims compiled evidence in a simulated run"
    ),
    "no kernel": (lambda r: r["simulation"].update(kernels=[]), "is simulated, but the simulation executed no kernel"),
    "no simulation": (
        lambda r: (r.update(simulation=None), r["environment"].update(gpu=GPU)),
        "claims to be simulated, but run run-sm120-simulated has no simulation",
    ),
    "no launch": (lambda r: r["simulation"]["kernels"][0].update(launches=0), "greater than or equal to 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", CONTRADICTIONS)
def test_a_simulated_record_that_contradicts_itself_is_no_record(name: str) -> None:
    change, words = CONTRADICTIONS[name]
    whole = simulated("sm120", passing("simulated")).model_dump(mode="json")
    change(whole)
    with pytest.raises(ValidationError, match=words):
        Record.model_validate(whole)


def test_a_run_on_a_gpu_emulates_nothing_and_skips_nothing_for_the_simulator() -> None:
    with pytest.raises(ValidationError, match=f"{ORACLE_N1} is emulated, but run run-sm120-1 is on sm120"):
        record("sm120", [result(ORACLE_N1, evidence="emulated")])
    with pytest.raises(ValidationError, match="claims to be simulated, but run run-sm120-1 has no simulation"):
        record("sm120", [result(ORACLE_N1, "SKIP", code="SIM_UNSUPPORTED")])


def test_a_simulated_pass_proves_nothing_and_is_counted_apart() -> None:
    found = of(simulated("sm120", passing("simulated")))
    assert (found.verdict, len(found.missing)) == (TargetVerdict.INCOMPLETE, len(HARD))
    assert all(one.simulated and not (one.proves or one.passed or one.compiled) for one in found.must_pass)
    assert "6 have no valid result, 6 of them simulated, so sm120 is INCOMPLETE" in found.sentence


def test_a_simulated_failure_is_seen_and_fails_no_gpu() -> None:
    found = of(simulated("sm120", changed("FAIL")))
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert cell(found, ORACLE_N1).simulated_failed
    assert "5 of them simulated, 1 of them FAILED in the simulator" in found.sentence
    assert [one.checks for one in found.findings] == [[ORACLE_N1]]


def test_what_the_simulator_does_not_execute_is_shown_and_is_no_pass() -> None:
    shown = cell(of(simulated("sm120", unsupported())), ORACLE_N1)
    assert (shown.outcome.code, shown.simulated, shown.warns) == ("SIM_UNSUPPORTED", False, False)


def test_the_best_evidence_is_shown() -> None:
    built = compiled("sm120", [result(ORACLE_N1, "FAIL", evidence="compiled")], day=9)
    executed = simulated("sm120", changed("FAIL"), day=8)
    for records, evidence in (([built], "compiled"), ([built, executed], "simulated")):
        assert cell(of(*records), ORACLE_N1).outcome.evidence == evidence
    found = of(built, executed, record("sm120", passing()))
    shown = cell(found, ORACLE_N1)
    assert (found.verdict, shown.outcome.evidence) == (TargetVerdict.VERIFIED, "hardware")
    assert shown.simulation.verdict == "FAIL"
    assert found.findings == ()


def test_a_failure_on_hardware_is_not_hidden_by_the_simulator() -> None:
    failed = record("sm120", [result(ORACLE_N1, "FAIL")])
    assert of(failed, simulated("sm120", passing("simulated"), day=2)).verdict is TargetVerdict.FAILED


@pytest.mark.parametrize("target", [SM120, EMULATED])
def test_a_simulated_run_without_a_launch_counts_nowhere(target) -> None:
    nowhere = [result(name, "FAIL", evidence="emulated") for name in (ORACLE_N1, "p1.nvcc.version")]
    made = simulated("sm120", nowhere)
    found = assess(target, [made], checks())
    assert not [one for one in found.cells if one.result is not None or one.stale is not None]
    assert found.findings == ()


@pytest.mark.parametrize("profile", [None, "scorer"])
def test_a_simulated_run_without_a_launch_decides_nothing_that_must_pass(profile: str | None) -> None:
    subject = record("sm120", []).subject.model_copy(update={"source": "checkout:theirs", "profile": profile})
    ran = record("sm120", passing()).model_copy(update={"subject": subject})
    other = simulated("sm120", [result(ORACLE_N1, "ABSENT", evidence="emulated")], day=2)
    both = [ran, other.model_copy(update={"subject": subject})]
    assert [one.check.id for one in of(*both).must_pass] == [one.check.id for one in of(ran).must_pass]


def of_another(made: Record, **environment: object) -> Record:
    return made.model_copy(update={"environment": made.environment.model_copy(update=environment)})


@pytest.mark.parametrize("day", [1, 9])
def test_no_kind_of_record_makes_another_stale(day: int) -> None:
    ran, built = record("sm120", passing()[:1], day=5), compiled("sm120", day=6)
    executed = of_another(simulated("sm120", passing("simulated"), day=day), torch="2.14.0", triton="3.8.0")
    for others in ([ran], [built], [ran, built]):
        assert of(*others, executed).stale == ()


@pytest.mark.parametrize("day", [1, 9])
def test_a_compilation_of_another_subject_gives_way_to_a_simulation(day: int) -> None:
    executed, built = simulated("sm120", passing("simulated"), day=5), compiled("sm120", day=day)
    theirs = built.subject.model_copy(update={"name": "another"})
    found = of(executed, built.model_copy(update={"subject": theirs}))
    assert [one.kind for one in found.used] == ["simulated"]


def test_a_simulation_goes_stale_by_its_files_and_by_another_simulator() -> None:
    made = simulated("sm120", passing("simulated"), sources={samples.ORACLE: "1" * 64})
    here = Checkout(samples.REPOSITORY, samples.REPOSITORY, samples.REPOSITORY / "triattention")
    found = assess(SM120, [made], checks(), here)
    assert {*found.outdated} == {"verify/judge/oracle.py changed"}
    assert cell(found, ORACLE_N1).stale.evidence == "simulated"
    newer = simulated("sm120", passing("simulated")[:1], day=2, run_id="newer")
    other = simulation(simulator_sha256="2" * 64)
    found = of(made, newer.model_copy(update={"simulation": other}))
    assert found.why_stale(made) == "another simulator"
    assert found.simulation == other


def test_the_index_says_the_same_and_leaves_out_what_counts_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    nowhere = result("p1.nvcc.version", evidence="emulated")
    for one in (record("sm120", passing()[:2]), simulated("sm120", [*changed("FAIL"), nowhere], day=2)):
        write(one, tmp_path / "reports")
    with open_index([tmp_path / "reports"]) as index:
        found = assess(SM120, index.records(SM120), checks(), index.checkout)
        points = index.points(target="sm120", last=1)
    assert cell(found, ORACLE_N1).simulated_failed
    assert found.simulation == simulation()
    assert {one.evidence for one in points} == {"hardware", "simulated"}  # the newest of each kind


def sound() -> Record:
    """A simulated record of phases 1 and 4 that nothing is wrong with."""

    def made(one: Check, evidence: str) -> CheckResult:
        return result(
            one.id, evidence=evidence, gate=one.spec.gate, plan=one.spec.plan, seed=derive_seed(7, one.id),
            measurements=measured(1e-7, 1e-6), repeat=f"python -m pytest '{one.node}' --device sim:sm120 --seed 7",
        )  # fmt: skip

    told = [made(one, "simulated" if one.phase == 4 else "emulated") for one in checks() if one.phase != 8]
    made_record = simulated(
        "sm120", told, seed=7, instrument_sha256=SHA, run_id="20261101T000000Z-sm120-beef",
        time_utc="2026-11-01T00:00:00Z",
    )  # fmt: skip
    whole = made_record.model_dump()
    whole["subject"] |= {"git_sha": "1" * 40, "content_sha256": SHA}
    whole["environment"]["variables"]["TRITON_INTERPRET"] = "1"
    whole["environment"]["torch"] = "2.13.0+cpu"
    return Record.model_validate(whole)


def problems(folder: Path, change: Callable[[dict], object]) -> list[str]:
    whole = json.loads(sound().model_dump_json())
    change(whole)
    path = folder / "record.json"
    path.write_text(json.dumps(whole))
    return [f"{one.id}: {one.problem}" for one in checker.examine([path], checks())]


def unsupported_in(whole: dict, **fields: object) -> None:
    one = next(one for one in whole["results"] if one["id"] == ORACLE_N1)
    one |= {"verdict": "SKIP", "code": "SIM_UNSUPPORTED", "message": "mma.sync", "measurements": []} | fields


@pytest.mark.parametrize(
    "change", [lambda r: None, unsupported_in, lambda r: r.update(run_id="20261101T000000Z-sm120-simulated-beef")]
)
def test_a_sound_simulation_has_no_problem(tmp_path: Path, change: Callable[[dict], object]) -> None:
    assert problems(tmp_path, change) == []


def alter(**fields: object) -> Callable[[dict], object]:
    return lambda whole: whole["simulation"].update(fields)


def first_kernel(**fields: object) -> Callable[[dict], object]:
    return lambda whole: whole["simulation"]["kernels"][0].update(fields)


UNSOUND: dict[str, tuple[Callable[[dict], object], str]] = {
    "another target": (alter(sm=90), "target is sm120, but the simulation is for sm90"),
    "a GPU": (lambda r: r["environment"].update(gpu=GPU), "was simulated without a GPU, but the environment has the"),
    "digest": (alter(simulator_sha256="0" * 64), "simulation.simulator_sha256 '000"),
    "digest of PTX": (first_kernel(ptx_sha256="0" * 64), "the digest of the PTX of score '000"),
    "mode": (alter(modes=["up"]), "simulation.modes is ['up'], but must name one or more of nearest, lowest, highest"),
    "no mode": (alter(modes=[]), "simulation.modes is [], but must name one or more"),
    "poison": (alter(poisons=["NaN"]), "simulation.poisons has 'NaN', which is not a hexadecimal word"),
    "everything": (alter(not_executed=[]), "simulation.not_executed is empty, but no simulation executes ptxas or the"),
    "no kernel": (alter(kernels=[]), f"{ORACLE_N1}: is simulated, but the simulation has no kernel"),
    "nothing": (first_kernel(thread_instructions=0), f"{ORACLE_N1}: PASS, but the simulation executed no instruction"),
    "census": (first_kernel(uncounted="why"), "score must have either a census or the reason why it is uncounted"),
    "twice": (lambda r: r["simulation"].update(kernels=r["simulation"]["kernels"] * 2), "has score 2 times"),
    "hardware": (
        lambda r: r["results"][3].update(evidence="hardware"),
        "evidence is hardware, but must be simulated or emulated in this record",
    ),
    "device": (
        lambda r: r["results"][3].update(repeat=r["results"][3]["repeat"].replace("sim:sm120", "cuda")),
        "it needs pytest 'phases/x.py::test[n1]' --device sim:sm120 --seed 7",
    ),
    "silent skip": (lambda r: unsupported_in(r, message=""), "without a message that names the instruction"),
    "other skip": (lambda r: unsupported_in(r, code="VRAM"), "SKIP(VRAM) counts as absent"),
    "left out": (lambda r: r["results"].pop(3), f"{ORACLE_N1}: is must-pass on sm120 and has no result"),
    "no simulation": (lambda r: r.update(simulation=None), "target is sm120, but the GPU is None"),
    "skip elsewhere": (
        lambda r: (unsupported_in(r), r.update(simulation=None)), "SIM_UNSUPPORTED), but the record has no simulation"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSOUND)
def test_one_change_of_a_simulation_is_one_named_problem(tmp_path: Path, name: str) -> None:
    change, words = UNSOUND[name]
    found = problems(tmp_path, change)
    assert any(words in one for one in found), found
