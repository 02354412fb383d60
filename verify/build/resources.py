"""Compares the resources of builds with those in an earlier record: no stack, and no unexpected growth."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from verify.files import EVIDENCE, RUNS, repository_root
from verify.record.archive import load, newest_first
from verify.record.builds import Build, Compilation, Resources
from verify.record.schema import Measurement, Record

#: A build may have at most this many times the registers, or the instructions, of the last record.
GROWTH_ALLOWED = 1.1


def stack(now: Compilation, last: Compilation | None) -> list[Measurement]:
    """The stack of each build; none is allowed, because a stack holds what did not fit into registers."""
    return [
        Measurement(name="stack", measured=found.stack_bytes, allowed=0, unit="bytes", where=_where(now, build))
        for build, found in _built(now)
    ]


def registers(now: Compilation, last: Compilation | None) -> list[Measurement]:
    """The registers of each build, bounded by the same build in ``last``; empty if there is none."""
    return _grown("registers", now, last, lambda used: used.registers)


def instructions(now: Compilation, last: Compilation | None) -> list[Measurement]:
    """The instructions that a warp executes per key, bounded by the same build in ``last``; empty if there is none.

    A build whose instructions cannot be counted (``Code.uncounted``) is left out.
    """
    return _grown(
        "warp instructions per key", now, last, lambda used: used.code and used.code.warp_instructions_per_key
    )


def _grown(
    what: str, now: Compilation, last: Compilation | None, size: Callable[[Resources], float | None]
) -> list[Measurement]:
    """The size of each build, bounded by the same build in ``last``, if both have one.

    The same build is the only one of its kernel for the variant, whatever its constants; among several, it is the one
    with the same options and constants.
    """
    before = _by_launch(last) if last is not None else {}
    pairs = [
        (build, size(found), size(earlier))
        for key, builds in _by_launch(now).items()
        for build, found in builds
        if (earlier := _alike(build, builds, before.get(key, [])))
    ]
    return [
        Measurement(
            name=what,
            measured=ours,
            allowed=GROWTH_ALLOWED * theirs,
            where=f"{_where(now, build)}: {theirs:g} in the last record (triton {now.triton}, was {last.triton})",
        )
        for build, ours, theirs in pairs
        if ours and theirs
    ]


@dataclass(frozen=True, slots=True)
class Earlier:
    """The records that builds are compared with: published and local ones."""

    published: tuple[Record, ...]
    local: tuple[Record, ...]

    @classmethod
    def load(cls, out: Path | None = None) -> Earlier:
        """Read them; local ones are those of this machine's runs, and those below ``out``."""
        evidence = repository_root() / EVIDENCE
        published = load([evidence]).records if evidence.is_dir() else ()
        folders = [folder for folder in (repository_root() / RUNS, out) if folder is not None and folder.is_dir()]
        return cls(published, load(folders).records if folders else ())

    def last_of(self, target: str, source: str, content_sha256: str, *, toolchain: str) -> Compilation | None:
        """The builds in the last record of ``target`` that has any of this subject; None if there is none.

        The newest published record comes first, so that a growth does not vanish by being measured twice. Without one,
        it is the newest local record whose subject content differs from ``content_sha256``, or whose triton from
        ``toolchain``: if both are equal, it is this very build. ``source`` is the subject's name in records, because
        the registers of another implementation are no measure.
        """

        def newest(records: Iterable[Record]) -> Compilation | None:
            mine = (one for one in records if one.target == target and one.subject.source == source and one.results)
            built = (one.compilation for one in newest_first(mine) if one.compilation and one.compilation.builds)
            return next(built, None)

        this = (content_sha256, toolchain)
        others = (one for one in self.local if (one.subject.content_sha256, one.environment.triton) != this)
        return newest(self.published) or newest(others)


def _by_launch(one: Compilation) -> dict[tuple[str, str], list[tuple[Build, Resources]]]:
    """The builds by kernel and first variant; several if the variant launches the kernel in several ways."""
    found: dict[tuple[str, str], list[tuple[Build, Resources]]] = {}
    for build, used in _built(one):
        found.setdefault((build.kernel, build.variants[0]), []).append((build, used))
    return found


def _alike(
    build: Build, beside: Sequence[tuple[Build, Resources]], before: Sequence[tuple[Build, Resources]]
) -> Resources | None:
    if len(beside) > 1 or len(before) > 1:
        same = (build.options, build.constants)
        before = [(one, used) for one, used in before if (one.options, one.constants) == same]
    return before[0][1] if len(before) == 1 else None


def _built(compilation: Compilation) -> list[tuple[Build, Resources]]:
    return [(build, build.resources) for build in compilation.builds if build.resources is not None]


def _where(compilation: Compilation, build: Build) -> str:
    return f"{build.kernel} on sm{compilation.sm}, {build.variants[0]}{build.configuration}"
