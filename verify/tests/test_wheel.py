"""The suite installed from its wheel into an environment that has the other packages, and used outside the checkout."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import pytest

from verify.record.grounds import BUNDLED, PACKAGE, Checkout
from verify.report.doctor import inspect_machine
from verify.subject.find import find_subject
from verify.tests.tree import REPOSITORY

_PACKAGES = ("verify", "phases", PACKAGE)
_REPORTS = [f"reports/{name}" for name in ("quality", "selftest", "sensitivity")]
_FILES = ("pyproject.toml", "README.md", "LICENSE", "MANIFEST.in", "pytest_triattention.py")

#: A version that is not the pinned one.
_OTHER = "5.23.0"

_CONFTEST = "from pathlib import Path\n(Path(__file__).parent / 'loaded').touch()\n"


@dataclass(frozen=True, slots=True)
class Installed:
    """A project of somebody else's, a git repository with an environment in it that has the suite."""

    project: Path

    @property
    def programs(self) -> Path:
        return self.project / ".venv" / "bin"

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        return self.project / ".venv" / "lib" / version / "site-packages"

    def call(self, *words: str, folder: str = ".") -> subprocess.CompletedProcess[str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "PYTHON"))}
        path = os.pathsep.join([str(self.programs), os.environ["PATH"]])
        return subprocess.run(
            words, cwd=self.project / folder, env=kept | {"PATH": path, "COLUMNS": "200"},
            capture_output=True, text=True, timeout=120,
        )  # fmt: skip

    def verify(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Run the command in a folder with another package that is called ``verify``."""
        return self.call("triattention-verify", *words, folder="work")

    def pytest(self, *words: str) -> subprocess.CompletedProcess[str]:
        return self.call("python", "-m", "pytest", "-p", "no:benchmark", *words)

    def records(self) -> list[Path]:
        return sorted(self.project.glob("**/reports/runs/*/record.json"), key=lambda path: path.stat().st_mtime_ns)


def _done(*words: str | Path, cwd: Path | None = None) -> None:
    child = subprocess.run([*map(str, words)], cwd=cwd, capture_output=True, text=True, timeout=120)
    assert child.returncode == 0, child.stderr[-2000:]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    folder = tmp_path_factory.mktemp("wheel")
    source, made = folder / "source", Installed(folder / "project")
    for name in (*_PACKAGES, "ci", *_REPORTS):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in _FILES:
        shutil.copy(REPOSITORY / name, source / name)
    left = source / "build" / "lib" / "verify" / "left_by_an_earlier_build.py"
    left.parent.mkdir(parents=True)
    left.touch()
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    _done(*pip, "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir", folder, source)
    for name, text in {
        ".gitignore": ".venv/\n", "conftest.py": _CONFTEST, "test_own.py": "def test_own():\n    pass\n",
        "work/verify/__init__.py": "raise ImportError('another verify')\n",
        "pyproject.toml": '[tool.pytest.ini_options]\naddopts = "--durations=1"\n',
    }.items():  # fmt: skip
        (made.project / name).parent.mkdir(parents=True, exist_ok=True)
        (made.project / name).write_text(text)
    _done("git", "init", "--quiet", cwd=made.project)
    _done("git", "add", ".", cwd=made.project)
    _done("git", "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", "first", cwd=made.project)
    _done(sys.executable, "-m", "venv", "--without-pip", made.project / ".venv")
    (wheel,) = folder.glob("*.whl")
    _done(*pip, "--python", made.programs / "python", "install", "--no-deps", "--no-index", wheel)
    # what a .pth file adds to the path has no .pth files of its own, so the editable installation there does not count
    (made.packages / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    # some wheel of somebody else's left it there
    (made.packages / "pyproject.toml").touch()
    about = made.packages / f"transformers-{_OTHER}.dist-info" / "METADATA"
    about.parent.mkdir()
    about.write_text(f"Metadata-Version: 2.1\nName: transformers\nVersion: {_OTHER}\n")
    return made


def _files(root: Path) -> set[str]:
    found = (path for package in _PACKAGES for path in (root / package).rglob("*") if path.is_file())
    return {path.relative_to(root).as_posix() for path in found if not {"tests", "__pycache__"} & {*path.parts}}


def test_a_wheel_has_every_file_of_the_packages_and_none_of_the_tests(installed: Installed) -> None:
    copied = [path for name in _REPORTS for path in (REPOSITORY / name).rglob("*.json")]
    copied += [REPOSITORY / "ci" / "constraints.txt", REPOSITORY / "ci" / "known_failures.toml"]
    own = {f"verify/data/{path.relative_to(REPOSITORY).as_posix()}" for path in copied}
    assert _files(installed.packages) == _files(REPOSITORY) | own
    for name in own:
        assert (installed.packages / name).read_bytes() == (REPOSITORY / name.removeprefix("verify/data/")).read_bytes()
    assert not [path for path in installed.packages.rglob("tests") if path.is_dir()]


def test_results_of_a_wheel_rest_on_the_same_files_as_those_of_the_checkout(installed: Installed) -> None:
    here, there = (
        (Checkout(root, root, root / PACKAGE, root).everything(), find_subject(BUNDLED, root).content_sha256())
        for root in (REPOSITORY, installed.packages)
    )
    assert there == here


def test_an_installed_suite_runs_and_reports_in_the_current_folder(installed: Installed) -> None:
    ran = installed.verify("run", "--phases", "1,2", "--device", "cpu", "-m", "hard")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    (path,) = installed.records()
    record = json.loads(path.read_text())
    assert f"record: {path.relative_to(installed.project / 'work')}" in ran.stdout
    # the project's repository and configuration are not the suite's
    assert (record["subject"]["source"], record["subject"]["git_sha"]) == (BUNDLED, "none")
    assert not (installed.project / "loaded").exists()
    assert str(installed.project) not in path.read_text()
    told = f"Made with transformers {_OTHER}; the suite is pinned to "
    assert told in ran.stdout
    assert told in installed.verify("report", "--gpu", "emulated").stdout
    # of a run of two phases only the results of others are missing
    problems = installed.verify("check", path.parent.name).stdout.splitlines()
    assert problems
    assert [line for line in problems if " no result" not in line] == []


def test_the_command_that_repeats_a_check_of_an_installed_suite_works_as_it_is(installed: Installed) -> None:
    before = installed.records()
    command = json.loads(before[-1].read_text())["results"][-1]["repeat"]
    assert "--pyargs 'phases.p2_imports::" in command
    ran = installed.call("bash", "-c", command)
    assert "1 passed" in ran.stdout, ran.stdout + ran.stderr
    (new,) = [path for path in installed.records() if path not in before]
    assert json.loads(new.read_text())["results"][0]["repeat"] == command


def test_pytest_takes_the_checks_by_the_name_of_their_package(installed: Installed) -> None:
    ran = installed.pytest("--pyargs", "phases", "-m", "hard", "--phase", "2", "-k", "defaults", "--device", "cpu")
    assert ran.returncode == 0, ran.stdout + ran.stderr
    newest = installed.records()[-1]
    found = {result["id"] for result in json.loads(newest.read_text())["results"]}
    assert found == {"p2.defaults.methods-triattention", "p2.defaults.vllm-core-config"}
    assert f"record: {newest.relative_to(installed.project)}" in ran.stdout
    assert not (installed.packages / ".pytest_cache").exists()


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--pyargs", "phases.p9_nothing"], "module or package not found: phases.p9_nothing"),
        (["--pyargs", "phases", "-n", "2"], "-n would spread the checks of phases/ over processes"),
        (["--phase", "2"], "unrecognized arguments: --phase"),
    ],
)
def test_pytest_says_what_it_cannot_do(installed: Installed, words: list[str], complaint: str) -> None:
    refused = installed.pytest(*words)
    assert refused.returncode == pytest.ExitCode.USAGE_ERROR
    assert complaint in refused.stderr


def test_another_projects_tests_see_nothing_of_the_suite(installed: Installed) -> None:
    assert "verify" not in installed.pytest("--markers").stdout
    ran = installed.pytest()
    assert "1 passed" in ran.stdout
    assert "verify:" not in ran.stdout
    loaded = f"import sys, pytest; pytest.main(['-q']); print(sorted({{*{_PACKAGES}}} & {{*sys.modules}}))"
    assert installed.call("python", "-c", loaded).stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "files", "theirs"),
    [
        (["-m", "pytest", "--pyargs", "phases"], {}, True),
        (["-P", "-m", "pytest", "--pyargs", "phases"], {"conftest.py": ""}, True),
        (["-P", "-m", "pytest", "--pyargs", "phases.test_own"], {"pytest.ini": "[pytest]\npythonpath = ."}, True),
        (["-P", "-m", "pytest", "phases"], {}, True),
        (["-P", "-m", "pytest", "--pyargs", "phases", "--phase", "2", "-k", "defaults", "--co"], {}, False),
    ],
    ids=["current folder", "conftest", "pythonpath", "path", "not on the path"],
)
def test_a_project_with_a_package_of_the_same_name_gets_what_python_would_import(
    installed: Installed, words: list[str], files: dict[str, str], theirs: bool, tmp_path: Path
) -> None:
    for name, text in {"phases/__init__.py": "", "phases/test_own.py": "def test_own(): pass\n", **files}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    # -P leaves the current folder out of the path, as the command `pytest` does
    ran = installed.call("python", *words, "-v", "-p", "no:benchmark", folder=str(tmp_path))
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert ("phases/test_own.py::test_own PASSED" in ran.stdout) == theirs
    assert ("test_defaults" in ran.stdout) != theirs
    assert not (tmp_path / "reports").exists()


def test_the_doctor_of_an_installed_suite_names_the_stack_and_no_step_of_a_checkout(installed: Installed) -> None:
    # on another machine than the expected one it imports nothing
    gpu = inspect_machine().gpu
    found = installed.verify("doctor", "--expect", "sm90" if gpu and gpu.sm == 120 else "sm120")
    assert f"stack: records are made with transformers {_OTHER}; the suite is pinned to " in found.stdout
    assert "Ready: python -m verify run" in found.stdout
    assert "make " not in found.stdout


def test_the_gate_of_an_installed_suite_runs_its_own_child_and_writes_nothing(installed: Installed) -> None:
    before = installed.records()
    with_gpu = inspect_machine().gpu is not None
    wanted = ["--gpu", "999"] if with_gpu else []  # so that there is none
    answered = installed.verify("gate", "--contract", "nagios", *wanted)
    assert answered.returncode == 3
    assert answered.stdout.startswith("TRIATTENTION UNKNOWN - no GPU: ")
    assert installed.records() == before


def test_what_changes_the_suite_itself_is_for_a_checkout(installed: Installed) -> None:
    refused = installed.call("python", "-m", "verify.sensitivity", "detection")
    assert refused.returncode == 3
    assert "clone the repository" in refused.stderr
