"""pytest as the instrument: what it collects, refuses, orders and records."""

from __future__ import annotations

from pathlib import Path

import pytest

from verify.machine.environment import localise
from verify.tests.tree import Tree, make_tree

_PASSES = """
@check("p{phase}.passes", gate="{gate}", cases="one", **WORDS)
def test_passes(case): pass
"""


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return make_tree(tmp_path)


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        (
            _PASSES.format(phase=2, gate="hard"),
            "phases/p1_tiny.py::test_passes[one] declares p2.passes; move it to the file of phase 2",
        ),
        ("def test_naked(): pass", "phases/p1_tiny.py::test_naked has no gate; declare it with @verify.check"),
        (
            "@pytest.mark.soft" + _PASSES.format(phase=1, gate="hard"),
            "phases/p1_tiny.py::test_passes[one] has the gates hard and soft; drop one",
        ),
        (
            "@pytest.mark.skipif(True, reason='x')" + _PASSES.format(phase=1, gate="hard"),
            "phases/p1_tiny.py::test_passes[one] is marked skipif; use verify.skip with a code",
        ),
        (
            "@pytest.mark.slow" + _PASSES.format(phase=1, gate="hard"),
            "phases/p1_tiny.py::test_passes[one] is hard and slow, but a run leaves out slow checks; make it fast,"
            " or soft",
        ),
        (
            "@pytest.mark.parametrize('more', [1, 2])"
            + _PASSES.format(phase=1, gate="hard").replace("case)", "case, more)"),
            "test_passes[one-1] is parametrized outside its cases; list every combination in cases",
        ),
    ],
)
def test_a_test_that_is_not_one_gated_check_stops_everything(tree: Tree, body: str, complaint: str) -> None:
    tree.write_phase(1, body)
    refused = tree.pytest("phases")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert complaint in refused.stderr
    assert not (tree.root / "reports").exists()


def test_numeric_phases_run_in_an_order_of_the_seed_and_the_others_as_declared(tree: Tree) -> None:
    cases = _PASSES.format(phase="{phase}", gate="hard").replace('cases="one"', "cases={{n: n for n in 'abcdefgh'}}")
    for phase in (2, 4):
        tree.write_phase(phase, cases.format(phase=phase))

    def order(*options: str) -> list[str]:
        printed = tree.pytest("phases", "--collect-only", "-q", *options).stdout
        return [line for line in printed.splitlines() if "::" in line]

    first = order()
    assert first == order() != order("--seed=1")
    assert [line[-2] for line in first[:8]] == [*"abcdefgh"] != [line[-2] for line in first[8:]]
    # what is left of a run goes in the same order as the whole
    assert order("-k", "[a] or [c] or [e] or [f]") == [line for line in first if line[-2] in "acef"]


def test_a_conftest_in_a_folder_of_other_tests_does_no_harm(tree: Tree) -> None:
    tree.write_phase(1, _PASSES.format(phase=1, gate="hard"))
    others = tree.root / "triattention" / "tests"
    others.mkdir()
    (others / "conftest.py").write_text("")
    (others / "test_other.py").write_text("def test_other(): pass\n")
    passed = tree.pytest("phases", "triattention/tests")
    assert passed.returncode == 0, passed.stdout
    assert "2 passed" in passed.stdout


def test_a_run_without_a_gpu_leaves_slow_checks_to_who_asks_for_them(tree: Tree) -> None:
    slow = _PASSES.replace("passes", "is_slow").format(phase=1, gate="soft")
    tree.write_phase(1, _PASSES.format(phase=1, gate="hard") + "\n@pytest.mark.slow" + slow)
    assert tree.verify("run", "--device", "cpu").returncode == 0
    assert tree.results().keys() == {"p1.passes.one"}
    assert tree.records()[-1].selection == "-m 'not slow'"
    assert tree.verify("run", "--device", "cpu", "-m", "slow").returncode == 0
    assert tree.results().keys() == {"p1.is_slow.one"}


def test_checks_under_the_sanitizer_run_only_where_they_are_asked_for(tree: Tree) -> None:
    under = _PASSES.replace("passes", "under").format(phase=1, gate="soft")
    tree.write_phase(1, _PASSES.format(phase=1, gate="hard") + "\n@pytest.mark.sanitize" + under)
    collected = tree.pytest("phases", "--device", "cpu", "--collect-only", "-q").stdout
    assert "test_passes" in collected
    assert "test_under" not in collected
    assert tree.verify("run", "--device", "cpu", "--sanitize").returncode == 0
    assert tree.results().keys() == {"p1.passes.one", "p1.under.one"}
    assert tree.results()["p1.under.one"].repeat.endswith("--sanitize")


def test_the_runner_refuses_an_ungated_test_too(tree: Tree) -> None:
    tree.write_phase(1, "def test_naked(): pass")
    refused = tree.verify("run", "--device", "cpu")
    assert refused.returncode == 3
    assert "phases/p1_tiny.py::test_naked has no gate" in refused.stderr


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    """Two phases and, before them in the alphabet, a unit test."""
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    for phase, gate in ((1, "hard"), (2, "soft"), (3, "hard")):
        tree.write_phase(phase, _PASSES.format(phase=phase, gate=gate))
    (tree.root / "a_unit").mkdir()
    (tree.root / "a_unit" / "test_unit.py").write_text("def test_unit(device): assert device == 'cpu'\n")
    return tree


def test_unit_tests_alone_leave_no_record(mixed: Tree) -> None:
    before = len(mixed.records())
    done = mixed.pytest("a_unit", "--device", "cpu")
    assert (done.returncode, len(mixed.records())) == (0, before), done.stdout


def test_checks_run_first_in_phase_order_and_only_they_are_recorded(mixed: Tree) -> None:
    done = mixed.pytest("a_unit", "phases/p3_tiny.py", "phases", "-v", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    ran = [line.split("::")[0] for line in done.stdout.splitlines() if " PASSED" in line]
    assert ran == ["phases/p1_tiny.py", "phases/p2_tiny.py", "phases/p3_tiny.py", "a_unit/test_unit.py"]
    assert list(mixed.results()) == ["p1.passes.one", "p2.passes.one", "p3.passes.one"]
    assert mixed.records()[-1].state == "complete"


def test_phase_and_gate_select(mixed: Tree) -> None:
    done = mixed.pytest("phases", "a_unit", "--phase", "2-3", "--phase", "1", "-m", "soft", "--device", "cpu")
    assert (done.returncode, list(mixed.results())) == (0, ["p2.passes.one"]), done.stdout
    assert mixed.records()[-1].selection == "pytest -m soft --phase 2-3,1 phases a_unit"


def test_a_run_that_stops_early_is_interrupted_and_the_runner_finishes_it(tree: Tree) -> None:
    tree.write_phase(1, _PASSES.format(phase=1, gate="hard").replace("pass\n", "assert case == 'two', 'no'\n"))
    tree.write_phase(2, _PASSES.format(phase=2, gate="hard"))
    done = tree.pytest("-x", "phases", "--device", "cpu")
    assert done.returncode == 1
    assert (tree.records()[-1].state, list(tree.results())) == ("interrupted", ["p1.passes.one"])
    resumed = tree.verify("run", "--resume", tree.records()[-1].run_id)
    assert resumed.returncode == 1, "p1 has failed before"
    assert [result.verdict for result in tree.results().values()] == ["FAIL", "PASS"]


_ABORTS = """
@check("p3.aborts", gate="hard", cases={{"fails": 0, "passes": 1, "aborts": 2}}, **WORDS)
def test_aborts(case):
    assert case, "no"
    if case == 2: os.abort()
"""


def test_an_abort_leaves_a_record_with_the_results_so_far(tree: Tree) -> None:
    tree.write_phase(1, _PASSES.format(phase=1, gate="hard"))
    tree.write_phase(3, _ABORTS.format())
    assert tree.pytest("phases", "--device", "cpu").returncode < 0
    record = tree.records()[-1]
    assert (record.state, [result.id for result in record.results]) == ("running", ["p1.passes.one", "p3.aborts.fails"])


_ASKS = """
@check("p1.asks", gate="hard", cases="one", **WORDS)
def test_asks(case, subject):
    import subprocess
    assert subject.module().WHO == "theirs"
    program = "import triattention; print(triattention.WHO)"
    command = [subject.command()[0], "-c", program]
    assert subprocess.check_output(command, env=subject.environment(), text=True) == "theirs\\n"
"""


def test_another_checkout_stands_in_for_the_bundled_subject(tree: Tree) -> None:
    tree.write_phase(1, _ASKS)
    theirs = tree.root / "elsewhere" / "theirs"
    (theirs / "triattention").mkdir(parents=True)
    (theirs / "triattention" / "__init__.py").write_text("WHO = 'theirs'\n")
    (tree.root / "triattention" / "tests").mkdir()
    (tree.root / "triattention" / "tests" / "test_ours.py").write_text("from triattention import __version__\n")
    done = tree.pytest(".", f"--subject={theirs}", "--device", "cpu")
    assert done.returncode == 0, done.stdout
    record = tree.records()[-1]
    assert (record.subject.source, record.subject.version) == ("checkout:theirs", "unknown")
    assert record.results[0].repeat.endswith("--subject=elsewhere/theirs")
    assert tree.verify("run", "--device", "cpu", "--subject", "elsewhere/theirs").returncode == 0


_TELLS = """
@check("p1.tells", gate="hard", cases="one", **WORDS)
def test_tells(case, subject, model_name):
    import platform
    raise OSError(f"{subject.root}/x and {model_name}/y on {platform.node()}")
"""


def test_a_record_names_neither_the_subject_s_place_nor_the_model_s_nor_the_host(tree: Tree) -> None:
    tree.write_phase(1, _TELLS)
    theirs, model = tree.root / "elsewhere", tree.root / "a" / "model"
    (theirs / "triattention").mkdir(parents=True)
    (theirs / "triattention" / "__init__.py").touch()
    model.mkdir(parents=True)
    tree.pytest("phases", f"--subject={theirs}", f"--model={model}", "--device", "cpu")
    message = tree.results()["p1.tells.one"].message
    assert message.endswith("OSError: <subject>/x and <model>/y on <host>"), message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--phase", "9"], "'9' is not a phase"),
        (["--subject=nowhere"], "subject 'nowhere': there is no directory"),
        (["--device=cpu", "--expect", "sm120"], "--expect sm120, but this machine has no GPU that torch can use"),
        (["-p", "xdist", "-n", "2"], "-n would spread the checks of phases/ over processes, but a run is one process"),
    ],
)
def test_options_that_cannot_be_met_are_usage_errors(mixed: Tree, arguments: list[str], complaint: str) -> None:
    before = len(mixed.records())
    refused = mixed.pytest("phases", *arguments)
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR, refused.stdout
    assert complaint in refused.stderr
    assert len(mixed.records()) == before


@pytest.mark.parametrize("node", ["box7.example.org", "box7"])
def test_a_host_name_is_replaced_as_a_word(monkeypatch: pytest.MonkeyPatch, node: str) -> None:
    monkeypatch.setattr("platform.node", lambda: node)
    assert localise(f"on {node}, on box7. box70 in-box7", Path("/nowhere")) == "on <host>, on <host>. box70 in-box7"
