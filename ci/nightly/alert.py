"""Opens, updates and closes the issues of HARD checks that fail at night. Standard library only.

There is one issue for each check and GPU, with the label ``nightly``. It is opened for a new failure that a second run
confirms, and closed after the check has passed at three different commits. The body of an issue ends with a hidden
comment that holds its state. An optional webhook (JSON with ``text``, as Slack takes it) gets a message about what was
opened and closed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any

from ci.nightly import NEW, NightlyError
from ci.nightly.github import Api, summarise

LABEL = "nightly"

#: At how many commits a check must have passed until its issue is closed.
CLEAN_COMMITS = 3

_STATE = re.compile(r"<!-- nightly (\{.*?\}) -->", re.DOTALL)
_LIMIT_S = 30

#: The most characters of a check's message in an issue; GitHub accepts 65,536 in a whole body.
_MOST_SAID = 4000

#: How many checks of a family are listed in an issue.
_LISTED = 20


@dataclass(slots=True)
class State:
    """What an issue remembers: its check and place, when it began and was last seen, the last run in which it failed,
    the checks that have failed, and the commits at which all of them passed since.
    """

    family: str
    place: str
    first: str
    last: str
    run: str
    checks: list[str]
    clean: list[str] = field(default_factory=list)

    @property
    def key(self) -> str:
        return f"{self.family} on {self.place}"

    @classmethod
    def of(cls, body: str) -> State | None:
        """The state in the body of an issue; None if there is none that can be read."""
        if (found := _STATE.search(body or "")) is None:
            return None
        try:
            state = cls(**json.loads(found[1]))
        except (ValueError, TypeError):
            return None
        words = (state.family, state.place, state.first, state.last, state.run)
        lists = all(isinstance(names, list) for names in (state.checks, state.clean))
        right = lists and all(isinstance(word, str) for word in (*words, *state.checks, *state.clean))
        return state if right else None

    def comment(self) -> str:
        # nothing in it may end the comment
        content = json.dumps(asdict(self)).replace(">", "\\u003e")
        return f"<!-- nightly {content} -->"


@dataclass(frozen=True, slots=True)
class Issue:
    number: int
    open: bool
    body: str
    state: State


@dataclass(frozen=True, slots=True)
class Done:
    """What was done about one check: ``opened``, ``updated``, ``closed``, ``left`` (still open), ``unconfirmed``,
    or ``refused`` by GitHub.
    """

    what: str
    told: str


def alert(api: Api, facts: Mapping[str, Any], night: str) -> list[Done]:
    """Bring the issues up to date with the facts of a night; ``night`` is the address of its page.

    What GitHub refuses for one issue is in the list, and the others go on. Raises NightlyError if the issues cannot be
    listed.
    """
    newest: dict[str, Issue] = {}
    for issue in _issues(api):
        known = newest.get(issue.state.key)
        if known is None or (issue.open, issue.number) > (known.open, known.number):
            newest[issue.state.key] = issue
    done, failing = [], set()
    for one in facts["failing"]:
        key = f"{one['family']} on {one['place']}"
        failing.add(key)
        done += _carried_out(key, partial(_failed, api, one, newest.get(key), facts["time_utc"], night))
    for key, issue in newest.items():
        if issue.open and key not in failing:
            passing = facts["passing"].get(issue.state.place)
            done += _carried_out(key, partial(_passed, api, issue, passing, night))
    return done


def _carried_out(key: str, step: Callable[[], list[Done]]) -> list[Done]:
    try:
        return step()
    except NightlyError as error:
        return [Done("refused", f"{key}: {error}")]


def _issues(api: Api) -> Iterable[Issue]:
    for one in api.pages("/issues", labels=LABEL, state="all"):
        if "pull_request" not in one and (state := State.of(one["body"])) is not None:
            yield Issue(one["number"], one["state"] == "open", one["body"], state)


def _failed(api: Api, one: Mapping[str, Any], issue: Issue | None, time_utc: str, night: str) -> list[Done]:
    told = f"{one['family']} on {one['place']}"
    if issue is not None and issue.open:
        state = issue.state
        state.last, state.run, state.clean = time_utc, one["run"], []
        state.checks = sorted({*state.checks, *one["checks"]})
        api.patch(f"/issues/{issue.number}", {"body": _body(one, state, night)})
        return [Done("updated", f"{told}: #{issue.number}, since {state.first[:10]}")]
    if not one["confirmed"]:
        return [Done("unconfirmed", f"{told}: no second run shows it ({one['told'][:_MOST_SAID]})")]
    by_hand = issue is not None and len(issue.state.clean) < CLEAN_COMMITS
    known = issue is not None and issue.state.run == one["run"]  # alert runs again for one night
    if known or (one["kind"] != NEW and by_hand):
        return []
    state = State(one["family"], one["place"], time_utc, time_utc, one["run"], sorted(one["checks"]))
    title = f"[{one['place']}] {one['family']} fails ({one['verdict']})"
    made = api.post("/issues", {"title": title, "body": _body(one, state, night), "labels": [LABEL]})
    return [Done("opened", f"{title}: {one['told'][:_MOST_SAID]} (#{made['number']})")]


def _passed(api: Api, issue: Issue, passing: Mapping[str, Any] | None, night: str) -> list[Done]:
    state = issue.state
    if passing is None or not {*state.checks} <= {*passing["checks"]}:
        return [Done("left", f"{state.key}: #{issue.number} stays open, because not all of its checks ran")]
    if passing["commit"] not in state.clean:
        state.clean.append(passing["commit"])
    body = _STATE.sub(lambda _: state.comment(), issue.body)
    if len(state.clean) < CLEAN_COMMITS:
        api.patch(f"/issues/{issue.number}", {"body": body})
        commits = f"{len(state.clean)} of {CLEAN_COMMITS} commits"
        return [Done("left", f"{state.key}: #{issue.number} passed at {commits}")]
    commits = ", ".join(commit[:12] for commit in state.clean)
    api.post(f"/issues/{issue.number}/comments", {"body": f"All of it passed at {commits}, last in {night}."})
    api.patch(f"/issues/{issue.number}", {"body": body, "state": "closed", "state_reason": "completed"})
    return [Done("closed", f"{state.key}: #{issue.number} passed at {CLEAN_COMMITS} commits")]


def _body(one: Mapping[str, Any], state: State, night: str) -> str:
    listed = [f"* `{name}`" for name in state.checks[:_LISTED]]
    if len(state.checks) > _LISTED:
        listed.append(f"* and {len(state.checks) - _LISTED} more")
    # what a check says ends neither the block nor the comment with the state
    said = one["told"][:_MOST_SAID].replace("```", "'''").replace("<!--", "<! --")
    return "\n".join(
        [
            f"`{one['family']}` is HARD and fails on {one['place']} since {state.first[:10]}, last {state.last[:10]}.",
            "",
            *("```", said, "```"),
            "",
            f"Repeat it on such a GPU: `{one['repeat']}`",
            "",
            f"Run {one['run']} at commit {one['commit']}; the night: {night}",
            "",
            "Checks that failed since then:",
            *listed,
            "",
            f"This issue is closed when all of them have passed at {CLEAN_COMMITS} commits.",
            state.comment(),
        ]
    )


def tell(webhook: str, done: Iterable[Done], night: str) -> None:
    """Post what was opened and closed to a webhook; nothing if nothing was. Raises NightlyError."""
    lines = [f"{one.what}: {one.told}" for one in done if one.what in ("opened", "closed")]
    if not lines:
        return
    text = "\n".join([*lines, night])
    content, kind = json.dumps({"text": text}).encode(), {"Content-Type": "application/json"}
    try:
        request = urllib.request.Request(webhook, content, kind, method="POST")
        with urllib.request.urlopen(request, timeout=_LIMIT_S):
            return
    except (OSError, HTTPException, ValueError) as error:
        # without the error itself, which may have the address, which is secret
        raise NightlyError(f"the webhook cannot be reached ({type(error).__name__})") from None


def main(arguments: Sequence[str] | None = None) -> int:
    """Alert about the night in ``alerts.json``; 3 if GitHub or the webhook cannot be reached."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("facts", type=Path, help="alerts.json")
    parser.add_argument("--rehearsal", action="store_true", help="take the facts of a rehearsal, and no others")
    chosen = parser.parse_args(arguments)
    try:
        facts = json.loads(chosen.facts.read_text("utf-8"))
        if facts["rehearsal"] != chosen.rehearsal:
            raise NightlyError(f"{chosen.facts} is {'made up for a rehearsal' if facts['rehearsal'] else 'real'}; "
                               f"{'add' if facts['rehearsal'] else 'drop'} --rehearsal")  # fmt: skip
        if (api := Api.of_environment()) is None:
            raise NightlyError("GITHUB_TOKEN and GITHUB_REPOSITORY are not set; run this in a workflow")
        server = os.environ.get("GITHUB_SERVER_URL", "https://github.com")
        night = f"{server}/{api.repository}/actions/runs/{os.environ.get('GITHUB_RUN_ID', '')}"
        done = alert(api, facts, night)
        lines = [f"* {one.what}: {one.told}" for one in done]
        summarise("\n".join(["## Alerts", "", *(lines or ["* none"])]))
        if webhook := os.environ.get("NIGHTLY_WEBHOOK"):
            tell(webhook, done, night)
        if refused := [one.told for one in done if one.what == "refused"]:
            raise NightlyError(f"{len(refused)} of {len(done)} issues could not be changed; the first is {refused[0]}")
    except (NightlyError, OSError, ValueError, KeyError) as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
