"""The subject loader: what it finds, what it refuses, and what it says is absent."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import spec_from_file_location
from pathlib import Path

import pytest

from verify.errors import ConfigurationError, SubjectLacks
from verify.subject.find import find_subject
from verify.subject.published import parameters_of
from verify.subject.subject import Subject
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
        "profile": None,
        "narrowed": {},
    }


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("setup.py", "from setuptools import setup\nraise SystemExit\nsetup(name='x', version='0.2.0')\n", "0.2.0"),
        ("setup.py", "import setuptools\nsetuptools.setup(version=read())\n", "unknown"),
        ("setup.py", "setup(", "unknown"),
        ("pyproject.toml", "[project]\nversion = '7'\n", "7"),
        ("pyproject.toml", "[project]\ndynamic = ['version']\n", "unknown"),
        ("pyproject.toml", "[project", "unknown"),
    ],
)
def test_a_version_that_the_package_does_not_have_is_read_from_beside_it(
    checkout: Path, name: str, text: str, version: str
) -> None:
    (checkout / "triattention" / "__init__.py").write_text("")
    (checkout / name).write_text(text)
    assert find_subject(str(checkout), REPOSITORY).info().version == version


def test_only_changes_of_the_package_make_it_dirty(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    before = subject.content_sha256()
    (checkout / "notes.txt").write_text("not the package")
    assert (subject.info().dirty, subject.content_sha256()) == (False, before)
    (checkout / "triattention" / "new.py").write_text("")
    assert subject.info().dirty
    assert subject.content_sha256() != before


def test_the_script_that_calibrates_is_part_of_the_content(checkout: Path) -> None:
    subject = find_subject(str(checkout), REPOSITORY)
    contents = [subject.content_sha256()]
    subject.calibration_script.parent.mkdir()
    for text in ("print()", "print(1)"):
        subject.calibration_script.write_text(text)
        contents.append(subject.content_sha256())
    assert len({*contents}) == 3


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


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("nowhere", "there is no directory .*nowhere"),
        ("empty", "empty has no triattention/ directory"),
        ("module:", "'' is not a package name"),
        ("module:a-b", "'a-b' is not a package name"),
        ("module:triattention", "triattention is the subject's own name"),
    ],
)
def test_anything_else_is_refused_with_the_next_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, why: str
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    offered = "use 'bundled', 'installed', 'module:NAME', or the path of a checkout with a triattention/ directory"
    with pytest.raises(ConfigurationError, match=f"^subject '{name}': .*{why}; {offered}$"):
        find_subject(name, REPOSITORY)


@pytest.mark.parametrize(
    ("name", "why"),
    [("module:no_such", "there is no package no_such"), ("module:json.no_such", "there is no package json.no_such"),
     ("module:bisect", "bisect is a module, not a package")],
)  # fmt: skip
def test_a_package_that_is_not_found_is_refused(name: str, why: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^subject '{name}': {why} on sys.path; install it, or put"):
        find_subject(name, REPOSITORY)


def test_the_installed_package_is_the_one_beside_this_repository(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.path", [str(REPOSITORY), str(checkout)])
    found = find_subject("installed", REPOSITORY)
    assert (found.root, found.option, found.info().source, found.info().version) == (
        checkout, "installed", "installed", "3.1"
    )  # fmt: skip


def test_an_editable_installation_of_this_repository_is_not_an_installed_one(monkeypatch: pytest.MonkeyPatch) -> None:
    class Editable:
        @staticmethod
        def find_spec(name: str, path: object, target: object = None) -> ModuleSpec:
            return spec_from_file_location(name, REPOSITORY / name / "__init__.py")

    monkeypatch.setattr("sys.path", [str(REPOSITORY)])
    monkeypatch.setattr("sys.meta_path", [PathFinder, Editable])
    with pytest.raises(ConfigurationError, match=r"^subject 'installed': no triattention is installed besides this"):
        find_subject("installed", REPOSITORY)


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package with other names in it, importable as ``theirs.inner``."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "theirs"]:  # of the test before
        monkeypatch.delitem(sys.modules, name)
    package = tmp_path / "theirs" / "inner"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "__main__.py").write_text("import sys, theirs.inner; print(__package__, *sys.argv[1:])")
    (package / "points.py").write_text("def rate(x):\n    return x\n")
    (package / "subject.toml").write_text(
        '[subject]\nname = "Theirs"\nversion = "4"\n'
        '[names]\n"vllm.core.scoring.compute_scores" = "theirs.inner.points:rate"\n'
    )
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


def test_a_package_of_another_name_plays_the_part(other: Path) -> None:
    subject = find_subject("module:theirs.inner", REPOSITORY)
    info = subject.info()
    assert (info.name, info.version, info.source, info.git_sha) == ("Theirs", "4", "module:theirs.inner", "none")
    assert subject.option == "module:theirs.inner"
    assert subject.run("hello") == "theirs.inner hello\n"
    subject.activate()
    assert subject.attribute("vllm.core.scoring", "compute_scores")(3) == 3
    with pytest.raises(SubjectLacks, match=r"^the subject has no module theirs\.inner\.vllm\.core\.config$"):
        subject.attribute("vllm.core.config", "TriAttentionConfig")


def test_renamed_parameters_are_given_by_the_subjects_names(other: Path) -> None:
    package = other / "theirs" / "inner"
    with (package / "subject.toml").open("a") as file:
        file.write('[arguments."vllm.core.scoring.compute_scores"]\nkey_states = "x"\n')
        file.write("".join(f"{name} = false\n" for name in parameters_of("vllm.core.scoring", "compute_scores")[1:]))
    subject = find_subject("module:theirs.inner", REPOSITORY)
    subject.activate()
    assert subject.attribute("vllm.core.scoring", "compute_scores")(3, None, omega=4) == 3


def test_a_child_makes_the_same_subject_from_its_description(other: Path) -> None:
    subject = find_subject("module:theirs.inner", REPOSITORY)
    assert Subject.described(json.loads(json.dumps(subject.describe()))) == subject


def test_the_subject_file_of_a_checkout_names_its_package_and_is_part_of_its_content(checkout: Path) -> None:
    (checkout / "triattention").rename(checkout / "renamed")
    file = checkout / "subject.toml"
    file.write_text('[subject]\npackage = "renamed"\n')
    subject = find_subject(str(checkout), REPOSITORY)
    assert subject.info().name == "renamed"
    before = subject.content_sha256()
    file.write_text('[subject]\npackage = "renamed"\n[names]\n"calibration.calibrate" = "renamed:run"\n')
    assert find_subject(str(checkout), REPOSITORY).content_sha256() != before


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("names = ", "cannot be read as TOML"),
        ("names = 3", "names is 3; give a table"),
        ("[subject]\nverison = '1'", "subject.verison is not a known entry"),
        ("[subject]\nversion = 1", "subject.version is 1; give a name"),
        ("[subject]\npackage = 'a b'", "subject.package is 'a b'; give a name"),
        ("[names]\n'vllm.core.scoring.compute_scores' = 'a.b'", "is 'a.b'; give 'module:attribute'"),
        ("[subject]\nprofile = 'scorers'", "'scorers' in [subject.profile] is not a profile; the nearest is 'scorer'"),
        ("[offers]\nheads = [1]", "offers.heads is not a known entry; [offers] has d, b, h, g, dtype"),
        (
            "[offers.patch]\nnormalise = [true]",
            "'normalise' in [offers.patch] is not an option of the patch; the nearest",
        ),
        ("[offers]\noffsets = [[inf]]", "offers.offsets is inf; give a list of the values that it takes"),
        ("[offers]\nd = [" + "9" * 400 + ".5]", "offers.d is inf; give a list of the values"),
        ("[offers]\nd = 64", "offers.d is 64; give a list of the values that it takes"),
        ("[arguments.'vllm.core.scoring.compute_scores']\nkeys = 'k'", "is not a published parameter; the nearest is"),
        ("[names]\n'vllm.core.scoring.compute_score' = 'a:b'", "the nearest is 'vllm.core.scoring.compute_scores'"),
    ],
)
def test_each_mistake_in_a_subject_file_is_one_sentence(checkout: Path, text: str, told: str) -> None:
    (checkout / "subject.toml").write_text(text)
    with pytest.raises(ConfigurationError) as refused:
        find_subject(str(checkout), REPOSITORY)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_subject_file_cannot_rename_the_package_that_was_asked_for(other: Path) -> None:
    (other / "theirs" / "inner" / "subject.toml").write_text("[subject]\npackage = 'ours'\n")
    with pytest.raises(ConfigurationError, match=r"names the package ours, but --subject module:theirs\.inner is"):
        find_subject("module:theirs.inner", REPOSITORY)


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
    with pytest.raises(SubjectLacks, match=r"^the subject has no module triattention\.nothing$"):
        bundled.attribute("nothing", "at_all")
    with pytest.raises(SubjectLacks, match=r"^the subject has no at_all in triattention$"):
        bundled.attribute("", "at_all")


def test_what_another_subject_lacks_is_not_lent_by_the_bundled_one(checkout: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from verify.subject.find import find_subject;"
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
