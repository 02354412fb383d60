from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from triattention.cli import main
from triattention.cli.results import MEASURED


def write_run(path: Path, correct: list[list[int]], **fields: Any) -> Path:
    """A results file with these samples per question; ``fields`` overwrite measurements and settings."""
    lines = []
    for index, samples in enumerate(correct):
        for sample, right in enumerate(samples):
            line = {name: 0.0 if isinstance(kind, tuple) else kind() for name, kind in MEASURED.items()} | {
                "question": f"question {index}", "index": index, "sample": sample, "batch": index,
                "correct": bool(right), "new_tokens": 100, "batch_seconds": 2.0, "peak_kv_tokens": 1000,
                "peak_kv_bytes": 2**20, "peak_memory_bytes": 2**30, "dataset": "aime24", "method": "full",
                "budget": None, "questions": len(correct), "num_samples": len(samples),
            }  # fmt: skip
            lines.append(line | fields)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    full = write_run(tmp_path / "full.jsonl", [[1], [1], [1], [0], [0]])
    faster = {"method": "triattention", "budget": 2048, "batch_seconds": 1.0, "peak_kv_tokens": 250}
    return full, write_run(tmp_path / "tri.jsonl", [[1], [1], [0], [0], [1], [1]], **faster)


def test_every_number_is_computed_from_the_lines(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *map(str, pair)]) == 0
    printed = capsys.readouterr().out
    rows = {line[:15].strip(): line[15:].split() for line in printed.splitlines()[2:10]}
    assert rows["accuracy"] == ["0.600", "0.667", "1.111"]
    assert rows["tokens/s"] == ["50.0", "100.0", "2.000"]
    assert rows["peak KV tokens"] == ["1000", "250", "0.250"]
    assert rows["memory"] == ["1024.0", "MiB", "1024.0", "MiB", "1.000"]
    assert "differing settings (A / B): method full / triattention, budget - / 2048, questions 5 / 6" in printed
    assert "1 questions are only in B" in printed
    # over the five shared questions d = 0, 0, -1, 0, 1: sum 0, sum of squares 2
    half = 1.959963984540054 * math.sqrt((3 / 7) / 7)
    last = printed.splitlines()[-1]
    assert last == f"accuracy B - A over 5 shared questions: +0.000, 95 % interval -{half:.3f} to +{half:.3f}"


def test_runs_are_found_by_name_by_stem_and_by_directory(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "tri.jsonl").write_bytes(pair[1].read_bytes())
    outputs = []
    for names in (["full", "tri"], [str(tmp_path / "full"), str(tmp_path / "alone")]):
        assert main(["compare", *names, "--out", str(tmp_path)]) == 0
        outputs.append(capsys.readouterr().out.splitlines()[2:])
    assert outputs[0] == outputs[1]


def test_runs_of_different_datasets_are_refused_by_both_names(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other.jsonl", [[1]], dataset="math500")
    assert main(["compare", str(pair[0]), str(other)]) == 1
    assert re.search(r"full\.jsonl is on the dataset aime24, .*other\.jsonl on math500", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nothing", "there is no run nothing (looked for nothing, nothing.jsonl"),
        ("{tmp}", "holds 3 runs (empty, full, tri); give one .jsonl file"),
        ("{tmp}/empty.jsonl", "has no replies; finish the run first"),
    ],
)
def test_what_is_no_run_is_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, words: str
) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    assert main(["compare", str(pair[0]), name.format(tmp=tmp_path)]) == 1
    assert words in capsys.readouterr().err


def test_a_run_that_is_not_finished_is_said_to_be_so(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = pair[0].read_text()
    pair[0].write_text("".join(whole.splitlines(keepends=True)[:3]) + whole[:40])
    assert main(["compare", *map(str, pair)]) == 0
    assert f"note: {pair[0]} is not finished: it holds 3 of 5 replies" in capsys.readouterr().out


def test_lines_of_two_runs_in_one_file_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "both.jsonl").write_text(pair[0].read_text() + pair[1].read_text())
    assert main(["compare", str(pair[0]), str(tmp_path / "both.jsonl")]) == 1
    assert "both.jsonl, line 6 is from another run than line 1 (method)" in capsys.readouterr().err


def test_runs_without_a_common_question_are_refused(
    pair: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_run(tmp_path / "other.jsonl", [[1]], question="another")
    assert main(["compare", str(pair[0]), str(other)]) == 1
    assert "have no question in common" in capsys.readouterr().err
