"""Who runs it, and where: users without a home, read-only checkouts, full disks, any folder and any terminal."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from verify import files
from verify.build import verb
from verify.errors import ConfigurationError
from verify.tests.tree import REPOSITORY, Tree, make_tree

_PHASE = """
@check("p1.tiny", gate="hard", cases={"one": 1, "two": 2}, **WORDS)
def test_tiny(case):
    pass
"""
_NAMED = " cannot be created ({}); use a checkout that you may write to, or `python -m verify run --out DIR`"


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    made = make_tree(tmp_path)
    made.write_phase(1, _PHASE)
    return made


@cache
def _namespaces() -> bool:
    child = subprocess.run(["unshare", "--user", "--map-user=12345", "true"], check=False, capture_output=True)
    return child.returncode == 0


def _contained(tree: Tree, command: str, *, before: str = "true", flags: str = "--map-user=12345", **more: str):
    """Run a shell command in a user namespace of its own, as the container of an unknown user has it."""
    if not _namespaces():
        pytest.skip("NOT_PERMITTED: user namespaces, in which an unknown user is tried")
    environment = tree.environment() | {"HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"} | more
    shell = f"{before} && exec {command}"
    return subprocess.run(
        ["unshare", "--user", *flags.split(), "sh", "-c", shell],
        cwd=tree.root, env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def _sentence(child: subprocess.CompletedProcess[str]) -> str:
    said = child.stdout + child.stderr
    assert "Traceback" not in said
    assert "INTERNALERROR" not in said
    return said


_PYTEST = shlex.join(
    [sys.executable, "-m", "pytest", "phases", "-p", "pytest_timeout", "-p", "no:cacheprovider", "--device=cpu"]
)
_VERIFY = shlex.join([sys.executable, "-m", "verify"])


@pytest.fixture
def read_only(tree: Tree):
    folders = [tree.root, *(path for path in tree.root.rglob("*") if path.is_dir())]
    for folder in folders:
        folder.chmod(0o555)
    yield tree
    for folder in folders:
        folder.chmod(0o755)


def test_a_read_only_checkout_is_told_in_a_sentence(read_only: Tree) -> None:
    child = _contained(read_only, _PYTEST)
    assert _NAMED.format("Permission denied") in _sentence(child)
    assert child.returncode == pytest.ExitCode.USAGE_ERROR
    child = _contained(read_only, f"{_VERIFY} run --device cpu")
    assert "cannot be created (Permission denied); choose another --out" in _sentence(child)
    assert child.returncode == 3


def test_an_unknown_user_without_a_home_can_run_it(read_only: Tree, tmp_path_factory: pytest.TempPathFactory) -> None:
    place = tmp_path_factory.mktemp("writable")
    out = place / "out"
    child = _contained(read_only, f"{_VERIFY} run --device cpu --out {out}", before="unset HOME", TMPDIR=str(place))
    assert "record: " in _sentence(child)
    assert child.returncode == 0
    assert len([*out.glob("*/record.json")]) == 1
    told = _contained(read_only, f"{_VERIFY} doctor", before="unset HOME", TMPDIR=str(place))
    assert "Ready: python -m verify run" in _sentence(told)


def test_a_full_disk_is_told_with_the_file(tree: Tree, tmp_path: Path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    small = f"mount -t tmpfs -o size=%s tmpfs {out}"
    flags = "--map-root-user --mount"
    none = _contained(tree, f"{_VERIFY} run --device cpu --out {out}", before=small % "4k", flags=flags)
    assert "cannot be created (No space left on device); choose another --out" in _sentence(none)
    many = _PHASE.replace('{"one": 1, "two": 2}', '{f"n{i}": i for i in range(150)}')
    tree.write_phase(1, many)
    some = _contained(tree, f"{_VERIFY} run --device cpu --out {out}", before=small % "96k", flags=flags)
    assert "cannot be used (No space left on device); mend that and run again" in _sentence(some)
    assert (none.returncode, some.returncode) == (3, 3)


def test_any_folder_and_any_terminal_will_do(tmp_path: Path) -> None:
    folder = tmp_path / "un été, l'an 2"
    folder.mkdir()
    tree = make_tree(folder)
    tree.write_phase(1, _PHASE)
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    for child in (
        tree.verify("run", "--device", "cpu", **ascii_only),
        tree.verify("report", "--all", **ascii_only),
        tree.pytest("phases", "--device=cpu", **ascii_only),
    ):
        assert "p1.tiny" in _sentence(child)
        assert child.returncode == 0
    assert len(tree.records()) == 2


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("verify", ["doctor"]),
        ("verify", ["run"]),
        ("verify", ["report", "--all"]),
        ("verify", ["compile"]),
        ("triattention", ["run-one", "--model", "embedded", "--dataset", "smoke"]),
    ],
)
def test_without_the_packages_it_is_one_sentence_with_the_set_up(module: str, arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    child = subprocess.run(
        [sys.executable, "-S", "-m", module, *arguments], env=environment, capture_output=True, text=True, timeout=60
    )
    assert child.returncode == 3, child.stderr
    (line,) = child.stderr.splitlines()
    assert f"{module}: " in line
    assert "is not installed; `make setup` or triattention-verify[" in line


def test_a_result_that_cannot_be_written_is_refused_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "writable", lambda folder: False)
    monkeypatch.setattr(verb, "compile_ahead", lambda *_: pytest.fail("it was built"))
    with pytest.raises(ConfigurationError, match="below cannot be written; choose another --out"):
        verb.compile_verb("sm90", out=tmp_path / "below")


def test_the_cache_is_the_user_s_or_a_folder_of_theirs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRIATTENTION_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "triattention"
    monkeypatch.setattr(files.tempfile, "gettempdir", lambda: str(tmp_path / "tmp"))
    monkeypatch.setattr(files.os, "access", lambda place, _: False)
    own = tmp_path / "tmp" / f"triattention-{os.getuid()}"
    assert files.cache_folder() == own
    own.mkdir(parents=True)
    monkeypatch.setattr(files.os, "getuid", lambda: 54321)
    own.rename(own.parent / "triattention-54321")
    with pytest.raises(ConfigurationError, match="triattention-54321 is of another user; set TRIATTENTION_CACHE"):
        files.cache_folder()
    monkeypatch.setenv("TRIATTENTION_CACHE", str(tmp_path / "mine"))
    assert files.cache_folder() == tmp_path / "mine"
