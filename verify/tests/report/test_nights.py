"""The pages of seven made-up nights on six GPUs: what a maintainer sees first."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from verify.tests.sites import nightly_site

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nightly_site(tmp_path_factory.mktemp("nights"))


def rows(page: Page) -> list[str]:
    """The checks that the matrix shows."""
    return page.locator(".matrix .rows tr:visible th a").all_text_contents()


def test_anything_red_is_crashes_and_failures_together(page: Page, site: Path) -> None:
    address = (site / "index.html").as_uri()
    page.goto(f"{address}#gate=hard&verdict=FAIL")
    assert rows(page) == ["p4.oracle"]
    page.goto(f"{address}#gate=hard&verdict=red")
    assert rows(page) == ["p3.scoring", "p4.oracle"]
    assert page.get_by_label("Verdict").locator("option:checked").text_content() == "anything red"
    page.get_by_label("Gate").select_option("")
    assert rows(page) == ["p3.scoring", "p4.oracle", "p7.soft_stream"]
    page.goto(f"{(site / 'gpu/sm100.html').as_uri()}#verdict=red")
    assert page.locator(".results tbody tr:visible th[scope=row]").count() == 12


def test_soft_failures_are_counted_in_the_heading_and_in_each_column(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    assert page.locator("h1").text_content() == (
        "4 of 12 GPUs verified on hardware (sm80, sm89, sm90 and sm121); sm100 and sm120 failed; "
        "SOFT checks fail on sm89 (1); every must-pass check passes without a GPU."
    )
    line = page.locator(".matrix thead tr", has_text="SOFT failures").locator("td").all_text_contents()
    names = page.locator(".matrix thead th[scope=col] a").all_text_contents()
    counted = dict(zip(names, line, strict=True))
    assert [counted[name] for name in ("sm80", "sm86", "sm89", "sm120")] == ["0", "-", "1", "0"]
