"""How a subject's programs for calibration are found, called and judged."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from verify.errors import SubjectLacks, SubjectNeeds
from verify.judge.compressor import write_statistics
from verify.model.calibrated import BEFORE_Q_NORM, SCALED, Means, directly, judge, of_file, of_object, programs
from verify.model.tiny import tiny, tokens
from verify.subject.subject import Subject

#: A script that writes its arguments to --output; its --help names one further option.
_SCRIPT = """
import sys
from beside import done
if "--help" in sys.argv:
    print("--model --input --output --max-length")
else:
    done(sys.argv)
"""
_BESIDE = """
def done(words):
    open(words[words.index("--output") + 1], "w").write(" ".join(words[1:]))
"""


def _subject(root: Path, script: str = "", main: str = "") -> Subject:
    (root / "theirs").mkdir()
    (root / "theirs" / "__init__.py").touch()
    if main:
        (root / "theirs" / "__main__.py").write_text(main)
    if script:
        (root / "scripts").mkdir()
        (root / "scripts" / "calibrate.py").write_text(script)
        (root / "scripts" / "beside.py").write_text(_BESIDE)
    return Subject(str(root), root, "checkout:theirs", "theirs")


def test_a_script_is_given_the_options_that_its_help_names(tmp_path: Path) -> None:
    (program,) = programs(_subject(tmp_path, _SCRIPT))
    assert program.called == "scripts/calibrate.py"
    program.calibrate("M", Path("text"), "cpu", output := tmp_path / "out")
    assert output.read_text() == f"--model M --input text --output {output} --max-length 640"
    assert program.used == 640


def test_the_verb_of_a_command_line_is_a_program_too(tmp_path: Path) -> None:
    main = "import sys\nassert sys.argv[1:] == ['calibrate', '--help']\nprint('--device')"
    (program,) = programs(_subject(tmp_path, main=main))
    assert (program.called, program.told) == ("python -m theirs calibrate", "--device\n")
    assert program.used == 1280


@pytest.mark.parametrize(
    ("main", "why"),
    [
        ("", "the subject has no scripts/calibrate.py, and it has no command line"),
        ("raise SystemExit('no such verb')", r"no verb calibrate \(calibrate ended with exit code 1: no such verb\)"),
    ],
)
def test_without_a_program_it_is_absent(tmp_path: Path, main: str, why: str) -> None:
    with pytest.raises(SubjectLacks, match=why):
        programs(_subject(tmp_path, main=main))


@pytest.mark.parametrize(
    ("body", "error", "told"),
    [
        ("raise ValueError('not this model')", AssertionError, r"ended with exit code 1: ValueError: not this model"),
        ("import no_such_package", SubjectNeeds, "needs the package no_such_package, which is not installed"),
        ("import theirs.gone", AssertionError, "No module named 'theirs.gone'"),
        ("", AssertionError, "scripts/calibrate.py ended with exit code 0 and wrote no --output"),
    ],
)
def test_a_program_that_fails(tmp_path: Path, body: str, error: type[Exception], told: str) -> None:
    (program,) = programs(_subject(tmp_path, f"import sys\nif '--help' not in sys.argv:\n    {body or 'pass'}"))
    with pytest.raises(error, match=told):
        program.calibrate("M", Path("text"), "cpu", tmp_path / "out")


def _means(scale: float = 1.0) -> Means:
    draw = np.random.default_rng(0)
    mean = draw.normal(size=(2, 3, 4)) + 1j * draw.normal(size=(2, 3, 4))
    return Means(mean, np.abs(mean) + 1).scaled(scale)


def _written(path: Path, means: Means, **more: Any) -> Path:
    write_statistics(path, torch.from_numpy(means.mean), torch.from_numpy(means.size), **more)
    return path


def test_a_file_in_the_published_layout_is_read(tmp_path: Path) -> None:
    right = _means()
    error, _ = of_file(_written(tmp_path / "file", right), _subject(tmp_path), right).off(right)
    assert 0 < error < 1e-6


def test_a_file_without_a_head_is_wrong(tmp_path: Path) -> None:
    file = _written(tmp_path / "file", _means(), without=[(1, 2)])
    with pytest.raises(AssertionError, match="lacks layer01_head02; the model has 2 layers of 3 query heads"):
        of_file(file, _subject(tmp_path), _means())


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ({"stats": {"layer00_head00": {"q_mean_real": torch.zeros(4)}}}, "layer00_head00 .* lacks q_abs_mean"),
        ({"other": 1}, "not in the published layout, and there is no load_head_frequency_stats"),
    ],
)
def test_another_file_is_wrong(tmp_path: Path, content: dict[str, Any], told: str) -> None:
    torch.save(content, tmp_path / "file.pt")
    with pytest.raises(AssertionError, match=told):
        of_file(tmp_path / "file.pt", _subject(tmp_path), _means())


def test_a_file_of_another_format_is_read_by_the_subjects_own_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right, file = _means(), tmp_path / "file.bin"
    file.write_bytes(b"TRIA 1")
    heads = {
        (layer, head): SimpleNamespace(
            q_mean_complex=torch.from_numpy(right.mean[layer, head]),
            q_abs_mean=torch.from_numpy(right.size[layer, head]),
        )
        for layer, head in np.ndindex(2, 3)
    }
    monkeypatch.setattr(Subject, "attribute", lambda *_: lambda path, device: ({}, heads))
    assert of_file(file, _subject(tmp_path), right).off(right)[0] == 0


def test_an_object_of_another_shape_is_wrong() -> None:
    class Found:
        q_mean_real = q_mean_imag = q_abs_mean = torch.zeros(2, 3, 5)

    with pytest.raises(AssertionError, match=r"q_mean_real has shape \(2, 3, 5\); the model has .* \(2, 3, 4\)"):
        of_object(Found(), _means())


@pytest.mark.parametrize(
    ("got", "cause"), [(_means(1.5), SCALED), (_means(7.0), BEFORE_Q_NORM), (_means(2.0), ""), (_means(1.0), "")]
)
def test_a_known_mistake_is_the_cause(got: Means, cause: str) -> None:
    told: dict[str, Any] = {}

    def measure(
        name: str, measured: float, allowed: float, *, where: str = "", cause: str = "", unit: str = ""
    ) -> None:
        told.update(where=where, cause=cause)

    judge(got, {"": _means(), BEFORE_Q_NORM: _means(7.0), SCALED: _means(1.5)}, 1e-3, measure, "their script")
    assert told["cause"] == cause
    assert told["where"].startswith("their script: q_")
    assert told["where"].endswith(cause)


def test_nan_is_within_no_bound_and_is_named() -> None:
    got = _means()
    got.size[1, 2, 3] = math.nan
    error, where = got.off(_means())
    assert math.isnan(error)
    assert where == "q_abs_mean of layer 1, query head 2, frequency 3"


def test_dims_that_are_not_rotated_are_compared_too(tmp_path: Path) -> None:
    live = tiny(tmp_path, _subject(tmp_path), "cpu", 0, kind="phi3", rope={"partial_rotary_factor": 0.5})
    ids = tokens(live, 20, 0)
    right = directly(live, lambda model: model(input_ids=ids, use_cache=False), [(ids, None)], "half")[""]
    assert right.unrotated is not None
    assert (right.mean.shape, right.unrotated.shape) == ((3, 4, 4), (3, 4, 8))
    wrong = replace(right, unrotated=right.unrotated.copy())
    wrong.unrotated[0, 1, 2] += right.unrotated_size[0, 1, 2] / 2
    error, where = wrong.off(right)
    assert error == pytest.approx(0.5)
    assert where == "q_pass_mean of layer 0, query head 1, frequency 2"
