"""The instrument measured: planted errors that must and must not be caught, and headroom over many seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from verify import explain, sensitivity
from verify.checks import Check, CheckSpec, catalogue
from verify.errors import ConfigurationError
from verify.files import write_atomic
from verify.judge import oracle
from verify.judge.keep_set import Selection
from verify.judge.perturb import CAUGHT, TOLERATED, Limit, Plant, element, judged, planting
from verify.judge.problems import Shape, make
from verify.judge.tolerance import accuracy, matmul_error, paths_differ, trig_entry_error, worst
from verify.tests.tree import make_tree

_CASE = make(Shape(n=33, t=64), 5, "cpu").case
_EXACT = oracle.scores(_CASE)
_ANGLE = np.linspace(0, 9, 12).reshape(3, 4)
_A, _B = np.random.default_rng(0).normal(size=(2, 8, 8))

#: Each comparison with an exact result: how much of what is allowed is used up.
_COMPARISONS: dict[str, Callable[[], float]] = {
    "scores": lambda: accuracy(_EXACT, _CASE).class_b.ratio,
    "paths": lambda: paths_differ(_EXACT, _EXACT, _CASE)[1].ratio,
    "table": lambda: trig_entry_error(np.cos(_ANGLE), np.cos(_ANGLE), _ANGLE).ratio,
    "matmul": lambda: matmul_error(_A @ _B, _A, _B).ratio,
    "errors": lambda: worst(np.zeros(3), np.array([0.0, 1e-7, 2.0])).ratio,
}


@pytest.mark.parametrize("name", _COMPARISONS)
def test_an_exact_result_with_a_planted_error_is_off_by_just_that(name: str) -> None:
    compare = _COMPARISONS[name]
    assert compare() == 0
    for factor in (TOLERATED, CAUGHT):
        with planting(Plant(factor, seed=3)) as plant:
            assert compare() == pytest.approx(factor, rel=1e-6)
        (limit,) = plant.limits
        assert limit.factor == pytest.approx(1.0, abs=1e-3)
    assert compare() == 0


def test_a_comparison_that_is_blind_has_no_limit() -> None:
    got, allowed = np.zeros(5), np.ones(5)
    with planting(Plant(1.0, seed=0)) as plant:
        judged(got, element(got, allowed, got), lambda _: 0.5)
    assert plant.limits[0].factor == math.inf


_SELECTION = Selection(np.array([[9.0, 8.0, 7.9, 3.0, 1.0]]), error=0.1)
_KEPT, _EVERYTHING = np.array([[True, True, False, False, False]]), np.ones(5, dtype=bool)


@pytest.mark.parametrize(
    ("factor", "inversion"),
    # the gaps are 0.1, 1.1, 5, 6, 7 and 8, and 0.2 is allowed
    [(0.3, 0.0), (0.5, 0.1), (1.0, 0.1), (2.0, 1.1), (30.0, 6.0), (1000.0, 8.0)],
)
def test_a_wrong_decision_has_the_next_gap_on_its_side_of_the_bound(factor: float, inversion: float) -> None:
    with planting(Plant(factor, seed=1)) as plant:
        assert _SELECTION.inversion(_KEPT, _EVERYTHING) == pytest.approx(inversion)
    assert plant.limits[0].absolute == pytest.approx(1.1)
    assert plant.limits[0].factor == pytest.approx(5.5)
    assert _SELECTION.inversion(_KEPT, _EVERYTHING) == 0


def test_nothing_is_planted_where_nothing_is_decided() -> None:
    with planting(Plant(CAUGHT, seed=1)) as plant:
        assert _SELECTION.inversion(np.ones_like(_KEPT), _EVERYTHING) == 0
    assert plant.limits == []


#: A case of each family, for a run on every change; the rest is slow.
_SOME = "smoke or plan or n33 or options and disable_mlr or gqa and mean or table and middle or max-t128 or t129"


def test_a_planted_error_is_caught_from_30_times_the_tolerance_and_not_at_a_third_of_it() -> None:
    found = sensitivity.measure_detection("-k", _SOME, phases="1,4,5", device="cpu")
    families = {check.id.rpartition(".")[0] for check in found.checks}
    assert families >= {"p1.bf16_matmul", "p4.triton_oracle", "p4.pytorch_oracle", "p4.options", "p4.gqa", "p4.plan"}
    assert families >= {"p5.table", "p5.cached", "p5.between"}
    assert found.faults == []
    assert {check.id: check.comparisons for check in found.checks}["p5.cached.max-t128"] == 2


_NUMERIC = """
from verify.judge.tolerance import trig_entry_error

@check("p1.numeric", gate="hard", cases="one", **WORDS)
def test_numeric(case, seed, measure):
    import numpy as np
    angle = np.linspace(0, 1, 5)
    near = np.cos(angle) + np.float64(seed % 3) * 2.0**-25
    measure("error", *trig_entry_error(near, np.cos(angle), angle))

@check("p1.count", gate="hard", cases="one", **WORDS)
def test_count(case, seed, measure):
    measure("count", 0, 0)
"""


def test_a_run_with_planted_errors_leaves_no_record(tmp_path: Path) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(1, _NUMERIC)
    refused = tree.pytest("phases", "--plant-error=30", "--device=cpu")
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert "write no evidence; name a new directory with --scratch" in refused.stderr
    done = tree.pytest("phases", "--plant-error=30", f"--scratch={tmp_path / 'scratch'}", "--device=cpu")
    assert "1 failed, 1 passed" in done.stdout
    assert not list(tmp_path.rglob("record.json"))
    assert not (tree.root / "reports").exists()


def test_many_seeds_give_the_least_headroom_of_what_is_numeric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = make_tree(tmp_path)
    tree.write_phase(4, _NUMERIC.replace("p1", "p4"))
    monkeypatch.chdir(tree.root)
    monkeypatch.setenv("PYTHONPATH", tree.environment()["PYTHONPATH"])
    words = {word: word for word in ("claim", "reason", "remedy")}
    specs = [CheckSpec(f"p4.{name}", gate="hard", cases={"one": "one"}, **words) for name in ("numeric", "count")]
    checks = [
        Check(f"{spec.family}.one", "one", spec, f"phases/p4_tiny.py::test_{spec.family[3:]}[one]") for spec in specs
    ]
    monkeypatch.setattr(sensitivity, "catalogue", lambda: checks)
    found = sensitivity.measure_headroom(device="cpu", seeds=9)
    (room,) = found.rooms
    assert (room.id, room.seeds, room.enough) == ("p4.numeric.one", 9, False)
    assert room.headroom == pytest.approx(1.5, rel=0.01)  # of 1.5 units one is used up, by two thirds of the seeds
    path = tree.root / "reports" / "sensitivity" / "headroom" / "bundled.json"
    assert sensitivity.Headroom.model_validate_json(path.read_bytes()) == found
    # what was found is not measured again, unless a file that it rests on changed
    ran = []
    monkeypatch.setattr(sensitivity, "scratch_run", lambda *nodes, **_: ran.extend(nodes))
    assert sensitivity.measure_headroom(device="cpu", seeds=9) == found
    assert ran == []
    assert {"phases/p4_tiny.py", "verify/judge/tolerance.py"} <= {*found.families["p4.numeric"].rests_on}
    (tree.root / "phases" / "p4_tiny.py").write_text("# changed")
    with pytest.raises(AttributeError):  # of what the stand-in returned
        sensitivity.measure_headroom(device="cpu", seeds=9)
    assert ran[0] == checks[0].node
    path.write_text("{}")
    with pytest.raises(ConfigurationError, match="is damaged or of another version; delete it to measure anew"):
        sensitivity.measure_headroom(device="cpu", seeds=9)


def test_every_recorded_limit_is_of_a_check_and_finite() -> None:
    known = {check.id: check.spec for check in catalogue()}
    limits = sensitivity.recorded_limits()
    assert limits.keys() <= known.keys(), "measure them anew: python -m verify.sensitivity detection"
    assert [name for name, limit in limits.items() if not limit.factor < math.inf] == []


def test_the_least_sharp_case_stands_in_the_catalogue(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    limits = {
        f"p4.triton_oracle.{case}": Limit(factor=factor, absolute=2e-4, value=40.0)
        for case, factor in {"n1": 1.5, "n33": 1.02}.items()
    }
    monkeypatch.setattr(explain, "recorded_limits", lambda: limits)
    explain.gates("markdown")
    (row,) = (line for line in capsys.readouterr().out.splitlines() if "`p4.triton_oracle`" in line)
    assert "| 1.5x |" in row
    monkeypatch.setenv("COLUMNS", "200")
    for name, factor in {"p4.triton_oracle": "1.5", "p4.triton_oracle.n33": "1.02"}.items():
        explain.explain(name, [tmp_path])
        told = capsys.readouterr().out
        assert f"from {factor} times what is allowed: 0.0002 in a result of 40" in told
        assert "phases/p4_equivalence.py:" in told


@pytest.mark.slow
def test_every_hard_numeric_check_catches_30_times_its_tolerance_and_passes_0_3() -> None:
    found = sensitivity.measure_detection()
    assert found.faults == []
    write_atomic(sensitivity.detection_file(), found.model_dump_json(indent=1) + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("subject", ["bundled", "verify/examples/plain"])
def test_right_subjects_have_twice_the_room_they_need_over_a_hundred_seeds(subject: str) -> None:
    assert sensitivity.measure_headroom(subject=subject).faults == []
