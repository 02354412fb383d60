"""The browser in which the pages are tested."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from verify.tests.browser import chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture
def page(browser: Browser) -> Iterator[Page]:
    """A page that fails its test for an error in its console, a dialog, or a request for anything but a file."""
    one = browser.new_page(viewport={"width": 1400, "height": 900})
    complaints: list[str] = []
    one.on("console", lambda message: message.type in ("error", "warning") and complaints.append(message.text))
    one.on("pageerror", lambda error: complaints.append(str(error)))
    one.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
    one.on("request", lambda asked: asked.url.startswith(("file:", "data:")) or complaints.append(asked.url))
    yield one
    one.close()
    assert complaints == []
