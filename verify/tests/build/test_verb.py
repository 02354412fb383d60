"""``python -m verify compile`` as a user meets it: records, reports, exit codes, and what it refuses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from phases import p3_compile
from verify import fixtures
from verify.architectures import ARCHITECTURES, find, parse_targets
from verify.build import resources
from verify.build.builder import Order, compile_ahead, prepare
from verify.build.records import failed_unwaived, records_of
from verify.errors import ConfigurationError
from verify.judge.variants import DEFAULT, FULL, GROUPED, SCORING
from verify.machine.device import Device
from verify.record import archive
from verify.record.builds import Build, BuildVerdict
from verify.record.reading import read_record
from verify.record.schema import Record
from verify.record.staleness import stale_because
from verify.record.verdict import TargetVerdict, assess
from verify.session import SESSION
from verify.subject.find import find_subject
from verify.tests.kernels import GOOD, HELD, TEMPERS, write_subject
from verify.tests.samples import checks, compiled, known_failure, measured, passing, record, result
from verify.tests.tree import REPOSITORY


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))


def verify(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-m", "verify", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == code, done.stdout[-1000:] + done.stderr[-2000:]
    return done


@pytest.mark.timeout(600)
def test_the_reference_builds_for_every_gpu_that_the_toolchain_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # with the cache of the user: what it has of this source and toolchain need not be built again
    # what prepare takes away, the tests of other files still need
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    prepare()
    reference = Order(find_subject("bundled", REPOSITORY), ARCHITECTURES, DEFAULT, jobs=2)
    found = {one.sm: one for one in compile_ahead(reference)}
    known = {sm: one for sm, one in found.items() if not one.gap}
    assert known.keys() >= {80, 86, 87, 89, 90, 100, 103, 120, 121}
    assert found.keys() - known.keys() <= {88, 107, 110}
    for one in known.values():
        assert one.unlaunched == {}
        for build in one.builds:
            assert build.verdict is BuildVerdict.OK, (one.sm, build.variants, build.message)
            assert (build.resources.stack_bytes, build.resources.registers <= 96) == (0, True), (one.sm, build)
        (plain,) = one.of("bfloat16-half-mean-d128-o17")
        if plain.resources.code is not None:
            assert plain.resources.code.warp_instructions_per_key <= 36, one.sm
            assert plain.resources.code.loads.keys() == {"128"}


def test_records_and_reports_of_what_was_built(tmp_path: Path) -> None:
    write_subject(tmp_path / "theirs")
    out = tmp_path / "out"
    told = json.loads(
        verify("compile", "--sm", "88,120", "--subject", str(tmp_path / "theirs"), "--out", str(out), "--json").stdout
    )
    assert [(one["target"], bool(one["gap"])) for one in told["targets"]] == [("sm88", True), ("sm120", False)]
    (folder,) = out.iterdir()
    found = read_record(folder / "sm120.json")
    assert {one.evidence for one in found.results} == {"compiled"}
    verdicts = {one.id: one.verdict.value for one in found.results}
    hard = {*(f"p3.scoring.{name}" for name in SCORING), "p3.plan.as_written"}
    built = hard | {f"p3.grouped.{name}" for name in GROUPED}
    assert verdicts == dict.fromkeys(built, "PASS") | {
        "p3.resources.stack": "PASS", "p3.resources.registers": "SKIP", "p3.resources.instructions": "SKIP",
    }  # fmt: skip
    # the way to a subject, in the command that repeats a check, is relative
    assert not re.search(rf"(?<![\w.]){re.escape(str(tmp_path))}", (folder / "sm120.json").read_text())
    assert read_record(folder / "sm88.json").results == []

    report = json.loads(verify("report", "--gpu", "sm120", "--records", str(out), "--format", "json").stdout)
    assert (report["verdict"], report["must_pass"]["passed"]) == ("INCOMPLETE", 0)
    assert set(report["compiled"]["must_pass"]) == hard
    assert "24 of them compiled ahead of time" in report["sentence"]
    rows = {row["family"]: row["verdict"] for row in report["rows"]}
    assert (rows["p3.scoring"], rows["p3.plan"], rows["p1.torch"]) == ("COMPILED 23", "COMPILED", "NOT RUN")
    lines = verify("report", "--records", str(out)).stdout.splitlines()
    assert any(line.startswith("sm88") and "gap" in line for line in lines)

    # another content is compared with the last record of this one, however often; the same one would be itself
    write_subject(tmp_path / "theirs", f"# new\n{GOOD}")
    for _ in range(2):
        before = set(out.iterdir())
        verify("compile", "--sm", "120", "--subject", str(tmp_path / "theirs"), "--out", str(out))
        (newest,) = set(out.iterdir()) - before
        (compared,) = [one for one in read_record(newest / "sm120.json").results if one.id == "p3.resources.registers"]
        grown = {one.measured * resources.GROWTH_ALLOWED / one.allowed for one in compared.measurements}
        assert (compared.verdict, grown) == ("PASS", {1.0})


def test_a_kernel_that_does_not_build_is_exit_1_and_told(tmp_path: Path) -> None:
    write_subject(tmp_path / "theirs", TEMPERS[: TEMPERS.index("def launch")] + GOOD.replace("good[", "mistyped["))
    options = ["--subject", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    done = verify("compile", "--sm", "90", *options, code=1)
    assert "COMPILE_ERROR mistyped on sm90" in done.stdout
    report = json.loads(
        verify("report", "--gpu", "sm90", "--records", str(tmp_path / "out"), "--format", "json").stdout
    )
    assert (report["verdict"], len(report["compiled"]["not_built"])) == ("INCOMPLETE", 24)
    (folder,) = (tmp_path / "out").iterdir()
    # nothing was built, so there is nothing to compare with anything
    assert not [one for one in read_record(folder / "sm90.json").results if one.id.startswith("p3.resources")]
    assert "24 of them NOT compiled" in report["sentence"]
    assert {row["family"]: row["verdict"] for row in report["rows"]}["p3.plan"] == "FAIL"


@pytest.mark.parametrize(("sm", "body"), [("88", GOOD), ("90", HELD.replace("once, twice, renamed, ", ""))])
def test_where_nothing_can_be_built_nothing_is_known(tmp_path: Path, sm: str, body: str) -> None:
    write_subject(tmp_path / "theirs", body)
    options = ["--subject", str(tmp_path / "theirs"), "--out", str(tmp_path / "out")]
    assert "nothing is known" in verify("compile", "--sm", sm, *options, code=3).stderr
    (kept,) = (tmp_path / "out").rglob("*.json")
    assert read_record(kept).results == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--sm", "101"], "sm101 was renamed to sm110"),
        (["--sm", "84"], "'84' is not a GPU architecture"),
        (["--sm", "90-80"], "is reversed; write 80-90"),
        (["--sm", "emulated"], "emulated, which is not a GPU"),
        (["--kernels", "a,,b"], "has an empty name"),
        (["--jobs", "0"], "--jobs 0 builds nothing"),
        (["--timeout", "0"], "--timeout 0 is out of range"),
        (["--subject", "nowhere"], "there is no directory"),
        (["--out", "README.md"], "is not a directory"),
    ],
)
def test_what_cannot_be_asked_is_one_sentence_and_exit_3(arguments: list[str], said: str) -> None:
    done = verify("compile", *arguments, code=3)
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_every_architecture_as_another_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_OVERRIDE_ARCH", "sm90")
    with pytest.raises(ConfigurationError, match="TRITON_OVERRIDE_ARCH=sm90 would build"):
        prepare()


def test_gpus_are_named_in_every_way() -> None:
    assert parse_targets("all") == ARCHITECTURES
    assert parse_targets("80-121") == ARCHITECTURES
    assert [one.sm for one in parse_targets("121, sm100,9.0,86-89")] == [86, 87, 88, 89, 90, 100, 121]


def test_full_has_every_combination_and_the_default_set() -> None:
    axes = (("bfloat16", "float16", "float32"), ("half", "interleaved"), ("mean", "max"), ("d64", "d128", "d256"))
    every = {"-".join(parts) for parts in product(*axes, ("o1", "o17"))}
    assert FULL.keys() == every | {f"{name}-cached" for name in every} | DEFAULT.keys()


# the blocks that NVIDIA's occupancy calculator (cuda_occupancy.h of CUDA 13.0) finds, over the warps that fit
@pytest.mark.parametrize(
    ("sm", "registers", "warps", "shared_bytes", "occupancy"),
    [(80, 48, 4, 128, 40 / 64), (86, 255, 8, 20000, 8 / 48), (90, 96, 1, 8192, 20 / 64), (120, 24, 2, 0, 1.0)],
)
def test_occupancy(sm: int, registers: int, warps: int, shared_bytes: int, occupancy: float) -> None:
    assert find(sm).occupancy(registers, warps, shared_bytes) == pytest.approx(occupancy)


def test_a_compilation_makes_no_run_stale_and_no_run_makes_it_stale() -> None:
    ran, built = record("sm120", passing(), day=1), compiled("sm120", day=2)
    environment = built.environment.model_copy(update={"torch": "2.12.0", "triton": "3.9.0"})
    built = built.model_copy(update={"environment": environment})
    found = assess(find(120), [ran, built], checks())
    assert (found.verdict, found.used, found.compilation) == (TargetVerdict.VERIFIED, (built, ran), built.compilation)
    later = record("sm120", passing(), day=3)
    assert assess(find(120), [later, built], checks()).used == (later, built)


def test_the_newest_run_and_no_compilation_says_which_subject_is_assessed() -> None:
    ran, built = record("sm120", passing(), day=1), compiled("sm120", day=2)
    other = built.subject.model_copy(update={"name": "another"})
    theirs = compiled("sm120", day=3, run_id="theirs").model_copy(update={"subject": other})
    found = assess(find(120), [ran, built, theirs], checks())
    assert (found.verdict, found.used, found.stale) == (TargetVerdict.VERIFIED, (built, ran), (theirs,))
    assert found.why_stale(theirs) == "another subject"
    newer = record("sm120", passing()[:1], day=4).model_copy(update={"subject": other})
    found = assess(find(120), [ran, built, theirs, newer], checks())
    assert (found.used, found.stale) == ((newer, theirs), (built, ran))


def test_a_compilation_of_another_subject_or_triton_is_not_mixed() -> None:
    old, new = compiled("sm120", day=1), compiled("sm120", day=2, run_id="new")
    triton = new.environment.model_copy(update={"triton": "3.9.0"})
    found = assess(find(120), [old, new.model_copy(update={"environment": triton})], checks())
    assert (len(found.used), found.stale, found.why_stale(old)) == (1, (old,), "another triton")
    ran = record("sm120", passing(), day=3)
    theirs = ran.model_copy(update={"subject": ran.subject.model_copy(update={"name": "theirs"})})
    assert stale_because(old, theirs) == "another subject"
    assert assess(find(120), [old, theirs], checks()).compilation is None


def test_what_is_compiled_shows_where_nothing_ran_and_verifies_nothing() -> None:
    results = [result(one.id, evidence="compiled") for one in passing()]
    found = assess(find(120), [compiled("sm120", results)], checks())
    assert found.verdict is TargetVerdict.INCOMPLETE
    assert "6 of them compiled ahead of time" in found.sentence
    assert all(cell.compiled and not cell.passed for cell in found.must_pass)
    assert found.missing == found.must_pass


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"results": [result("p1.bf16.matmul").model_dump()]}, r"ahead of time, but p1\.bf16\.matmul ran"),
        ({"target": "sm90"}, "claims sm90, but was built for sm120"),
        ({"compilation": None}, "has another GPU or none"),
    ],
)
def test_a_record_of_builds_contradicts_nothing(change: dict, problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        Record.model_validate(compiled("sm120").model_dump() | change)


def test_on_a_gpu_a_build_that_failed_fails_its_check() -> None:
    build = Build(kernel="k", variants=["v"], verdict=BuildVerdict.COMPILE_ERROR, message="no such op", duration_s=0)
    with pytest.raises(AssertionError, match="k built ahead of time: COMPILE_ERROR: no such op"):
        p3_compile._all_built([build])
    with pytest.raises(AssertionError, match="OUT_OF_RESOURCES"):
        p3_compile._all_built([build.model_copy(update={"verdict": BuildVerdict.OUT_OF_RESOURCES})])
    for verdict in (BuildVerdict.TIMEOUT, BuildVerdict.NOT_FOUND):
        p3_compile._all_built([build.model_copy(update={"verdict": verdict})])


def test_on_a_gpu_the_builds_are_kept_beside_the_run(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "theirs")
    manifest = SimpleNamespace(target="sm90", subject_info=subject.info(), selection="pytest -m hard")
    session = SimpleNamespace(
        device=Device("cuda"), subject=subject, manifest=manifest, run_dir=tmp_path / "run", root=REPOSITORY
    )
    fixture = fixtures.compilation._get_wrapped_function()
    found = fixture(SimpleNamespace(stash={SESSION: session}))
    assert [build.verdict for build in found.of("as_written")] == [BuildVerdict.OK]
    kept = read_record(tmp_path / "run" / "sm90.json")
    assert (kept.target, kept.compilation, kept.environment.gpu) == ("sm90", found, None)
    # a full disk leaves the checks to their launches
    session.run_dir = REPOSITORY / "README.md"
    request = SimpleNamespace(getfixturevalue=lambda name: fixture(SimpleNamespace(stash={SESSION: session})))
    assert fixtures.builds._get_wrapped_function()(request) == []


def test_on_a_gpu_builds_that_all_hang_end_within_the_time_of_a_check() -> None:
    limit_s = p3_compile.test_kernel_launches.check_spec.timeout_s
    assert fixtures._BUILD_LIMIT_S * len(DEFAULT) / 2 < limit_s - 30


def test_the_earlier_records_are_read_once_for_all_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple] = []
    monkeypatch.setattr(resources, "load", lambda *folders: read.append(folders) or archive.Archive((), ()))
    subject = write_subject(tmp_path / "theirs")
    found = [compiled(f"sm{sm}").compilation for sm in (80, 90, 120)]
    what = Order(subject, parse_targets("80,90,120"), DEFAULT)
    assert len(records_of(what, subject.info(), found, "compile", tmp_path, REPOSITORY, [])) == 3
    # the published ones, and those of this machine with those below --out
    assert len(read) == 2


def test_a_build_that_is_known_to_fail_is_waived_and_no_other_is(tmp_path: Path) -> None:
    subject = write_subject(tmp_path / "theirs")
    bad = {"verdict": "CRASH", "message": "the compiler died", "duration_s": 0}
    builds = [Build(kernel="k", variants=[name], **bad) for name in ("as_written", next(iter(SCORING)))]
    what = Order(subject, parse_targets("90,120"), DEFAULT)
    found = [compiled(f"sm{sm}").compilation.model_copy(update={"builds": builds}) for sm in (90, 120)]
    known = [known_failure("p3.plan", "p3.sco*", when={"sm": [120]})]
    other, own = made = records_of(what, subject.info(), found, "compile", tmp_path, REPOSITORY, [], known)
    assert {one.verdict for one in other.results} == {"CRASH"}
    assert {str(one.waiver)[:30] for one in own.results} == {"CRASH, waived by @owner until "}
    assert [failed_unwaived([one], [record]) for one, record in zip(found, made, strict=True)] == [True, False]
    one_of_two = known[0].model_copy(update={"checks": ["p3.plan"]})
    made = records_of(what, subject.info(), found, "compile", tmp_path, REPOSITORY, [], [one_of_two])
    assert failed_unwaived(found[1:], made[1:])


def test_on_a_gpu_resources_are_measured_or_skipped() -> None:
    now, taken = compiled("sm120").compilation, []
    rule = lambda now, last: measured(1, 2) if last else []  # noqa: E731 - it stands in for one of verify.build.resources
    p3_compile.test_resources(rule, now, now, lambda *numbers, **words: taken.append(numbers))
    assert taken == [("error", 1.0, 2.0)]
    with pytest.raises(pytest.skip.Exception) as skipped:
        p3_compile.test_resources(rule, now, None, lambda *numbers, **words: None)
    assert skipped.value.code == "NO_BASELINE"
    failed = {"verdict": "COMPILE_ERROR", "message": "no such op", "resources": None}
    build = now.builds[0].model_copy(update=failed)
    with pytest.raises(AssertionError, match="no kernel was built, so none is measured: no such op"):
        p3_compile.test_resources(rule, now.model_copy(update={"builds": [build]}), now, lambda *numbers, **words: None)
