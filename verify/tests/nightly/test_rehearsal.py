"""Seven made-up nights through the nightly workflow's own steps: alerts on their nights, and the words of the pages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ci.nightly.alert import State
from verify.tests.rehearsal import CRASHED, FIRST, FLAKY, ONCE, SECOND, Rehearsal, rehearse
from verify.tests.samples import REPOSITORY

if TYPE_CHECKING:
    from playwright.sync_api import Page


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rehearsal]:
    yield from rehearse(tmp_path_factory.mktemp("rehearsal"))


def test_every_night_ends_with_its_exit_code(nights: Rehearsal) -> None:
    # the first two are green; later something is worse than in the last green run, or did not run
    assert [one.collected for one in nights.ended] == [0, 0, 1, 1, 1, 1, 1], nights.ended[-1].printed
    assert [one.alerted for one in nights.ended] == [0] * 7


def test_each_alert_falls_on_its_night(nights: Rehearsal) -> None:
    def done(number: int) -> list[str]:
        alerts = nights.ended[number - 1].summary.partition("## Alerts\n")[2]
        return [line.removeprefix("* ") for line in alerts.splitlines() if line]

    assert done(1) == done(2) == ["none"]
    (night3,) = done(3)
    assert night3.startswith(f"unconfirmed: p4.scale on sm90: no second run shows it ({ONCE}: FAIL")
    (night4,) = done(4)
    assert night4.startswith(f"opened: [sm80] p4.offsets fails (FAIL): {FIRST}: FAIL: error: measured 2.5e-06")
    assert done(5) == ["left: p4.offsets on sm80: #1 passed at 1 of 3 commits"]
    assert done(6) == ["left: p4.offsets on sm80: #1 passed at 2 of 3 commits"]
    assert [line.partition(": ")[0] for line in done(7)] == ["opened", "opened", "closed"]
    titles = [f"{one['state']} {one['title']}" for one in nights.github.issues]
    assert titles == [
        "closed [sm80] p4.offsets fails (FAIL)",
        f"open [sm100] {CRASHED} fails (CRASH)",
        "open [sm120] p4.permute fails (FAIL)",
    ]
    state = State.of(nights.github.issues[1]["body"])
    assert state is not None
    assert (len(state.checks), state.first) == (12, "2026-11-07T05:00:00Z")
    assert "0000004" not in nights.github.comments[1][0]  # the commit of the failure is not one of the three
    assert len(nights.github.messages) == 2  # of the nights on which something was opened or closed


def test_the_summary_says_why_a_gpu_has_no_record(nights: Rehearsal) -> None:
    told = [one.summary.partition("\n\n")[2].partition("\n\n")[0] for one in nights.ended]
    assert told[4] == (
        "* sm100: INVALID on 2026-11-05: the record of the job was refused "
        "(20261105T031700Z-sm90-beef/record.json: it is of sm90, and the job was for sm100)"
    )
    assert told[5] == (
        "* sm90: NO_RECORD on 2026-11-06: the job began and left no record "
        "(the job ended with failure and uploaded nothing)"
    )
    assert told[6] == (
        "* sm121: NO_RUNNER on 2026-11-07: no runner took the job (its job did not begin within 60 minutes)"
    )
    assert f"::error title=sm120 p4.permute::{SECOND}: FAIL" in nights.ended[6].printed


def test_the_last_night_names_what_fails_newly_what_crashes_and_what_did_not_run(nights: Rehearsal) -> None:
    found = nights.command("verify", "diff", "--since", "last-green", "--records", str(nights.nights), "--rehearsal")
    assert found.returncode == 1
    assert found.stdout.splitlines()[-4:] == [
        "sm100: 12 newly failing",
        "sm120: 1 newly failing",
        "sm121: did not run",
        "6 targets: 3 with HARD checks that got worse or did not run, 3 without a HARD check that got worse.",
    ]
    assert f"SOFT {FLAKY}" in found.stdout.partition("flaky (1)")[2]


@pytest.mark.parametrize("words", [["report"], ["history"], ["diff", "--since", "last-green"], ["explain", "p4.scale"]])
def test_made_up_records_are_refused_without_the_option(nights: Rehearsal, words: list[str]) -> None:
    found = nights.command("verify", *words, "--records", str(nights.nights))
    said = found.stdout + found.stderr
    assert "PASS" not in said
    assert "is made up for a rehearsal, shown with --rehearsal" in said or " records cannot be read" in said


@pytest.mark.parametrize("form", ["junit", "badge"])
def test_a_rehearsal_is_not_exported_as_evidence(nights: Rehearsal, tmp_path: Path, form: str) -> None:
    words = ["report", "--records", str(nights.nights), "--rehearsal", "--format", form, "--out", str(tmp_path / "out")]
    found = nights.command("verify", *words)
    assert (found.returncode, "is read as evidence, and a rehearsal is none" in found.stderr) == (3, True)
    assert not (tmp_path / "out").exists()


def test_every_report_of_a_rehearsal_says_so(nights: Rehearsal) -> None:
    for form in ("terminal", "markdown", "json"):
        words = ["report", "--gpu", "sm80", "--records", str(nights.nights), "--rehearsal", "--format", form]
        assert "REHEARSAL, no evidence" in nights.command("verify", *words).stdout, form


def test_real_records_are_refused_with_it(nights: Rehearsal, tmp_path: Path) -> None:
    made = next(nights.nights.glob("*-sm80-beef/record.json"))
    assert nights.command("verify", "check", "--rehearsal", str(made)).returncode == 0
    refused = nights.command("verify", "check", str(made))
    assert refused.returncode == 1
    assert "is made up for a rehearsal, shown with --rehearsal" in refused.stdout
    content = json.loads(made.read_text())
    real = tmp_path / made.parent.name / "record.json"
    real.parent.mkdir()
    real.write_text(json.dumps(content | {"rehearsal": False}))
    assert nights.command("verify", "check", str(real)).returncode == 0
    found = nights.command("verify", "check", "--rehearsal", str(real))
    assert (found.returncode, "is real; drop --rehearsal" in found.stdout) == (1, True)
    alerted = nights.command("ci.nightly.alert", str(nights.folder / "out" / "alerts.json"))
    assert (alerted.returncode, "is made up for a rehearsal" in alerted.stderr) == (3, True)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_first_screen_says_what_is_red_what_is_new_and_what_did_not_run(
    page: Page, nights: Rehearsal, width: int
) -> None:
    page.set_viewport_size({"width": width, "height": 900})
    page.goto((nights.site / "index.html").as_uri())
    assert page.get_by_role("note").text_content() == (
        "A rehearsal: every record on these pages is made up and proves nothing."
    )
    assert page.locator("h1").text_content() == (
        "REHEARSAL, no evidence: 3 of 12 GPUs verified on hardware (sm80, sm89 and sm90); sm100 and sm120 failed; "
        "sm121 (NO_RUNNER) left no record last night; SOFT checks fail on sm89 (1)."
    )
    box = page.locator(".news")
    place = box.bounding_box()
    assert place is not None
    assert place["y"] < 900
    told = {
        heading.text_content(): [" ".join(line.split()) for line in content.locator("p").all_text_contents()]
        for heading, content in zip(box.locator("dt").all(), box.locator("dd").all(), strict=True)
    }
    assert told["Red"] == [
        "sm100 p6.keep_set: 12 checks CRASH",
        f"sm120 {SECOND}: FAIL",
        f"sm89 {FLAKY}: SOFT FAIL",
    ]
    assert told["New since the last green run"] == [
        "sm100 p6.keep_set: 12 checks PASS hardware, now CRASH hardware (last green run 2026-11-06)",
        f"sm120 {SECOND}: PASS hardware, now FAIL hardware (last green run 2026-11-06)",
    ]
    assert told["Did not run"] == [
        "sm121 NO_RUNNER on 2026-11-07: no runner took the job (its job did not begin within 60 minutes)"
    ]
    strips = page.locator(".matrix thead .strip")
    told_nights = [strip.get_attribute("aria-label") or "" for strip in strips.all()]
    assert any(one.startswith("sm121") and one.endswith("2026-11-07: no runner took the job") for one in told_nights)
    assert any("2026-11-05: the record of the job was refused" in one for one in told_nights if one.startswith("sm100"))


def test_a_night_that_cannot_ask_github_is_not_collected(nights: Rehearsal, tmp_path: Path) -> None:
    nights.github.refuses = True
    try:
        environment = os.environ | nights.github.environment | {"GITHUB_RUN_ID": "1007", "ROWS": "[]"}
        places = [f"--artifacts={tmp_path / 'artifacts'}", f"--nights={tmp_path / 'nights'}", f"--out={tmp_path}"]
        found = subprocess.run(
            [sys.executable, "-m", "ci.nightly.collect", "--rehearsal", *places],
            cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=60,
        )  # fmt: skip
    finally:
        nights.github.refuses = False
    assert found.returncode == 3
    assert "nightly: GET /actions/artifacts" in found.stderr
    assert "GitHub answers 503" in found.stderr
    assert len(found.stderr.splitlines()) == 1
