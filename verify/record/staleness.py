"""When a result no longer counts, and which records of a target are merged."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from verify.architectures import Target
from verify.record.archive import newest_first
from verify.record.grounds import BUNDLED, SUBJECT, Checkout
from verify.record.schema import EVIDENCE, CheckResult, Record, SubjectInfo

#: Why a result of an older record does not count.
_NAMELESS = "recorded before results listed the files they rest on"


def same_subject(one: SubjectInfo, other: SubjectInfo) -> bool:
    """Whether two records are about one subject: the same content in any place, or another version in one place."""
    return one.name == other.name and (one.content_sha256 == other.content_sha256 or one.source == other.source)


def stale_because(record: Record, newest: Record) -> str | None:
    """How ``record`` differs from the ``newest`` one, such as ``another torch``; None where both can be merged.

    A run, a simulation and a compilation ahead of time must be of one subject, but need not be of one machine.
    """
    ours, theirs = record.environment, newest.environment
    if not same_subject(record.subject, newest.subject):
        return "another subject"
    if record.kind != newest.kind:
        return None
    pairs: dict[str, tuple[object, object]] = {"triton": (ours.triton, theirs.triton)}
    if record.kind != "compiled":
        simulators = [one.simulation and one.simulation.simulator_sha256 for one in (record, newest)]
        pairs |= {
            "torch": (ours.torch, theirs.torch),
            "driver": (ours.gpu and ours.gpu.driver, theirs.gpu and theirs.gpu.driver),
            "GPU": (ours.gpu and ours.gpu.uuid_sha256, theirs.gpu and theirs.gpu.uuid_sha256),
            "simulator": (simulators[0], simulators[1]),
        }
    return next((f"another {name}" for name, (one, other) in pairs.items() if one != other), None)


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which results count: those whose files are unchanged.

    Files of the suite, and of the subject of this checkout, are compared with ``checkout``; files of another subject
    with the newest of ``records`` about it. ``records`` are newest first. Without a checkout every result counts.
    """

    checkout: Checkout | None
    records: Sequence[Record]
    _known: dict[int, list[str]] = field(default_factory=dict, init=False, repr=False)

    def because(self, record: Record, result: CheckResult) -> str:
        """Why a result does not count, such as ``verify/judge/oracle.py changed``; empty if it does."""
        if self.checkout is None:
            return ""
        return _NAMELESS if result.rests_on is None else self.lists(record)[result.rests_on]

    def counts(self, record: Record) -> bool:
        """Whether any result of ``record`` counts."""
        if self.checkout is None or (record.compilation is not None and record.compilation.gap):
            return True
        return not all(self.lists(record))

    def why_stale(self, record: Record, used: Sequence[Record]) -> str | None:
        if self.counts(record):
            return why_not_merged(record, used)
        return next(iter(self.lists(record)), _NAMELESS)

    def lists(self, record: Record) -> list[str]:
        """For each list in ``record.rests_on`` the first file that changed, and how; empty if none did."""
        if id(record) not in self._known:
            newest = next((one for one in self.records if same_subject(one.subject, record.subject)), record)
            changed = {name: self._changed(record, name, digest, newest) for name, digest in record.sources.items()}
            self._known[id(record)] = [
                next((changed[name] for name in names if changed[name]), "") for names in record.rests_on
            ]
        return self._known[id(record)]

    def _changed(self, record: Record, name: str, digest: str, newest: Record) -> str:
        if not name.startswith(f"{SUBJECT}/") or record.subject.source == BUNDLED:
            assert self.checkout is not None  # without one every result counts and no file is compared
            now = self.checkout.sha256(name)
            return "" if now == digest else f"{name} {'changed' if now else 'is gone'}"
        if newest.subject.content_sha256 == record.subject.content_sha256 or newest.sources.get(name) == digest:
            return ""
        return f"{name} changed" if name in newest.sources else "the subject changed"


def why_not_merged(record: Record, records: Sequence[Record]) -> str | None:
    """``stale_because`` against the newest run, and against the newest record of the same kind that merges with it.

    Without any run, the newest simulation takes its place; without that, the newest compilation.
    """
    anchor = min(records, key=lambda one: EVIDENCE.index(one.kind), default=record)
    fitting = (one for one in records if stale_because(one, anchor) is None)
    same_kind = next((one for one in fitting if one.kind == record.kind), record)
    return next((why for one in (anchor, same_kind) if (why := stale_because(record, one))), None)


def merged(
    target: Target, records: Iterable[Record], checkout: Checkout | None = None
) -> tuple[list[Record], list[Record], Comparison]:
    """The records of ``target`` that can be merged, and its stale ones, both newest first; and the comparison that
    decides which of their results count.
    """
    own = newest_first(record for record in records if record.target == target.target)
    comparison = Comparison(checkout, own)
    current = [record for record in own if comparison.counts(record)]
    used = [record for record in current if why_not_merged(record, current) is None]
    kept = {id(record) for record in used}
    return used, [record for record in own if id(record) not in kept], comparison
