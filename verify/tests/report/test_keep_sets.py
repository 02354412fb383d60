"""Keep sets next to the oracle's: in words, as pictures on the pages, and in the terminal."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from rich.console import Console

from verify import explain
from verify.architectures import parse_target
from verify.record.pictures import KeptSet
from verify.record.schema import CheckResult, Record
from verify.record.verdict import assess
from verify.report.keep_sets import kept_words, most_telling
from verify.report.site.keep_sets import LONGEST, drawn
from verify.report.terminal import print_report
from verify.tests.samples import result
from verify.tests.sites import night, nightly_checks, nightly_site

if TYPE_CHECKING:
    from playwright.sync_api import Page

FAILED, PASSED = "p4.keep_set.random", "p4.keep_set.ties"


def kept_set(name: str, swaps: int, tokens: int = 320, kept: int = 256) -> KeptSet:
    """The first ``kept`` tokens, the last ``swaps`` of which the oracle replaces by the tokens after them; the first
    eight are protected.
    """
    places = range(tokens)
    own = [at < kept for at in places]
    oracle = [at < kept - swaps or kept <= at < kept + swaps for at in places]
    return KeptSet.between(name, own, oracle, [at < 8 for at in places])


HOSTILE = "<img src=x onerror=alert(1)>"
SWAPPED = [kept_set("KV head 0", 0), kept_set("KV head 1", 2)]
WORDS = (
    "KV head 1: 256 of 320 tokens kept, 2 differ from the oracle: 254 and 255 are kept instead of 256 and 257; "
    "8 protected"
)
SAME = "KV head 0: 256 of 320 tokens kept, none differs from the oracle; 8 protected"


def run(target: str, kept: dict[str, list[KeptSet]], verdicts: dict[str, str]) -> Record:
    """A run of every check of the nights, with keep sets of some."""
    made = night(target, 7, verdicts=verdicts, said="round 1, KV head 1: measured 2, allowed 1")
    results = [one.model_copy(update={"kept": kept.get(one.id, [])}) for one in made.results]
    return made.model_copy(update={"results": results})


def runs() -> list[Record]:
    """A failure with two swapped tokens and a pass on sm120, and passes on sm90."""
    failed = run("sm120", {FAILED: SWAPPED, PASSED: [kept_set(HOSTILE, 0)]}, {FAILED: "FAIL"})
    return [failed, run("sm90", {FAILED: SWAPPED[:1]}, {})]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return nightly_site(tmp_path_factory.mktemp("keep_sets"), runs())


def test_a_keep_set_is_told_in_one_sentence() -> None:
    assert [kept_words(one) for one in SWAPPED] == [SAME, WORDS]
    assert kept_words(kept_set("x", 1)).split(": ", 1)[1] == (
        "256 of 320 tokens kept, 1 differs from the oracle: 255 is kept instead of 256; 8 protected"
    )
    assert kept_words(kept_set("x", 6)).endswith(
        ": 250, 251, 252, 253 and 2 more are kept instead of 256, 257, 258, 259 and 2 more; 8 protected"
    )
    free = KeptSet.between("x", [True], [True], [False])
    assert kept_words(free) == "x: 1 of 1 token kept, none differs from the oracle"


def test_the_most_telling_result_is_the_newest_that_did_not_pass() -> None:
    def one(verdict: str, *kept: KeptSet) -> CheckResult:
        return result(FAILED, verdict, kept=list(kept))

    newest, failed, older = one("PASS", *SWAPPED), one("FAIL", *SWAPPED), one("FAIL", *SWAPPED)
    assert most_telling([one("FAIL"), newest, failed, older]) is failed
    assert most_telling([one("FAIL"), newest]) is newest
    assert most_telling([one("FAIL")]) is None


def _cells(svg: str, kind: str) -> int:
    """How many cells of a kind there are in a picture."""
    lines = re.findall(rf'<path class="{kind}" d="([^"]*)"', svg)
    return sum((int(length) + 1) // 8 for line in lines for length in re.findall(r"h(\d+)", line))


@pytest.mark.parametrize("tokens", [1, 15, 16, 17, 320])
@pytest.mark.parametrize("swaps", [0, 2])
def test_every_token_has_a_cell_of_its_kind_in_both_rows(tokens: int, swaps: int) -> None:
    swaps = min(swaps, tokens // 4)
    one = kept_set("x", swaps, tokens, tokens // 2)
    svg = drawn(one)
    assert svg.count("<svg") == -(-tokens // 16)
    assert _cells(svg, "kept") == 2 * (tokens // 2 - swaps)
    assert _cells(svg, "out") == 2 * (tokens - tokens // 2 - swaps)
    assert _cells(svg, "kept swapped") == _cells(svg, "out swapped") == 2 * swaps
    assert svg.count("l4 4m0-4l-4 4") == 4 * swaps
    assert _cells(svg, "bar") == min(tokens, 8)


def test_a_very_long_keep_set_is_told_in_words_only() -> None:
    assert drawn(kept_set("x", 2, LONGEST)) != ""
    assert drawn(kept_set("x", 2, LONGEST + 1)) == ""


def _marks(page: Page, words: str) -> dict[str, int]:
    """The number of paths of each kind in the picture with these words."""
    figure = page.get_by_role("figure", name=words, exact=True)
    assert figure.is_visible()
    kinds = figure.locator("path").evaluate_all("all => all.map(one => one.getAttribute('class'))")
    return {kind: kinds.count(kind) for kind in ("kept swapped", "out swapped", "cross")}


@pytest.mark.parametrize("name", ["gpu/sm120", "check/p4.keep_set", "run/run-sm120-7"])
def test_a_failed_keep_set_is_shown_with_its_swapped_tokens(page: Page, site: Path, name: str) -> None:
    page.goto((site / f"{name}.html").as_uri())
    # 254 and 255 are in another block than 256 and 257: each row has one run of each kind
    assert _marks(page, WORDS) == {"kept swapped": 2, "out swapped": 2, "cross": 4}
    assert _marks(page, SAME) == {"kept swapped": 0, "out swapped": 0, "cross": 0}


def test_the_gpu_page_shows_a_failure_with_its_keep_sets_and_those_of_a_pass_on_request(page: Page, site: Path) -> None:
    page.goto((site / "gpu/sm120.html").as_uri())
    assert page.locator(".failure figure").count() == 2
    rest = page.locator("details", has_text=f"{PASSED}: PASS, hardware")
    assert not rest.locator("figure").is_visible()
    page.locator(f"[id='{PASSED}'] + .more").get_by_role("link", name="Keep sets").click()
    assert rest.locator("figure").is_visible()
    assert rest.locator("figcaption").inner_text().startswith(HOSTILE)  # as text, not as an image
    page.goto((site / "gpu/sm80.html").as_uri())
    assert page.get_by_text("Keep sets").count() == 0


def test_the_page_of_a_run_has_no_keep_sets_of_a_pass(page: Page, site: Path) -> None:
    page.goto((site / "run/run-sm120-7.html").as_uri())
    assert page.get_by_role("link", name="Keep sets").count() == 1
    assert "Keep sets" not in (site / "run/run-sm90-7.html").read_text()


def _contrast(page: Page, path: str) -> float:
    """The contrast of a mark with its ground (WCAG 2.2)."""
    return page.evaluate(
        """path => {
          const canvas = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
          const light = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((one) => one / 255)
              .map((one) => (one <= 0.04045 ? one / 12.92 : ((one + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const mark = getComputedStyle(document.querySelector(path)).stroke;
          const both = [light(mark), light(getComputedStyle(document.body).backgroundColor)].sort();
          return (Math.max(...both) + 0.05) / (Math.min(...both) + 0.05);
        }""",
        path,
    )


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_mark_stands_out_and_every_picture_fits_a_narrow_window(page: Page, site: Path, scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": 390, "height": 844})
    for name in ("gpu/sm120", "check/p4.keep_set", "run/run-sm120-7"):
        page.goto((site / f"{name}.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") <= 390, name
        right = page.locator(".keep-set svg:visible").evaluate_all(
            "all => Math.max(...all.map(one => one.getBoundingClientRect().right))"
        )
        assert 0 < right <= 390, name
    for kind in (".kept", ".out", ".swapped.kept", ".swapped.out", ".bar"):
        assert _contrast(page, f".keep-set {kind}") > 3, kind


def test_the_terminal_names_the_swapped_tokens_of_a_failure() -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    print_report(assess(parse_target("sm120"), runs()[:1], nightly_checks()), console)
    told = console.file.getvalue().splitlines()
    assert [line for line in told if "tokens kept" in line] == [f"first round, {WORDS}"]


def test_explain_has_a_line_for_each_keep_set() -> None:
    console = Console(file=io.StringIO(), width=200, highlight=False)
    explain._print_results([FAILED], runs(), console)
    assert console.file.getvalue().splitlines()[-3:] == [
        f"Keep sets of the first round, {FAILED}: FAIL, hardware", f"  {SAME}", f"  {WORDS}",
    ]  # fmt: skip
