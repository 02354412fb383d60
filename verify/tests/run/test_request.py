from __future__ import annotations

from pathlib import Path

import pytest

from verify.architectures import ARCHITECTURES
from verify.arguments import parser
from verify.checks import catalogue
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.record.verdict import must_pass
from verify.run.levels import GATE, LEVELS
from verify.run.request import RunRequest, parse_expect, parse_phases, request_of
from verify.tests.samples import REPOSITORY, write_tree


@pytest.mark.parametrize(
    ("text", "phases"),
    [("4", (4,)), ("1-8", tuple(range(1, 9))), ("1,3-5", (1, 3, 4, 5)), ("5, 3 - 4,4", (3, 4, 5))],
)
def test_phases_are_read_ascending_and_once(text: str, phases: tuple[int, ...]) -> None:
    assert parse_phases(text) == phases


@pytest.mark.parametrize("text", ["9", "0", "5-3", "x", "", "1,", "1-9", "-3"])
def test_what_is_no_phase_is_named(text: str) -> None:
    with pytest.raises(ConfigurationError, match="is not a phase; give numbers from 1 to 8"):
        parse_phases(text)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"device": "cpu", "expect": 120}, "--device cpu and --expect sm120 contradict"),
        ({"device": "gpu"}, "device 'gpu' is unknown"),
        ({"phases": ()}, "phases"),
        ({"phases": (2, 1)}, "ascending"),
        ({"seed": -1}, "seed -1 is out of range"),
        ({"seed": 2**32}, "out of range"),
        ({"expect": 101}, "renamed to sm110"),
        ({"model": " "}, "model is empty"),
        ({"out": Path(__file__)}, "is not a directory"),
    ],
)
def test_a_request_that_cannot_be_met_is_refused(fields: dict, words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        RunRequest(**fields)


def test_emulated_cannot_be_expected() -> None:
    with pytest.raises(ConfigurationError, match="does not name a GPU"):
        parse_expect("emulated")
    assert parse_expect("9.0") == 90


def test_the_repository_is_the_nearest_tree_with_phases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tree = write_tree(tmp_path / "tree")
    monkeypatch.chdir(tree / "phases")
    assert repository_root() == tree
    monkeypatch.chdir(tmp_path)
    assert repository_root() == REPOSITORY


@pytest.mark.parametrize("level", LEVELS)
def test_every_level_is_a_request_that_a_run_accepts(level: int) -> None:
    chosen = parser().parse_args(["run", "--level", str(level)])
    request = request_of(chosen)
    assert {name: getattr(request, name) for name in LEVELS[level]} == LEVELS[level]


@pytest.mark.parametrize("words", [["--phases", "4"], ["-m", "hard"], ["--sanitize"], ["--resume", "RUN"]])
def test_a_level_says_alone_which_checks_run(words: list[str]) -> None:
    with pytest.raises(ConfigurationError, match="; drop -"):
        request_of(parser().parse_args(["run", "--level", "1", *words]))


def test_the_checks_of_the_gate_are_must_pass_on_every_gpu() -> None:
    known = {check.id: check for check in catalogue()}
    for gpu in ARCHITECTURES:
        assert {check.id for check in must_pass([*known.values()], gpu, "full", {})} >= GATE
