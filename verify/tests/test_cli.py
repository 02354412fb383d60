"""The command line as a user meets it: child processes in a small tree, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from verify.arguments import parser
from verify.errors import ConfigurationError
from verify.run.request import RunRequest, request_of
from verify.tests import samples

FAILED, VERIFIED = "sm120", "sm90"


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("cli")
    samples.main(root)
    return root


def verify(tree: Path, *arguments: str, columns: int = 100, path: str = "") -> subprocess.CompletedProcess[str]:
    places = os.pathsep.join(filter(None, [path, str(samples.REPOSITORY)]))
    environment = os.environ | {"PYTHONPATH": places, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "verify", *arguments]
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, timeout=60, check=False)


def request(*arguments: str) -> RunRequest:
    return request_of(parser().parse_args(["run", *arguments]))


def test_run_without_options_is_the_default_request() -> None:
    assert request() == RunRequest()


def test_run_options_reach_the_request(tmp_path: Path) -> None:
    options = "--phase 4 --phases 1,6-7 -m hard --device cuda --expect 12.0 --model M --subject S --seed 7"
    options += " --profile engine"
    asked = request(*options.split(), "--out", str(tmp_path), "--strict-soft", "--sanitize")
    assert asked == RunRequest((1, 4, 6, 7), "hard", "cuda", 120, "M", "S", 7, tmp_path, None, True, True, "engine")
    resumed = request("--resume", "R", "--expect", "sm90", "--out", str(tmp_path), "--strict-soft")
    assert resumed == RunRequest(resume="R", expect=90, out=tmp_path, strict_soft=True)


@pytest.mark.parametrize(
    "option",
    [
        "--phases 1",
        "-m hard",
        "--device auto",
        "--model embedded",
        "--subject bundled",
        "--seed 0",
        "--sanitize",
        "--profile full",
    ],
)
def test_a_resumed_run_keeps_its_options(option: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"^--resume keeps the options .*; drop {option.split()[0]}$"):
        request("--resume", "R", *option.split())


@pytest.mark.parametrize("options", [["--phases", "9"], ["--expect", "banana"], ["--device", "cpu", "--expect", "90"]])
def test_run_options_that_make_no_sense_are_configuration_errors(options: list[str]) -> None:
    with pytest.raises(ConfigurationError):
        request(*options)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "VERB"),
        (["bogus"], "invalid choice: 'bogus'"),
        (["report", "--format", "pdf"], "invalid choice: 'pdf'"),
        (["run", "--seed", "x"], "invalid int value: 'x'"),
        (["run", "--profile", "kernel"], "invalid choice: 'kernel'"),
        (["init", "new"], "the following arguments are required: --profile"),
        (["init", "phases", "--profile", "scorer"], "phases exists and is not an empty directory; give a new one"),
        (["run", "--ph", "4"], "unrecognized arguments"),
        (["run", "--device", "cpu", "--expect", "sm120"], "contradict"),
        (["report", "--format", "html", "--gpu", "sm120"], "makes the pages of every target; drop --gpu sm120"),
        (["report", "--out", "x"], "--out x needs another format than terminal; drop it, or give --format"),
        (["report", "--gpu", "sm999"], "'sm999' is not a GPU architecture"),
        (["report", "--gpu", "sm101"], "sm101 was renamed to sm110"),
        (["report", "--gpu", "sm90", "--records", "absent"], "absent is not a directory"),
        (["explain", "p4.orcle"], "nearest are p4.oracle"),
        (["explain", "zzzz"], "`python -m verify gates` lists them"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_3(tree: Path, arguments: list[str], words: str) -> None:
    done = verify(tree, *arguments)
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("verify: ")
    assert done.stderr.count("\n") == 1
    assert words in done.stderr


def test_report_on_a_failed_gpu_is_made_and_exit_0(tree: Path) -> None:
    done = verify(tree, "report", "--gpu", FAILED)
    assert (done.returncode, done.stderr) == (0, "")
    for words in ("FAILED", "FAIL 1/2", "p4.triton_pytorch.max  measured 2, allowed 1", "repeat: ", "--phases 4"):
        assert words in done.stdout
    assert "\x1b" not in done.stdout


def test_report_on_a_gpu_nobody_ran_says_what_would_fill_it(tree: Path) -> None:
    done = verify(tree, "report", "--gpu", "12.1")
    assert done.returncode == 0
    assert "INCOMPLETE" in done.stdout
    assert "Missing: 6 must-pass checks (2 in phase 1 environment, 4 in phase 4 equivalence)" in done.stdout
    assert "python -m verify run --expect sm121\n" in done.stdout


@pytest.mark.parametrize("columns", [60, 80, 100, 160])
def test_the_matrix_fits_its_terminal(tree: Path, columns: int) -> None:
    done = verify(tree, "report", "--gpu", VERIFIED, columns=columns)
    assert max(map(len, done.stdout.splitlines())) <= columns
    assert ("Both paths agree." in done.stdout) is (columns == 160)
    if columns >= 80:
        assert "1.0e-07 / 1.0e-06" in done.stdout
        assert "p4.triton_pytorch" in done.stdout


def test_the_summary_has_a_line_for_every_target(tree: Path) -> None:
    done = verify(tree, "report")
    lines = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    assert "VERIFIED" in lines["sm90"]
    assert "FAILED" in lines["sm120"]
    assert "INCOMPLETE" in lines["sm121"]
    assert "EMULATED PASS" in lines["emulated"]


def test_the_formats_tell_the_same(tree: Path) -> None:
    told = json.loads(verify(tree, "report", "--gpu", FAILED, "--format", "json").stdout)
    assert (told["target"], told["verdict"]) == ("sm120", "FAILED")
    assert told["must_pass"] == {"total": 6, "passed": 4, "failed": ["p4.triton_pytorch.max"], "waived": []}
    assert told["missing"] == ["p4.triton_pytorch.mean"]
    assert told["fill"] == "python -m verify run --expect sm120 --phases 4"
    assert [row["family"] for row in told["rows"]][:2] == ["p1.torch_sees", "p1.bf16"]
    assert told["rows"][0]["tightest"]["headroom"] == pytest.approx(10)
    markdown = verify(tree, "report", "--gpu", FAILED, "--format", "markdown").stdout
    assert markdown.startswith(f"# sm120: FAILED\n\n{told['sentence']}\n")
    assert "| 4 equivalence | 3.2 | `p4.triton_pytorch` | HARD | FAIL 1/2 | hardware | - | - |" in markdown
    everything = json.loads(verify(tree, "report", "--format", "json").stdout)
    assert {t["target"]: t["verdict"] for t in everything["targets"]}["sm120"] == "FAILED"


def test_an_unreadable_record_is_named_and_the_report_is_still_made(tmp_path: Path) -> None:
    samples.main(tmp_path)
    broken = tmp_path / "reports" / "evidence" / "broken.json"
    broken.write_text('{"schema_version": 1, "run_id": ')
    done = verify(tmp_path, "report", "--gpu", VERIFIED)
    assert done.returncode == 5
    assert "VERIFIED" in done.stdout
    assert done.stderr.startswith(f"verify: unreadable record {broken}: ")
    told = json.loads(verify(tmp_path, "report", "--gpu", VERIFIED, "--format", "json").stdout)
    assert "broken.json" in told["unreadable"][0]


@pytest.mark.parametrize("form", ["terminal", "markdown"])
def test_a_reader_who_leaves_early_is_no_failure(tree: Path, form: str) -> None:
    # the reader is gone before the first byte is written
    line = f"'{sys.executable}' -m verify report --gpu 90 --format {form} | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(samples.REPOSITORY)}
    done = subprocess.run(["bash", "-c", line], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_verb_that_answers_by_its_code_never_ends_with_0_because_its_reader_left(tree: Path) -> None:
    line = f"'{sys.executable}' -m verify doctor --expect sm90 | true; exit ${{PIPESTATUS[0]}}"
    environment = os.environ | {"PYTHONPATH": str(samples.REPOSITORY)}
    done = subprocess.run(["bash", "-c", line], cwd=tree, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")


def test_interrupted_it_says_so_and_leaves_nothing_behind(tree: Path) -> None:
    # a matrix that nobody writes keeps the report from its end
    endless = tree / "reports" / "selftest" / "endless.json"
    endless.parent.mkdir()
    os.mkfifo(endless)
    command = [sys.executable, "-m", "verify", "report", "--format", "html", "--out", "pages/site"]
    with subprocess.Popen(
        command, cwd=tree, env=os.environ | {"PYTHONPATH": str(samples.REPOSITORY)}, stderr=subprocess.PIPE,
        text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what a shell starts with & ignores it
    ) as report:  # fmt: skip
        deadline = time.monotonic() + 60
        while not list(tree.glob("pages/.site.*/new/catalogue.html")) and time.monotonic() < deadline:
            time.sleep(0.01)
        os.killpg(report.pid, signal.SIGINT)  # as a terminal does
        told = report.communicate(timeout=60)[1]
    shutil.rmtree(endless.parent)
    assert (report.returncode, told) == (2, "verify: report was interrupted; run it again\n")
    assert not list((tree / "pages").iterdir())


def test_gates_lists_every_family(tree: Path) -> None:
    families = json.loads(verify(tree, "gates", "--format", "json").stdout)
    by_name = {family["family"]: family for family in families}
    assert list(by_name) == ["p1.bf16", "p1.torch_sees", "p1.nvcc", "p4.oracle", "p4.triton_pytorch", "p8.kernel"]
    assert not by_name["p1.torch_sees"]["must_pass_emulated"]
    assert by_name["p4.oracle"]["checks"] == ["p4.oracle.n1", "p4.oracle.n33"]
    for form in ("terminal", "markdown"):
        assert "A bf16 product is right." in verify(tree, "gates", "--format", form, columns=140).stdout


@pytest.mark.parametrize(("name", "shown", "total"), [("p4.oracle", 6, 6), ("p4.oracle.n33", 3, 3)])
def test_explain_tells_all_about_a_check_and_its_last_results(tree: Path, name: str, shown: int, total: int) -> None:
    done = verify(tree, "explain", name)
    assert done.returncode == 0
    for words in ("Within class A.", "Scores decide", "derived budget", "Compare both", "p1.bf16", "test_oracle"):
        assert words in done.stdout
    assert f"newest first ({shown} of {total})" in done.stdout


def test_reading_works_where_torch_is_not_installed(tree: Path, tmp_path: Path) -> None:
    # these stand before the real packages and fail as an absent one does
    for package in ("torch", "triton", "transformers", "numpy"):
        (tmp_path / f"{package}.py").write_text(f"raise ModuleNotFoundError('No module named {package}')")
    for arguments in (
        ["report"],
        ["report", "--all"],
        ["report", "--gpu", "90"],
        ["history"],
        ["gates"],
        ["explain", "p1.bf16"],
        ["contract"],
        ["init", str(tmp_path / "new"), "--profile", "full"],
    ):
        done = verify(tree, *arguments, path=str(tmp_path))
        assert (done.returncode, done.stderr) == (0, ""), arguments
    done = verify(tree, "doctor", path=str(tmp_path), columns=200)
    assert (done.returncode, done.stderr) == (3, "")
    assert (
        "NEEDED  PyTorch: ModuleNotFoundError: No module named torch; install it again, in a build that fits"
        in done.stdout
    )


def test_help_has_examples_and_exit_codes(tree: Path) -> None:
    done = verify(tree, "--help")
    assert done.returncode == 0
    assert "python -m verify report --gpu sm120" in done.stdout
    assert "exit codes" in done.stdout


def test_doctor_with_another_card_is_exit_3(tree: Path) -> None:
    done = verify(tree, "doctor", "--expect", "sm88")
    assert done.returncode == 3
    assert "not sm88 (no product known)" in done.stderr
