"""Known failures: failures of the bundled subject that this suite has listed, each with an owner and a last day.

A failure that is listed is WAIVED in the record, which is neither a failure nor a pass: its target cannot be VERIFIED,
and the run may still end with 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import AfterValidator, Field

from verify.files import COPIES
from verify.record.deviations import Entry, some, untested
from verify.record.schema import FAILING, CheckResult, Environment, Verdict, Waiver
from verify.record.strict import Strict

#: Where the entries are, relative to ``repository_root``.
FILE = (COPIES / "ci" / "known_failures.toml").as_posix()

#: What can be waived. ERROR is a fault of this suite and INFRA one of the machine: neither shows the listed failure.
WAIVABLE = frozenset({Verdict.FAIL, Verdict.CRASH, Verdict.TIMEOUT})


_OF_A_WAIVER = {"reason", "issue", "owner", "expires"}


def _specifier(text: str) -> str:
    from packaging.specifiers import SpecifierSet

    SpecifierSet(text)
    return text


#: A version specifier (PEP 440), such as ``>=3.8,<3.9``.
Specifier = Annotated[str, Field(pattern=r"\S"), AfterValidator(_specifier)]


class Condition(Strict):
    """When a failure is known: on one of these GPUs, with these versions, and with this model.

    What is not given holds everywhere. ``cuda`` is the CUDA runtime that torch was built for.
    """

    sm: list[Annotated[int, Field(strict=True)]] | None = Field(default=None, min_length=1)
    driver: Specifier | None = None
    cuda: Specifier | None = None
    triton: Specifier | None = None
    torch: Specifier | None = None
    model: Annotated[str, Field(pattern=r"\S")] | None = None

    def holds(self, target: str, environment: Environment, model: str) -> bool:
        """Whether a run on ``target`` is meant. A version that does not exist there, such as a driver, never fits."""
        gpu = environment.gpu
        versions = {"driver": gpu.driver if gpu else "none", "cuda": environment.cuda_runtime}
        versions |= {"triton": environment.triton, "torch": environment.torch}
        wanted = {name: getattr(self, name) for name in versions}
        return (
            (self.sm is None or target in {f"sm{one}" for one in self.sm})
            and self.model in (None, model)
            and all(one is None or _fits(versions[name], one) for name, one in wanted.items())
        )

    def overlaps(self, other: Condition) -> bool:
        """Whether a GPU may be meant by both, whatever the versions."""
        return self.sm is None or other.sm is None or not {*self.sm}.isdisjoint(other.sm)


def _fits(found: str, specifier: str) -> bool:
    """Whether a version is meant by ``specifier``; a pre-release counts as its release, an unreadable one as none."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        version = Version(found)
    except InvalidVersion:
        return False
    return SpecifierSet(specifier).contains(version.base_version if version.is_prerelease else version)


class KnownFailure(Entry):
    """One entry. ``checks`` are ids, families or patterns of ids; ``probe`` is the command that shows whether the
    failure is fixed.
    """

    when: Condition = Condition()
    owner: str = Field(pattern=r"^@[\w-]+(/[\w-]+)?$")
    added: date
    probe: str = Field(pattern=r"\S")

    def covers(self, check_id: str) -> bool:
        return super().covers(check_id) or any(fnmatchcase(check_id, pattern) for pattern in self.checks)

    @property
    def told(self) -> str:
        return f"the known failure {', '.join(self.checks)} ({self.issue})"


def applying(
    entries: Iterable[KnownFailure], ids: Iterable[str], target: str, environment: Environment, model: str
) -> tuple[KnownFailure, ...]:
    """The entries that concern a run of these checks on ``target``, also those that have expired."""
    ids = list(ids)
    return tuple(one for one in entries if one.when.holds(target, environment, model) and any(map(one.covers, ids)))


def waiver(entries: Iterable[KnownFailure], check_id: str, verdict: Verdict, today: date) -> Waiver | None:
    """Why a check that ended with ``verdict`` is WAIVED; None if it is not."""
    if verdict not in WAIVABLE:
        return None
    one = next((one for one in entries if one.covers(check_id) and not one.expired(today)), None)
    if one is None:
        return None
    return Waiver.model_validate({"verdict": verdict} | one.model_dump(include=_OF_A_WAIVER))


def waived(result: CheckResult, entries: Iterable[KnownFailure], today: date) -> CheckResult:
    """``result``, WAIVED if one of the ``entries`` lists it."""
    why = waiver(entries, result.id, result.verdict, today)
    return result.model_copy(update={"verdict": Verdict.WAIVED, "waiver": why}) if why else result


def outdated(
    entries: Iterable[KnownFailure], results: Sequence[CheckResult], today: date, *, on_target: bool
) -> Iterator[str]:
    """A sentence for each entry that must be changed: it has expired, or one of its checks has passed.

    A pass that was not obtained ``on_target`` says nothing about it, and changes no entry.
    """
    for one in entries:
        own = [result for result in results if one.covers(result.id)]
        passed = [result.id for result in own if result.verdict is Verdict.PASS]
        if one.expired(today):
            yield f"{one.told} expired on {one.expires}; remove it from {FILE}, or give a later date"
        elif passed and on_target:
            what = "narrow it in" if len(passed) < len(own) else "remove it from"
            yield f"{some(passed)} passed, but {one.told} has it; {what} {FILE}. Its probe: {one.probe}"


def told_waived(results: Sequence[CheckResult], *, alone: bool) -> str:
    """A sentence on every failure that is waived; empty without any. ``alone`` says that the run ends with 0."""
    groups: dict[str, list[str]] = {}
    for one in results:
        if one.waiver is not None:
            why = f"{one.waiver.verdict}, {one.waiver.issue}, {one.waiver.owner}, until {one.waiver.expires}"
            groups.setdefault(why, []).append(one.id)
    if not groups:
        return ""
    names = [name for members in groups.values() for name in members]
    listed = "; ".join(f"{', '.join(members)} ({why})" for why, members in groups.items())
    others = any(one.verdict in FAILING for one in results)
    end = "the other failures are warnings" if others else "nothing else failed"
    number = "1 failure is" if len(names) == 1 else f"{len(names)} failures are"
    return (
        f"{number} waived: {listed}{untested(names, results)}; {end if alone else 'the run fails for another reason'}"
    )
