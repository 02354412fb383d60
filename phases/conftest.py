"""Fixtures shared by phases 6 and 7: the model, its statistics, its patch, and the judge of served answers."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

from verify import skip
from verify.errors import SubjectLacks
from verify.model.live_model import LiveModel, load, locate, published_layout
from verify.model.settings import RECOMMENDED
from verify.serving.judge import Judge, rule
from verify.subject.find import find_subject
from verify.subject.offered import optional
from verify.subject.published import PLUGIN
from verify.subject.subject import Subject


@pytest.fixture(scope="session")
def located(model_name: str, device: str, pytestconfig: pytest.Config) -> tuple[str, Path]:
    """The model directory and its statistics, made by the bundled command line for every subject."""
    return locate(find_subject("bundled", pytestconfig.rootpath), model_name, device)


@pytest.fixture(scope="session")
def location(located: tuple[str, Path]) -> str:
    return located[0]


@pytest.fixture(scope="session")
def stats_path(located: tuple[str, Path]) -> str:
    """The statistics file to pass to the subject's command line."""
    return str(published_layout(located[1]))


@pytest.fixture(scope="module")
def loaded(located: tuple[str, Path], subject: Subject, device: str) -> LiveModel:
    return load(*located, subject, device, RECOMMENDED)


@pytest.fixture
def model(loaded: LiveModel) -> Iterator[LiveModel]:
    """The model, unpatched at the start; each check's patch is undone after it."""
    yield loaded
    loaded.restore()
    loaded.model.set_attn_implementation("sdpa")


@pytest.fixture(scope="module")
def served(subject: Subject, request: pytest.FixtureRequest) -> tuple[str, Path]:
    """The model directory and its statistics; vLLM must be installed, and the subject have a plugin."""
    if importlib.util.find_spec("vllm") is None:
        skip("PKG_MISSING", "vllm is not installed")
    optional(subject, "vllm.plugin", "register_triattention_backend")
    if (place := ":".join(subject.place("vllm.plugin", "register_triattention_backend"))) != PLUGIN:
        raise SubjectLacks(f"the subject has no {PLUGIN}, which vLLM's processes load; its plugin is {place}")
    return request.getfixturevalue("located")


@pytest.fixture(scope="module")
def judge(served: tuple[str, Path], subject: Subject, device: str) -> Judge:
    import torch

    model = load(*served, subject, device, {})
    return Judge(model, torch.load(served[1], weights_only=True), rule(device))
