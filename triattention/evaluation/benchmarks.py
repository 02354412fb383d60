"""Benchmarks of the Hugging Face hub, read with the ``datasets`` library."""

from __future__ import annotations

import logging
import os
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from triattention.embedded import cache_root
from triattention.errors import TriAttentionError
from triattention.evaluation.questions import Question

FETCH_TIMEOUT_S = 60
INSTRUCTION = "Please reason step by step, and put your final answer within \\boxed{}."

#: Prints the directory of the repository in the hub's cache, downloading what is missing. It runs in a separate
#: process, because the hub's client waits forever for a server that has stopped answering.
_FETCH = """
import sys
from huggingface_hub import snapshot_download
from huggingface_hub.constants import is_offline_mode
try:
    print(snapshot_download(sys.argv[1], repo_type="dataset"))
except (OSError, ValueError) as error:
    sys.exit("HF_HUB_OFFLINE is set" if is_offline_mode() else str(error).partition("\\n")[0])
"""


@dataclass(frozen=True, slots=True)
class Benchmark:
    """The location of a benchmark, its columns and its number of questions.

    With ``answer_mark``, the answer is the text after its last occurrence in the column.
    """

    repository: str
    split: str
    question: str
    answer: str
    count: int
    configuration: str | None = None
    answer_mark: str = ""

    def download_command(self, directory: Path) -> str:
        return f"hf download {self.repository} --repo-type dataset --local-dir {shlex.quote(str(directory))}"


BENCHMARKS = {
    "aime24": Benchmark("HuggingFaceH4/aime_2024", "train", "problem", "answer", 30),
    "aime25": Benchmark("math-ai/aime25", "test", "problem", "answer", 30),
    "math500": Benchmark("HuggingFaceH4/MATH-500", "test", "problem", "answer", 500),
    "gsm8k": Benchmark("openai/gsm8k", "test", "question", "answer", 1319, configuration="main", answer_mark="####"),
}


def load_benchmark(name: str) -> tuple[Question, ...]:
    """The questions of ``BENCHMARKS[name]`` in dataset order.

    They are read from ``<cache>/datasets/<name>`` if it exists, else from the hub's own cache, which is filled from the
    network within 60 s. Raises TriAttentionError if the files are not available (with the download command), cannot be
    read, or do not have the expected columns and number of questions.
    """
    benchmark = BENCHMARKS[name]
    local = (cache_root() / "datasets" / name).absolute()
    directory = local if local.is_dir() else _fetch(name, benchmark, local)
    rows = _rows(benchmark, directory, f"remove {directory}, and run: {benchmark.download_command(local)}")
    return tuple(_question(benchmark, row, f"{directory}, row {number}") for number, row in enumerate(rows, start=1))


def _fetch(name: str, benchmark: Benchmark, local: Path) -> Path:
    """The benchmark's directory in the hub's cache."""
    command = [sys.executable, "-P", "-c", _FETCH, benchmark.repository]
    try:
        fetched = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=FETCH_TIMEOUT_S,
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            check=False,
        )
    except subprocess.TimeoutExpired:
        reason = f"no answer within {FETCH_TIMEOUT_S} s"
    else:
        if fetched.returncode == 0:
            return Path(fetched.stdout.splitlines()[-1])
        reason = ([line for line in fetched.stderr.splitlines() if line.strip()] or ["no reason given"])[-1]
    raise TriAttentionError(
        f"dataset {name} is not in {local} and cannot be fetched from the hub ({reason.rstrip('.')}); with network "
        f"access, run: {benchmark.download_command(local)} (or on another machine, then copy that directory here)"
    )


def _rows(benchmark: Benchmark, directory: Path, remedy: str) -> list[dict[str, Any]]:
    """The rows with the benchmark's two columns."""
    try:
        import datasets
    except ImportError:
        raise TriAttentionError(
            "benchmarks are read with the package datasets, which is not installed; run: pip install datasets"
        ) from None
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity(logging.CRITICAL)  # it logs what it raises
    try:
        # do not keep the library's prepared files: they would be reused after the source files have changed
        with tempfile.TemporaryDirectory(prefix="triattention-") as scratch:
            table = datasets.load_dataset(
                str(directory), benchmark.configuration, split=benchmark.split, cache_dir=scratch, keep_in_memory=True
            )
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        # for a broken file, only the cause of the exception says what the error was
        reason = " ".join(str(error.__cause__ or error).split())
        raise TriAttentionError(f"cannot read the dataset in {directory} ({reason.rstrip('.')}); {remedy}") from error
    columns = [benchmark.question, benchmark.answer]
    if missing := [column for column in columns if column not in table.column_names]:
        raise TriAttentionError(f"the dataset in {directory} has no column {missing[0]!r}; {remedy}")
    if len(table) != benchmark.count:
        raise TriAttentionError(
            f"the dataset in {directory} has {len(table)} questions in its split {benchmark.split}, not "
            f"{benchmark.count}; {remedy}"
        )
    return table.select_columns(columns).to_list()


def _question(benchmark: Benchmark, row: dict[str, Any], where: str) -> Question:
    question, answer = row[benchmark.question], row[benchmark.answer]
    if benchmark.answer_mark:
        answer = str(answer).rpartition(benchmark.answer_mark)[2] if benchmark.answer_mark in str(answer) else None
    if not isinstance(question, str) or answer is None or not str(answer).strip():
        raise TriAttentionError(
            f"{where}: {benchmark.question!r} or {benchmark.answer!r} is empty or malformed; "
            "remove that directory, and download the dataset again"
        )
    return Question(question, str(answer).strip(), grader="math", instruction=INSTRUCTION)
