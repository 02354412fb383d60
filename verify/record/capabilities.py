"""What a subject offers, in words, from the results of its checks."""

from __future__ import annotations

import re
from collections.abc import Iterable

from verify.checks import CAPABILITIES
from verify.record.schema import BLOCKING, PATCH, CheckResult, SubjectInfo, Verdict

#: The accuracy class in the place of a measurement.
_CLASS = re.compile(r"\bclass ([ABC]), \S+ units of ")


def by_capability(found: Iterable[tuple[str, CheckResult]], subject: SubjectInfo) -> dict[str, str]:
    """What the subject offers, by capability: how many of its checks passed, and what it does not offer."""
    by_name: dict[str, list[CheckResult]] = {}
    for name, result in found:
        by_name.setdefault(name, []).append(result)
    told = {}
    for name, words in CAPABILITIES.items():
        results = by_name.get(name, [])
        if name in ("environment", "latency") or not results:
            continue
        judged = [one for one in results if one.verdict is Verdict.PASS or one.verdict in BLOCKING]
        refused = dict.fromkeys(one.aspect for one in results if one.verdict is Verdict.REFUSED and one.aspect)
        absent = [one for one in results if one.verdict is Verdict.ABSENT]
        if not judged:
            blocked = any(one.verdict is Verdict.BLOCKED for one in results)
            silent = all(one.message.startswith("not implemented") for one in absent)
            if absent:
                told[words] = "not implemented" if silent else "not offered"
            elif blocked:
                told[words] = "blocked"
            continue
        passed = sum(one.verdict is Verdict.PASS for one in judged)
        classes = {match[1] for one in judged for m in one.measurements if (match := _CLASS.search(m.where))}
        parts = [*([f"class {max(classes)}"] if classes else []), f"{passed} of {len(judged)}"]
        within = _narrowed(subject, name)
        told[words] = f"{', '.join(parts)}{within}" + "".join(f"; {aspect}: refused" for aspect in refused)
    return told


def _narrowed(subject: SubjectInfo, capability: str) -> str:
    """The values that the author says this capability takes, in brackets; empty without any."""
    if capability not in ("triton", "pytorch", "live_model"):
        return ""
    parts = []
    for name, values in subject.narrowed.items():
        if name.startswith(PATCH) != (capability == "live_model"):
            continue
        name = name.removeprefix(PATCH)
        fixed = f"{values[0].count(',') + 1} fixed offsets" if len(values) == 1 else f"{len(values)} sets of offsets"
        parts.append(fixed if name == "offsets" else f"{name} {', '.join(values)}")
    return f" ({'; '.join(parts)})" if parts else ""
