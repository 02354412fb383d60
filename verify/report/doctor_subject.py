"""What the doctor says about a subject: what it offers by capability, and what this suite cannot judge of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path

from verify.checks import CAPABILITIES, PROFILES, Check, catalogue
from verify.errors import ConfigurationError
from verify.files import repository_root
from verify.record.deviations import told_before
from verify.record.grounds import BUNDLED
from verify.record.verdict import describe_subject
from verify.report.doctor_table import Finding, Status
from verify.subject.deviations import read_deviations
from verify.subject.known_failures import read_known_failures
from verify.subject.offered import Examined, examined, narrowed
from verify.subject.subject import Subject

#: What no check covers, by where in a package it would be. A pattern is one of ``pathlib``.
_UNCOVERED = {
    "**/vllm/runtime": "tensor parallelism: whether each rank takes the statistics of its own heads",
    "**/vllm/runtime/*compaction*": "whether gather spans are reused by address after their block ids have changed",
    "**/vllm/runtime/*selector*": "the runtime's own selector, whose variance may lose digits if it is computed in one "
    "pass, and which may give a layer the statistics of another one",
    "**/vllm/runtime/*planner*": "whether the runtime's planner skips a protected prompt above the budget for ever",
    "**/sglang": "SGLang: only transformers and vLLM are driven",
    "**/mlx": "MLX: only transformers and vLLM are driven",
}

#: How long before its last day a known failure is told.
_SOON = timedelta(days=14)

#: The capabilities that ``subject.toml`` narrows.
_NARROWED = ("triton", "pytorch", "ranking")


def examine_subject(subject: Subject, profile: str | None = None) -> list[Finding]:
    """What the subject offers, by capability; what its profile asks for and it does not offer; what is not covered.

    Imports the subject. Raises ConfigurationError if it does not import.
    """
    subject.activate()
    found = examined(subject)
    offers = {name for name, names in found.items() if any(one.offered for one in names)}
    if (subject.folder / "__main__.py").is_file():
        offers.add("command_line")
    groups = PROFILES[profile] if profile else (tuple(CAPABILITIES),)
    asked = {name: group for group in groups for name in group}
    findings = [_whole(subject, profile, offers & asked.keys())]
    for name in CAPABILITIES:
        if name in found or name == "command_line":
            group = asked.get(name, ()) if profile else ()
            missed = () if offers & {*group} else group
            findings.append(_capability(subject, name, name in offers, found.get(name, ()), missed))
    return [*findings, *_deviations(subject), *_uncovered(subject)]


def _whole(subject: Subject, profile: str | None, offered: set[str]) -> Finding:
    described = describe_subject(subject.info())
    words = f"profile {profile}" if profile else ""
    if offered:
        return Finding("subject", described, words, Status.OK)
    nothing = f"it offers nothing{f' that the profile {profile} asks for' if profile else ''}, so nothing can be judged"
    return Finding(
        "subject", described, words, Status.NEEDED, f"{nothing}; python -m verify contract says what to write"
    )


def _capability(
    subject: Subject, name: str, offered: bool, names: Sequence[Examined], missed: Sequence[str]
) -> Finding:
    """``missed`` are this and its alternatives if the profile asks for one of them and none is offered."""
    words = CAPABILITIES[name]
    absent = list(dict.fromkeys(one.problem for one in names if not one.offered))
    if not offered:
        if not missed:
            return Finding(words, "not offered", "", Status.SKIP)
        why = f" ({'; '.join(absent)})" if absent else ""
        step = f"the profile asks for {' or '.join(CAPABILITIES[one] for one in missed)}; this is ABSENT{why}"
        return Finding(words, "not offered", "must pass" if len(missed) == 1 else "alternative", Status.NOTE, step)
    differ = [f"{one.name.full}: {one.problem}" for one in names if one.offered and one.problem]
    parts = [f"{sum(one.offered for one in names)} of {len(names)} names" if absent else "offered"]
    within = narrowed(subject, name) if name in _NARROWED else {}
    parts += [f"{property_} only {_shown(property_, values)}" for property_, values in within.items()]
    parts += ["a signature differs"] if differ else []
    status = Status.NOTE if differ else Status.OK
    return Finding(words, ", ".join(parts), "", status, "; ".join([*differ, *_missing(names)]))


def _missing(names: Sequence[Examined]) -> list[str]:
    """What is absent of a capability that is offered in part: the names, by why they are absent."""
    problems: dict[str, list[str]] = {}
    for one in names:
        if not one.offered:
            # the module may be absent because other names of it are mapped to other places
            why = "not offered" if one.problem.startswith("the subject has no ") else one.problem
            problems.setdefault(why, []).append(one.name.name)
    return [f"{', '.join(found)}: {why}" for why, found in problems.items()]


def _shown(name: str, values: tuple) -> str:
    return " or ".join(f"{len(one)} fixed" if name == "offsets" else str(one) for one in values)


def _deviations(subject: Subject) -> Iterator[Finding]:
    """How many known deviations its author has listed, and which have expired."""
    entries = read_deviations(subject, repository_root(), catalogue())
    expired = [*told_before(entries, datetime.now(UTC).date())]
    if entries:
        found = f"{len(entries)} listed, {len(expired)} expired"
        yield Finding("known deviations", found, "", Status.NOTE if expired else Status.OK, "; ".join(expired))


def known_failures(repository: Path, checks: Iterable[Check]) -> Finding:
    """How many failures of the bundled subject are listed, and which of them count no longer, or soon will not."""
    try:
        entries = read_known_failures(BUNDLED, repository, checks)
    except ConfigurationError as error:
        return Finding("known failures", "not readable", "", Status.NEEDED, str(error))
    today = datetime.now(UTC).date()
    soon = [one for one in entries if not one.expired(today) and one.expires <= today + _SOON]
    expired = [*told_before(entries, today)]
    steps = [*expired, *(f"{one.told} of {one.owner} expires on {one.expires}" for one in soon)]
    counts = {f"expiring within {_SOON.days} days": len(soon), "expired": len(expired)}
    found = ", ".join([f"{len(entries)} listed", *(f"{number} {words}" for words, number in counts.items() if number)])
    return Finding("known failures", found, "", Status.NOTE if steps else Status.OK, "; ".join(steps))


def _uncovered(subject: Subject) -> Iterator[Finding]:
    for pattern, words in _UNCOVERED.items():
        place = next(subject.folder.glob(pattern), None)
        if place is not None:
            where = place.relative_to(subject.folder.parent).as_posix()
            yield Finding("not covered", where, "", Status.NOTE, f"no check covers {words}")
