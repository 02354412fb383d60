"""A new subject: it is complete, it can be judged at once, and nothing of it is half written."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from verify.checks import PROFILES
from verify.errors import ConfigurationError
from verify.record.reading import read_record
from verify.record.schema import Verdict
from verify.report.doctor_subject import examine_subject
from verify.report.doctor_table import Status
from verify.subject import scaffold
from verify.subject.find import find_subject
from verify.subject.offered import examined
from verify.subject.published import CONFIG_DEFAULTS, signature_differs
from verify.tests.tree import REPOSITORY


@pytest.mark.parametrize("profile", PROFILES)
def test_the_files_are_python_toml_and_words_without_gaps(profile: str, tmp_path: Path) -> None:
    for place, text in scaffold.files('A "name"', profile).items():
        (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place).write_text(text, "utf-8")
        assert "{" not in text.replace("${{", "") or place.endswith(".py")
        if place.endswith(".py"):
            ast.parse(text)
            assert max(map(len, text.splitlines()), default=0) <= 140, place  # comments of options
    subject = find_subject(str(tmp_path), REPOSITORY)
    assert (subject.profile, subject.info().name, subject.info().version) == (profile, 'A "name"', "0.1.0")
    workflow = (tmp_path / ".github" / "workflows" / "conformance.yml").read_text()
    assert f"run: python -m verify run --device cpu --subject . --profile {profile}" in workflow


def test_every_stub_has_the_published_signature_and_offers_nothing() -> None:
    """In a child, because this process may have imported another package of the name."""
    program = """
import sys
from pathlib import Path
from verify.tests.subject.test_scaffold import stubs_of
stubs_of(Path(sys.argv[1]))
"""
    child = subprocess.run(
        [sys.executable, "-c", program, os.fspath(REPOSITORY)], capture_output=True, text=True, cwd=REPOSITORY
    )
    assert child.returncode == 0, child.stderr


def stubs_of(place: Path) -> None:
    """Fail unless the stubs of the profile ``full`` are as they should be."""
    with tempfile.TemporaryDirectory() as folder:
        scaffold.init(Path(folder) / "new", "full")
        subject = find_subject(f"{folder}/new", place)
        findings = examine_subject(subject, "scorer")
        assert findings[0].status is Status.NEEDED, findings[0]
        every = [one for names in examined(subject).values() for one in names]
        offered = {one.name.full for one in every if one.offered}
        assert offered == {"methods.triattention.TriAttentionConfig", "vllm.core.config.TriAttentionConfig"}
        for one in every:
            if "only raises NotImplementedError" in one.problem:
                found = subject.attribute(one.name.module, one.name.name)
                assert signature_differs(one.name, found) == ""
                assert inspect.getdoc(found)
        for module, defaults in CONFIG_DEFAULTS.items():
            made = dataclasses.fields(subject.attribute(module, "TriAttentionConfig"))
            assert {field.name: field.default for field in made}.items() >= defaults.items()


def test_a_folder_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.py").touch()
    with pytest.raises(ConfigurationError, match=r"exists and is not an empty directory; give a new one$"):
        scaffold.init(tmp_path, "scorer")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.py"]


def test_an_empty_folder_is_filled(tmp_path: Path) -> None:
    assert scaffold.init(tmp_path / "a" / "new", "scorer", "Mine") == 0
    (tmp_path / "empty").mkdir()
    assert scaffold.init(tmp_path / "empty", "scorer", "Mine") == 0
    one, other = (
        {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        for root in (tmp_path / "a" / "new", tmp_path / "empty")
    )
    assert one == other
    assert {path.name for path in tmp_path.iterdir()} == {"a", "empty"}


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_nothing_is_left_of_an_attempt_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    rename = Path.rename

    def failing(self: Path, target: Path) -> Path:
        if self.name == "triattention":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises((ConfigurationError, KeyboardInterrupt)):
        scaffold.init(tmp_path / "new", "scorer")
    assert not any((tmp_path / "new").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_a_new_subject_can_be_judged_at_once(tmp_path: Path) -> None:
    scaffold.init(tmp_path / "new", "scorer")
    command = [sys.executable, "-m", "verify", "run", "--device", "cpu", "--subject", str(tmp_path / "new")]
    child = subprocess.run(
        [*command, "--phases", "2", "--out", str(tmp_path / "runs")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert child.returncode == 1, child.stdout + child.stderr
    (path,) = (tmp_path / "runs").glob("*/record.json")
    results = {result.id: result for result in read_record(path).results}
    assert {result.verdict for result in results.values()} == {Verdict.PASS, Verdict.ABSENT, Verdict.SKIP}
    stub = results["p2.names.vllm-core-scoring-compute_scores_pytorch"]
    assert stub.message == "not implemented (vllm.core.scoring.compute_scores_pytorch only raises NotImplementedError)"
