"""How the resources of two records' builds are compared: no stack, and no growth that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable

from verify.builds import Build, Compilation, Resources
from verify.record import Measurement, Record
from verify.verdict import newest_first

#: How many times the registers of the last record a build may need.
GROWTH_ALLOWED = 1.1


def stack(now: Compilation, last: Compilation | None) -> list[Measurement]:
    """The stack that each build needs; none is allowed, because a stack is what did not fit into registers."""
    return [
        Measurement(name="stack", measured=found.stack_bytes, allowed=0, unit="bytes", where=_where(now, build))
        for build, found in _built(now)
    ]


def registers(now: Compilation, last: Compilation | None) -> list[Measurement]:
    """The registers of each build over those of the same kernel and variant in ``last``; empty where there is none."""
    before = {} if last is None else {(one.kernel, name): used for one, used in _built(last) for name in one.variants}
    return [
        Measurement(
            name="registers over the last record's",
            measured=found.registers / earlier.registers,
            allowed=GROWTH_ALLOWED,
            where=f"{_where(now, build)}: {found.registers}, {earlier.registers} in the last record "
            f"(triton {now.triton}, then {last.triton})",
        )
        for build, found in _built(now)
        if (earlier := before.get((build.kernel, build.variants[0])))
    ]


def last_of(records: Iterable[Record], target: str, source: str) -> Compilation | None:
    """What the newest record of ``target`` that has builds of the same subject built; None where there is none.

    ``source`` is the subject as a record names it: another implementation's registers are no measure.
    """
    mine = (record for record in records if record.target == target and record.subject.source == source)
    return next((one.compilation for one in newest_first(mine) if one.compilation and one.compilation.builds), None)


def _built(compilation: Compilation) -> list[tuple[Build, Resources]]:
    return [(build, build.resources) for build in compilation.builds if build.resources is not None]


def _where(compilation: Compilation, build: Build) -> str:
    return f"{build.kernel} on sm{compilation.sm}, {build.variants[0]}"
