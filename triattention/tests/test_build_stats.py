from __future__ import annotations

import re
from pathlib import Path

import pytest

from triattention import statistics
from triattention.cli import main
from triattention.tests.command_line import TEXT
from triattention.tests.model_directory import write_tiny_model

pytest_plugins = ["triattention.tests.fixtures"]


@pytest.fixture
def text(tmp_path: Path) -> str:
    (tmp_path / "text").write_text(TEXT)
    return str(tmp_path / "text")


def test_build_stats_prints_the_concentration_of_every_layer_range(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-stats", "--model", tiny_model, "--output", str(tmp_path / "s.pt")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"concentration, layers +0 to +0: mean 0\.\d\d, from 0\.\d\d to 0\.\d\d", printed)
    assert re.search(r"concentration, layers +1 to +1:", printed)


def test_build_stats_without_an_output_prints_where_the_cached_ones_are(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))
    assert main(["build-stats", "--model", tiny_model, "--dtype", "float32", "--device", "cpu"]) == 0
    path = Path(capsys.readouterr().out.splitlines()[-1])
    assert path.parent == tmp_path / "statistics"
    assert statistics.load(path).q_abs_mean.shape == (2, 4, 8)


def test_several_models_are_calibrated_at_once_into_one_directory(
    tiny_model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    deeper = str(write_tiny_model(tmp_path / "deeper", layers=3))
    command = ["build-stats", "--model", tiny_model, "--model", deeper, "--input", text, "--max-length", "600"]
    assert main([*command, "--output-dir", str(tmp_path / "stats"), "--job-parallel", "2", "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    assert f"{deeper}: wrote {tmp_path / 'stats' / 'deeper.pt'}: 600 tokens" in captured.err
    for name, layers in ((Path(tiny_model).name, 2), ("deeper", 3)):
        made = statistics.load(tmp_path / "stats" / f"{name}.pt")
        assert (len(made.q_abs_mean), made.token_count) == (layers, 600)
        assert f"wrote {tmp_path / 'stats' / name}.pt: 600 tokens of {text}" in captured.out


def test_calibrate_prints_every_layer_and_uses_max_length_tokens(
    tiny_model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "s.pt"
    command = ["calibrate", "--model", tiny_model, "--input", text, "--output", str(output), "--max-length", "520"]
    assert main([*command, "--device", "cpu"]) == 0
    captured = capsys.readouterr()
    by_layer = statistics.load(output).concentration().tolist()
    assert captured.out.splitlines() == [
        f"wrote {output}: 520 tokens of {text}",
        *(f"concentration, layer {layer:2d}: {value:.3f}" for layer, value in enumerate(by_layer)),
    ]
    assert captured.err == ""  # a progress bar is for a terminal


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--input", "text"], "--input text needs --output or --output-dir"),
        (["--max-length", "600"], "--max-length 600 needs --output or --output-dir"),
        (["--job-parallel", "2"], "--job-parallel 2 needs --output or --output-dir"),
        (["--job-parallel", "0"], "--job-parallel is 0; give 1 or more"),
        (
            ["--model", "{tiny}/../other", "--output", "s.pt"],
            "--output s.pt is one file, but there are 2 models; use --output-dir",
        ),
        (["--output-dir", "text"], "text is a file; give a directory"),
        (["--output", "."], "--output . is a directory"),
        (["--output", "s.pt", "--input", "none"], "cannot read the calibration text none"),
        (["--output", "s.pt", "--max-length", "100"], "the calibration text has 100 tokens"),
    ],
)
def test_what_cannot_be_calibrated_is_one_sentence(
    tiny_model: str, text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], words: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    more = [word.format(tiny=tiny_model) for word in more]
    assert main(["build-stats", "--model", tiny_model, "--device", "cpu", *more]) == 1
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["text"]


def test_one_sentence_over_and_over_is_refused(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "repeated").write_text("what is 1 + 2 ? word11 user : 3 4 word12 " * 60)
    output = tmp_path / "s.pt"
    command = ["calibrate", "--model", tiny_model, "--input", str(tmp_path / "repeated"), "--output", str(output)]
    assert main(command) == 1
    assert "the calibration text repeats itself: 1.7% of its runs of 32 characters" in capsys.readouterr().err
    assert not output.exists()


def test_models_that_would_share_a_file_are_refused(
    tiny_model: str, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "elsewhere").mkdir()
    same_name = write_tiny_model(tmp_path / "elsewhere" / Path(tiny_model).name)
    command = ["build-stats", "--model", tiny_model, "--model", str(same_name), "--output-dir", str(tmp_path / "stats")]
    assert main(command) == 1
    assert "two of the models would be written to the same file" in capsys.readouterr().err


def test_download_models_prints_a_directory_for_each(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(write_tiny_model(tmp_path / "other"))
    assert main(["download-models", "--model", tiny_model, "--model", other]) == 0
    assert capsys.readouterr().out.splitlines() == [tiny_model, other]
