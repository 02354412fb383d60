"""The plain subject: all green, and nobody else's code; and the statistics that every subject is given."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from verify.model.live_model import published_layout
from verify.record.reading import read_record
from verify.record.schema import Record, Verdict
from verify.tests.tree import REPOSITORY

_ROOT = REPOSITORY / "verify" / "examples" / "plain"
_PACKAGE = _ROOT / "triattention"
_SOURCES = sorted(_PACKAGE.rglob("*.py"))


def _run(phases: str, out: Path, limit_s: float) -> Record:
    """The record of a run on the plain subject. Raises AssertionError where any check failed, HARD or SOFT."""
    command = [sys.executable, "-m", "verify", "run", "--subject", str(_ROOT), "--phases", phases, "--device", "cpu"]
    child = subprocess.run(
        [*command, "--strict-soft", "--out", str(out)], cwd=REPOSITORY, capture_output=True, text=True, timeout=limit_s
    )
    assert child.returncode == 0, child.stdout[-4000:] + child.stderr[-2000:]
    return read_record(next(out.glob("*/record.json")))


def test_phases_2_to_5_are_green_and_skip_only_what_needs_a_gpu(tmp_path: Path) -> None:
    results = _run("2-5", tmp_path, 1200).results
    assert {result.verdict for result in results} == {Verdict.PASS, Verdict.SKIP, Verdict.ABSENT}
    assert {result.code for result in results if result.verdict is Verdict.SKIP} == {"NO_GPU"}
    # it tells its scores, so it needs no ranker
    absent = {result.id.rpartition(".")[0] for result in results if result.verdict is Verdict.ABSENT}
    assert absent == {"p4.ranking", "p4.ranking_repeats"}
    assert sum(result.verdict is Verdict.PASS for result in results) > 150


@pytest.mark.slow
def test_phase_6_is_green_and_skips_only_what_is_not_published(tmp_path: Path) -> None:
    others = {r.id: r for r in _run("6", tmp_path, 3000).results if r.verdict is not Verdict.PASS}
    assert others.pop("p6.cli_flash.flash_attention_2").code == "NO_GPU"
    absent = {name.split(".")[1] for name, one in others.items() if one.verdict is Verdict.ABSENT}
    calibration = {"calibration", "calibration_restores", "calibration_script"}
    assert absent <= {"keep_set_mode", "quality", "window", *calibration}
    assert {one.verdict for one in others.values()} <= {Verdict.ABSENT, Verdict.REFUSED}


@pytest.mark.parametrize("source", _SOURCES, ids=lambda path: path.relative_to(_PACKAGE).as_posix())
def test_it_imports_nothing_but_itself_torch_triton_and_transformers(source: Path) -> None:
    allowed = {"torch", "triton", "transformers", *sys.stdlib_module_names}
    depth = len(source.relative_to(_PACKAGE).parts)
    for node in ast.walk(ast.parse(source.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level <= depth, f"line {node.lineno} reaches out of the package"
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module]
            assert {name.partition(".")[0] for name in names} <= allowed, f"line {node.lineno} imports {names}"


def _bodies(folder: Path) -> set[str]:
    """Every function of more than one statement below ``folder``, without its name, signature and docstring."""
    found = set()
    for source in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found |= {ast.dump(ast.Module(body, []))} if len(body) > 1 else set()
    return found


def test_no_function_of_it_is_one_of_the_reference() -> None:
    assert not _bodies(_PACKAGE) & _bodies(REPOSITORY / "triattention")


def _statistics(folder: Path, unrotated: int) -> Path:
    draw = torch.Generator().manual_seed(0)
    content = {name: torch.randn(2, 3, 4, generator=draw) for name in ("q_mean_real", "q_mean_imag", "q_abs_mean")}
    content["q_pass_mean"] = torch.zeros(2, 3, unrotated)
    content["architecture"] = {"num_layers": 2, "num_query_heads": 3, "head_dim": 8, "rope_style": "half"}
    torch.save(content, folder / "ours.pt")
    return folder / "ours.pt"


def test_a_subject_is_given_the_oracle_s_numbers_in_the_published_layout(tmp_path: Path) -> None:
    ours = torch.load(_statistics(tmp_path, 0), weights_only=True)
    given = torch.load(published_layout(tmp_path / "ours.pt"), weights_only=True)
    heads = [[layer, head] for layer in range(2) for head in range(3)]
    assert given["metadata"] == {"sampled_heads": heads, "head_dim": 8, "rope_style": "half"}
    for layer, head in heads:
        for name, values in given["stats"][f"layer{layer:02d}_head{head:02d}"].items():
            assert torch.equal(values, ours[name][layer, head]), name


def test_means_of_unrotated_dims_have_no_place_there(tmp_path: Path) -> None:
    ours = _statistics(tmp_path, 4)
    assert published_layout(ours) == ours
    assert list(tmp_path.iterdir()) == [ours]


_KEPT = "(torch.arange(len(omega)) >= config.disable_top_n_high_freq)"


@pytest.mark.parametrize(
    ("before", "after", "told"),
    [
        ("freq_scale_sq, omega", f"freq_scale_sq * {_KEPT}, omega", "1 passed"),
        (
            "*_means(head_stats)",
            f"*(lambda m, a, kept: (m * kept, a - m.abs() * ~kept))(*_means(head_stats), {_KEPT})",
            "1 passed",
        ),
        ("freq_scale_sq, omega", f"freq_scale_sq * {_KEPT}.flip(0), omega", "1 failed"),
    ],
    ids=["whole_term", "trigonometric_term", "lowest_frequencies"],
)
def test_an_option_may_be_honoured_in_either_reading(before: str, after: str, told: str, tmp_path: Path) -> None:
    copy = shutil.copytree(_ROOT, tmp_path / "plain")
    core = copy / "triattention" / "vllm" / "core"
    accepting = (core / "config.py").read_text().replace('"disable_top_n_high_freq",', "")
    (core / "config.py").write_text(accepting)
    head, mark, body = (core / "scoring.py").read_text().partition("scores = score(")
    assert before in body
    (core / "scoring.py").write_text(head + mark + body.replace(before, after))
    command = [sys.executable, "-m", "pytest", "phases/p4_equivalence.py::test_high_frequencies[pytorch]", "-q"]
    child = subprocess.run(
        [*command, "--device", "cpu", "--subject", str(copy), "--scratch", str(tmp_path / "scratch")],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert told in child.stdout, child.stdout + child.stderr
