"""Benchmarks are read with the real library, from directories in the layout of their repositories."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from triattention.errors import TriAttentionError
from triattention.evaluation import benchmarks
from triattention.evaluation.benchmarks import BENCHMARKS
from triattention.evaluation.datasets import Question, load_dataset

Rows = list[dict[str, Any]]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of ours and of the hub, and no network: the state of a new machine in a cellar."""
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return tmp_path / "cache"


def _rows(name: str) -> Rows:
    benchmark = BENCHMARKS[name]
    answer = "2 * 9 = <<2*9=18>>18\n#### 1,{}" if name == "gsm8k" else "{}"
    return [
        {benchmark.question: f"How many? {i}", benchmark.answer: answer.format(i), "other": i}
        for i in range(100, 100 + benchmark.count)
    ]


def _parquet(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def _jsonl(path: Path, rows: Rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _card(directory: Path, configurations: dict[str, dict[str, str]]) -> None:
    """The README whose header names the files of every configuration."""
    lines = ["---", "configs:"]
    for name, splits in configurations.items():
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    (directory / "README.md").write_text("\n".join([*lines, "---", "# A data set", ""]))


def _download(name: str, directory: Path, rows: Rows | None = None) -> None:
    """Lay out what ``hf download --local-dir`` leaves of the repository."""
    rows = _rows(name) if rows is None else rows
    (directory / ".cache" / "huggingface" / "download").mkdir(parents=True)
    (directory / ".cache" / "huggingface" / "download" / "README.md.metadata").write_text("etag\n")
    if name == "aime24":
        _parquet(directory / "data" / "train-00000-of-00001.parquet", rows)
        _card(directory, {"default": {"train": "data/train-*"}})
    elif name == "gsm8k":
        for configuration in ("main", "socratic"):
            for split in ("train", "test"):
                chosen = rows if (configuration, split) == ("main", "test") else rows[:3]
                _parquet(directory / configuration / f"{split}-00000-of-00001.parquet", chosen)
        splits = ("train", "test")
        _card(directory, {c: {s: f"{c}/{s}-*" for s in splits} for c in ("main", "socratic")})
    else:
        _jsonl(directory / "test.jsonl", rows)
        _card(directory, {"default": {"test": "test.jsonl"}})


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_downloaded_benchmark_is_read_in_order_offline_and_in_silence(
    name: str, cache: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _download(name, cache / "datasets" / name)
    dataset = load_dataset(name)
    assert dataset.name == name
    assert len(dataset.questions) == {"aime24": 30, "aime25": 30, "math500": 500, "gsm8k": 1319}[name]
    first = "1,100" if name == "gsm8k" else "100"
    assert dataset.questions[0] == Question("How many? 100", first, "math", benchmarks.INSTRUCTION)
    assert dataset.questions[0].prompt == f"How many? 100\n\n{benchmarks.INSTRUCTION}"
    assert capfd.readouterr() == ("", "")


def test_a_changed_directory_is_read_anew(cache: Path) -> None:
    directory = cache / "datasets" / "aime25"
    _download("aime25", directory)
    load_dataset("aime25")
    rows = _rows("aime25")
    rows[0]["answer"] = "0"
    _jsonl(directory / "test.jsonl", rows)
    assert load_dataset("aime25").questions[0].answer == "0"


def test_what_the_hub_keeps_in_its_own_cache_is_found(cache: Path, tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "hub" / "datasets--math-ai--aime25"
    _download("aime25", repository / "blobs")
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    for name in ("test.jsonl", "README.md"):
        (snapshot / name).symlink_to(Path("..", "..", "blobs", name))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    assert len(load_dataset("aime25").questions) == 30
    assert not (cache / "datasets").exists()


def test_without_the_files_and_a_network_the_line_that_downloads_them_is_given(cache: Path) -> None:
    with pytest.raises(TriAttentionError) as caught:
        load_dataset("aime24")
    directory = cache / "datasets" / "aime24"
    assert str(caught.value) == (
        f"dataset aime24 is not in {directory} and cannot be fetched from the hub (HF_HUB_OFFLINE is set); with "
        f"network access, run: hf download HuggingFaceH4/aime_2024 --repo-type dataset --local-dir {directory} (or on "
        "another machine, then copy that directory here)"
    )


def test_a_hub_that_refuses_and_a_hub_that_is_silent_are_told_apart_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(TriAttentionError, match=r"Connection refused\); with network access, run: hf download"):
        load_dataset("gsm8k")
    monkeypatch.setattr(benchmarks, "FETCH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(benchmarks, "_FETCH", "import time; time.sleep(60)")
    started = time.monotonic()
    with pytest.raises(TriAttentionError, match=r"\(no answer within 0.2 s\); with network access, run:"):
        load_dataset("gsm8k")
    assert time.monotonic() - started < 10


def _too_few(rows: Rows) -> Rows:
    return rows[:-1]


def _other_columns(rows: Rows) -> Rows:
    return [{"question": row["problem"], "answer": row["answer"]} for row in rows]


def _no_answer(rows: Rows) -> Rows:
    return [*rows[:-1], {**rows[-1], "answer": None}]


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (_too_few, "has 29 questions in its split test, not 30; remove {0}, and run: hf download math-ai/aime25 "),
        (_other_columns, "has no column 'problem'; remove {0}, and run: hf download math-ai/aime25 "),
        (_no_answer, "row 30: 'problem' or 'answer' is empty or malformed; remove that directory"),
    ],
)
def test_a_benchmark_that_is_not_what_it_should_be_is_refused(cache: Path, damage: Any, sentence: str) -> None:
    directory = cache / "datasets" / "aime25"
    _download("aime25", directory, damage(_rows("aime25")))
    with pytest.raises(TriAttentionError, match=re.escape(sentence.format(directory))):
        load_dataset("aime25")


def test_an_answer_without_its_mark_is_refused(cache: Path) -> None:
    rows = _rows("gsm8k")
    rows[4]["answer"] = "18"
    _download("gsm8k", cache / "datasets" / "gsm8k", rows)
    with pytest.raises(TriAttentionError, match="row 5: 'question' or 'answer' is empty or malformed"):
        load_dataset("gsm8k")


@pytest.mark.parametrize(
    ("content", "reason"),
    [("nothing", "any data files"), ("a broken file", "JSON parse error"), ("another split", 'Unknown split "test"')],
)
def test_a_directory_that_cannot_be_read_is_one_sentence(
    cache: Path, content: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    directory = cache / "datasets" / "aime25"
    directory.mkdir(parents=True)
    if content == "a broken file":
        (directory / "test.jsonl").write_text('{"problem": ')
    elif content == "another split":
        _jsonl(directory / "train.jsonl", _rows("aime25"))
    with pytest.raises(
        TriAttentionError, match=rf"^cannot read .* {directory} \(.*{reason}.*\); .*hf download"
    ) as caught:
        load_dataset("aime25")
    assert "\n" not in str(caught.value)
    assert capfd.readouterr() == ("", "")


def test_importing_the_sets_loads_neither_the_library_nor_torch() -> None:
    code = (
        "import sys, triattention.evaluation.datasets as d; d.load_dataset('smoke'); d.load_dataset('dfs')\n"
        "print(sorted({'datasets', 'torch', 'pandas', 'huggingface_hub'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
