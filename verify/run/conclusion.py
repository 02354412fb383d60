"""What was known to fail before a run, and what that does to the end of the run."""

from __future__ import annotations

from verify.checks import catalogue
from verify.errors import Exit
from verify.record.deviations import told_after, without_failure
from verify.record.known_failures import FILE, outdated, told_waived
from verify.record.schema import Record
from verify.run.manifest import Manifest


def concluded(record: Record, manifest: Manifest, code: int) -> tuple[int, list[str]]:
    """The exit code of a run that would end with ``code``, and its last sentences on what was known to fail.

    If nothing failed, the run ends with 3 where an entry must be changed: one that matches nothing, one that has
    expired, or a known failure that passes.
    """
    alone = code == Exit.OK
    needless = without_failure(manifest.deviations, record.results, list(catalogue()))
    known = (told_after(record.results, alone=alone), told_waived(record.results, alone=alone))
    changed = [*outdated(manifest.known_failures, record.results, manifest.day, on_target=record.on_target)]
    if alone and changed:
        changed.append(f"nothing failed, but the run cannot end with 0 until {FILE} is changed")
    red = (needless and code in (Exit.OK, Exit.SOFT)) or (changed and alone)
    return (Exit.CANNOT if red else code), [*filter(None, known), *needless, *changed]
