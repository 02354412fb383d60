"""``python -m verify run`` on tiny phases, in real processes: verdicts, crashes, interruption and resumption."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from verify.checks import catalogue
from verify.record.schema import CheckResult, Verdict
from verify.run.manifest import Selected
from verify.run.runner import exit_code, lanes_of
from verify.tests.tree import Tree, make_tree

_VERDICTS = """
@check("p1.values", gate="hard", cases={"good": 1.0, "bad": 2.0}, plan="1.3", **WORDS)
def test_values(case, measure, seed, device, target):
    assert (device, target) == ("cpu", "emulated")
    measure("error", case, 1.5, unit="ms", where=f"row 3 of {Path(__file__).parent}")

@check("p1.needs", gate="hard", cases="family", needs=("p1.values",), **WORDS)
def test_needs(case): raise RuntimeError("a blocked check must not run")

@check("p1.soft", gate="soft", cases={"coded": 0, "bare": 1, "unknown": 2, "infra": 3, "error": 4}, **WORDS)
def test_soft(case):
    if case == 0: skip("VRAM", "too small")
    if case == 1: pytest.skip("because")
    if case == 2: skip("NOPE", "no such code")
    if case == 3: raise InfraError("the driver is broken")
    raise ValueError(f"cannot read {Path(__file__)}")

@check("p1.gpu", gate="hard", cases="only", needs_gpu=True, **WORDS)
def test_gpu(case): raise RuntimeError("must not run without a GPU")

@check("p1.teardown", gate="soft", cases="only", **WORDS)
def test_teardown(case, broken): pass

@pytest.fixture
def broken():
    yield
    raise OSError("cannot clean up")
"""

_ACROSS = """
@check("p2.across", gate="hard", cases="id", needs=("p1.needs.family",), **WORDS)
def test_across(case): raise RuntimeError("a blocked check must not run")

@check("p2.lacks", gate="hard", cases="name", **WORDS)
def test_lacks(case, subject): subject.attribute("methods.pruning_utils", "load")

@check("p2.raises", gate="hard", cases={"subject": "parse", "suite": "call"}, **WORDS)
def test_raises(case, subject):
    def called(): raise ValueError("this is the suite's own")
    subject.attribute("", case)("x" if case == "parse" else called)

@check("p2.late", gate="hard", cases="python", timeout_s=0.5, **WORDS)
def test_late(case): time.sleep(60)

@check("p2.waits", gate="soft", cases={name: name for name in ("answer", "command", "subject", "told")}, **WORDS)
def test_waits(case, subject):
    if case == "answer":
        raise TimeoutError("no answer within 1 s")
    if case == "subject":
        subject.attribute("", "late")()
    if case == "told":
        try:
            subject.attribute("", "late")()
        except TimeoutError as error:
            raise AssertionError("the subject raised") from error
    try:
        subprocess.run(["sleep", "60"], timeout=0.1)
    except subprocess.TimeoutExpired as error:
        raise AssertionError("sleep did not end") from error
"""

_ABORTS = """
@check("p3.before", gate="hard", cases="one", **WORDS)
def test_before(case): pass

@check("p3.aborts", gate="soft", cases="one", **WORDS)
def test_aborts(case):
    print("LLVM ERROR: cannot select", flush=True)
    os.abort()

@check("p3.after", gate="hard", cases="one", **WORDS)
def test_after(case): pass
"""

_HANGS = """
@check("p4.hangs", gate="hard", cases="one", timeout_s=0.5, **WORDS)
def test_hangs(case):
    # native code that never returns looks like this: the alarm of pytest-timeout does not get through
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    while True: time.sleep(60)

@check("p4.after", gate="hard", cases="one", **WORDS)
def test_after(case): pass
"""

_FINE = """
@check("p5.fine", gate="hard", cases="one", **WORDS)
def test_fine(case): pass
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    for phase, body in enumerate((_VERDICTS, _ACROSS, _ABORTS, _HANGS, _FINE), start=1):
        tree.write_phase(phase, body)
    return tree


@pytest.fixture(scope="module")
def output(tree: Tree) -> str:
    done = tree.verify("run", "--device", "cpu", "--seed", "7")
    assert done.returncode == 1, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def results(tree: Tree, output: str) -> dict[str, CheckResult]:
    return tree.results()


@pytest.mark.parametrize(
    ("check_id", "verdict", "detail"),
    [
        ("p1.values.good", "PASS", None),
        ("p1.values.bad", "FAIL", None),
        ("p1.needs.family", "BLOCKED", "p1.values.bad"),
        ("p1.soft.coded", "SKIP", "VRAM"),
        ("p1.soft.bare", "ERROR", None),
        ("p1.soft.unknown", "ERROR", None),
        ("p1.soft.infra", "INFRA", None),
        ("p1.soft.error", "ERROR", None),
        ("p1.gpu.only", "SKIP", "NO_GPU"),
        ("p1.teardown.only", "ERROR", None),
        ("p2.across.id", "BLOCKED", "p1.values.bad"),
        ("p2.lacks.name", "ABSENT", None),
        ("p2.raises.subject", "FAIL", None),
        ("p2.raises.suite", "ERROR", None),
        ("p2.late.python", "TIMEOUT", None),
        ("p2.waits.answer", "TIMEOUT", None),
        ("p2.waits.command", "TIMEOUT", None),
        ("p2.waits.subject", "FAIL", None),
        ("p2.waits.told", "FAIL", None),
        ("p3.before.one", "PASS", None),
        ("p3.aborts.one", "CRASH", None),
        ("p3.after.one", "BLOCKED", "p3.aborts.one"),
        ("p4.hangs.one", "TIMEOUT", None),
        ("p4.after.one", "BLOCKED", "p4.hangs.one"),
        ("p5.fine.one", "PASS", None),
    ],
)
def test_every_ending_has_its_verdict(
    results: dict[str, CheckResult], check_id: str, verdict: str, detail: str | None
) -> None:
    result = results[check_id]
    assert (result.verdict, result.code or result.by) == (verdict, detail), result.message


def test_a_failed_measurement_says_everything_and_nothing_about_the_machine(results: dict[str, CheckResult]) -> None:
    result = results["p1.values.bad"]
    assert result.repeat == "python -m pytest 'phases/p1_tiny.py::test_values[bad]' --device cpu --seed 7"
    assert re.fullmatch(
        r"phases/p1_tiny\.py:\d+: error: measured 2 ms, allowed 1\.5 ms at row 3 of \S*phases; repeat with: "
        + re.escape(result.repeat),
        result.message,
    )
    assert [(m.name, m.measured, m.allowed) for m in result.measurements] == [("error", 2.0, 1.5)]


def test_what_the_subject_raises_is_its_failure_with_the_line(results: dict[str, CheckResult]) -> None:
    assert re.fullmatch(
        r"phases/p2_tiny\.py:\d+: the subject raised JSONDecodeError at triattention/__init__\.py:3: Expecting .*",
        results["p2.raises.subject"].message,
    )


def test_messages_hold_no_path_of_the_machine(tree: Tree, results: dict[str, CheckResult]) -> None:
    places = [str(tree.root), str(tree.root.parent), "/site-packages/_pytest"]
    assert [(r.id, r.message) for r in results.values() for place in places if place in r.message] == []


def test_a_crash_shows_the_last_words_of_the_library(results: dict[str, CheckResult]) -> None:
    message = results["p3.aborts.one"].message
    assert message.startswith("the process died of signal 6 (Aborted) during this check")
    assert "LLVM ERROR: cannot select" in message
    assert 'File "phases/p3_tiny.py"' in message


def test_a_hang_shows_where_it_hung(results: dict[str, CheckResult]) -> None:
    assert re.search(r'File "phases/p4_tiny\.py", line \d+ in test_hangs', results["p4.hangs.one"].message)


def test_output_has_a_plain_line_per_phase_and_per_failure(output: str) -> None:
    assert re.search(r"^phase 3 compile: 1 passed, 1 crashed, 1 blocked \(\d+\.\d s\)$", output, re.MULTILINE)
    assert re.search(r"^  CRASH p3\.aborts\.one \(soft\): the process died", output, re.MULTILINE)
    assert re.search(r"^record: reports/runs/\S+/record\.json$", output, re.MULTILINE)


def test_the_record_is_complete_and_in_order(tree: Tree, results: dict[str, CheckResult]) -> None:
    record = tree.records()[-1]
    assert (record.state, record.target, record.seed) == ("complete", "emulated", 7)
    assert (record.subject.version, record.subject.source, record.subject.git_sha) == ("9.9", "bundled", "none")
    assert [result.id[:2] for result in record.results] == sorted(result.id[:2] for result in record.results)
    assert record.environment.variables["TRITON_INTERPRET"] == "1"
    assert record.duration_s > 1


def test_pytest_in_one_process_has_the_runner_s_verdicts(tree: Tree, results: dict[str, CheckResult]) -> None:
    done = tree.pytest("-m", "hard", "--phase", "1,2", "--seed", "7", "--device", "cpu")
    assert done.returncode == 1
    hard = [result for result in results.values() if result.gate == "hard" and result.id[1] in "12"]
    untimed = {"duration_s": 0.0}
    assert [r.model_copy(update=untimed) for r in tree.results().values()] == [
        r.model_copy(update=untimed) for r in hard
    ]
    assert "record: reports/runs/" in done.stdout
    assert "this verifies no GPU" in " ".join(done.stdout.split())


_WAITS = """
@check("p2.waits", gate="hard", cases={"a": 0, "b": 1}, **WORDS)
def test_waits(case):
    if case and not Path("go").exists():
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        while True: time.sleep(60)
"""


def test_an_interrupted_run_is_resumed_and_finishes_the_same_record(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _FINE.replace("p5", "p1"))
    tree.write_phase(2, _WAITS)
    printed = _interrupt_twice(tree, "run", "--device", "cpu")
    (record,) = tree.records()
    assert (record.state, [result.id for result in record.results]) == ("interrupted", ["p1.fine.one", "p2.waits.a"])
    assert f"resume with: python -m verify run --resume {record.run_id}" in printed

    package = tree.root / "triattention" / "__init__.py"
    text = package.read_text()
    package.write_text(text + "# changed\n")
    refused = tree.verify("run", "--resume", record.run_id, "--expect", "sm120")
    assert refused.returncode == 3
    assert f"--expect sm120, but run {record.run_id} is for emulated; " in refused.stderr
    refused = tree.verify("run", "--resume", record.run_id)
    assert refused.returncode == 3
    assert re.search(r"cannot be resumed: the subject's content was \w{12} and is now \w{12}", refused.stderr)
    package.write_text(text)

    (tree.root / "go").touch()
    done = tree.verify("run", "--resume", record.run_id)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 of 3 checks are left" in done.stdout
    (record,) = tree.records()
    assert (record.state, len(record.results)) == ("complete", 3)
    starts = [event["id"] for event in tree.events() if event["event"] == "start"]
    assert starts == ["p1.fine.one", "p2.waits.a", *["p2.waits.b"] * 2]

    again = tree.verify("run", "--resume", str(tree.root / "reports" / "runs" / record.run_id))
    assert (again.returncode, "is complete" in again.stdout) == (0, True)


def _interrupt_twice(tree: Tree, *arguments: str) -> str:
    """Start a run, ask it to stop while p2.waits.b takes no notice, ask again, and return what it printed."""
    running = tree.start_verify(*arguments)
    _wait_until(lambda: any(event.get("id") == "p2.waits.b" for event in tree.events()))
    begun = time.monotonic()
    for number in (signal.SIGINT, signal.SIGTERM):
        running.send_signal(number)
        time.sleep(0.4)
    printed, _ = running.communicate(timeout=30)
    assert running.returncode == 2, printed
    # being asked twice, it did not try the gentle ways for the 8 s that they may take
    assert time.monotonic() - begun < 7
    return printed


def _wait_until(happened: Callable[[], bool], limit_s: float = 30.0) -> None:
    until = time.monotonic() + limit_s
    while not happened():
        assert time.monotonic() < until, f"nothing happened within {limit_s} s"
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            ["-m", "hard and soft"],
            "no check is selected by -m 'hard and soft'; `python -m verify gates` lists them all",
        ),
        (["-m", "hard and"], "the checks cannot be collected: Wrong expression passed to '-m': hard and: at column 9"),
        (["--subject", "elsewhere"], "subject 'elsewhere': there is no directory"),
        (["--resume", "nothing"], "there is no run 'nothing' in"),
    ],
)
def test_what_cannot_be_run_is_one_sentence_exit_3_and_leaves_nothing(
    tmp_path: Path, arguments: list[str], sentence: str
) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(5, _FINE)
    refused = tree.verify("run", *arguments)
    assert refused.returncode == 3, refused.stdout
    assert refused.stderr.startswith(f"verify: {sentence}")
    assert refused.stderr.count("\n") == 1
    assert not (tmp_path / "reports").exists()


def test_a_subject_that_does_not_import_is_refused(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(5, _FINE)
    (tmp_path / "triattention" / "__init__.py").write_text("import absent_dependency\n")
    refused = tree.verify("run", "--device", "cpu")
    assert refused.returncode == 3
    assert (
        "subject 'bundled' does not import (ModuleNotFoundError: No module named 'absent_dependency')" in refused.stderr
    )
    assert not (tmp_path / "reports").exists()


#: Both wait for each other: only where they run at the same time do they end.
_MEETS = """
@check("p{phase}.meets", gate="hard", cases="other", timeout_s=20, **WORDS)
def test_meets(case):
    Path("here{phase}").touch()
    while not Path("here{other}").exists(): time.sleep(0.05)
    assert Path("first").exists(), "a phase began before the first one had ended"
"""

_FIRST = """
@check("p1.first", gate="hard", cases="one", **WORDS)
def test_first(case):
    time.sleep(0.5)
    Path("first").touch()
"""


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="one core has one lane")
def test_phase_6_runs_beside_the_others_after_the_first(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _FIRST)
    tree.write_phase(5, _MEETS.format(phase=5, other=6))
    tree.write_phase(6, _MEETS.format(phase=6, other=5))
    done = tree.verify("run", "--device", "cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = tree.records()
    assert [result.id for result in record.results] == ["p1.first.one", "p5.meets.other", "p6.meets.other"]
    assert sorted((one.phase, one.end is not None) for one in record.machine) == [(1, True), (5, True), (6, True)]
    for one in record.machine:
        assert one.end.busy_s >= one.start.busy_s
        assert one.start.cores == len(os.sched_getaffinity(0))


def test_lanes() -> None:
    checks = [Selected(id=f"p{n}.a.x", node="n", gate="hard", plan=None, timeout_s=1) for n in (7, 1, 6, 4)]
    assert lanes_of(checks, "cpu", 2) == [[1, 4, 7], [6]]
    assert lanes_of(checks, "cpu", 1) == [[1, 4, 6, 7]]
    assert lanes_of(checks, "cuda", 16) == [[1, 4, 6, 7]]
    assert lanes_of([one for one in checks if one.phase == 6], "cpu", 2) == [[6]]
    assert lanes_of([], "cpu", 2) == []
    assert lanes_of([*checks[:3], checks[3].model_copy(update={"slow": True})], "cpu", 2) == [[1, 4, 6, 7]]


def test_no_check_needs_one_of_a_phase_that_runs_beside_its_own() -> None:
    by_id = {check.id: check for check in catalogue()}
    families = {check.spec.family: check.phase for check in by_id.values()}
    for check in by_id.values():
        needed = {families.get(need) or by_id[need].phase for need in check.spec.needs}
        if check.phase == 6:
            assert needed <= {1, 6}, check.id
        else:
            assert 6 not in needed, check.id


#: Hangs until a file says that nothing is wrong any more; with ``spin`` on every core.
_HANGS_ONCE = """
@check("p1.hangs", gate="soft", cases={"python": 0, "native": 1}, timeout_s=1.5, **WORDS)
def test_hangs(case):
    if Path("mended").exists(): return
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(int(SPIN))]
    if case: signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGALRM})
    try:
        while True: time.sleep(60)
    finally:
        for process in spinning: process.kill()

@check("p1.needs", gate="hard", cases="it", needs=("p1.hangs.python",), **WORDS)
def test_needs(case): pass
"""


_NEEDS_FIRST = """
@check("p2.needs", gate="hard", cases="it", needs=("p1.hangs.python",), **WORDS)
def test_needs(case): pass
"""


def _spinners(count: int) -> list[subprocess.Popen[bytes]]:
    return [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]


def test_what_hangs_while_others_take_the_machine_is_not_judged_and_can_be_repeated(tmp_path: Path) -> None:
    tree, busy = make_tree(tmp_path), {"TREE_BUSY_SHARE": "0.5"}
    tree.write_phase(1, "import subprocess, sys\nSPIN = 0\n" + _HANGS_ONCE)
    tree.write_phase(2, _NEEDS_FIRST)
    others = _spinners(2 * len(os.sched_getaffinity(0)))
    try:
        done = tree.verify("run", "--device", "cpu", **busy)
    finally:
        for process in others:
            process.kill()
            process.wait()
    results = tree.results()
    assert done.returncode == 3, done.stdout + done.stderr
    for name in ("p1.hangs.python", "p1.hangs.native"):
        assert results[name].verdict is Verdict.INFRA, results[name].message
        assert "the machine was busy: processes outside this run took" in results[name].message
    assert (results["p1.needs.it"].verdict, results["p1.needs.it"].by) == (Verdict.BLOCKED, "p1.hangs.native")
    assert (results["p2.needs.it"].verdict, results["p2.needs.it"].by) == (Verdict.BLOCKED, "p1.hangs.python")
    command = f"python -m verify run --resume {tree.records()[-1].run_id}"
    assert done.stdout.rstrip().splitlines()[-1] == (
        "INFRA: 2 checks have no verdict because of the machine, not the subject, the first of them "
        f"p1.hangs.python; repeat them with: {command}"
    )
    (tree.root / "mended").touch()
    again = tree.verify(*command.split()[3:])
    assert (again.returncode, "4 of 4 checks are left" in again.stdout) == (0, True), again.stdout
    assert {result.verdict for result in tree.results().values()} == {Verdict.PASS}


def test_what_hangs_again_on_a_quiet_machine_is_a_timeout(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, "import subprocess, sys\nSPIN = 0\n" + _HANGS_ONCE)
    first = tree.verify("run", "--device", "cpu", TREE_BUSY_SHARE="-1")  # any machine is busy then
    assert first.returncode == 3, first.stdout
    again = tree.verify("run", "--resume", tree.records()[-1].run_id)
    assert again.returncode == 1, again.stdout
    (record,) = tree.records()
    verdicts = {result.id: result.verdict for result in record.results}
    assert verdicts["p1.hangs.python"] is verdicts["p1.hangs.native"] is Verdict.TIMEOUT
    assert [(one.phase, one.end is not None) for one in record.machine] == [(1, True)] * 2


def test_a_subject_that_spins_on_every_core_hangs_by_itself(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    spin = 2 * len(os.sched_getaffinity(0))
    tree.write_phase(1, f"import subprocess, sys\nSPIN = {spin}\n" + _HANGS_ONCE)
    # other tests beside this one may take half of the machine; were what spins taken for others', it would be all of it
    done = tree.verify("run", "--device", "cpu", TREE_BUSY_SHARE="0.95")
    results = tree.results()
    assert results["p1.hangs.python"].verdict is Verdict.TIMEOUT, results["p1.hangs.python"].message
    assert results["p1.hangs.native"].verdict is Verdict.TIMEOUT, results["p1.hangs.native"].message
    assert done.returncode == 1


_SLOW = """
@check("p1.slow", gate="hard", cases={"a": 0, "b": 1}, **WORDS)
def test_slow(case): time.sleep(1.2)
"""


def test_a_log_has_a_sign_of_life_with_the_check_and_what_is_left(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _SLOW)
    first = tree.verify("run", "--device", "cpu", TREE_HEARTBEAT_S="0.3").stdout
    assert re.search(r"^phase 1 environment: 2 checks$", first, re.MULTILINE)
    assert re.search(r"^  \.\.\. phase 1 environment 0 of 2, p1\.slow\.a for \d s$", first, re.MULTILINE), first
    assert re.search(r"^  \.\.\. phase 1 environment 1 of 2, p1\.slow\.b for \d s$", first, re.MULTILINE)
    # the second time it is known how long they take here
    second = tree.verify("run", "--device", "cpu", TREE_HEARTBEAT_S="0.3").stdout
    assert re.search(r"p1\.slow\.a for \d s; about 10 s left$", second, re.MULTILINE), second


def _result(number: int, gate: str, verdict: Verdict, by: int | None = None) -> CheckResult:
    return CheckResult(
        id=f"p1.made.c{number}", gate=gate, verdict=verdict, by=None if by is None else f"p1.made.c{by}",
        evidence="emulated", seed=0, duration_s=0, message="made", repeat="made",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("results", "strict_soft", "code"),
    [
        ([("hard", "PASS"), ("soft", "FAIL")], False, 0),
        ([("hard", "PASS"), ("soft", "FAIL")], True, 4),
        ([("hard", "FAIL"), ("soft", "FAIL")], True, 1),
        ([("hard", "INFRA"), ("soft", "PASS")], False, 3),
        ([("hard", "INFRA"), ("hard", "BLOCKED", 0)], False, 3),
        ([("hard", "INFRA"), ("hard", "CRASH")], False, 1),
        ([("soft", "CRASH"), ("hard", "BLOCKED", 0)], False, 1),
        ([("hard", "BLOCKED", 9)], False, 1),
        ([("soft", "INFRA"), ("soft", "BLOCKED", 0)], False, 3),
        ([("soft", "INFRA"), ("soft", "FAIL")], True, 3),
        ([("soft", "INFRA"), ("hard", "FAIL")], False, 1),
        ([("hard", "ABSENT")], False, 1),
        ([("hard", "REFUSED")], False, 1),
        ([("soft", "ABSENT"), ("soft", "REFUSED")], True, 0),
    ],
)
def test_exit_code(results: list[tuple], strict_soft: bool, code: int) -> None:
    made = [_result(number, result[0], Verdict(result[1]), *result[2:]) for number, result in enumerate(results)]
    assert exit_code(made, strict_soft=strict_soft) == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({}, 0),
        ({"verdict": "SKIP", "code": "SIM_UNSUPPORTED", "message": "mma.sync"}, 0),
        ({"verdict": "FAIL", "message": "measured 2, allowed 1"}, 1),
        ({"verdict": "FAIL", "message": "measured 2, allowed 1", "evidence": "emulated"}, 1),
        ({"verdict": "INFRA", "message": "no memory"}, 3),
    ],
)
def test_a_simulation_of_some_phases_ends_like_any_run(change: dict[str, str], code: int) -> None:
    kernels = [check for check in catalogue() if check.phase in (3, 4, 5) and not check.spec.needs_gpu]
    usual = {"verdict": "PASS", "evidence": "simulated", "seed": 0, "duration_s": 0, "repeat": "made"}
    first = next(check.id for check in kernels if check.spec.gate == "hard")
    made = [
        CheckResult.model_validate({"id": one.id, "gate": one.spec.gate} | usual | (change if one.id == first else {}))
        for one in kernels
    ]
    assert exit_code(made, "sm120") == code
