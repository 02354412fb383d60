"""Runs the probe of every known failure, so that none outlives its cause.

A probe is the command in ``ci/known_failures.toml`` that shows whether a failure is fixed: without any known failure,
it ends with 0 if it is, and with 1 if not. The workflow asks for the list first (``plan``: the entries, each with the
labels of a runner that has its GPU), and then probes each on its own (``probe``, with the entry in ENTRY).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

from ci.nightly import NightlyError
from ci.nightly.github import output
from ci.nightly.gpus import Gpu, read_gpus
from verify.report.workflow import annotation

FILE = Path("ci/known_failures.toml")

#: The runner of a probe that needs no GPU.
_HOSTED = ["ubuntu-24.04"]

#: How many days before its end an entry is announced.
_SOON = timedelta(days=14)

_NEEDED = ("checks", "probe", "owner", "issue", "expires")

_LIMIT_S = 3 * 3600


def entries(content: str, gpus: Sequence[Gpu]) -> list[dict[str, Any]]:
    """Every known failure with its number, the labels of its runner and what is asked of it.

    Raises NightlyError if an entry is for a GPU that no runner has.
    """
    try:
        known = tomllib.loads(content).get("known_failure", [])
    except tomllib.TOMLDecodeError as error:
        raise NightlyError(f"{FILE} is not TOML ({error})") from error
    found = []
    for number, entry in enumerate(known, start=1):
        if missing := [name for name in _NEEDED if name not in entry]:
            raise NightlyError(f"{FILE}: entry {number} has no {missing[0]}")
        if not isinstance(entry["expires"], date):
            raise NightlyError(f"{FILE}: expires of entry {number} is {entry['expires']!r}; give a date without quotes")
        sms = entry.get("when", {}).get("sm", [])
        runner = next((gpu for gpu in gpus if gpu.sm in sms), None)
        if sms and runner is None:
            listed = ", ".join(f"sm{sm}" for sm in sms)
            raise NightlyError(f"{FILE}: entry {number} is for {listed}, and ci/gpus.toml has no runner with one")
        labels = list(runner.labels) if runner else _HOSTED
        expires = entry["expires"].isoformat()
        found.append({"number": number, "labels": labels, "checks": entry["checks"], "probe": entry["probe"],
                      "owner": entry["owner"], "issue": entry["issue"], "expires": expires})  # fmt: skip
    return found


def judge(entry: Mapping[str, Any], fixed: bool, today: date) -> str:
    """What must be done about an entry, in a sentence; empty if nothing."""
    name = f"known failure {entry['number']} ({', '.join(entry['checks'])}, {entry['owner']}, {entry['issue']})"
    if fixed:
        return f"{name} is fixed: its probe passes; remove it from {FILE}"
    left = date.fromisoformat(entry["expires"]) - today
    if left < timedelta(0):
        return f"{name} expired on {entry['expires']} and is not fixed; fix it, or agree on a later date"
    if left < _SOON:
        return f"{name} expires in {left.days} days and is not fixed"
    return ""


def probed(command: str) -> int:
    """The exit code of a probe. While it runs no failure is known, or it would not count as one."""
    kept = FILE.read_bytes()
    try:
        FILE.write_bytes(b"")
        return subprocess.run(shlex.split(command), timeout=_LIMIT_S).returncode
    finally:
        FILE.write_bytes(kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """``plan`` writes the output ``entries``; ``probe`` ends with 1 if something must be done; 3 on a wrong call."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if words not in (["plan"], ["probe"]):
        print(f"nightly: {' '.join(words)!r} is neither plan nor probe", file=sys.stderr)
        return 3
    try:
        if words == ["plan"]:
            content = FILE.read_text("utf-8") if FILE.exists() else ""
            output(entries=json.dumps(entries(content, read_gpus())))
            return 0
        entry = json.loads(os.environ["ENTRY"])
        code = probed(entry["probe"])
    except (NightlyError, OSError, subprocess.TimeoutExpired, KeyError) as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 3
    if code not in (0, 1):
        print(f"nightly: the probe {entry['probe']!r} ends with {code}, which shows nothing; mend it", file=sys.stderr)
        return 3
    if told := judge(entry, code == 0, datetime.now(UTC).date()):
        print(annotation("error", "known failure", told))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
