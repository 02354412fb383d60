"""Curves: what a record accepts, thinning, and what the fixture leaves in the record of a run."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from pydantic import ValidationError

from verify.record.curves import Curve, Point, thin
from verify.record.reading import read_record
from verify.record.schema import CheckResult
from verify.tests.samples import curve, record, result, write
from verify.tests.tree import Tree, make_tree

AXES = {"x": "generated tokens", "y": "KV blocks"}


@pytest.mark.parametrize(
    ("points", "words"),
    [
        ([(0, 1)], "needs at least 2 points, but has 1"),
        ([(0, 1), (1, math.nan)], "is not finite at point 1: (1.0, nan)"),
        ([(0, 1), (math.inf, 2)], "is not finite at point 1: (inf, 2.0)"),
        ([(0, 1), (2, 1), (1, 1)], "goes back from x 2 to 1 at point 2; sort its points"),
    ],
)
def test_points_that_are_no_curve_are_told_in_one_sentence(points: list[Point], words: str) -> None:
    for padding in ([], [(3, 1)] * 1000):  # a fault must not be thinned away
        if len(points) > 1 or not padding:
            with pytest.raises(ValueError, match=rf"^curve 'a' {re.escape(words)}[^\n]*$"):
                Curve.of("a", points + padding, **AXES)


def test_a_record_with_a_damaged_curve_is_unreadable_and_says_why(tmp_path: Path) -> None:
    good = Curve.of("a", [(t, t) for t in range(1000)], **AXES)
    path = write(record("sm120", [result("p1.bf16.matmul", curves=[good])]), tmp_path)
    assert read_record(path).results[0].curves == [good]
    raw = json.loads(path.read_text())
    points = raw["results"][0]["curves"][0]["points"]
    for damaged, words in (
        (points[::-1], "curve 'a' goes back from x 999 to "),
        (points[:1], "results.0.curves.0.points: List should have at least 2 items"),
        (points * 3, "results.0.curves.0.points: List should have at most 512 items"),
        ([[0, 1], [1, "NaN"]], "curve 'a' is not finite"),
    ):
        raw["results"][0]["curves"][0]["points"] = damaged
        path.write_text(json.dumps(raw))
        with pytest.raises(ValueError, match=re.escape(words)):
            read_record(path)


def test_a_result_without_curves_stays_readable() -> None:
    old = result("p1.bf16.matmul").model_dump(mode="json")
    del old["curves"]
    assert CheckResult.model_validate(old).curves == []


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"name": "a"}, "two curves are named 'a'; rename one"),
        ({"name": "b", "y": "blocks"}, "curve 'b' is blocks over generated tokens, but 'a' is KV blocks over"),
        ({"name": "b", "x": "steps"}, "curve 'b' is KV blocks over steps, but 'a' is KV blocks over generated tokens"),
    ],
)
def test_the_curves_of_a_result_go_into_one_plot(other: dict[str, str], words: str) -> None:
    points = [(0, 0), (1, 1)]
    with pytest.raises(ValidationError, match=words):
        result("p1.bf16.matmul", curves=[curve("a", points), curve(points=points, **other)])
    with pytest.raises(ValidationError, match="has 5 curves, but a plot shows at most 4"):
        result("p1.bf16.matmul", curves=[curve(name, points) for name in "abcde"])


@pytest.mark.parametrize("length", [257, 258, 1000, 4099])
@pytest.mark.parametrize("most", [4, 5, 256])
def test_thinning_keeps_ends_and_peaks_in_order(length: int, most: int) -> None:
    points = [(float(t), float(t % 97)) for t in range(length)]
    points[length // 3] = (length // 3, 1e6)
    points[length // 2] = (length // 2, -1e6)
    kept = thin(points, most)
    assert len(kept) <= most
    assert kept == sorted(kept)
    assert {points[0], points[-1], points[length // 3], points[length // 2]} <= set(kept) <= set(points)


def test_a_short_series_is_kept_whole() -> None:
    points = [(float(t), 0.0) for t in range(256)]
    assert thin(points) == points


def test_a_curve_has_the_last_value_up_to_a_place_and_none_outside() -> None:
    stepped = curve("a", [(1, 10), (3, 30), (3, 5), (4, 6)])
    assert [stepped.at(x) for x in (0, 1, 2.9, 3, 4, 4.1)] == [None, 10, 10, 5, 6, None]


_DRAWS = """
AXES = dict(x="generated tokens", y="KV blocks")

@check("p1.draws", gate="hard", cases={"passes": 0, "fails": 1, "raises": 2, "clashes": 3}, **WORDS)
def test_draws(case, curve, measure):
    curve("with", [(t, t // 16) for t in range(5000)], **AXES)
    curve("without", iter([(0, 1), (5, 9)]), x="seconds" if case == 3 else AXES["x"], y=AXES["y"])
    measure("blocks", 2 if case == 1 else 1, 1)
    if case == 2: raise RuntimeError("the server died")
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Tree:
    tree = make_tree(tmp_path_factory.mktemp("repository"))
    tree.write_phase(1, _DRAWS)
    return tree


@pytest.mark.parametrize("start", ["pytest", "runner"])
def test_what_a_check_draws_is_recorded_however_it_ends(tree: Tree, start: str) -> None:
    done = tree.pytest("phases", "--device", "cpu") if start == "pytest" else tree.verify("run", "--device", "cpu")
    assert done.returncode == 1, done.stderr
    found = tree.results()
    verdicts = {"passes": "PASS", "fails": "FAIL", "raises": "ERROR", "clashes": "ERROR"}
    assert {name.rpartition(".")[2]: str(one.verdict) for name, one in found.items()} == verdicts
    for case in ("passes", "fails", "raises"):
        long, short = found[f"p1.draws.{case}"].curves
        assert (long.name, short.name, short.points) == ("with", "without", [(0, 1), (5, 9)])
        assert (len(long.points) <= 256, long.points[-1]) == (True, (4999, 312))
    clashing = found["p1.draws.clashes"]
    assert [one.name for one in clashing.curves] == ["with"]
    assert "ValueError: curve 'without' is KV blocks over seconds, but 'with' is" in clashing.message
