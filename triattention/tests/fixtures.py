"""What the tests of the command line share: a tiny model on disk, its statistics, and two questions.

A plugin that test modules name, and no conftest: that would import the bundled package whatever the subject is.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from triattention.tests.command_line import write_questions, write_statistics
from triattention.tests.model_directory import write_tiny_model


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(write_tiny_model(tmp_path_factory.mktemp("tiny")))


@pytest.fixture(scope="session")
def tiny_statistics(tiny_model: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_statistics(tiny_model, tmp_path_factory.mktemp("statistics"))


@pytest.fixture
def questions(tmp_path: Path) -> str:
    return write_questions(tmp_path / "two.jsonl", 2)
