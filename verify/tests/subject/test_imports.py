"""Phase 2 on subjects that have a part of the published API: absent is not wrong, and wrong is not absent."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from phases import p2_imports
from verify.errors import Refused, SubjectLacks, SubjectNeeds
from verify.subject.find import find_subject
from verify.subject.subject import Subject
from verify.tests.tree import REPOSITORY

_CONFIG, _SCORING = "vllm/core/config.py", "vllm/core/scoring.py"


def _subject(root: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str]) -> Subject:
    """A package of its own with these modules, active."""
    package = root / "halfway"
    for name, text in {"__init__.py": "", **files}.items():
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text(text)
    for name in [name for name in sys.modules if name.partition(".")[0] == "halfway"]:  # of the test before
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(root)
    subject = find_subject("module:halfway", REPOSITORY)
    subject.activate()
    return subject


@pytest.mark.parametrize(
    ("files", "error", "words"),
    [
        ({_SCORING: ""}, None, ""),
        ({_SCORING: "", _CONFIG: "import no_such_package\n"}, None, ""),
        ({}, SubjectLacks, "none of the published modules"),
        ({_CONFIG: "import no_such_package\n"}, SubjectNeeds, "halfway.vllm.core.config needs the package no_such"),
        ({_SCORING: "", _CONFIG: "1 / 0\n"}, AssertionError, "failed: ZeroDivisionError"),
        ({_SCORING: "import halfway.gone\n"}, AssertionError, "No module named 'halfway.gone'"),
    ],
)
def test_only_the_modules_that_are_there_are_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, files: dict[str, str], error: type[Exception] | None, words: str
) -> None:
    subject = _subject(tmp_path, monkeypatch, files)
    if error is None:
        p2_imports.test_no_cuda_context("no_cuda", subject)
        return
    with pytest.raises(error, match=words):
        p2_imports.test_no_cuda_context("no_cuda", subject)


_STRICT = """
class TriAttentionConfig:
    def __init__(self, kv_budget, **more):
        if kv_budget {limit}:
            raise ValueError("the window of 128 must be smaller")
        self.kv_budget = kv_budget
"""


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        (
            _STRICT.format(limit="<= 128"),
            Refused,
            "^kv_budget=128 without a window: refused at halfway/vllm/core/config",
        ),
        (_STRICT.format(limit=""), ValueError, "^the window of 128"),
        ("class TriAttentionConfig:\n    def __init__(self): ...\n", TypeError, "unexpected keyword argument"),
        ("", SubjectLacks, "the subject has no TriAttentionConfig"),
    ],
)
def test_a_budget_is_refused_only_if_a_larger_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, error: type[Exception], words: str
) -> None:
    subject = _subject(tmp_path, monkeypatch, {_CONFIG: text})
    with pytest.raises(error, match=words):
        p2_imports.test_plan_budget("plan_budget", subject)


def test_a_name_is_judged_by_its_own_parameters_and_a_stub_is_absent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = p2_imports._BY_CASE["methods-pruning_utils-build_geometric_offsets"]
    renamed = f"[arguments.'{case.full}']\nmax_length = 'longest'\n"
    files = {"methods/pruning_utils.py": "def build_geometric_offsets(longest, device): ...\n"}
    with pytest.raises(AssertionError, match="parameter 1 is longest, published is max_length"):
        p2_imports.test_name(case, _subject(tmp_path / "a", monkeypatch, files))
    p2_imports.test_name(case, _subject(tmp_path / "b", monkeypatch, {**files, "subject.toml": renamed}))
    files = {"methods/pruning_utils.py": "def build_geometric_offsets(*_):\n    raise NotImplementedError\n"}
    with pytest.raises(SubjectLacks, match=r"^not implemented \(methods\.pruning_utils\.build_geometric_offsets only"):
        p2_imports.test_name(case, _subject(tmp_path / "c", monkeypatch, files))
