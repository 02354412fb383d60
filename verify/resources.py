"""How the resources of two records' builds are compared: no stack, and no growth that nobody asked for."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from verify.archive import load
from verify.builds import Build, Compilation, Resources
from verify.record import Measurement, Record
from verify.request import repository_root
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


def last_of(
    target: str, source: str, content_sha256: str, out: Path | None = None, *, toolchain: str
) -> Compilation | None:
    """What the last record of ``target`` with builds of this subject built; None where there is none.

    A published record is the last one until another is published, so that a growth does not vanish by being measured
    twice. Without any, it is the newest local one, below ``out`` too, of another content than ``content_sha256`` or
    another triton than ``toolchain``: of the same ones it would be this very build. ``source`` is the subject as a
    record names it, because another implementation's registers are no measure.
    """
    evidence = repository_root() / "reports" / "evidence"

    def newest(records: Iterable[Record]) -> Compilation | None:
        mine = (one for one in records if one.target == target and one.subject.source == source and one.results)
        return next((one.compilation for one in newest_first(mine) if one.compilation and one.compilation.builds), None)

    published = load([evidence]).records if evidence.is_dir() else ()
    local = [*load().records, *(load([out]).records if out is not None and out.is_dir() else ())]
    this = (content_sha256, toolchain)
    others = (one for one in local if (one.subject.content_sha256, one.environment.triton) != this)
    return newest(published) or newest(others)


def _built(compilation: Compilation) -> list[tuple[Build, Resources]]:
    return [(build, build.resources) for build in compilation.builds if build.resources is not None]


def _where(compilation: Compilation, build: Build) -> str:
    return f"{build.kernel} on sm{compilation.sm}, {build.variants[0]}"
