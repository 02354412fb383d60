"""The checker against sound records, and against records in which one thing was changed by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from verify.checks import Check, CheckSpec, derive_seed
from verify.checks import catalogue as whole_catalogue
from verify.record import checker
from verify.record.reading import UnreadableRecord, read_record
from verify.record.schema import Record
from verify.tests.samples import REPOSITORY, checks, measured, record, result, write

Json = dict[str, Any]
SHA = "0123456789abcdef" * 4


def catalogue() -> list[Check]:
    """The small catalogue, with a check that has a tolerance and one that needs another."""
    spec = CheckSpec("p5.table", "hard", "c", "r", "r", {"last": None}, tolerance="derived", needs=("p1.bf16",))
    return [*checks(), Check("p5.table.last", "last", spec, "phases/p5.py::test_table[last]")]


def sound(target: str = "sm120", minute: int = 0, name: str = "beef") -> Record:
    """A record that nothing is wrong with: every check of the target, each as the suite would write it."""
    emulated = target == "emulated"
    results = [
        result(
            one.id, evidence="emulated" if emulated else "hardware", gate=one.spec.gate, plan=one.spec.plan,
            seed=derive_seed(7, one.id), measurements=measured(1e-7, 1e-6) if one.spec.tolerance else [],
            repeat=f"python -m pytest '{one.node}' --device {'cpu' if emulated else 'cuda'} --seed 7",
        )
        for one in catalogue()
        if one.applies_to(target)
    ]  # fmt: skip
    made = record(
        target, results, seed=7, instrument_sha256=SHA, run_id=f"20261101T00{minute:02d}00Z-{target}-{name}",
        time_utc=f"2026-11-01T00:{minute:02d}:00Z",
    )  # fmt: skip
    whole = made.model_dump()
    whole["subject"] |= {"git_sha": "1" * 40, "content_sha256": SHA}
    if emulated:
        whole["environment"]["variables"]["TRITON_INTERPRET"] = "1"
    else:
        whole["environment"]["gpu"]["uuid_sha256"] = SHA
    return Record.model_validate(whole)


def problems(*paths: Path) -> list[str]:
    return [f"{one.id}: {one.problem}" for one in checker.examine(paths, catalogue())]


def tampered(folder: Path, change: Callable[[Json], object], target: str = "sm120") -> list[str]:
    path = write(sound(target), folder, "evidence")
    whole = json.loads(path.read_text())
    change(whole)
    path.write_text(json.dumps(whole))
    return problems(path)


def of(whole: Json, check_id: str) -> Json:
    return next(one for one in whole["results"] if one["id"] == check_id)


@pytest.mark.parametrize("target", ["sm120", "emulated"])
def test_a_sound_record_has_no_problem(tmp_path: Path, target: str) -> None:
    assert problems(write(sound(target), tmp_path, "evidence")) == []


def test_the_command_of_an_installed_suite_repeats_a_check(tmp_path: Path) -> None:
    whole = sound()
    command = next(one for one in whole.results if one.id == TABLE).repeat
    installed = _installed(command)
    assert installed != command
    results = [one.model_copy(update={"repeat": installed}) if one.id == TABLE else one for one in whole.results]
    assert problems(write(whole.model_copy(update={"results": results}), tmp_path, "evidence")) == []


def test_an_honest_failure_is_sound(tmp_path: Path) -> None:
    def fail(whole: Json) -> None:
        words = "phases/p5.py:3: error: measured 2, allowed 1; repeat with: ..."
        number = {"name": "error", "measured": 2.0, "allowed": 1.0}
        of(whole, "p5.table.last").update(verdict="FAIL", message=words, measurements=[number])
        whole["findings"] = [{"cause": "error", "checks": ["p5.table.last"], "blocks": []}]

    assert tampered(tmp_path, fail) == []


def test_a_waived_failure_is_sound(tmp_path: Path) -> None:
    def waive(whole: Json) -> None:
        number = {"name": "error", "measured": 2.0, "allowed": 1.0}
        wrong = {"verdict": "WAIVED", "message": "error: measured 2, allowed 1", "measurements": [number]}
        of(whole, TABLE).update(wrong, waiver=WAIVER)

    assert tampered(tmp_path, waive) == []


TABLE = "p5.table.last"


def _installed(command: str) -> str:
    """The command that repeats a check, as an installed suite has it."""
    return command.replace("pytest ", "pytest --pyargs ").replace("phases/p5.py", "phases.p5")


KNOWN = {"reason": "x", "issue": "https://example.org", "expires": "2027-01-01"}
WAIVER = KNOWN | {"verdict": "FAIL", "owner": "@me"}
CHANGES: dict[str, tuple[Callable[[Json], object], str]] = {
    "absent": (lambda r: r["results"].pop(0), "p1.bf16.matmul: is must-pass on sm120 and has no result"),
    "family absent": (lambda r: r.update(results=r["results"][:3] + r["results"][5:]), "p4.oracle: 2 checks are must-"),
    "twice": (lambda r: r["results"].append(r["results"][0]), "p1.bf16.matmul: has 2 results"),
    "unknown id": (lambda r: r["results"].append(r["results"][0] | {"id": "p4.gone.x"}), "p4.gone.x: is not a check"),
    "state": (lambda r: r.update(state="running"), "state is 'running'"),
    "future": (
        lambda r: r.update(time_utc="2099-01-01T00:00:00Z", run_id="20990101T000000Z-sm120-beef"),
        "2099-01-01T00:00:00Z is not between",
    ),
    "run id": (lambda r: r.update(run_id="20261101T010000Z-sm120-beef"), "does not have the time of"),
    "placeholder": (lambda r: r["environment"].update(vllm="unknown"), "vllm is 'unknown', which says nothing"),
    "blank": (lambda r: r["environment"].update(os=" "), "os is ' ', which says nothing"),
    "no torch": (lambda r: r["environment"].update(torch="not installed"), "torch is 'not installed'"),
    "fusion": (lambda r: r["environment"].update(variables={}), "TRITON_DEFAULT_FP_FUSION is 'unset'"),
    "interpreter": (
        lambda r: r["environment"]["variables"].update(TRITON_INTERPRET="1"),
        "TRITON_INTERPRET=1 emulated the kernels",
    ),
    "no GPU": (lambda r: r["environment"].update(gpu=None), "target is sm120, but the GPU is None"),
    "another GPU": (lambda r: r["environment"]["gpu"].update(sm=90), "but the GPU is Sample GPU 120 (sm90)"),
    "CPU build": (lambda r: r["environment"].update(torch="2.13.0+cpu"), "torch 2.13.0+cpu is a CPU build"),
    "digest": (lambda r: r["subject"].update(content_sha256="0" * 64), "content_sha256 '000"),
    "gate": (lambda r: of(r, TABLE).update(gate="soft"), f"{TABLE}: gate is soft, but the catalogue has hard"),
    "evidence": (lambda r: of(r, TABLE).update(evidence="emulated"), f"{TABLE}: evidence is emulated"),
    "seed": (lambda r: of(r, TABLE).update(seed=1), f"{TABLE}: seed is 1, but seed 7 of the run makes it"),
    "run's seed": (lambda r: r.update(seed=8), f"{TABLE}: seed is"),
    "repeat without --pyargs": (
        lambda r: of(r, TABLE).update(repeat=_installed(of(r, TABLE)["repeat"]).replace(" --pyargs", "")),
        "which does not repeat it: it needs pytest --pyargs 'phases.p5::",
    ),
    "repeat": (lambda r: of(r, TABLE).update(repeat="python -m pytest"), f"{TABLE}: repeat is 'python -m pytest'"),
    "outside": (
        lambda r: of(r, TABLE)["measurements"][0].update(measured=2),
        f"{TABLE}: PASS, but error: measured 2 is outside the allowed 1e-06",
    ),
    "NaN": (lambda r: of(r, TABLE)["measurements"][0].update(measured="NaN"), "PASS, but error: measured nan is"),
    "no bound": (lambda r: of(r, TABLE)["measurements"][0].update(allowed="Infinity"), "allowed inf, which is not a"),
    "nothing measured": (lambda r: of(r, TABLE).update(measurements=[]), f"{TABLE}: PASS without a measurement"),
    "a failure turned round": (lambda r: of(r, TABLE).update(message="is wrong"), f"{TABLE}: PASS with a message"),
    "no message": (lambda r: of(r, TABLE).update(verdict="FAIL"), f"{TABLE}: FAIL without a message"),
    "failed for nothing": (
        lambda r: of(r, TABLE).update(verdict="FAIL", message="error: measured 2, allowed 1"),
        "but every measurement is inside its bound",
    ),
    "another number": (
        lambda r: of(r, TABLE).update(
            verdict="FAIL", message="error: measured 2, allowed 1",
            measurements=[{"name": "error", "measured": 3, "allowed": 1}],
        ),
        "but the failed measurement is error: measured 3",
    ),
    "no blocker": (
        lambda r: of(r, TABLE).update(verdict="BLOCKED", by="p1.bf16.matmul"),
        f"{TABLE}: BLOCKED by p1.bf16.matmul, which is PASS here",
    ),
    "no finding": (
        lambda r: of(r, TABLE).update(verdict="FAIL", message="is wrong"), f"{TABLE}: failed and is in no finding"
    ),
    "finding": (
        lambda r: r.update(findings=[{"cause": "x", "checks": [TABLE], "blocks": []}]),
        f"{TABLE}: is in a finding, but did not fail",
    ),
    "known, but passed": (
        lambda r: of(r, TABLE).update(deviation=KNOWN),
        f"{TABLE}: PASS with the known deviation 'x', which only a FAIL can be",
    ),
    "known, but bundled": (
        lambda r: of(r, TABLE).update(verdict="FAIL", message="is wrong", deviation=KNOWN),
        f"{TABLE}: is called a known deviation, but the bundled subject may have none",
    ),
    "known, but expired": (
        lambda r: of(r, TABLE).update(
            verdict="FAIL", message="is wrong", deviation=KNOWN | {"expires": "2026-10-31"}
        ),
        f"{TABLE}: is called a known deviation until 2026-10-31, which was before the run",
    ),
    "waived without a waiver": (
        lambda r: of(r, TABLE).update(verdict="WAIVED", message="is wrong"), f"{TABLE}: WAIVED with the waiver None"
    ),
    "waived, but passed": (
        lambda r: of(r, TABLE).update(waiver=WAIVER),
        f"{TABLE}: PASS with the waiver {{'reason': 'x'",
    ),
    "waived, but expired": (
        lambda r: of(r, TABLE).update(
            verdict="WAIVED", message="is wrong", waiver=WAIVER | {"expires": "2026-10-31"}
        ),
        f"{TABLE}: is waived until 2026-10-31, which was before the run",
    ),
    "waived, but of another subject": (
        lambda r: (
            of(r, TABLE).update(verdict="WAIVED", message="is wrong", waiver=WAIVER),
            r["subject"].update(source="checkout:theirs"),
        ),
        f"{TABLE}: is waived, but only failures of the bundled subject can be",
    ),
    "waived, but of the machine": (
        lambda r: of(r, TABLE).update(verdict="WAIVED", message="is busy", waiver=WAIVER | {"verdict": "INFRA"}),
        "results.8.waiver.verdict: Input should be <Verdict.FAIL: 'FAIL'>, <Verdict.CRASH: 'CRASH'> or <Verdict.TIME",
    ),
    "waived in a finding": (
        lambda r: (
            of(r, TABLE).update(verdict="WAIVED", message="is wrong", waiver=WAIVER),
            r.update(findings=[{"cause": "x", "checks": [TABLE], "blocks": []}]),
        ),
        f"{TABLE}: is in a finding, but did not fail",
    ),
    "waived for nothing": (
        lambda r: of(r, TABLE).update(verdict="WAIVED", message="error: measured 2, allowed 1", waiver=WAIVER),
        "but every measurement is inside its bound",
    ),
    "two findings": (
        lambda r: r.update(findings=[{"cause": name, "checks": [TABLE], "blocks": []} for name in "xy"]),
        f"{TABLE}: is in 2 findings",
    ),
    "blocks": (
        lambda r: r.update(findings=[{"cause": "x", "checks": [TABLE], "blocks": ["p1.bf16.matmul"]}]),
        "p1.bf16.matmul: is said to be blocked by the finding 'x', but is not",
    ),
    "absent without a word": (lambda r: of(r, TABLE).update(verdict="ABSENT"), f"{TABLE}: ABSENT without a message"),
    "aspect": (lambda r: of(r, TABLE).update(aspect="d=64"), f"{TABLE}: PASS with the aspect 'd=64'"),
    "skip": (lambda r: of(r, TABLE).update(verdict="SKIP", code="VRAM"), "SKIP(VRAM) counts as absent"),
    "no GPU wanted": (lambda r: of(r, TABLE).update(verdict="SKIP", code="NO_GPU"), "of a check that needs no GPU"),
    "another model": (
        lambda r: r.update(schema_version=2), "has schema version 2, but this suite reads 1; use the suite that wrote"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_one_change_is_one_named_problem(tmp_path: Path, name: str) -> None:
    change, words = CHANGES[name]
    found = tampered(tmp_path, change)
    assert any(words in one for one in found), found


def test_an_emulated_record_cannot_claim_hardware(tmp_path: Path) -> None:
    found = tampered(tmp_path, lambda r: of(r, TABLE).update(evidence="hardware"), "emulated")
    assert f"{TABLE}: evidence is hardware, but must be emulated in this record" in found


@pytest.mark.parametrize("content", ["", "{", '{"schema_version": 1}', "[]", "\x00\xff"])
def test_what_is_no_record_is_a_problem_and_the_others_are_still_read(tmp_path: Path, content: str) -> None:
    (tmp_path / "broken.json").write_text(content)
    good = write(sound(), tmp_path, "evidence")
    (found,) = checker.examine([tmp_path / "broken.json", good], catalogue())
    assert found.record == str(tmp_path / "broken.json")


def test_a_name_twice_in_one_object_is_a_problem(tmp_path: Path) -> None:
    path = write(sound(), tmp_path, "evidence")
    path.write_text(path.read_text().replace('"verdict": "PASS"', '"verdict": "FAIL",\n"verdict": "PASS"', 1))
    assert problems(path) == [": has 'verdict' twice in one object"]


def test_a_record_in_the_folder_of_another_gpu_is_a_problem(tmp_path: Path) -> None:
    made = write(sound(), tmp_path, "evidence")
    other = tmp_path / "sm90" / "record.json"
    other.parent.mkdir()
    made.rename(other)
    assert problems(other) == [": target is sm120, but its folder is sm90"]


def test_several_records_are_merged_unless_they_contradict_each_other(tmp_path: Path) -> None:
    whole = sound()
    first = whole.model_copy(update={"results": whole.results[:3]})
    rest = sound(minute=5, name="cafe").model_copy(update={"results": whole.results[3:]})
    paths = [write(one, tmp_path, "evidence") for one in (first, rest)]
    assert problems(*paths) == []
    assert "are must-pass on sm120 and have no result" in problems(paths[0])[0]
    again = write(whole.model_copy(update={"run_id": "20261101T000001Z-sm120-0123"}), tmp_path, "evidence")
    assert any("more results of" in one for one in problems(*paths, again))
    subject = whole.subject.model_copy(update={"content_sha256": SHA[::-1]})
    other = write(rest.model_copy(update={"subject": subject}), tmp_path, "runs")
    assert any("subject.content_sha256 is" in one and "cannot be merged" in one for one in problems(paths[0], other))


def test_the_run_beside_a_record_must_tell_the_same(tmp_path: Path) -> None:
    made = sound()
    path = write(made, tmp_path)
    whole = made.model_dump(mode="json")
    names = ("run_id", "time_utc", "target", "environment", "instrument_sha256", "seed", "selection")
    manifest = {name: whole[name] for name in names} | {"subject_info": whole["subject"]}
    manifest["selected"] = [{"id": one.id} for one in made.results]
    events = [{"event": "start", "id": TABLE}, *({"event": "result", "result": one} for one in whole["results"])]
    (path.parent / "run.json").write_text(json.dumps(manifest))
    (path.parent / "events.jsonl").write_text("".join(f"{json.dumps(one)}\n" for one in events) + '{"torn')
    assert problems(path) == []
    of(whole, TABLE)["measurements"][0]["measured"] = 1e-9
    path.write_text(json.dumps(whole))
    assert problems(path) == [f"{TABLE}: the PASS result differs from its events.jsonl"]
    (path.parent / "run.json").write_text(json.dumps(manifest | {"instrument_sha256": SHA[::-1]}))
    assert ": instrument_sha256 differs from its run.json" in problems(path)


def test_the_published_records_have_no_problem_but_what_they_lack() -> None:
    known = list(whole_catalogue())
    for path in sorted((REPOSITORY / "reports" / "evidence").rglob("*.json")):
        assert [one for one in checker.examine([path], known) if "must-pass" not in one.problem] == []


def test_a_compilation_passes_only_what_it_built(tmp_path: Path) -> None:
    (published,) = (REPOSITORY / "reports" / "evidence" / "sm120").glob("*-compiled-*.json")
    whole = json.loads(published.read_text())
    case = whole["results"][0]["id"].rpartition(".")[2]
    for build in whole["compilation"]["builds"]:
        if case in build["variants"]:
            build |= {
                "verdict": "CRASH",
                "message": "died",
                "resources": None,
                "ptx_sha256": None,
                "cubin_sha256": None,
            }
    path = tmp_path / published.name
    path.write_text(json.dumps(whole))
    found = checker.examine([path], list(whole_catalogue()))
    assert any(f"of {case} was not built" in one.problem for one in found)


def test_the_verb_answers_in_words_json_and_exit_codes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (published,) = (REPOSITORY / "reports" / "evidence" / "sm120").glob("*-compiled-*.json")
    assert checker.check([published.stem]) == 0
    assert capsys.readouterr().out.startswith("sound: ")
    broken = tmp_path / "broken.json"
    broken.write_text(published.read_text()[:999])
    assert checker.check([str(broken)]) == 1
    assert "is cut off or not JSON" in capsys.readouterr().out
    for form, told in (
        ("utf-8-sig", ""),
        ("utf-16", ""),
        ("utf-16-le", "line 1 has a NUL character; save it as UTF-8"),
    ):
        saved = tmp_path / "saved.json"
        saved.write_bytes(published.read_text().encode(form))
        assert checker.check([str(saved)]) == bool(told)
        assert (told or "sound: ") in capsys.readouterr().out
        with pytest.raises(UnreadableRecord, match=told) if told else nullcontext():
            assert read_record(saved) == read_record(published)
    saved.write_text(published.read_text().replace('"verdict": "PASS"', '"verdict": "FAIL",\n"verdict": "PASS"', 1))
    with pytest.raises(UnreadableRecord, match="has 'verdict' twice in one object"):
        read_record(saved, unique=True)
    assert checker.check([str(saved)]) == 1
    capsys.readouterr()
    assert checker.check([str(broken)], as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["problems"][0]["record"] == str(broken)
