"""Interrupted, resumed and shared runs: the same lines, however the run was cut."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from triattention.evaluation import generation
from triattention.tests.command_line import SMALL, lines_of, results_in, run_one, without_times, write_questions

pytest_plugins = ["triattention.tests.fixtures"]

SAMPLED = (
    "--method", "triattention", *SMALL, "--allow-prefill-compression", "--batch-size", "3", "--num-samples", "2",
    "--temperature", "0.8", "--max-new-tokens", "24",
)  # fmt: skip


@pytest.fixture
def five(tmp_path: Path) -> str:
    return write_questions(tmp_path / "five.jsonl", 5)


@pytest.fixture
def run(tiny_model: str, tiny_statistics: str, five: str, tmp_path: Path) -> Callable[..., int]:
    """Run the sampled command into a directory of ``tmp_path``, and return the exit code."""
    return lambda out, *more: run_one(
        tiny_model, five, *SAMPLED, "--stats-path", tiny_statistics, "--out", str(tmp_path / out), *more
    )


@pytest.fixture(scope="module")
def whole_run(tiny_model: str, tiny_statistics: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The results file of the sampled command, made in one go."""
    directory = tmp_path_factory.mktemp("whole")
    five = write_questions(directory / "five.jsonl", 5)
    out = directory / "out"
    assert run_one(tiny_model, five, *SAMPLED, "--stats-path", tiny_statistics, "--out", str(out)) == 0
    return results_in(out)


@pytest.fixture
def finished(whole_run: Path, tmp_path: Path) -> Path:
    """The results file of a finished run in ``tmp_path / "out"``."""
    return Path(shutil.copytree(whole_run.parent, tmp_path / "out")) / whole_run.name


@pytest.fixture
def generated(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of rows of every batch that is generated."""
    sizes: list[int] = []
    original = generation.generate_batch

    def counted(loaded: object, prompts: list, *rest: object) -> list[generation.Answer]:
        sizes.append(len(prompts))
        return original(loaded, prompts, *rest)

    monkeypatch.setattr(generation, "generate_batch", counted)
    return sizes


def test_a_run_cut_inside_a_batch_resumes_to_the_same_lines(
    run, whole_run: Path, generated: list[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    want = without_times(lines_of(whole_run))
    assert len({line["batch_seed"] for line in want}) == 4
    # a power cut: one whole batch, one line of the second, and a torn one
    lines = whole_run.read_text().splitlines(keepends=True)
    (tmp_path / "cut").mkdir()
    cut = tmp_path / "cut" / whole_run.name
    cut.write_text("".join(lines[:4]) + lines[4][:50])
    assert run("cut") == 0
    assert generated == [3, 3, 1]
    printed = capsys.readouterr().out
    assert "ended with 1 lines of unfinished batches and a cut-off line: dropped, and generated again" in printed
    assert "note: 1 of 4 batches are in" in printed
    assert without_times(lines_of(cut)) == want


def test_an_interrupt_keeps_whole_batches_and_no_summary(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original, asked = generation.generate_batch, []

    def interrupted(*args: object) -> list[generation.Answer]:
        asked.append(args)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return original(*args)

    monkeypatch.setattr(generation, "generate_batch", interrupted)
    assert run("out") == 130
    captured = capsys.readouterr()
    assert captured.err == "triattention: interrupted\n"
    assert "run the same command to resume" in captured.out
    assert len(lines_of(results_in(tmp_path / "out"))) == 6
    assert len(os.listdir(tmp_path / "out")) == 1
    assert run("out") == 0
    assert len(asked) == 3 + 2


def test_a_finished_run_is_not_done_again(
    run, finished: Path, generated: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    lines, summary = finished.read_bytes(), finished.with_suffix(".summary.json")
    before = summary.read_bytes()
    summary.unlink()
    assert run("out") == 0
    assert generated == []
    assert finished.read_bytes() == lines
    assert summary.read_bytes() == before
    assert "note: 4 of 4 batches are in" in capsys.readouterr().out
    assert len(os.listdir(finished.parent)) == 2


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (["--window-size", "3"], "window_size = 4, but this one has 3"),
        (["--seed", "1"], "seed = 0, but this one has 1"),
        (["--max-questions", "4"], "questions = 5, but this one has 4"),
        (["--dtype", "bfloat16"], "dtype = 'float32', but this one has 'bfloat16'"),
        (["--temperature", "0.7", "--max-new-tokens", "7"], "max_new_tokens = 24, but this one has 7"),
    ],
)
def test_a_file_of_other_settings_is_refused_by_the_first_that_differs(
    run, finished: Path, capsys: pytest.CaptureFixture[str], more: list[str], difference: str
) -> None:
    before = finished.read_bytes()
    assert run("out", *more) == 1
    assert f".jsonl is from a run with {difference}; give another --out or --run-tag" in capsys.readouterr().err
    assert run("out", "--dry-run", *more) == 1
    assert finished.read_bytes() == before
    assert run("out", "--run-tag", "other", "--dry-run", *more) == 0


def test_an_edited_dataset_is_noticed(run, finished: Path, five: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path(five).write_text(Path(five).read_text().replace("what is 2", "what is 9"))
    assert run("out") == 1
    assert "line 3 answers 'what is 2" in capsys.readouterr().err


def test_a_foreign_file_is_refused(run, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    finished.write_text('{"question": "what", "answer": "4"}\n')
    assert run("out") == 1
    assert "line 1 has no 'expected', so it is not a result of run-one" in capsys.readouterr().err
    finished.write_text("banana\n")
    assert run("out") == 1
    assert "line 1: not JSON" in capsys.readouterr().err


def test_two_runs_cannot_write_the_same_file(run, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FileLock(finished.with_name(f".{finished.name}.run.lock")):
        assert run("out") == 1
    assert f"another run is writing {finished}" in capsys.readouterr().err


def test_a_disk_that_is_full_leaves_no_half_batch(
    run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write, calls = os.write, []

    def short(handle: int, data: bytes) -> int:
        calls.append(data)
        return write(handle, data if len(calls) == 1 else data[:40])

    monkeypatch.setattr("triattention.cli.results.os.write", short)
    assert run("out") == 1
    assert "make room, or give another --out" in capsys.readouterr().err
    assert len(lines_of(results_in(tmp_path / "out"))) == 3


def test_workers_give_the_lines_of_a_single_process_in_the_same_order(
    run, whole_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("two", "--workers", "2") == 0
    printed = capsys.readouterr().out
    assert printed.count("\n[") + printed.startswith("[") == 10
    one, two = whole_run, results_in(tmp_path / "two")
    assert without_times(lines_of(one)) == without_times(lines_of(two))
    summaries = [json.loads(path.with_suffix(".summary.json").read_text()) for path in (one, two)]
    assert summaries[0]["accuracy"] == summaries[1]["accuracy"]
    assert sorted(os.listdir(two.parent)) == sorted(os.listdir(one.parent))


def test_a_worker_that_fails_is_reported_with_its_last_line(
    tiny_model: str, five: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--method", "full", "--max-new-tokens", "600", "--workers", "2", "--out", str(tmp_path / "out")]
    assert run_one(tiny_model, five, *command) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert "worker 1 of 2 ended with exit code 1: question 1 has" in error
    assert "worker 2 of 2 ended with exit code 1: question 1 has" in error
    assert not (tmp_path / "out").exists()
