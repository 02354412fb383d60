"""The pages of seven made-up nights on six GPUs: what a maintainer sees first."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from verify.architectures import known_targets, parse_target
from verify.record.verdict import assess
from verify.report.site.build import build
from verify.report.terminal import print_report
from verify.tests.samples import compiled, result, simulated
from verify.tests.sites import CASES, CRASHED, night, nightly_checks, nightly_site, site_of

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nightly_site(tmp_path_factory.mktemp("nights"))


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of a run on every target, with long names, and of what was compiled for some."""
    folder = tmp_path_factory.mktemp("wide")
    bad = dict.fromkeys(CRASHED, "CRASH")
    found = [
        night(one.target, 7, verdicts=bad, said="/a/path" * 60, run_id=f"20261107T000000Z-{one.target}-nightly-06c7")
        for one in known_targets()
    ]
    found += [compiled("sm90"), compiled("sm88", gap="no assembler knows it"), simulated("sm121", [])]
    return nightly_site(folder, found)


@pytest.fixture(scope="module")
def green(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nightly_site(tmp_path_factory.mktemp("green"), [night("sm80", 1), night("sm90", 1)])


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


#: The red cells of the tables of a page, as whether each is shown, and the rows that are shown without one.
RED = """
() => {
    const tables = "main :is(.matrix, .results)";
    const shown = (one) => one.checkVisibility() && !one.closest(".off");
    const red = [...document.querySelectorAll(`${tables} .g.fail`)];
    const rows = [...document.querySelectorAll(":is(.matrix .rows, .results tbody) tr:not(.phase, .more)")];
    return [red.map(shown), rows.filter((row) => shown(row) && !row.querySelector(".g.fail")).length];
}
"""


def test_with_the_filter_for_red_every_red_cell_is_shown_and_no_other_row(page: Page, site: Path, wide: Path) -> None:
    numbers = {}
    for place in (site, wide):
        for file in (place / "index.html", *sorted(place.glob("gpu/*.html"))):
            page.goto(f"{file.as_uri()}#verdict=red")
            shown, others = page.evaluate(RED)
            assert all(shown), file
            assert others == 0, file
            numbers[place, file.stem] = len(shown)
    assert [numbers[site, name] for name in ("index", "sm100", "sm120", "sm89", "sm80")] == [3, 12, 1, 1, 0]
    assert numbers[wide, "index"] == 13


def test_red_rows_come_first_and_the_others_stay_in_their_order(page: Page, site: Path, green: Path) -> None:
    page.set_viewport_size({"width": 1280, "height": 900})
    page.goto((site / "index.html").as_uri())
    red, families = ["p3.scoring", "p4.oracle", "p7.soft_stream"], [*CASES]
    assert rows(page) == [*red, *(family for family in families if family not in red)]
    assert page.locator(".matrix .block").first.text_content().strip().startswith("RED")
    assert page.locator(".matrix .rows tr", has_text="p7.soft_stream").locator("th").text_content().endswith("SOFT")
    for width in (1280, 390):
        page.set_viewport_size({"width": width, "height": 844})
        places = [one.bounding_box() for one in page.locator(".news .g.fail").all()]
        assert [place["y"] + place["height"] < 844 for place in places] == [True] * 3
    page.set_viewport_size({"width": 1280, "height": 900})
    places = [one.bounding_box() for one in page.locator(".matrix td.fail").all()]
    assert [place["y"] + place["height"] < 900 for place in places] == [True] * 3
    page.goto((green / "index.html").as_uri())
    assert rows(page) == families
    assert not page.locator(".matrix .failing").count()


def test_soft_failures_are_counted_in_the_heading_and_in_each_column(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    assert page.locator("h1").text_content() == (
        "4 of 12 GPUs verified on hardware (sm80, sm89, sm90 and sm121); sm100 and sm120 failed; "
        "SOFT checks fail on sm89 (1); every must-pass check passes without a GPU."
    )
    line = page.locator(".matrix tr.sum", has_text="SOFT failures").locator("td").all_text_contents()
    names = page.locator(".matrix thead th[scope=col] a").all_text_contents()
    counted = dict(zip(names, line, strict=True))
    assert [counted[name] for name in ("sm80", "sm86", "sm89", "sm120")] == ["0", "-", "1", "0"]


def told(page: Page) -> dict[str, list[str]]:
    """What the first screen says under each heading, and whether all of it is in the window."""
    box = page.locator(".news")
    place = box.bounding_box()
    assert place is not None
    assert place["y"] + place["height"] < page.viewport_size["height"]
    found = {}
    for heading, content in zip(box.locator("dt").all(), box.locator("dd").all(), strict=True):
        lines = content.locator("p").all_text_contents() or [content.text_content()]
        found[heading.text_content()] = [" ".join(line.split()) for line in lines]
    return found


@pytest.mark.parametrize("width", [1280, 390])
def test_the_first_screen_says_what_is_red_what_is_new_and_what_did_not_run(page: Page, site: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((site / "index.html").as_uri())
    assert told(page) == {
        "Red": ["sm100 p3.scoring: 12 checks CRASH", "sm120 p4.oracle.n33: FAIL", "sm89 p7.soft_stream.one: SOFT FAIL"],
        "New since the last green run": [
            "sm100 p3.scoring: 12 checks PASS hardware, now CRASH hardware (last green run 2026-11-06)",
            "sm120 p4.oracle.n33: PASS hardware, now FAIL hardware (last green run 2026-11-06)",
            "sm89 p7.soft_stream.one: SOFT PASS hardware, now FAIL hardware (last green run 2026-11-06)",
        ],
        "Did not run": ["sm121 its newest run is of 2026-11-06, and sm90 has one of 2026-11-07"],
    }
    page.get_by_text("Show only these rows").click()
    page.wait_for_function("document.querySelector('[name=verdict]').value === 'red'")
    assert rows(page) == ["p3.scoring", "p4.oracle", "p7.soft_stream"]


def test_every_column_has_the_day_of_its_newest_run_its_age_and_its_nights(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    names = page.locator(".matrix thead th[scope=col] a").all_text_contents()
    ages = dict(zip(names, page.locator(".matrix thead .ages td").all_text_contents(), strict=True))
    assert [ages[name] for name in ("sm80", "sm86", "sm121")] == ["2026-11-07", "-", "2026-11-061 day old"]
    before = "2026-10-25 to 2026-10-31: did not run"
    for words in (
        f"sm80, the last 14 nights. {before}; 2026-11-01 to 2026-11-07: its must-pass checks passed",
        f"sm89, the last 14 nights. {before}; 2026-11-01 to 2026-11-06: its must-pass checks passed; "
        "2026-11-07: 1 SOFT check failed",
        f"sm90, the last 14 nights. {before}; 2026-11-01 to 2026-11-02: its must-pass checks passed; "
        "2026-11-03: did not run; 2026-11-04 to 2026-11-07: its must-pass checks passed",
        f"sm100, the last 14 nights. {before}; 2026-11-01 to 2026-11-06: its must-pass checks passed; "
        "2026-11-07: 12 HARD checks failed",
        f"sm121, the last 14 nights. {before}; 2026-11-01 to 2026-11-06: its must-pass checks passed; "
        "2026-11-07: did not run",
    ):
        strip = page.get_by_role("img", name=words, exact=True)
        assert strip.locator("i").count() == 14, words
        column = strip.evaluate("one => one.closest('td').cellIndex")
        assert page.locator(".matrix thead tr:first-child > *").nth(column).locator("a").text_content() in words
    page.goto((site / "gpu/sm121.html").as_uri())
    assert page.locator(".facts dd", has_text="2026-11-06, 1 day old").locator(".strip i.gap").count() == 8


def test_what_fails_for_longer_is_not_new(tmp_path: Path) -> None:
    bad = {"p4.oracle.n1": "FAIL"}
    found = [night("sm80", 1), night("sm80", 2, verdicts=bad), night("sm80", 3, verdicts=bad)]
    found += [night("sm90", 3), night("sm120", 3, verdicts=bad)]
    found.append(night("sm80", 3, verdicts={"p4.oracle.n1": "SKIP"}, run_id="again", time_utc="2026-11-03T08:00:00Z"))
    build(site_of(tmp_path, found[:-1], known=nightly_checks()), tmp_path / "site")
    page = " ".join((tmp_path / "site" / "index.html").read_text().split())
    assert (
        "<dt>New since the last green run</dt><dd> nothing <small>no earlier run to compare with: sm90, sm120" in page
    )
    assert '<dt>Failing for longer</dt><dd> <p><a href="gpu/sm80.html">sm80</a>' in page
    news = site_of(tmp_path, found, known=nightly_checks()).news["sm80"]
    assert [one.tone for one in news.nights[-3:]] == ["pass", "fail", "part"]
    assert news.nights[-1].told == "some must-pass checks without a result"


def test_a_failure_without_the_gpu_is_red_and_says_so(tmp_path: Path) -> None:
    bad = simulated("sm90", [result("p4.oracle.n33", "FAIL", "simulated", gate="hard")])
    told = " ".join((nightly_site(tmp_path, [bad]) / "index.html").read_text().split())
    assert '<a href="check/p4.oracle.html#p4.oracle.n33">p4.oracle.n33</a>: FAIL simulated' in told
    assert "last 14 nights. " not in told  # nothing ever ran on it


def test_what_is_met_by_design_has_no_figure_on_any_page(page: Page, site: Path) -> None:
    for file in site.rglob("*.html"):
        words = re.sub(r"<svg.*?</svg>", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        assert not re.search(r"-\d+x|\binf\b|\bexact\b", words), file.name
    page.goto((site / "run/run-sm80-7.html").as_uri())
    for name, shown in (
        ("p4.keep_set.random", "-2.2e+07 / 1.0e-09"),
        ("p5.tables.same", "0 / any"),
        ("p4.oracle.n1", "3.0e-07 / 1.0e-06"),
    ):
        row = page.locator(f"[id='{name}']")
        assert row.locator("td.n").first.text_content() == shown
        figure = row.locator(".bars .n").text_content()
        assert (figure, row.locator(".bar").count()) == (("3.3x", 1) if name == "p4.oracle.n1" else ("-", 0))
    page.goto((site / "index.html").as_uri())
    cells = page.locator(".matrix .rows tr", has_text="p4.keep_set").locator("td small")
    assert cells.all_text_contents() == []


def test_what_is_met_by_design_has_no_figure_in_the_terminal() -> None:
    console = Console(width=120, file=io.StringIO(), color_system=None)
    print_report(assess(parse_target("sm80"), [night("sm80", 7)], nightly_checks()), console)
    lines = {words[0]: words for line in console.file.getvalue().splitlines() if (words := line.split())}
    assert lines["p4.keep_set"][-4:] == ["-2.2e+07", "/", "1.0e-09", "-"]
    assert lines["p5.tables"][-4:] == ["0", "/", "any", "-"]
    assert lines["p4.oracle"][-1] == "3.3x"


def test_what_is_said_of_several_cases_is_said_once(page: Page, site: Path) -> None:
    cases = ", ".join(CASES["p3.scoring"])
    page.goto((site / "check/p3.scoring.html").as_uri())
    assert page.locator(".verdict-line").all_text_contents() == [
        "Fails only on sm100; passes on sm80, sm89, sm90, sm120, sm121 and emulated.",
        f"Cases {cases}.",
    ]
    page.goto((site / "check/p4.oracle.html").as_uri())
    assert page.locator(".verdict-line").all_text_contents()[1:] == ["Case n33."]
    said = "the process died of signal 11 while the kernel ran"
    for name in ("gpu/sm100.html", "run/run-sm100-7.html"):
        page.goto((site / name).as_uri())
        assert page.locator(".results .message").all_text_contents() == [said]
        assert page.locator(".results .more", has_text="Same message as p3.scoring.d8").count() == 11
        page.get_by_label("Find").fill("signal 11")
        assert page.locator(".results tbody tr:visible th[scope=row]").count() == 12
    page.goto((site / "gpu/sm100.html").as_uri())
    failures = page.locator(".failure:has(.message)")
    assert failures.locator("h3").all_text_contents() == ["p3.scoring CRASH HARD"]
    assert failures.locator(".ids").text_content() == f"12 cases: {cases}"


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_is_wider_than_its_window(page: Page, site: Path, wide: Path, width: int) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    found = []
    for place in (site, wide):
        kinds = [sorted(place.glob(kind)) for kind in ("*.html", "gpu/*.html", "check/*.html", "run/*.html")]
        assert all(kinds)
        for file in (*kinds[0], *(file for some in kinds[1:] for file in some[-4:])):
            page.goto(file.as_uri())
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                    found.append(f"{file.parent.name}/{file.name}, {scheme}")
    assert found == []


def test_runs_with_failures_stand_out(page: Page, site: Path) -> None:
    page.goto((site / "runs.html").as_uri())
    assert page.locator("tbody .v.fail").all_text_contents() == ["1 FAIL", "1 FAIL", "12 CRASH"]


def test_the_title_of_every_page_begins_with_the_verdict(page: Page, site: Path, green: Path) -> None:
    every = "FAILED sm100, sm120"
    for name, words in (
        *(
            (f"{name}.html", every)
            for name in ("index", "tolerances", "runs", "catalogue", "resources", "latency", "faults")
        ),
        ("gpu/sm89.html", "VERIFIED · sm89"),
        ("gpu/emulated.html", "EMULATED PASS · emulated"),
        ("check/p3.scoring.html", "Fails only on sm100 · p3.scoring"),
        ("check/p1.torch_sees.html", "Passes on sm80, sm89, sm90, sm100, sm120, sm121 and emulated · p1.torch_sees"),
        ("run/run-sm100-7.html", "12 CRASH · run-sm100-7"),
        ("run/run-sm80-7.html", "22 PASS · run-sm80-7"),
    ):
        page.goto((site / name).as_uri())
        assert page.title().startswith(f"{words} · "), page.title()
        assert page.title().endswith(" · TriAttention verification")
    page.goto((green / "index.html").as_uri())
    assert page.title() == "2 of 12 VERIFIED · Matrix · TriAttention verification"


def test_a_waived_failure_is_amber_and_its_night_is_not_full(page: Page, tmp_path: Path) -> None:
    bad, hostile = {"p4.oracle.n33": "WAIVED", "p8.kernel.ms": "WAIVED"}, "<b>error: measured 2.5e-06, allowed 1e-06"
    found = [night("sm90", 1), night("sm90", 2, verdicts=bad, said=hostile)]
    built = site_of(tmp_path, found, known=nightly_checks())
    assert [(one.tone, one.told) for one in built.news["sm90"].nights[-2:]] == [
        ("pass", "its must-pass checks passed"), ("part", "2 checks waived")
    ]  # fmt: skip
    build(built, tmp_path / "site")
    page.goto((tmp_path / "site" / "index.html").as_uri())
    assert page.locator("h1").text_content() == "0 of 12 GPUs verified on hardware; failures are waived on sm90 (2)."
    assert [*told(page).values()] == [["nothing"]] * 3
    assert rows(page)
    page.goto(f"{(tmp_path / 'site' / 'index.html').as_uri()}#verdict=WAIVED")
    assert rows(page) == ["p4.oracle", "p8.kernel"]
    assert page.get_by_label("Verdict").locator("option:checked").text_content() == "WAIVED"
    page.goto(f"{(tmp_path / 'site' / 'index.html').as_uri()}#verdict=red")
    assert rows(page) == []
    for name in ("gpu/sm90.html", "run/run-sm90-2.html"):
        page.goto((tmp_path / "site" / name).as_uri())
        row = page.locator("[id='p4.oracle.n33']")
        assert row.locator("td.v.waived").text_content() == "WAIVED by @owner until 2027-01-31"
        more = page.locator("[id='p4.oracle.n33'] + .more .known")
        assert more.text_content() == "Waived by @owner until 2027-01-31: Zeros are NaN. (https://example.org/12)"
        assert more.locator("a").get_attribute("href") == "https://example.org/12"
        assert page.get_by_text("<b>error: measured").count() > 0
    assert page.title().startswith("20 PASS, 2 WAIVED · run-sm90-2 · ")
    page.goto((tmp_path / "site" / "check/p4.oracle.html").as_uri())
    assert page.locator(".verdict-line").first.text_content() == "Its failure is waived on sm90."
