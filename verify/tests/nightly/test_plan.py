"""Which GPUs are verified tonight, from the file of runners, the runners that are online, and a repository variable."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from ci.nightly import NightlyError
from ci.nightly.gpus import Gpu, read_gpus
from ci.nightly.plan import plan
from verify.architectures import parse_target
from verify.arguments import parser
from verify.run.request import request_of
from verify.tests.fake_github import serving
from verify.tests.samples import REPOSITORY

GPUS = [
    Gpu(
        name=f"sm{sm}",
        sm=sm,
        labels=("self-hosted", f"sm{sm}"),
        gpus=1,
        level="usual",
        timeout_min=9,
        start_within_min=5,
    )
    for sm in (80, 90, 120)
]


def why(runners: Sequence[Sequence[str]] | None = None, listed: str = "", asked: str = "all") -> dict[str, str]:
    return {row["name"]: row["why"] for row in plan(GPUS, asked, runners, listed)}


def test_every_row_of_the_file_is_a_gpu_that_the_suite_covers_with_options_that_run_takes() -> None:
    for gpu in read_gpus(REPOSITORY / "ci" / "gpus.toml"):
        assert parse_target(gpu.target).target == gpu.target
        request = request_of(parser().parse_args(["run", *gpu.options]))
        assert request.expect == gpu.sm


def test_without_any_knowledge_every_row_gets_a_job() -> None:
    assert why() == {"sm80": "", "sm90": "", "sm120": ""}


def test_a_row_whose_runner_is_not_online_gets_none() -> None:
    runners = [["self-hosted", "Linux", "sm80"], ["self-hosted", "sm90"], ["sm120"]]
    assert why(runners) == {
        "sm80": "", "sm90": "", "sm120": "no runner with the labels self-hosted, sm120 is online",
    }  # fmt: skip
    # the runners that are known to be online decide, whatever the variable says
    assert why(runners, '["sm120"]') == why(runners)


def test_without_runners_the_repository_variable_decides() -> None:
    found = why(None, '["sm90"]')
    assert found == dict.fromkeys(("sm80", "sm120"), "the repository variable GPU_RUNNERS does not list it") | {
        "sm90": ""
    }
    assert why(None, '["sm90"]', "sm80") == {"sm80": "the repository variable GPU_RUNNERS does not list it"}


@pytest.mark.parametrize(
    ("listed", "asked", "words"),
    [
        ("[sm90]", "all", "GPU_RUNNERS is not JSON"),
        ('["sm99"]', "all", "GPU_RUNNERS has 'sm99'; give a JSON list of sm80, sm90, sm120"),
        ('"sm90"', "all", "GPU_RUNNERS has 'sm90'"),
        ("", "sm75", "ci/gpus.toml has no row 'sm75'; it has sm80, sm90, sm120"),
    ],
)
def test_what_does_not_exist_is_refused(listed: str, asked: str, words: str) -> None:
    with pytest.raises(NightlyError, match=words.replace("[", r"\[")):
        plan(GPUS, asked, None, listed)


_ROW = 'name = "a"\nsm = 90\nlabels = ["x"]\ngpus = 1\nlevel = "usual"\ntimeout_min = 1\nstart_within_min = 1\n'
_OTHER = _ROW.replace('"a"', '"b"')


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "has no row, so nothing would be verified"),
        ("[[gpus]]\n", "gpus is not known; a row begins with"),
        (f"[[gpu]]\n{_ROW}[[gpu]]\n{_ROW}", "two rows with the name a"),
        (f"[[gpu]]\n{_ROW}[[gpu]]\n" + _OTHER, "two rows with the sm 90"),
        (f"[[gpu]]\n{_ROW.replace('start_within_min = 1', 'start_within_min = 340')}", "at most 340 together"),
        (f"[[gpu]]\n{_ROW.replace('sm = 90', '')}", "row 1 has no sm"),
        (f"[[gpu]]\n{_ROW.replace('90', '75')}", "sm of a is 75; give 80 to 121"),
        (f"[[gpu]]\n{_ROW.replace('usual', 'some')}", "level of a is 'some'; give must-pass, usual, everything"),
        (f"[[gpu]]\n{_ROW.replace('gpus = 1', 'gpus = true')}", "gpus of row 1 is True; give a int"),
        (f"[[gpu]]\n{_ROW}image = 'nvidia/cuda:13.0'\n", "give an image by digest"),
        (f"[[gpu]]\n{_ROW}card = 'x'\n", "card of row 1 is not known"),
        ("[[gpu]\n", "is not TOML"),
    ],
)
def test_a_mistake_in_the_file_is_told_in_one_sentence(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "gpus.toml"
    path.write_text(content)
    with pytest.raises(NightlyError) as told:
        read_gpus(path)
    assert words in str(told.value)
    assert "\n" not in str(told.value)


def _planned(tmp_path: Path, **environment: str) -> tuple[int, dict[str, list[dict[str, str]]], str]:
    out = tmp_path / "output"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GITHUB_")}
    # as in the workflow: the machine's own Python, without what the set-up installs
    done = subprocess.run(
        [sys.executable, "-S", "-m", "ci.nightly.plan"], cwd=REPOSITORY, capture_output=True, text=True, timeout=60,
        env=clean | {"GITHUB_OUTPUT": str(out)} | environment,
    )  # fmt: skip
    lines = out.read_text().splitlines() if out.exists() else []
    return (
        done.returncode,
        {name: json.loads(text) for name, _, text in (line.partition("=") for line in lines)},
        done.stderr,
    )


def test_the_runners_are_asked_page_by_page_and_offline_ones_do_not_count(tmp_path: Path) -> None:
    with serving() as github:
        github.runners = [
            {"status": "offline", "labels": [{"name": "self-hosted"}, {"name": "sm120"}]} for _ in range(150)
        ] + [{"status": "online", "labels": [{"name": "self-hosted"}, {"name": "sm90"}]}]  # fmt: skip
        environment = github.environment | {"RUNNERS_TOKEN": github.environment["GITHUB_TOKEN"]}
        code, outputs, said = _planned(tmp_path, **environment)
        assert (code, [row["name"] for row in outputs["matrix"]]) == (0, ["sm90"]), said
        assert len(outputs["rows"]) == len(read_gpus(REPOSITORY / "ci" / "gpus.toml"))
        code, _, said = _planned(tmp_path, **environment | {"RUNNERS_TOKEN": "wrong"})
    assert code == 3
    assert "GitHub answers 401" in said


def test_no_runner_at_all_is_an_error_and_the_plan_is_written_all_the_same(tmp_path: Path) -> None:
    code, outputs, said = _planned(tmp_path, GPU_RUNNERS="[]")
    assert (code, outputs["matrix"]) == (3, [])
    assert all(row["why"] for row in outputs["rows"])
    assert "none of 7 rows has a runner, so no GPU is verified" in said
