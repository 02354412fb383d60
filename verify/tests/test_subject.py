"""The subject loader: what it finds, what it refuses, and what it says is absent."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from verify.outcome import ConfigurationError
from verify.subject import Subject, SubjectLacks, find_subject
from verify.tests.tree import REPOSITORY


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A committed checkout of another implementation."""
    package = tmp_path / "theirs" / "triattention"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('__version__ = "3.1"\n')
    _git(package.parent, "init", "--quiet")
    _git(package.parent, "add", ".")
    _git(package.parent, "-c", "user.name=t", "-c", "user.email=t@example.org", "commit", "--quiet", "-m", "first")
    return package.parent


def _git(where: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(where), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def test_info_names_version_source_and_commit(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    assert subject.info().model_dump() == {
        "name": "triattention",
        "version": "3.1",
        "source": "checkout:theirs",
        "git_sha": _git(checkout, "rev-parse", "HEAD"),
        "dirty": False,
        "content_sha256": subject.content_sha256(),
    }


def test_only_changes_of_the_package_make_it_dirty(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    before = subject.content_sha256()
    (checkout / "notes.txt").write_text("not the package")
    assert (subject.info().dirty, subject.content_sha256()) == (False, before)
    (checkout / "triattention" / "new.py").write_text("")
    assert subject.info().dirty
    assert subject.content_sha256() != before


def test_the_caches_of_an_import_do_not_make_it_dirty(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    cache = checkout / "triattention" / "__pycache__"
    cache.mkdir(exist_ok=True)
    (cache / "__init__.cpython-311.pyc").touch()
    assert not subject.info().dirty
    (checkout / ".gitignore").write_text("__pycache__/\n")
    assert not subject.info().dirty


def test_what_git_ignores_or_does_not_track_is_dirty(checkout: Path) -> None:
    (checkout / ".gitignore").write_text("*.so\nvendored/\n")
    (checkout / "vendored").mkdir()
    shutil.copytree(checkout / "triattention", checkout / "vendored" / "triattention")
    assert find_subject(str(checkout / "vendored"), REPOSITORY).info().dirty
    (checkout / "triattention" / "kernel.so").touch()
    assert find_subject(str(checkout), REPOSITORY).info().dirty


@pytest.mark.parametrize("name", ["nowhere", "empty", "module:triattention"])
def test_anything_else_is_refused_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigurationError, match=f"subject '{name}': .*; use 'bundled' or the path of a checkout"):
        find_subject(name, REPOSITORY)


def test_a_package_from_somewhere_else_is_refused(checkout: Path, bundled: Subject) -> None:
    bundled.activate()
    with pytest.raises(ConfigurationError, match=r"should be .*theirs.*, but triattention was imported from"):
        find_subject(str(checkout), REPOSITORY).activate()
    bundled.activate()


@pytest.fixture
def bundled() -> Subject:
    return find_subject("bundled", REPOSITORY)


def test_what_is_absent_is_named(bundled: Subject) -> None:
    bundled.activate()
    with pytest.raises(
        SubjectLacks, match=r"^subject 'bundled' lacks the module triattention\.nothing \(No module named"
    ):
        bundled.attribute("nothing", "at_all")
    with pytest.raises(SubjectLacks, match=r"^subject 'bundled' lacks at_all in triattention$"):
        bundled.attribute("", "at_all")


def test_what_another_subject_lacks_is_not_lent_by_the_bundled_one(checkout: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from verify.subject import find_subject;"
        "subject = find_subject(sys.argv[1], Path()); subject.activate(); subject.module('vllm.core.scoring')"
    )
    subject = find_subject(str(checkout), REPOSITORY)
    for command in (["-c", program, str(checkout)], ["-c", "import triattention.vllm"], ["-m", "triattention"]):
        child = subprocess.run(
            [subject.command()[0], *command], env=subject.environment(), capture_output=True, text=True
        )
        assert child.returncode == 1, command
        assert "No module named" in child.stderr


def test_a_child_started_elsewhere_imports_the_subject(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    (checkout / "triattention" / "__main__.py").write_text(
        "import sys, triattention as t; print(t.__version__, *sys.argv[1:])"
    )
    done = subprocess.run(
        subject.command("run-one", "--x"),
        env=subject.environment(),
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "3.1 run-one --x\n"
