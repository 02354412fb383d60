from __future__ import annotations

import os
from pathlib import Path

import pytest

from triattention.cli import main, run_default
from triattention.tests.command_line import lines_of, write_questions

pytest_plugins = ["triattention.tests.fixtures"]


def test_a_sweep_runs_every_combination_once_and_again_only_what_is_missing(
    tiny_model: str, questions: str, tiny_statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep = [
        "run-sweep", "--model", tiny_model, "--datasets", questions, "--methods", "fullkv,full,triattention",
        "--budgets", "16", "--device", "cpu", "--divide-length", "8", "--window-size", "4", "--max-new-tokens", "30",
        "--stats-path", tiny_statistics, "--out", str(tmp_path / "out"),
    ]  # fmt: skip
    assert main(sweep) == 0
    printed = capsys.readouterr().out.splitlines()
    names = [f"full-{Path(tiny_model).name}-two", f"triattention-b16-{Path(tiny_model).name}-two"]
    files = sorted(os.listdir(tmp_path / "out"))
    assert files == sorted(f"{name}.{end}" for name in names for end in ("jsonl", "summary.json"))
    assert printed[-3].split()[:2] == ["run", "accuracy"]
    assert [row.split()[0] for row in printed[-2:]] == names
    peaks = [max(line["peak_kv_tokens"] for line in lines_of(tmp_path / "out" / f"{name}.jsonl")) for name in names]
    assert peaks[0] > 30 > peaks[1]
    assert main(sweep) == 0
    again = capsys.readouterr().out.splitlines()
    assert again[-3:] == printed[-3:]
    assert not any(line.startswith("[") for line in again)


def test_a_run_that_fails_does_not_keep_a_sweep_from_the_others(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text('{"question": "%s", "answer": 1}\n' % ("what is " * 300))
    short = write_questions(tmp_path / "short.jsonl", 1)
    sweep = ["run-sweep", "--model", tiny_model, "--datasets", f"{long},{short}", "--methods", "full"]
    assert main([*sweep, "--device", "cpu", "--max-new-tokens", "8", "--out", str(tmp_path / "out")]) == 1
    captured = capsys.readouterr()
    assert "note: full-" in captured.err
    assert "question 1 has" in captured.err
    assert "1 of 2 runs failed (full-" in captured.err.splitlines()[-1]
    assert captured.out.splitlines()[-2].split()[1] == "failed"
    assert len(list((tmp_path / "out").glob("*.jsonl"))) == 1


def test_datasets_of_the_same_name_are_not_confused(
    tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for directory, count in (("a", 1), ("b", 2)):
        (tmp_path / directory).mkdir()
        write_questions(tmp_path / directory / "same.jsonl", count)
    both = f"{tmp_path / 'a' / 'same.jsonl'},{tmp_path / 'b' / 'same.jsonl'}"
    assert main(["run-sweep", "--model", tiny_model, "--datasets", both, "--methods", "full", "--dry-run"]) == 1
    assert "two of the --datasets are called same" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("--methods", "full,banana", "unknown method 'banana'"),
        ("--budgets", "64,many", "'64,many' is not a list of whole numbers"),
        ("--datasets", "a,,b", "'a,,b' has an empty name"),
    ],
)
def test_lists_are_checked_as_usage(option: str, value: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run-sweep", "--model", "m", "--methods", "full", "--datasets", "smoke", option, value])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def test_the_default_is_both_methods_on_every_dataset_at_the_default_budget(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sets = [write_questions(tmp_path / f"{name}.jsonl", 2) for name in run_default.DATASETS]
    monkeypatch.setattr(run_default, "DATASETS", sets)
    monkeypatch.chdir(tmp_path)
    assert main(["run-default", "--model", tiny_model, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert "  max_new_tokens             32768\n" in printed
    model = Path(tiny_model).name
    for name in ("aime24", "aime25", "math500"):
        assert f"full-{model}-{name}: " in printed
        assert f"triattention-b2048-{model}-{name}: " in printed
    assert printed.count("results/") == 6
    assert not (tmp_path / "results").exists()
