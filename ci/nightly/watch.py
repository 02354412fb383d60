"""Cancels the jobs that no runner takes in time. Standard library only.

GitHub cancels whole runs only. So when jobs have waited too long, this waits until every other job has ended, and then
cancels the run: what is left to cancel are the waiting jobs, and ``collect`` runs even then.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ci.nightly import NightlyError
from ci.nightly.github import Api

_PAUSE_S = 60.0

#: How many times in a row GitHub may not answer.
_PATIENCE = 30

#: The jobs that nobody waits for: this one, and those that come after it.
_NOT_AWAITED = ("cancel jobs without a runner", "collect", "alert", "pages")


def watch(
    jobs: Callable[[], Iterable[Mapping[str, Any]]],
    limits_min: Mapping[str, int],
    cancel: Callable[[], object],
    now: Callable[[], float] = time.monotonic,
    pause: Callable[[float], object] = time.sleep,
) -> list[str]:
    """Wait until each job named in ``limits_min`` has begun, or ``cancel`` those that did not within their limit.

    Returns the names of the jobs that no runner took. Raises NightlyError if GitHub does not answer for half an hour.
    """
    begun, silent = now(), 0
    while True:
        try:
            states = {job["name"]: job["status"] for job in jobs() if job["name"] not in _NOT_AWAITED}
            silent = 0
        except NightlyError:
            silent += 1
            if silent > _PATIENCE:
                raise
            pause(_PAUSE_S)
            continue
        waiting = {name for name in limits_min if states.get(name, "queued") not in ("in_progress", "completed")}
        late = {name for name in waiting if now() - begun > 60 * limits_min[name]}
        if late and late == waiting and all(state == "completed" for name, state in states.items() if name not in late):
            cancel()
            return sorted(late)
        if not waiting:
            return []
        pause(_PAUSE_S)


def main() -> int:
    """Watch the jobs of the rows in PLAN; 0, also if jobs were cancelled, 3 if GitHub cannot be asked."""
    limits_min = {row["name"]: row["start_within_min"] for row in json.loads(os.environ["PLAN"])}
    run = os.environ["GITHUB_RUN_ID"]
    try:
        if (api := Api.of_environment()) is None:
            raise NightlyError("GITHUB_TOKEN and GITHUB_REPOSITORY are not set; run this in a workflow")
        attempt = f"/actions/runs/{run}/attempts/{os.environ.get('GITHUB_RUN_ATTEMPT', '1')}/jobs"
        late = watch(lambda: api.pages(attempt, "jobs"), limits_min, lambda: api.post(f"/actions/runs/{run}/cancel"))
    except NightlyError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 3
    print(f"cancelled, because no runner took them: {', '.join(late)}" if late else "every job was taken by a runner")
    return 0


if __name__ == "__main__":
    sys.exit(main())
