"""What the checks of phase 6 share: the model, its statistics, and the subject's patch on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from verify.live_model import LiveModel, load, locate, published_layout
from verify.short_runs import RECOMMENDED
from verify.subject import Subject, find_subject


@pytest.fixture(scope="session")
def located(model_name: str, device: str, pytestconfig: pytest.Config) -> tuple[str, Path]:
    """The directory of the model and its statistics, by the bundled command line, whatever the subject is."""
    return locate(find_subject("bundled", pytestconfig.rootpath), model_name, device)


@pytest.fixture(scope="session")
def location(located: tuple[str, Path]) -> str:
    return located[0]


@pytest.fixture(scope="session")
def stats_path(located: tuple[str, Path]) -> str:
    """The statistics that the command line of the subject is given."""
    return str(published_layout(located[1]))


@pytest.fixture(scope="module")
def loaded(located: tuple[str, Path], subject: Subject, device: str) -> LiveModel:
    return load(*located, subject, device, RECOMMENDED)


@pytest.fixture
def model(loaded: LiveModel) -> Iterator[LiveModel]:
    """The model, unpatched at the start; whatever forward a check put there is taken away after it."""
    original = loaded.model.forward
    own = set(vars(loaded.model))
    yield loaded
    for name in set(vars(loaded.model)) - own:
        delattr(loaded.model, name)
    if loaded.model.forward != original:
        loaded.model.forward = original
    loaded.model.set_attn_implementation("sdpa")
