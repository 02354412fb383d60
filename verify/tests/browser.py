"""A real browser for the tests of the pages, and the pictures of them: ``python -m verify.tests.browser OUT SITE``."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from playwright.sync_api import Browser

#: What Debian, Ubuntu and CI machines call one; ci/bootstrap.py installs the first where there is none.
PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

#: A picture of each, by the file that it becomes.
PICTURED = {
    "matrix": "index.html",
    "tolerances": "tolerances.html",
    "gpu": "gpu/sm120.html",
    "check": "check/p3.scoring.html",
    "runs": "runs.html",
    "catalogue": "catalogue.html",
    "resources": "resources.html",
    "latency": "latency.html",
    "faults": "faults.html",
}


@contextmanager
def chromium() -> Iterator[Browser]:
    """A headless Chromium of the machine's own. Raises RuntimeError naming the package where there is none."""
    from playwright.sync_api import sync_playwright

    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        raise RuntimeError("there is no browser to test the pages in; run: apt-get install chromium")
    with sync_playwright() as playwright:
        # the sandbox needs user namespaces, which containers lack, and the pages are our own
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield browser
        finally:
            browser.close()


def picture(site: Path, out: Path) -> None:
    """Pictures of the pages of ``site`` in ``out``: light, dark, and the matrix on a narrow screen."""
    run = next((site / "run").glob("*.html"), None)
    pages = PICTURED | ({"run": f"run/{run.name}"} if run else {})
    out.mkdir(parents=True, exist_ok=True)
    with chromium() as browser:
        for scheme in ("light", "dark"):
            page = browser.new_page(viewport={"width": 1360, "height": 900}, color_scheme=scheme)
            for name, file in pages.items():
                page.goto((site / file).resolve().as_uri())
                page.screenshot(path=out / f"{name}-{scheme}.png")
            page.set_viewport_size({"width": 400, "height": 800})
            page.goto((site / "index.html").resolve().as_uri())
            page.screenshot(path=out / f"matrix-narrow-{scheme}.png")
            page.close()


if __name__ == "__main__":
    picture(Path(sys.argv[2]), Path(sys.argv[1]))
