"""Which GPUs are verified tonight: the rows of ``ci/gpus.toml`` that have a runner. Standard library only.

Writes the outputs ``matrix`` (the rows that get a job) and ``rows`` (all of them, each with ``why`` it has none).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

from ci.nightly import NightlyError
from ci.nightly.github import Api, output
from ci.nightly.gpus import Gpu, read_gpus


def plan(gpus: Sequence[Gpu], asked: str, runners: Iterable[Iterable[str]] | None, listed: str) -> list[dict[str, Any]]:
    """Every row as JSON has it, with its ``options`` and ``why`` it gets no job (empty: it gets one).

    ``asked`` is the name of a row, or ``all``. ``runners`` are the labels of each runner that is online, None if they
    are not known; then ``listed``, a JSON list of rows that have one, decides, and if it is empty every row has one.
    Raises NightlyError for a row that does not exist.
    """
    names = [gpu.name for gpu in gpus]
    if asked not in ("all", *names):
        raise NightlyError(f"ci/gpus.toml has no row {asked!r}; it has {', '.join(names)}")
    have = _listed(listed, names) if runners is None else None
    online = [set(labels) for labels in runners or ()]
    found = []
    for gpu in gpus:
        if asked not in ("all", gpu.name):
            continue
        why = ""
        if have is not None and gpu.name not in have:
            why = "the repository variable GPU_RUNNERS does not list it"
        if runners is not None and not any(set(gpu.labels) <= labels for labels in online):
            why = f"no runner with the labels {', '.join(gpu.labels)} is online"
        found.append({**asdict(gpu), "target": gpu.target, "options": gpu.options, "why": why})
    return found


def _listed(text: str, names: Sequence[str]) -> list[str]:
    if not text:
        return list(names)
    try:
        found = json.loads(text)
    except ValueError as error:
        raise NightlyError(f"the repository variable GPU_RUNNERS is not JSON ({error})") from error
    if not isinstance(found, list) or (unknown := [name for name in found if name not in names]):
        wrong = unknown[0] if isinstance(found, list) else found
        raise NightlyError(f"the repository variable GPU_RUNNERS has {wrong!r}; give a JSON list of {', '.join(names)}")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the plan; 3 if it cannot be made, or if no row has a runner (the plan is written all the same)."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gpu", default="all", help="only this row (default: all)")
    chosen = parser.parse_args(arguments)
    try:
        api = Api.of_environment("RUNNERS_TOKEN")
        runners = None
        if api is not None:
            known = api.pages("/actions/runners", "runners")
            runners = [[label["name"] for label in one["labels"]] for one in known if one["status"] == "online"]
        rows = plan(read_gpus(), chosen.gpu, runners, os.environ.get("GPU_RUNNERS", ""))
    except NightlyError as error:
        print(f"nightly: {error}", file=sys.stderr)
        return 3
    jobs = [row for row in rows if not row["why"]]
    output(matrix=json.dumps(jobs), rows=json.dumps(rows))
    for row in rows:
        print(f"{row['name']}: {row['why'] or 'gets a job'}", file=sys.stderr)
    if not jobs:
        print(f"nightly: none of {len(rows)} rows has a runner, so no GPU is verified; start one", file=sys.stderr)
        return 3
    return 0


if __name__ == "__main__":
    sys.exit(main())
