"""Files as other tools write them: what can mean only one thing is read, anything else is named with its next step."""

from __future__ import annotations

import codecs
import gzip
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from triattention import statistics
from triattention.cli import main
from triattention.cli.results import read_lines
from triattention.errors import TriAttentionError
from triattention.evaluation.datasets import Question, load_dataset
from triattention.files import write_text
from triattention.reading import parse_json, read_text
from triattention.tests.command_line import TEXT, lines_of, results_in, run_one, without_times

pytest_plugins = ["triattention.tests.fixtures"]

#: Two lines of each kind of text, with a character that encodings write differently.
TEXT_OF = {"dataset": '{"question": "é", "answer": 1}\n{"question": "b", "answer": 2}\n', "text": "é\nb\n"}

SAME = {
    "as written": lambda text: text.encode(),
    "UTF-8 with a mark": lambda text: codecs.BOM_UTF8 + text.encode(),
    "UTF-16, little-endian": lambda text: codecs.BOM_UTF16_LE + text.encode("utf-16-le"),
    "UTF-16, big-endian": lambda text: codecs.BOM_UTF16_BE + text.encode("utf-16-be"),
    "UTF-32": lambda text: text.encode("utf-32"),
    "lines of Windows": lambda text: text.replace("\n", "\r\n").encode(),
    "lines of old Macs": lambda text: text.replace("\n", "\r").encode(),
    "UTF-16 with lines of Windows": lambda text: text.replace("\n", "\r\n").encode("utf-16"),
}


@pytest.mark.parametrize("form", SAME)
def test_the_same_text_is_read_from_every_form(form: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(SAME[form](TEXT_OF["dataset"]))
    (tmp_path / "a.txt").write_bytes(SAME[form](TEXT_OF["text"]))
    assert load_dataset(str(tmp_path / "a.jsonl")).questions == (Question("é", "1"), Question("b", "2"))
    assert read_text(tmp_path / "a.txt", "the text", "") == TEXT_OF["text"]


def test_a_last_line_needs_no_line_end_and_files_may_be_joined(tmp_path: Path) -> None:
    first, second = (codecs.BOM_UTF8 + line.encode() for line in TEXT_OF["dataset"].splitlines())
    (tmp_path / "a.jsonl").write_bytes(first + b"\n" + second)
    assert load_dataset(str(tmp_path / "a.jsonl")).questions == (Question("é", "1"), Question("b", "2"))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"a\ncaf\xe9 b\n", "line 2 is not UTF-8 (byte 5 is 0xe9); convert the file, for example with iconv -f"),
        (codecs.BOM_UTF16_LE + b"a\x00\x00\xdc", "line 1 is not UTF-16 (byte 4 is 0x00)"),
        ("a\nb".encode("utf-16-le"), "line 1 has a NUL character, so it is not UTF-8 text; convert it, for example "
         "with iconv -f UTF-16LE -t UTF-8"),
        ("a\nb".encode("utf-16-be"), "iconv -f UTF-16BE -t UTF-8"),
        (b"a\nb\x00" + b"c" * 99, "line 2 has a NUL character, so it is not UTF-8 text; convert it"),
        ("a\né".encode()[:-1], "line 2: the file ends inside a character, or is not"),
        ("a\né".encode("utf-16")[:-1], "line 2: the file ends inside a character, or is not"),
        (gzip.compress(b"a", mtime=0), "is compressed with gzip, not text; unpack or convert it first"),
        (b"PK\x03\x04rest", "is a zip archive, not text"),
        (b"PAR1\x15\x04", "is a Parquet file, not text"),
    ],
)  # fmt: skip
def test_any_other_encoding_is_named_with_its_line(data: bytes, sentence: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(data)
    with pytest.raises(TriAttentionError, match=re.escape(sentence)):
        load_dataset(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize(
    ("line", "question"),
    [
        ('{"problem": "p", "answer": 1, "solution": "s"}', Question("p", "1")),
        ('{"Problem": "p", "Answer": 1}', Question("p", "1")),
        ('{"prompt": "p", "target": "x"}', Question("p", "x")),
        ('{"question": "p", "prompt": "long p", "answer": "x", "final_answer": "y"}', Question("p", "x")),
        ('{"messages": [{"role": "user", "content": "p"}], "expected_answer": "x"}', Question("p", "x")),
        ('{"question": "p", "answer": "2 + 3\\n#### 5"}', Question("p", "5")),
        ('{"question": "p", "answer": "x\\n##### 5"}', Question("p", "x\n##### 5")),
        ('{"question": "p", "answer": "x\\n#### "}', Question("p", "x\n#### ")),
        ('{"question": "p", "answer": 0e-99999999999999999999}', Question("p", "0")),
        # numbers keep their digits
        ('{"question": "p", "answer": 12345678901234567890123}', Question("p", "12345678901234567890123")),
        ('{"question": "p", "answer": 0.10000000000000000001}', Question("p", "0.10000000000000000001")),
        ('{"question": "p", "answer": 4.0}', Question("p", "4.0")),
        ('{"question": "p", "answer": 1.5e3}', Question("p", "1500")),
        ('{"question": "p", "answer": ' + "7" * 5000 + "}", Question("p", "7" * 5000)),
        ('  {"question": "\\ud83d\\ude00", "answer": "x"}\t', Question("\U0001f600", "x")),
    ],
)  # fmt: skip
def test_a_question_under_another_name_is_read(line: str, question: Question, tmp_path: Path) -> None:
    for name, text in (("lines", line), ("list", f"[{line}]")):
        (tmp_path / f"{name}.jsonl").write_text(text)
        assert load_dataset(str(tmp_path / f"{name}.jsonl")).questions == (question,)


def test_a_list_names_the_item_and_another_kind_of_file_is_said_to_be_one(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('[\n {"question": "a", "answer": 1},\n {"question": "b"}\n]')
    with pytest.raises(TriAttentionError, match=r"a\.json, item 2: the object has no \"answer\""):
        load_dataset(str(tmp_path / "a.json"))
    (tmp_path / "b.json").write_text('[\n {"question": "a"')
    with pytest.raises(TriAttentionError, match=r"neither JSON lines nor one JSON list: not JSON \(.* at line 2, col"):
        load_dataset(str(tmp_path / "b.json"))
    (tmp_path / "a.csv").write_text("question,answer\na,1\n")
    with pytest.raises(TriAttentionError, match=r"a\.csv does not end with \.jsonl; convert it to JSON lines"):
        load_dataset(str(tmp_path / "a.csv"))


def test_a_configuration_is_read_in_every_form_and_as_it_is_written(
    tiny_model: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = 'method: triattention\nbudget: 010\nseed: 1_0\nrun-tag: "on"  # é\n'
    for form in SAME.values():
        (tmp_path / "c.yaml").write_bytes(form(text))
        assert run_one(tiny_model, questions, "--dry-run", "--extra-config", str(tmp_path / "c.yaml")) == 0
        values = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line.startswith("  "))
        # as on the command line: not 8, as YAML 1.1 reads it
        assert (values["budget"], values["seed"]) == ("10", "10")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("triattention_stats_file: {stats}\nper_head_pruning: true\nper_layer_perhead_pruning: false",
         {"stats_path": "{stats}", "pruning_mode": "per_head"}),
        ("per_head_pruning: false\nper_layer_perhead_pruning: yes\nload_dtype: bfloat16\nkv_budget: 64",
         {"pruning_mode": "per_layer_per_head", "dtype": "bfloat16", "budget": "64"}),
        ("x-base: &base\n  seed: 3\n", None),
        ("<<: &base {seed: 3, budget: 32}\nbudget: 64", {"seed": "3", "budget": "64"}),
        ("hf-overrides: {rope_parameters: {rope_type: yarn, factor: 4.0, rope_theta: 1e5, x: 010}, tie: true}",
         {"hf_overrides": "{{'rope_parameters': {{'rope_type': 'yarn', 'factor': 4.0, 'rope_theta': 100000.0, "
          "'x': '010'}}, 'tie': True}}"}),
    ],
)  # fmt: skip
def test_published_names_and_nested_values_of_a_configuration(
    text: str, expected: dict[str, str] | None, tiny_model: str, questions: str, tiny_statistics: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "c.yaml").write_text(text.replace("{stats}", tiny_statistics))
    more = ("--method", "triattention", "--dry-run", "--extra-config", str(tmp_path / "c.yaml"))
    code = run_one(tiny_model, questions, *more)
    printed = capsys.readouterr()
    if expected is None:
        assert (code, "'x-base' is not an option" in printed.err) == (1, True)
        return
    assert code == 0, printed.err
    values = dict(line.split(maxsplit=1) for line in printed.out.splitlines() if line.startswith("  "))
    assert {name: values[name] for name in expected} == {
        name: value.format(stats=tiny_statistics) for name, value in expected.items()
    }


def test_numbers_beyond_all_sense_are_one_sentence(
    tiny_model: str, questions: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_one(tiny_model, questions, "--method", "full", "--max-new-tokens", "9" * 400) == 1
    assert capsys.readouterr().err.endswith("; give at most 2147483647\n")


def test_a_calibration_text_is_read_in_every_form(tiny_model: str, tmp_path: Path) -> None:
    made = []
    for number, form in enumerate((SAME["as written"], SAME["UTF-16, little-endian"])):
        (tmp_path / "text").write_bytes(form(TEXT))
        output = tmp_path / f"{number}.pt"
        assert (
            main(["calibrate", "--model", tiny_model, "--input", str(tmp_path / "text"), "--output", str(output)]) == 0
        )
        made.append(statistics.load(output).q_abs_mean)
    assert torch.equal(*made)


@pytest.fixture(scope="module")
def finished(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """The words of a finished run of four batches, and its results."""
    out = tmp_path_factory.mktemp("run")
    (out / "two.json").write_text(
        '[{"question": "what is 1 ?", "answer": 1}, {"question": "what is 2 ?", "answer": 2}]'
    )
    words = ["--method", "full", "--max-new-tokens", "3", "--num-samples", "2", "--seed", "1"]
    assert run_one(tiny_model, str(out / "two.json"), *words, "--out", str(out)) == 0
    return words, results_in(out)


#: A line that was cut off must not count as whole, so results need the line ends that run-one writes.
_SAVED = [form for form in SAME if form != "lines of old Macs"]


@pytest.mark.parametrize("form", [*_SAVED, "no last line end"])
def test_a_run_is_resumed_from_lines_that_another_tool_saved(
    form: str, finished: tuple[list[str], Path], tiny_model: str, tmp_path: Path
) -> None:
    words, whole = finished
    half = "".join(whole.read_text("utf-8").splitlines(keepends=True)[:2])
    data = half.rstrip("\n").encode() if form == "no last line end" else SAME[form](half)
    (tmp_path / whole.name).write_bytes(data)
    assert len(read_lines(tmp_path / whole.name)[0]) == 2
    assert run_one(tiny_model, str(whole.parent / "two.json"), *words, "--out", str(tmp_path)) == 0
    assert without_times(lines_of(tmp_path / whole.name)) == without_times(lines_of(whole))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda line: line.replace('"index": 0', '"index": 0, "index": 1'), "line 2: 'index' twice in one object"),
        (lambda line: line.replace('"index": 0', '"index": "0"'), "line 2: 'index' is '0', which run-one never writes"),
        (lambda line: line.replace('"index": 0', '"index": true'), "line 2: 'index' is True, which run-one never"),
        (lambda line: line.replace('"index": 0', f'"index": {"9" * 5000}'), "line 2: a number of 5000 digits; correct"),
        (lambda line: line.replace('"index": 0', '"index": -1'), "line 2 does not belong to a batch of this run"),
        (lambda line: line.replace('"seconds": ', '"seconds": 1e999, "x": '), "line 2: 1e999, which is beyond float64"),
        (lambda line: "\ufffd" + line, "line 2: not JSON (Expecting value at column 1)"),
        (lambda line: line.replace('"index": 0', f'"index": {10**400}'), "line 2: 'index' is 1000"),
        (lambda line: "[" + line.rstrip() + "]\n", "line 2 has no 'question', so it is not a result of run-one"),
    ],
)  # fmt: skip
def test_a_changed_result_is_named_and_nothing_is_lost(
    change: Any, sentence: str, finished: tuple[list[str], Path], tiny_model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words, whole = finished
    first, second, *rest = whole.read_text("utf-8").splitlines(keepends=True)
    before = "".join([first, change(second), *rest])
    (tmp_path / whole.name).write_text(before)
    assert run_one(tiny_model, str(whole.parent / "two.json"), *words, "--out", str(tmp_path)) == 1
    assert sentence in capsys.readouterr().err
    assert (tmp_path / whole.name).read_text() == before


@pytest.mark.parametrize(
    ("form", "sentence"),
    [
        (lambda lines: f"[{','.join(lines)}]", "line 1 has no 'question', so it is not a result of run-one"),
        ("\r".join, "line 1: not JSON (Extra data at column"),
        (lambda lines: "\n".join([*lines, "other"]), "line 3: not JSON (Expecting value at column 1)"),
    ],
    ids=["a list", "old Mac", "a note"],
)  # fmt: skip
def test_a_whole_file_in_another_form_is_not_taken_for_a_line_that_was_cut_off(
    form: Any, sentence: str, finished: tuple[list[str], Path], tiny_model: str, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words, whole = finished
    before = form(whole.read_text("utf-8").splitlines()[:2]).encode()
    (tmp_path / whole.name).write_bytes(before)
    assert run_one(tiny_model, str(whole.parent / "two.json"), *words, "--out", str(tmp_path)) == 1
    assert sentence in capsys.readouterr().err
    assert (tmp_path / whole.name).read_bytes() == before


def test_a_corrected_answer_is_told_from_another_question(
    finished: tuple[list[str], Path], tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words, whole = finished
    (tmp_path / whole.name).write_text(whole.read_text("utf-8"))
    (tmp_path / "two.json").write_text((whole.parent / "two.json").read_text().replace('"answer": 1', '"answer": 8'))
    assert run_one(tiny_model, str(tmp_path / "two.json"), *words, "--out", str(tmp_path)) == 1
    assert (
        "line 1 was graded with the answer '1', but question 1 of two has '8'; give another" in capsys.readouterr().err
    )


def _with(lines: list[str], name: str, value: Any) -> list[str]:
    return [json.dumps({**json.loads(line), name: value}) for line in lines]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda lines: [*lines, lines[0]], "line 5 is the same reply as an earlier line; remove one of them"),
        (lambda lines: _with(lines, "questions", "2"), "'questions' is '2', so it"),
        (lambda lines: _with(lines, "num_samples", None), "'num_samples' is None"),
        (lambda lines: _with(lines, "batch_seconds", 0), "took no time"),
    ],
    ids=["twice", "text", "null", "no time"],
)  # fmt: skip
def test_results_that_cannot_be_compared_are_named(
    change: Any, sentence: str, finished: tuple[list[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(change(finished[1].read_text("utf-8").splitlines())) + "\n")
    assert main(["compare", str(finished[1]), str(tmp_path / "a.jsonl")]) == 1
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("which", ["input", "other", "folder", "pipe"])
def test_statistics_replace_nothing_but_statistics(
    which: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "input").write_text(TEXT)
    (tmp_path / "other").write_text("{}")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    words = ["--model", tiny_model, "--input", str(tmp_path / "input"), "--output", str(tmp_path / which)]
    for verb in ("calibrate", "build-stats"):
        assert main([verb, *words]) == 1
        assert f"--output {tmp_path / which} is " in capsys.readouterr().err
    assert ((tmp_path / "input").read_text(), (tmp_path / "other").read_text()) == (TEXT, "{}")
    with pytest.raises(FileExistsError, match="not a regular file"):
        write_text(tmp_path / "pipe", "")


def _published(**changes: Any) -> dict[str, Any]:
    mean = torch.view_as_complex(torch.arange(1.0, 9.0).view(4, 2))
    entry = {"q_mean_real": mean.real, "q_mean_imag": mean.imag, "q_abs_mean": mean.abs() + 1}
    stats = {f"layer{layer:02d}_head{head:02d}": entry for layer in range(2) for head in range(3)}
    return {"metadata": {"sampled_heads": [[i, j] for i in range(2) for j in range(3)]}, "stats": stats} | changes


_ENTRY = _published()["stats"]["layer00_head00"]


def _complex(pairs: bool) -> dict[str, Any]:
    mean = torch.complex(_ENTRY["q_mean_real"], _ENTRY["q_mean_imag"])
    mean = torch.view_as_real(mean) if pairs else mean
    return {key: {"q_mean_complex": mean, "q_abs_mean": _ENTRY["q_abs_mean"]} for key in _published()["stats"]}


@pytest.mark.parametrize(
    "payload",
    [
        _published(),
        _published(metadata={}),
        {"stats": _published()["stats"]},
        _published()["stats"],
        _published(stats={f"layer{i}_head{j}": _ENTRY for i in range(2) for j in range(3)}),
        _published(stats={key: {name: x.double() for name, x in _ENTRY.items()} for key in _published()["stats"]}),
        _published(stats=_complex(pairs=False)),
        _published(stats=_complex(pairs=True)),
        _published(metadata={"sampled_heads": torch.tensor([[i, j] for i in range(2) for j in range(3)]).tolist()}),
    ],
)  # fmt: skip
def test_statistics_under_other_names_are_the_same(payload: dict[str, Any], tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "p.pt")
    loaded, expected = statistics.load(tmp_path / "p.pt"), statistics.parse(_published(), "")
    for name in ("q_mean_real", "q_mean_imag", "q_abs_mean"):
        found = getattr(loaded, name)
        assert found.dtype == torch.float32
        assert torch.equal(found, getattr(expected, name))


@pytest.mark.parametrize(
    ("payload", "sentence"),
    [
        (_published(stats={}), "is not a statistics file: it has no entries such as layer00_head00, but []"),
        (_published(stats={"layer00": {"head00": {}}}), "no entries such as layer00_head00, but ['layer00']"),
        ({"sigma": 1, "compressor": {}}, "no entries such as layer00_head00, but ['sigma', 'compressor']; calibrate"),
        (_published(stats=None), "is not a statistics file (AttributeError"),
        ({"layer_stats": {}}, "has 'layer_stats', means of KV heads without E|q|, from which TriAttention cannot"),
        (_published(stats={"layer00_head00": {"mean": 1}}, metadata={}), "layer 0, head 0 has no q_mean_real, but ['m"),
        (_published(metadata={"sampled_heads": [[0, 0], [0, 7]]}), "lacks layer 0, head 7; calibrate every head"),
        (_published(metadata={"sampled_heads": []}), "lists no heads"),
        (_published(metadata={"sampled_heads": [[0, 2]]}), "lacks layer 0, head 0; calibrate every head"),
        (_published(metadata={"sampled_heads": [[0.5, 0.0]]}), "is not a statistics file (TypeError"),
        (_published(stats={"layer00_head00": {name: x.view(2, 2) for name, x in _ENTRY.items()}}, metadata={}),
         "layer 0, head 0 has means of shape (2, 2); expected [F]; calibrate this model"),
        (_published(metadata={"sampled_heads": [[0, 0, 0]]}), "is not a statistics file (ValueError"),
        (_published(metadata={"token_count": float("inf")}), "is not a statistics file (OverflowError"),
        (_published(metadata={"token_count": -1}), "is not a statistics file (ValueError"),
        ({"stats": {**_published()["stats"], "layer999999999_head0": _ENTRY}},
         "lacks layer 2, head 0; calibrate every head"),
        ({"stats": {**_published()["stats"], "layer0_head00": {}}}, "has layer 0, head 0 twice; calibrate again"),
        (_published(stats={"layer00_head00": {"q_mean_real": torch.ones(2, dtype=torch.complex64),
         "q_mean_imag": torch.ones(2), "q_abs_mean": torch.ones(2)}}, metadata={}), "a complex tensor where a real"),
        (_published(stats={"layer00_head00": {"q_mean_real": torch.full((2,), 1e300, dtype=torch.float64),
         "q_mean_imag": torch.ones(2), "q_abs_mean": torch.ones(2)}}, metadata={}), "q_mean_real holds NaN or Inf"),
    ],
)  # fmt: skip
def test_any_other_statistics_are_named(payload: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    torch.save(payload, tmp_path / "p.pt")
    with pytest.raises(TriAttentionError, match=re.escape(sentence)):
        statistics.load(tmp_path / "p.pt")


def test_json_of_every_value_is_what_json_reads() -> None:
    text = '{"a": [1, -2.5e-3, true, null, "\\u00e9\\ud83d\\ude00"], "b": {"c": 12345678901234567890}}'
    assert parse_json(text) == json.loads(text)
