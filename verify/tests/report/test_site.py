"""The pages: what they say, that nothing in a record becomes markup, and how they behave in a real browser."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from verify.checks import catalogue
from verify.errors import ConfigurationError
from verify.record import kills
from verify.record.schema import Record
from verify.report.site.build import build
from verify.report.site.view import Bar, across, page_name
from verify.tests import samples
from verify.tests.samples import (
    HARD,
    REPOSITORY,
    compiled,
    counted,
    curve,
    known,
    measure_report,
    measured,
    passing,
    reading_s,
    record,
    result,
    simulated,
    waived,
    write_many,
)
from verify.tests.sites import site_of

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>{{ 7 * 7 }}"

#: One page of every kind.
PAGES = (
    "index.html", "tolerances.html", "runs.html", "catalogue.html", "resources.html", "latency.html", "faults.html",
    "gpu/sm120.html", "gpu/sm121.html", "check/p4.oracle.html", "run/run-sm120-3.html",
)  # fmt: skip


def records() -> list[Record]:
    """A card that passes, one that fails, is hostile and has a waived failure, one that is stale, one compiled, one
    simulated, and a run without any.
    """
    failed = result("p4.oracle.n33", "FAIL", message=HOSTILE, measurements=measured(3, 1, HOSTILE))
    drawn = result("p8.kernel.ms", curves=[curve(HOSTILE, [(0, 1), (1, 2)])], measurements=measured(2, 4))
    blocked = result("p1.nvcc.version", "BLOCKED", by=failed.id)
    listed = waived("p4.triton_pytorch.mean", message=HOSTILE)
    others = [one for one in passing() if one.id not in (failed.id, listed.id)]
    hostile = record("sm120", [*others, failed, listed, drawn, blocked], day=3)
    environment = hostile.environment
    renamed = environment.model_copy(update={"gpu": environment.gpu.model_copy(update={"name": HOSTILE})})
    newest = record("sm80", passing()[:2], day=2)
    other = newest.subject.model_copy(update={"name": "another"})
    return [
        record("sm90", passing(), day=2),
        record("sm90", passing(), day=1),
        hostile.model_copy(update={"environment": renamed}),
        record("sm80", passing(), day=1),
        newest.model_copy(update={"subject": other}),
        compiled("sm100"),
        compiled("sm88", gap="no assembler knows it"),
        counted("sm89", {"bfloat16-half-mean": 31.0, "bfloat16-half-max-d128-o17-g4": 690.0}),
        simulated("sm121", [result(HARD[0], evidence="simulated"), result(HARD[5], "FAIL", "simulated")]),
        record("emulated", passing("emulated"), day=4),
    ]


def made(folder: Path, found: list[Record], unreadable: tuple[str, ...] = ()) -> Path:
    selftest = folder / "selftest"
    selftest.mkdir(parents=True, exist_ok=True)
    cells = [
        kills.Cell(check=f"p4.oracle.{case}", outcome=outcome, verdict="FAIL")
        for case, outcome in (("n1", "killed"), ("n2", "survived"), ("n33", "killed"))
    ]
    rows = [
        kills.Row(id="scoring.sign", what=HOSTILE, cells=cells, duration_s=1),
        kills.Row(id="scoring.survivor", what="x", cells=cells[1:2], duration_s=1),
    ]
    one = records()[0]
    kills.write(
        kills.Matrix(
            time_utc=one.time_utc, subject=one.subject, instrument_sha256=one.instrument_sha256, versions={},
            selection="everything", seed=0, rows=rows, idle=[],
        ),
        selftest / "bundled.json",
    )  # fmt: skip
    build(site_of(folder, found, [folder / "runs"], unreadable), folder / "site")
    return folder / "site"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    log = folder / "runs" / "run-sm120-3" / "server.log"
    log.parent.mkdir(parents=True)
    log.write_text("started")
    return made(folder, records(), (f"x/record.json: {HOSTILE}",))


def text(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def test_every_page_is_there_and_every_link_leads_to_one(site: Path) -> None:
    for page in site.rglob("*.html"):
        for link in re.findall(r'(?:href|src)="([^"#:]+)(?:#[^"]*)?"', page.read_text(encoding="utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
    assert {str(page) for page in PAGES} <= {str(page.relative_to(site)) for page in site.rglob("*.html")}


def test_the_first_sentence_says_what_is_verified_and_what_is_not(site: Path, tmp_path: Path) -> None:
    assert (
        "<h1>1 of 12 GPUs verified on hardware (sm90); sm120 failed; failures are waived on sm120 (1); "
        "the kernels compile for 2; "
        "sm88 cannot be compiled for yet; simulated checks fail for sm121; "
        "every must-pass check passes without a GPU.</h1>"
    ) in text(site, "index.html")
    assert "<h1>0 of 12 GPUs verified on hardware.</h1>" in text(made(tmp_path, []), "index.html")


def test_nothing_in_a_record_becomes_markup(site: Path) -> None:
    for page in site.rglob("*.html"):
        told = page.read_text(encoding="utf-8")
        assert "<img" not in told, page.name
        assert "<script>" not in told, page.name
    assert "&lt;script&gt;alert(2)&lt;/script&gt;{{ 7 * 7 }}" in text(site, "gpu/sm120.html")


def test_the_matrix_tells_evidence_and_how_each_cell_ended(site: Path) -> None:
    told = text(site, "index.html")
    for words in (
        "p4.oracle on sm90: PASS, hardware evidence, 10.0x",
        "p4.oracle on sm120: FAIL, hardware evidence, 1/2",
        "p4.oracle on sm80: STALE, hardware evidence, was PASS",
        "p4.oracle on emulated: PASS, emulated evidence, 10.0x",
        "p4.oracle on sm86: NOT RUN, no evidence",
        "p1.nvcc on sm120: BLOCKED, no evidence",
    ):
        assert f'aria-label="{words}' in told, words


def test_a_check_that_fails_on_one_gpu_only_says_so(site: Path) -> None:
    told = text(site, "check/p4.oracle.html")
    assert "Fails only on sm120; passes on sm90 and emulated." in told
    assert 'Case <a href="#p4.oracle.n33"><code>n33</code></a>.</p>' in told
    assert across({}) == "No target has a valid result."


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pages of another subject, on another stack than the pinned one: a known deviation that blocks, a new failure,
    and what it does not offer.
    """
    own = known("p4.oracle.n1", evidence="emulated", message=HOSTILE)
    blocked = result("p4.oracle.n33", "BLOCKED", evidence="emulated", by=own.id)
    failed = result("p1.bf16.matmul", "FAIL", evidence="emulated")
    others = [("p4.triton_pytorch.mean", "REFUSED"), ("p4.triton_pytorch.max", "REFUSED"), ("p8.kernel.ms", "ABSENT")]
    whole = record("emulated", [own, blocked, failed, *(result(*one, evidence="emulated") for one in others)])
    subject = whole.subject.model_copy(update={"source": "checkout:theirs"})
    stack = whole.environment.model_copy(update={"torch": "2.11.0+cu130", "triton": "3.6.0"})
    whole = whole.model_copy(update={"subject": subject, "environment": stack})
    return made(tmp_path_factory.mktemp("theirs"), [whole])


def test_every_page_of_another_subject_names_it_and_has_its_targets_only(theirs: Path) -> None:
    for page in theirs.rglob("*.html"):
        assert '<strong class="subject">sample 1.0, checkout:theirs</strong>' in page.read_text(), page
    assert [page.name for page in (theirs / "gpu").iterdir()] == ["emulated.html"]
    assert "--device cpu --subject=PATH" in text(theirs, "gpu/emulated.html")
    assert "phases/x.py::test&#39; --subject=PATH" in text(theirs, "check/p4.oracle.html")


def test_what_is_not_offered_is_told_in_its_cell_and_a_known_deviation_too(theirs: Path) -> None:
    told = text(theirs, "index.html")
    for words, shown in (
        ("p4.triton_pytorch on emulated: REFUSED, emulated evidence", "refused"),
        ("p8.kernel on emulated: ABSENT, emulated evidence", "absent"),
        ("p4.oracle on emulated: FAIL, emulated evidence, known, 1/2", "known"),
    ):
        assert re.search(rf'aria-label="{words}">.*?<small>{shown}</small>', told), words


def test_findings_come_before_the_failures_with_what_they_block(theirs: Path) -> None:
    for page in ("gpu/emulated.html", "run/run-emulated-1.html"):
        told = " ".join(text(theirs, page).split())
        assert re.search(
            r"p4.oracle did not hold: claim <small>1 check, blocking 1 more, 1 known deviation</small>", told
        ), page
        assert "Known deviation, still a failure: Zeros are NaN. (<a href=" in told
        assert "<script>alert" not in told
        assert told.index('id="findings"') < told.index('<p class="known">')


def test_a_stack_that_is_not_the_pinned_one_is_told_below_the_verdict(site: Path, theirs: Path) -> None:
    told = re.search(r'<p class="lead">.*?</p>\s*<p>(.*?)</p>\s*<dl', text(theirs, "gpu/emulated.html"))
    assert told is not None
    assert re.fullmatch(r"Made with torch 2\.11\.0 and Triton 3\.6\.0; the suite is pinned to .+ and .+\.", told[1])
    assert "Made with" not in text(site, "gpu/sm90.html")


def test_a_chart_of_headroom_has_what_a_log_scale_can_show(site: Path, tmp_path: Path) -> None:
    assert "Least headroom over time" in text(site, "check/p4.oracle.html")
    wrong = [measured(float("inf"), 1), measured(-1, 1)]
    failed = [result("p4.oracle.n1", "FAIL", message="x", measurements=one) for one in wrong]
    found = [record("sm90", [one], day=day) for one in failed for day in (1, 2)]
    found = [one.model_copy(update={"run_id": f"run-{number}"}) for number, one in enumerate(found)]
    assert "Least headroom over time" not in text(made(tmp_path, found), "check/p4.oracle.html")


def test_a_run_shows_its_logs_and_how_to_repeat_a_failure(site: Path) -> None:
    told = text(site, "run/run-sm120-3.html")
    assert '<a href="../../runs/run-sm120-3/server.log">server.log</a>' in told
    assert "<code>python -m pytest &#39;phases/x.py::p4.oracle.n33&#39;</code>" in told


def test_faults_name_what_killed_them_and_survivors_stand_out(site: Path, tmp_path: Path) -> None:
    told = text(site, "faults.html")
    assert "1 of 2 mistakes planted in a subject, in compiled code or in a record were caught; " in told
    assert ", with another version of the suite." in told
    assert "<td>p4.oracle (2)</td>" in told
    assert '<span class="v fail">survived</span>' in told
    build(site_of(tmp_path, [], []), tmp_path / "site")
    assert "There is no kill matrix" in text(tmp_path / "site", "faults.html")


def test_latency_that_nobody_measures_is_said_to_be_absent(tmp_path: Path) -> None:
    skipped = result("p8.kernel.ms", "SKIP", code="NO_BASELINE")
    told = text(made(tmp_path, [record("sm90", [skipped])]), "latency.html")
    assert "1 result of phase 8 is NO_BASELINE: there is no earlier record to compare with" in told


def test_a_bar_ends_at_what_is_allowed() -> None:
    widths = [Bar.of(measured(value, 1)[0]).width for value in (1e-9, 0.01, 1, 2, float("inf"), float("nan"))]
    assert widths == [1, 40, 80, 86, 100, 100]
    none = [Bar.of(measured(value, 0)[0]) for value in (0, 1)]
    assert [(one.width, one.over) for one in none] == [(None, False), (100, True)]


def test_a_run_id_cannot_leave_its_folder(tmp_path: Path) -> None:
    climbing = record("sm90", passing(), run_id="../../escaped")
    build(site_of(tmp_path, [climbing], [tmp_path]), tmp_path / "a" / "site")
    assert [page.name for page in (tmp_path / "a" / "site" / "run").iterdir()] == [f"{page_name('../../escaped')}.html"]
    assert not list(tmp_path.glob("escaped*"))
    assert page_name("a/b") != page_name("a_b")


def test_a_site_is_made_anew_and_replaces_nothing_else(tmp_path: Path) -> None:
    site = made(tmp_path, records())
    assert (site / "run" / "run-sm90-1.html").is_file()
    made(tmp_path, records()[:1])
    assert not (site / "run" / "run-sm90-1.html").exists()
    assert not list(tmp_path.glob(".site*"))
    mine = tmp_path / "thesis"
    mine.mkdir()
    (mine / "thesis.tex").write_text("years of work")
    with pytest.raises(ConfigurationError, match="thesis holds something other than a site; name a new or an empty"):
        build(site_of(tmp_path, [], []), mine)
    assert (mine / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ConfigurationError, match="below cannot be created"):
        build(site_of(tmp_path, [], []), mine / "thesis.tex" / "below")


def test_a_thousand_records_make_a_site_in_half_a_minute_and_half_a_gigabyte(tmp_path: Path) -> None:
    root = samples.write_tree(tmp_path)
    results = passing()
    for number in range(1000):
        target = ("sm80", "sm90", "sm120")[number % 3]
        one = record(target, results, day=number % 28 + 1, run_id=f"run-{number:04d}")
        path = root / "reports" / "runs" / one.run_id / "record.json"
        path.parent.mkdir(parents=True)
        path.write_text(one.model_dump_json())
    (path.parent / "record.json").write_text("{")
    made = measure_report("--format", "html", cwd=root, cache=tmp_path / "cache")
    assert made.exit_code == 5
    assert "run-0999/record.json" in made.said
    assert len(list((root / "reports" / "site" / "run").iterdir())) == 999
    assert made.processor_s < 120 * reading_s(root / "reports")  # small records: most of it is the other pages
    assert made.mebibytes < 500


@pytest.mark.slow  # by the clock, so with nothing beside it
def test_a_thousand_whole_runs_make_a_site_in_half_a_minute_and_half_a_gigabyte(tmp_path: Path) -> None:
    write_many(tmp_path, 1000, list(catalogue()))
    last = sorted((tmp_path / "evidence").rglob("*.json"))[-1]
    last.write_text("{")
    records, where = ("--records", str(tmp_path / "evidence")), {"cwd": REPOSITORY, "cache": tmp_path / "cache"}
    made = measure_report("--format", "html", "--out", str(tmp_path / "site"), *records, **where)
    assert made.exit_code == 5
    assert last.name in made.said
    assert len(list((tmp_path / "site" / "run").iterdir())) == 999
    assert made.wall_s < 5 * reading_s(tmp_path)
    assert made.mebibytes < 500


def rows(page: Page) -> list[str]:
    """The checks that the matrix shows."""
    return page.locator(".matrix .rows tr:visible th a").all_text_contents()


#: The problems that matter, in a few words each: only these cross from the browser to the test.
SERIOUS = """
async (options) => (await axe.run({preload: false, resultTypes: ["violations"], ...options})).violations
    .filter((problem) => ["serious", "critical"].includes(problem.impact))
    .map((problem) => `${problem.id}: ${problem.nodes[0].html.slice(0, 120)}`)
"""

#: A colour scheme changes what these rules say, and no other.
OF_COLOURS = {"runOnly": {"type": "rule", "values": ["color-contrast", "link-in-text-block"]}}


@pytest.mark.parametrize("width", [1280, 390])
def test_no_page_has_a_serious_problem_for_assistive_technology(
    page: Page, site: Path, theirs: Path, width: int
) -> None:
    from axe_playwright_python.base import AXE_SCRIPT

    page.set_viewport_size({"width": width, "height": 844})
    found = []
    others = ("index.html", "gpu/emulated.html", "run/run-emulated-1.html")
    for name, place in (*((name, site) for name in PAGES), *((name, theirs) for name in others)):
        page.emulate_media(color_scheme="light")
        page.goto((place / name).as_uri())
        page.evaluate("for (const one of document.querySelectorAll('details')) one.open = true")
        page.evaluate(AXE_SCRIPT)
        problems = page.evaluate(SERIOUS, {})
        page.emulate_media(color_scheme="dark")
        problems += [f"dark: {problem}" for problem in page.evaluate(SERIOUS, OF_COLOURS)]
        found += [f"{name}: {problem}" for problem in problems]
        if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
            found.append(f"{name}: wider than the window")
    assert found == []


def test_filters_narrow_the_matrix_and_stand_in_its_address(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    everything = rows(page)
    page.get_by_label("Gate").select_option("hard")
    page.get_by_label("Phase").select_option("4")
    assert rows(page) == ["p4.triton_pytorch", "p4.oracle"]
    page.get_by_label("Find").fill("ORACLE")
    assert rows(page) == ["p4.oracle"]
    assert page.url.endswith("#q=ORACLE&phase=4&gate=hard")
    assert page.locator(".filters output").text_content() == f"1 of {len(everything)}"
    page.keyboard.press("Escape")
    page.wait_for_function("!location.hash.includes('=')")
    assert rows(page) == everything


def test_a_deep_link_restores_the_filters(page: Page, site: Path) -> None:
    page.goto(f"{(site / 'index.html').as_uri()}#verdict=FAIL&evidence=hardware")
    assert rows(page) == ["p4.oracle"]
    assert page.get_by_label("Verdict").input_value() == "FAIL"
    page.goto(f"{(site / 'run/run-sm120-3.html').as_uri()}#verdict=BLOCKED")
    assert page.locator(".results tbody tr:visible th[scope=row]").all_text_contents() == ["p1.nvcc.version"]
    assert not page.locator(".message:visible").count()


def test_the_matrix_is_one_stop_for_tab_and_the_arrows_move_in_it(page: Page, site: Path) -> None:
    page.goto((site / "index.html").as_uri())
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.name") == "q"
    for _ in range(6):
        page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "p4.triton_pytorch"  # red rows come first
    for _ in range(3):
        page.keyboard.press("ArrowDown")
    page.keyboard.press("End")
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowLeft")
    assert page.evaluate("document.activeElement.textContent") == "p1.bf16"
    page.keyboard.press("ArrowRight")
    assert page.locator(".inspector").text_content() == "p1.bf16 on sm80: PASS, hardware evidence, 10.0x"
    page.keyboard.press("Tab")
    assert not page.evaluate("!!document.activeElement.closest('.matrix')")
    page.keyboard.press("Shift+Tab")
    page.keyboard.press("Enter")
    page.wait_for_url("**/gpu/sm80.html#p1.bf16.matmul")
    assert page.locator("h1").text_content().startswith("sm80")


def test_the_theme_can_be_chosen_and_is_kept(page: Page, site: Path) -> None:
    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.emulate_media(color_scheme="light")
    page.goto((site / "index.html").as_uri())
    light, button = ground(), page.get_by_role("button", name="Theme")
    button.click()
    assert ground() == light
    button.click()
    assert button.text_content() == "Theme: dark"
    assert ground() != light
    page.goto((site / "runs.html").as_uri())
    assert button.text_content() == "Theme: dark"
    button.click()
    assert ground() == light


def test_a_command_is_copied(page: Page, site: Path) -> None:
    page.goto((site / "gpu/sm120.html").as_uri())
    button = page.locator(".failure .copy").first
    button.click()
    page.wait_for_function("document.querySelector('.failure .copy').textContent === 'Copied'")
    page.locator(".filters input").focus()
    page.keyboard.press("Control+V")
    assert page.locator(".filters input").input_value() == "python -m pytest 'phases/x.py::p4.oracle.n33'"


def test_without_scripts_everything_is_there(browser: Browser, site: Path) -> None:
    context = browser.new_context(java_script_enabled=False)
    plain = context.new_page()
    plain.goto((site / "index.html").as_uri())
    assert plain.locator(".matrix .rows tr").count() > 6
    assert not plain.locator(".filters").is_visible()
    context.close()
