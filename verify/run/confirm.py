"""``run --confirm RUN``: the HARD failures of an earlier run, tried once more in a run with a record of its own.

No check is retried: the failure stays as it is, and the second record counts for no verdict. It only tells a failure
that comes again, which is worth waking somebody up for, from one that does not.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from verify.errors import ConfigurationError
from verify.record.schema import Verdict
from verify.run import events
from verify.run.manifest import Selected
from verify.run.request import RunRequest

#: What a run can confirm: a failure of the subject, and not of the suite or the machine.
CONFIRMED = frozenset({Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT})


def confirming(request: RunRequest, run_dir: Path) -> tuple[RunRequest, tuple[Selected, ...]]:
    """The ``request`` with the options of the run in ``run_dir``, and the checks that are tried again.

    Raises ConfigurationError if no HARD check failed in it.
    """
    manifest, results = events.read_manifest(run_dir), events.read_results(run_dir)
    failed = {one.id for one in results.values() if one.gate == "hard" and one.verdict in CONFIRMED}
    chosen = tuple(check for check in manifest.selected if check.id in failed)
    if not chosen:
        raise ConfigurationError(f"run {manifest.run_id} has no HARD failure to confirm; look at it: verify report")
    kept = {name: getattr(manifest, name) for name in ("device", "subject", "model", "seed")}
    return replace(request, **kept, profile=manifest.subject_info.profile, confirm=manifest.run_id), chosen
