"""A model whose configuration is replaced when it is loaded: the same words load, calibrate and serve it."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from triattention import models, statistics
from triattention.architecture import describe
from triattention.cli import main
from triattention.cli.overrides import joined, overrides_of
from triattention.configuration import read_configuration
from triattention.errors import TriAttentionError
from triattention.methods.triattention import apply_triattention_patch
from triattention.tests.command_line import TEXT, run_one

pytest_plugins = ["triattention.tests.fixtures"]

YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

#: Words as vLLM takes them, and the overrides that vLLM 0.26 makes of them.
WORDS = [
    (["--hf-overrides", '{"a": {"b": 1}}'], {"a": {"b": 1}}),
    (["--hf_overrides", '{"a": 1}'], {"a": 1}),
    (['--hf_overrides={"a": 1}'], {"a": 1}),
    (["--hf-overrides.a.b", "4.0"], {"a": {"b": 4.0}}),
    (["--hf_overrides.a.b_c=yarn", "--hf-overrides.a.factor", "4"], {"a": {"b_c": "yarn", "factor": 4}}),
    (["--hf-overrides.a", "-1", "--hf-overrides.b", "null"], {"a": -1, "b": None}),
    (["--hf-overrides.a+", "A,B"], {"a": ["A", "B"]}),
    (["--hf-overrides.a", "128k", "--hf-overrides.b", "2K", "--hf-overrides.c", "25.6k"], {"a": 128000, "b": 2048,
     "c": 25600}),
    (["--hf-overrides.a", '{"b": [1, 2]}'], {"a": {"b": [1, 2]}}),
]  # fmt: skip


@pytest.mark.parametrize(("words", "expected"), WORDS)
def test_words_mean_what_they_mean_to_vllm(words: list[str], expected: dict[str, Any]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--hf-overrides", type=overrides_of)
    parser.add_argument("--model")
    args = parser.parse_args(joined([*words, "--model", "m"]))
    assert (args.hf_overrides, args.model) == (expected, "m")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--hf-overrides.a"], "--hf-overrides.a has no value; give one"),
        (["--hf-overrides.a", "1", "--hf-overrides.a", "2"], "--hf-overrides.a is given twice; remove one"),
        (["--hf-overrides.a", "1", "--hf-overrides.a.b", "2"], "'a' has a value and entries of its own"),
        (
            ["--hf-overrides", "{}", "--hf_overrides", "{}"],
            "--hf-overrides is given 2 times, of which the last would count",
        ),
        (["--hf-overrides.a..b", "1"], "--hf-overrides.a..b has an empty name; write it as"),
        (["--hf-overrides.", "1"], "--hf-overrides. has an empty name"),
        (["--hf-overrides.a", "1", "--hf-overrides", "{}"], "is given both as JSON and with dots; give one of them"),
    ],
)
def test_words_with_two_meanings_are_refused(words: list[str], sentence: str) -> None:
    with pytest.raises(TriAttentionError, match=re.escape(sentence)):
        joined(words)


@pytest.mark.parametrize(
    ("text", "words"),
    [("{a: 1}", "is not JSON"), ("[1]", "is not a JSON object"), ('{"a": 1, "a": 2}', "is 'a' twice in one object"),
     ('{"a": NaN}', "is NaN, which JSON does not have")],
)  # fmt: skip
def test_overrides_that_are_no_object_are_a_usage_error(
    text: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["calibrate", "--model", "m", "--hf-overrides", text])
    assert stop.value.code == 2
    assert words in capsys.readouterr().err


def _calibrate(model: str, directory: Path, *words: str) -> Path:
    (directory / "text").write_text(TEXT)
    output = directory / "stats.pt"
    assert (
        main(["calibrate", "--model", model, "--input", str(directory / "text"), "--output", str(output), *words]) == 0
    )
    return output


@pytest.mark.parametrize(
    "words",
    [["--hf-overrides", json.dumps({"rope_parameters": YARN})],
     [part for name, value in YARN.items() for part in (f"--hf-overrides.rope_parameters.{name}", str(value))],
     ["--hf-config-path", "{other}"]],
    ids=["JSON", "dots", "another config.json"],
)  # fmt: skip
def test_a_model_that_is_loaded_with_other_rope_is_calibrated_with_the_same_words(
    words: list[str], tiny_model: str, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((Path(tiny_model) / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "rope_parameters": YARN}))
    made = _calibrate(
        tiny_model, tmp_path, *(word.format(other=other) if "{other}" in word else word for word in words)
    )
    served = AutoModelForCausalLM.from_pretrained(tiny_model, rope_parameters=YARN, local_files_only=True)
    loaded = statistics.load(made)
    loaded.check_model(served)
    assert loaded.architecture is not None
    assert loaded.architecture.attention_scaling == describe(served).attention_scaling != 1.0
    plain = AutoModelForCausalLM.from_pretrained(tiny_model, local_files_only=True)
    with pytest.raises(TriAttentionError, match=r"calibrate this model, with --hf-overrides if entries of its config"):
        loaded.check_model(plain)


def test_the_refusal_of_overridden_rope_names_the_way_out(tiny_model: str, tiny_statistics: str) -> None:
    from transformers import AutoModelForCausalLM

    served = AutoModelForCausalLM.from_pretrained(tiny_model, rope_parameters=YARN, local_files_only=True)
    with pytest.raises(TriAttentionError, match=r"attention_scaling 1\.0 and .*; calibrate this model, with --hf-over"):
        apply_triattention_patch(served, stats_path=tiny_statistics, model_path=None, kv_budget=64)


def test_overrides_are_applied_in_the_order_of_vllm(tiny_model: str) -> None:
    def rope(**overrides: Any) -> dict[str, Any]:
        return read_configuration(tiny_model, overrides, name="tiny").rope_parameters

    assert rope(rope_parameters=YARN) == rope(rope_scaling=YARN) == YARN
    # the value of config.json, which rope_parameters holds, stays
    assert rope(rope_theta=5.0)["rope_theta"] == 10000.0
    assert rope(partial_rotary_factor=0.5)["partial_rotary_factor"] == 0.5
    assert read_configuration(tiny_model, {"rms_norm_eps": 0.5}, name="tiny").rms_norm_eps == 0.5
    assert rope(rope_parameters=None, rope_theta=5.0) == {"rope_type": "default", "rope_theta": 5.0}


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            {"rope_parameters": {"rope_theta": 5.0}},
            "cannot be used (KeyError('rope_type')); give rope_type, rope_theta and",
        ),
        (
            {"rope_parameters": {"rope_type": "spiral", "rope_theta": 5.0}},
            "cannot be used (KeyError('spiral')); give rope",
        ),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, "'factor': 2.0}} cannot be used (TypeError("),
        ({"rope_parameters": {**YARN, "factor": "big"}}, "'<=' not supported between instances of"),
        ({"rope_parameters": None}, "rope_parameters None cannot be used (TypeError"),
        ({"vocab_size": 50}, "the weights in its files have other shapes; correct them"),
        (
            {"attention_bias": True},
            "of its weights are not in its files (one: model.layers.0.self_attn.k_proj.bias); correct",
        ),
        ({"pad_token_id": 500}, "correct them"),
        ({"num_attention_heads": 0}, "division or modulo by zero; correct them"),
        ({"head_dim": "x"}, "Validation error for field 'head_dim': TypeError: Field 'head_dim' with value 'x'"),
        ({"hidden_size": 32}, "correct them"),
        ({"model_type": "qwen2"}, "but {model} has 'llama' in its config.json, which decides the classes; change it"),
    ],
)
def test_overrides_that_cannot_be_used_are_one_sentence(
    overrides: dict[str, Any], sentence: str, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hf-overrides", json.dumps(overrides), "--method", "full"]
    assert run_one(tiny_model, "smoke", "--max-questions", "1", "--max-new-tokens", "1", *words) == 1
    printed = capsys.readouterr().err.splitlines()[-1]
    assert sentence.format(model=tiny_model) in printed


def test_statistics_in_the_cache_are_kept_for_each_configuration(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triattention.text_calibration import cached_statistics

    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path))
    paths = []
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    longer = {"rope_parameters": dynamic, "max_position_embeddings": 1024}
    for overrides in ({}, {"rope_parameters": YARN}, {}, {"rope_parameters": dynamic}, longer):
        loaded = models.load(models.find_source(tiny_model, overrides=overrides), device="cpu")
        paths.append(cached_statistics(loaded))
        statistics.load(paths[-1]).check_model(loaded.model)
    assert paths[0] == paths[2]
    assert len({*paths}) == 4


@pytest.mark.parametrize(
    ("overrides", "note"),
    [
        ({"temperature": 0.5}, "has temperature, which steers transformers, not the model; it is left out"),
        ({"return_dict": False}, "has return_dict, which steers transformers"),
        ({"rope_theta": 5.0}, "has rope_theta, but that of rope_parameters counts; replace it there"),
        ({"rope_paramters": {}}, "has rope_paramters, which the configuration of {model} does not have"),
    ],
)
def test_overrides_without_effect_are_noted(
    overrides: dict[str, Any], note: str, tiny_model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--hf-overrides", json.dumps(overrides), "--method", "full", "--max-new-tokens", "2"]
    assert run_one(tiny_model, "smoke", "--max-questions", "1", *words) == 0
    assert f"note: --hf-overrides {note.format(model=tiny_model)}" in capsys.readouterr().err


def test_overrides_do_not_make_a_run_of_none_another_one(tiny_model: str, questions: str, tmp_path: Path) -> None:
    words = ["--method", "full", "--max-new-tokens", "2", "--out", str(tmp_path)]
    assert run_one(tiny_model, questions, *words) == 0
    assert run_one(tiny_model, questions, *words, "--hf-overrides", "{}") == 0


def test_a_run_with_overrides_is_not_resumed_without_them(
    tiny_model: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--method", "full", "--max-new-tokens", "2", "--out", str(tmp_path)]
    assert run_one(tiny_model, questions, *words, "--hf-overrides.rope_parameters", json.dumps(YARN)) == 0
    assert run_one(tiny_model, questions, *words) == 1
    assert "is from a run with hf_overrides = {'rope_parameters'" in capsys.readouterr().err


def test_a_revision_of_a_hub_model_has_its_own_fingerprint(
    tiny_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    root = tmp_path / "models--their--model"
    for commit, name in (("a" * 40, "main"), ("b" * 40, "other")):
        shutil.copytree(tiny_model, root / "snapshots" / commit)
        (root / "refs").mkdir(exist_ok=True)
        (root / "refs" / name).write_text(commit)
    changed = root / "snapshots" / ("b" * 40)
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps({**config, "rope_parameters": YARN}))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub, "HF_HUB_CACHE", str(tmp_path), raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    main_, other = (models.find_source("their/model", revision=name) for name in (None, "other"))
    assert (
        models.fingerprint(main_)
        != models.fingerprint(other)
        == models.fingerprint(models.find_source("their/model", revision="b" * 40))
    )
    scaling = [describe(models.load(source, device="cpu").model).attention_scaling for source in (main_, other)]
    assert scaling[0] == 1.0 != scaling[1]


@pytest.mark.parametrize("path", ["./absent", "{tmp}"])
def test_a_configuration_that_is_not_there_is_named(
    path: str, tiny_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = path.format(tmp=tmp_path)
    assert run_one(tiny_model, "smoke", "--method", "full", "--hf-config-path", path) == 1
    assert f"--hf-config-path {path} has no config.json; give a directory that has one" in capsys.readouterr().err
    assert run_one(tiny_model, "smoke", "--method", "full", "--revision", "v1") == 1
    assert f"--revision v1 is of a hub model, but {tiny_model} is a directory; leave it out" in capsys.readouterr().err


def test_several_models_are_calibrated_with_the_same_overrides(tiny_model: str, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    twin = shutil.copytree(tiny_model, tmp_path / "twin")
    words = ["--input", str(tmp_path / "text"), "--output-dir", str(tmp_path / "out"), "--job-parallel", "2"]
    both = ["--model", tiny_model, "--model", str(twin)]
    assert main(["build-stats", *both, *words, "--hf-overrides", json.dumps({"rope_parameters": YARN})]) == 0
    found = [statistics.load(path) for path in sorted((tmp_path / "out").iterdir())]
    assert len(found) == 2
    assert torch.equal(found[0].q_abs_mean, found[1].q_abs_mean)
    assert [one.architecture.attention_scaling for one in found if one.architecture] == pytest.approx(
        [1.1386] * 2, 1e-4
    )
