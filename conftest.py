"""Makes ``pytest`` in this repository the instrument: gates, phases, subjects and records live in ``verify.plugin``."""

from __future__ import annotations

import sys
from collections.abc import Generator

import pytest

pytest_plugins = ["verify.plugin"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """A thread for what is no check: models of tests are tiny, and on a busy machine two threads spend seconds waiting
    for each other in each of their steps.
    """
    torch = sys.modules.get("torch")
    if torch is None or item.get_closest_marker("check"):
        return (yield)
    usual = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return (yield)
    finally:
        torch.set_num_threads(usual)
