from __future__ import annotations

from pathlib import Path

import pytest

from triattention.cli import main
from triattention.tests.command_line import run_one

pytest_plugins = ["triattention.tests.fixtures"]


@pytest.fixture
def configured(tiny_model: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """What a dry run prints, and the exit code, with YAML texts as extra configurations."""

    def run(*texts: str, more: tuple[str, ...] = ()) -> tuple[int, str]:
        files = []
        for number, text in enumerate(texts):
            (tmp_path / f"{number}.yaml").write_text(text)
            files += ["--extra-config", str(tmp_path / f"{number}.yaml")]
        code = run_one(tiny_model, questions, "--dry-run", *files, *more)
        captured = capsys.readouterr()
        return code, captured.out + captured.err

    return run


def test_dashes_and_underscores_both_name_options_and_required_ones_may_come_from_the_file(configured) -> None:
    code, printed = configured(
        "method: triattention\nbudget: 100\nmax-questions: 1\nallow_prefill_compression: true\nrun-tag: t7\n"
    )
    assert code == 0
    assert "  budget                     100\n" in printed
    assert "  allow_prefill_compression  True\n" in printed
    assert "two-t7: 1 questions" in printed


def test_the_command_line_wins_over_a_file_and_a_later_file_over_an_earlier_one(configured) -> None:
    first = "method: triattention\nbudget: 100\nwindow-size: 7\nseed: 1\nallow-prefill-compression: true"
    second = "budget: 200\nseed: 2"
    _, printed = configured(first, second, more=("--seed", "3", "--no-allow-prefill-compression"))
    values = dict(line.split(maxsplit=1) for line in printed.splitlines() if line.startswith("  "))
    assert values["budget"] == "200"
    assert values["seed"] == "3"
    assert values["window_size"] == "7"
    assert values["allow_prefill_compression"] == "False"


def test_a_null_leaves_an_option_at_its_default(configured) -> None:
    code, printed = configured("method: full\nseed: 5", "seed: null")
    assert code == 0
    assert "  seed                       0\n" in printed


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("bugdet: 100", "'bugdet' is not an option of run-one; did you mean 'budget'?"),
        ("zzz: 100", "'zzz' is not an option of run-one; the options are model, dtype"),
        ("extra-config: other.yaml", "'extra-config' is not an option of run-one"),
        ("run-tag: a\nrun_tag: b", "line 2: 'run_tag' and 'run-tag' are the same option; remove one"),
        ("budget: true", "line 1: 'budget' is 'true'; give one value"),
        ("dry-run: 3", "line 1: 'dry-run' is '3'; give true or false"),
        ("seed: 1\nrunner_args:\n  budget: 1", "line 2: 'runner_args' is not an option of run-one"),
        ("budget: {a: 1}", "line 1: 'budget' contains options of its own (a); move them to the left margin"),
        ("budget: [1, [2]]", "line 1: 'budget' is a sequence; give one value"),
        ("budget: !!python/object:os.system 1", "line 1: 'budget' is '1'; give one value"),
        ("? [a, b]\n: 1", "line 1: a key is not text; write 'option: value'"),
        ("- budget", "is not a mapping; write one option on each line, such as 'budget: 1024'"),
        ("a: b: c", "is not one YAML mapping (mapping values are not allowed here"),
        ("seed: 1\n---\nseed: 2", "is not one YAML mapping (expected a single document"),
        ("seed: 1\nbudget: 9\nseed: 2", "has 'seed' twice, in lines 1 and 3; remove one"),
        ("seed: 1\n\tbudget: 2", "is not one YAML mapping (while scanning"),
        ("a: " + "[" * 5000, "is nested too deeply, or contains itself; correct it"),
        ("disable_mlr: true", "line 1: 'disable_mlr' is not an option of run-one"),
        ("per_head_pruning: 1", "line 1: 'per_head_pruning' is '1'; give true or false"),
        (
            "per_head_pruning: true\nper_layer_perhead_pruning: true",
            "line 2: 'per_layer_perhead_pruning' and 'per_head_pruning' are the same option",
        ),
        (
            "per_head_pruning: false\nper_layer_perhead_pruning: false",
            "'per_head_pruning' is false, which leaves the mode open; add ",
        ),
        ("hf-overrides: {rope_theta: !!binary aGk=}", "line 1: 'aGk=' has the tag 'tag:yaml.org,2002:binary'"),
        (
            "per_head_pruning: false",
            "'per_head_pruning' is false, which leaves the mode open; add 'pruning-mode: union'",
        ),
        ("per_head_pruning: false\npruning_mode: per_head", "is false, which leaves the mode open"),
        ("<<: {seed: 1, seed: 2}", "has 'seed' twice, in line 1; remove one"),
        ("hf-overrides: {a: !!str 4}", "line 1: '4' has the tag 'tag:yaml.org,2002:str'; write it without"),
        ("hf-overrides: !x {a: 1}", "line 1: a mapping has the tag '!x'; write it without"),
        ("seed: !!int '3'", "line 1: 'seed' is '3'; give one value"),
        ("hf-overrides: {a: 1e999}", "line 1: 1e999, which is beyond float64; give a smaller number"),
        ("hf-overrides: &a {b: *a}", "is nested too deeply, or contains itself; correct it"),
        ("seed: 5\r\n\x1a", "is not one YAML mapping (unacceptable character #x001a"),
        ("hf-overrides: {a: 1, a: 2}", "has 'a' twice, in line 1; remove one"),
    ],
)
def test_what_is_no_option_is_refused_by_name(configured, text: str, sentence: str) -> None:
    code, printed = configured(text, more=("--method", "full"))
    assert code == 1
    assert sentence in printed
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("budget: 1.5", "line 1: 'budget' is '1.5'; give a whole number"),
        ("seed: 1\ntemperature: warm", "line 2: 'temperature' is 'warm'; give a number"),
        ("budget: []", "line 1: 'budget' is ''; give a whole number"),
        ("method: best", "line 1: 'method' is 'best'; give one of full, fullkv, triattention"),
        ("hf-overrides: 3", "line 1: 'hf-overrides': '3' is not a JSON object; give one such as"),
    ],
)
def test_a_value_that_the_command_line_would_refuse_is_named_with_its_line(
    configured, text: str, sentence: str
) -> None:
    code, printed = configured(text, more=("--method", "full"))
    assert (code, sentence in printed) == (1, True), printed


def test_a_file_that_is_not_there_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run-one", "--extra-config", "none.yaml"]) == 1
    assert "cannot read --extra-config none.yaml: No such file" in capsys.readouterr().err


def test_a_sweep_takes_its_lists_from_a_file(
    tiny_model: str, questions: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sweep.yaml").write_text("budgets: [64, 128]\nmethods: [full, triattention]\ndevice: cpu\n")
    sweep = ["run-sweep", "--model", tiny_model, "--datasets", questions, "--out", str(tmp_path / "out")]
    assert main([*sweep, "--extra-config", str(tmp_path / "sweep.yaml"), "--dry-run"]) == 0
    runs = [line.partition(":")[0] for line in capsys.readouterr().out.splitlines() if "2 batches" in line]
    name = f"{Path(tiny_model).name}-two"
    assert runs == [f"full-{name}", f"triattention-b64-{name}", f"triattention-b128-{name}"]
