"""The issues of failed checks: opened, updated, closed or left alone, against a GitHub on loopback."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from ci.nightly import NightlyError
from ci.nightly.alert import Done, State, alert, tell
from ci.nightly.github import Api
from verify.tests.fake_github import GitHub, serving

NIGHT = "https://github.com/owner/suite/actions/runs/7"


@pytest.fixture
def github() -> Iterator[GitHub]:
    with serving() as one:
        yield one


def failing(*checks: str, kind: str = "newly failing", confirmed: bool = True, said: str = "wrong") -> dict[str, Any]:
    return {
        "family": "p4.a", "place": "sm90", "checks": [*checks], "kind": kind, "confirmed": confirmed, "run": "r",
        "commit": "0" * 40, "verdict": "FAIL", "told": f"{checks[0]}: FAIL: {said}", "repeat": "python -m pytest x",
    }  # fmt: skip


def passing(commit: int, *checks: str) -> dict[str, Any]:
    return {"sm90": {"commit": f"{commit:040x}", "checks": [*checks]}}


def night(github: GitHub, day: int, *failures: dict[str, Any], passed: dict[str, Any] | None = None) -> list[str]:
    """What is done in a night, in a word each."""
    facts = {"time_utc": f"2026-11-{day:02d}T05:00:00Z", "failing": [*failures], "passing": passed or {}}
    api = Api.of_environment() or Api(github.address, "owner/suite", "secret")
    return [one.what for one in alert(api, facts, NIGHT)]


def test_a_confirmed_failure_opens_one_issue_and_the_next_night_updates_it(github: GitHub) -> None:
    assert night(github, 1, failing("p4.a.x")) == ["opened"]
    assert night(github, 2, failing("p4.a.y", kind="still failing")) == ["updated"]
    (issue,) = github.issues
    assert (issue["title"], issue["labels"], issue["state"]) == ("[sm90] p4.a fails (FAIL)", ["nightly"], "open")
    state = State.of(issue["body"])
    assert state == State("p4.a", "sm90", "2026-11-01T05:00:00Z", "2026-11-02T05:00:00Z", "r", ["p4.a.x", "p4.a.y"])
    for words in ("since 2026-11-01, last 2026-11-02", "* `p4.a.x`", "python -m pytest x", NIGHT):
        assert words in issue["body"]


def test_a_failure_that_no_second_run_shows_opens_nothing(github: GitHub) -> None:
    assert night(github, 1, failing("p4.a.x", confirmed=False)) == ["unconfirmed"]
    assert github.issues == []


def test_it_is_closed_after_three_different_commits(github: GitHub) -> None:
    night(github, 1, failing("p4.a.x"))
    assert night(github, 2, passed=passing(2, "p4.a.x")) == ["left"]
    assert night(github, 3, passed=passing(2, "p4.a.x")) == ["left"]  # the same commit again proves nothing new
    assert night(github, 4, passed=passing(3, "p4.a.x")) == ["left"]
    assert night(github, 5, passed=passing(4, "p4.a.x")) == ["closed"]
    assert github.issues[0]["state"] == "closed"
    assert f"{2:012x}"[:12] not in github.comments[1][0] or len(github.comments[1]) == 1
    assert night(github, 6, passed=passing(5, "p4.a.x")) == []
    # and a new failure is a new issue
    assert night(github, 7, failing("p4.a.x") | {"run": "later"}) == ["opened"]
    assert len(github.issues) == 2


def test_a_failure_between_begins_the_count_again(github: GitHub) -> None:
    night(github, 1, failing("p4.a.x"))
    night(github, 2, passed=passing(2, "p4.a.x"))
    night(github, 3, failing("p4.a.x"))
    for number in (4, 5):
        assert night(github, number, passed=passing(number, "p4.a.x")) == ["left"]
    assert night(github, 6, passed=passing(6, "p4.a.x")) == ["closed"]


@pytest.mark.parametrize("passed", [{}, {"sm90": {"commit": "2" * 40, "checks": ["p4.a.x"]}}])
def test_a_check_that_did_not_run_closes_nothing(github: GitHub, passed: dict[str, Any]) -> None:
    night(github, 1, failing("p4.a.x", "p4.a.y"))
    for number in range(2, 8):
        assert night(github, number, passed=passed) == ["left"]
    assert github.issues[0]["state"] == "open"


def test_an_issue_that_a_person_closed_stays_closed_while_the_check_still_fails(github: GitHub) -> None:
    night(github, 1, failing("p4.a.x"))
    github.issues[0]["state"] = "closed"
    assert night(github, 2, failing("p4.a.x", kind="still failing")) == []
    assert night(github, 2, failing("p4.a.x")) == []  # the same run is told a second time
    assert night(github, 3, failing("p4.a.x") | {"run": "later"}) == ["opened"]


def test_other_issues_are_left_alone_and_all_pages_are_read(github: GitHub) -> None:
    for number in range(1, 150):
        github.issues.append({"number": number, "state": "open", "labels": ["nightly"], "body": "by a person"})
    night(github, 1, failing("p4.a.x"))
    assert night(github, 2, failing("p4.a.x")) == ["updated"]
    assert len(github.issues) == 150
    assert all(one["body"] == "by a person" for one in github.issues[:149])


def test_what_a_check_says_cannot_end_the_comment_that_holds_the_state(github: GitHub) -> None:
    night(github, 1, failing("p4.a.-->x", said="``` --> <!-- nightly {} -->"))
    assert night(github, 2, failing("p4.a.-->x")) == ["updated"]
    state = State.of(github.issues[0]["body"])
    assert state is not None
    assert state.checks == ["p4.a.-->x"]


def test_an_issue_that_github_refuses_does_not_stop_the_others(github: GitHub) -> None:
    night(github, 1, failing("p4.a.x"), failing("p4.b.x") | {"family": "p4.b"})
    github.locked.add(1)
    again = [failing("p4.a.x"), failing("p4.b.x") | {"family": "p4.b"}, failing("p4.c.x") | {"family": "p4.c"}]
    assert night(github, 2, *again) == ["refused", "updated", "opened"]


def test_a_long_message_is_cut(github: GitHub) -> None:
    assert night(github, 1, failing("p4.a.x", said="x" * 70_000)) == ["opened"]
    assert len(github.issues[0]["body"]) < 6000


@pytest.mark.parametrize("state", ['{"checks": null}', "{}", "[]", "{"])
def test_a_state_that_cannot_be_read_is_no_state(state: str) -> None:
    whole = '{"family": "a", "place": "b", "first": "c", "last": "d", "run": "e", "checks": null, "clean": []}'
    assert State.of(f"<!-- nightly {state} -->") is None
    assert State.of(f"<!-- nightly {whole} -->") is None


def test_a_webhook_is_told_what_was_opened_and_closed_and_nothing_else(github: GitHub) -> None:
    address = f"{github.address}/webhook"
    tell(address, [Done("updated", "a"), Done("left", "b"), Done("unconfirmed", "c")], NIGHT)
    assert github.messages == []
    tell(address, [Done("opened", "a"), Done("updated", "b"), Done("closed", "c")], NIGHT)
    assert github.messages == [f"opened: a\nclosed: c\n{NIGHT}"]
    with pytest.raises(NightlyError) as told:
        tell("http://127.0.0.1:9/secret", [Done("opened", "a")], NIGHT)
    assert "secret" not in str(told.value)
    with pytest.raises(NightlyError) as told:
        tell("secret", [Done("opened", "a")], NIGHT)
    assert "secret" not in str(told.value)
