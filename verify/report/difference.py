"""``python -m verify diff``: what changed between two runs, or on every target since its last green run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from verify.architectures import known_targets, parse_target
from verify.checks import Check, catalogue
from verify.errors import ConfigurationError, Exit
from verify.record.absences import newest_of
from verify.record.archive import locate, newest_first
from verify.record.headroom import by_design, used_share
from verify.record.index import Index, Point, open_index
from verify.record.reading import UnreadableRecord, read_record
from verify.record.schema import BLOCKING, CheckResult, Record, Verdict
from verify.report.changes import Change, Compared, as_object, ordered, print_pair, print_targets
from verify.report.comparable import BAD, Course, courses, missed, verdicts_of
from verify.report.documents import dumps
from verify.report.matrix import KNOWN, count

#: Without a history, a number is reported only if it grew by more than this factor, and a duration also by a second.
_FACTOR, _SECONDS = 1.5, 1.0

#: With at least this many earlier runs, the noise is this many robust standard deviations, and at least this share.
_ENOUGH, _DEVIATIONS, _LEAST = 5, 4.0, 0.05

#: The kinds of change of a check that fails, or that now passes, which a flaky check has by chance.
_TURNS = {"newly failing", "still failing", "newly passing"}

_History = Callable[[str, str], Iterable[Point]]


def diff(
    names: Sequence[str],
    since: str | None,
    gpu: str | None,
    folders: Sequence[Path],
    subject: str | None = None,
    *,
    as_json: bool,
) -> int:
    """Print what changed between two runs of one subject, or on every target; 1 if a HARD check got worse, else 0.

    ``names`` are two runs, or, if ``since`` is ``last-green``, none or the later one. With ``since``, but neither
    ``names`` nor ``gpu``, it is about every target, and a HARD check that did not run is worse too. Raises
    ConfigurationError if there is no record, a run does not exist, or there is no comparable earlier green run.
    """
    checks = list(catalogue())
    with open_index(folders, subject) as index:
        if since is not None and not names and gpu is None:
            return _print_every_target(index, checks, as_json=as_json)
        before, after, changes = _between(index, names, since, gpu, checks)
    if as_json:
        told = {"before": before.run_id, "after": after.run_id, "changes": [asdict(one) for one in ordered(changes)]}
        print(dumps(told), end="")
    else:
        print_pair(before, after, changes)
    return Exit.FAILED if any(one.worse for one in changes) else Exit.OK


def _print_every_target(index: Index, checks: Sequence[Check], *, as_json: bool) -> int:
    if not index.heads:
        unread = f"; {count(len(index.unreadable), 'record')} cannot be read" if index.unreadable else ""
        raise ConfigurationError(f"there is no run to compare; make one first: python -m verify run{unread}")
    names = [target.target for target in known_targets()]
    found = [runs for name in names for runs in on_target(index, name, checks, index.points(None, name))]
    if as_json:
        print(dumps([as_object(runs) for runs in found]), end="")
    else:
        print_targets(found)
    return Exit.FAILED if any(one.worse for runs in found for one in runs) else Exit.OK


def on_target(index: Index, target: str, checks: Sequence[Check], points: Sequence[Point]) -> list[list[Compared]]:
    """The newest runs on a target, each with what changed in it, by kind of evidence; ``points`` are its results."""
    verdicts = verdicts_of(points)
    known, history = {check.id for check in checks}, _history(points)
    found: dict[str, list[Compared]] = {}
    for course, passed in courses(index, target, verdicts):
        head, changes = course.newest, []
        green = course.last_green(checks)
        if before := green or next(iter(course.earlier), None):
            after, old = _record(index, head.run_id), _record(index, before.run_id)
            changed = _with_course(compare(old, after, history, known), course, after)
            changes = [one for one in changed if one.id not in passed]
        absence = newest_of(index.absences, target, head.time_utc) if head.on_target else None
        if why := absence.told if absence else missed(head, index.heads.values()):
            hard = any(one.gate == "hard" and one.id in course.expected - passed for one in points)
            changes.append(Change("did not run", target, "hard" if hard else "soft", why, hard))
        bad = (check_id for check_id, verdict in verdicts.get(head.run_id, {}).items() if verdict in BAD)
        again = frozenset(check_id for check_id in bad if course.failed_before(check_id))
        one = Compared(head, before, green is not None, course.alone, changes, again)
        found.setdefault(head.kind, []).append(one)
    return [*found.values()]


def compare(before: Record, after: Record, history: _History, known: Container[str] | None = None) -> Iterator[Change]:
    """Every change between two records; ``history`` returns the results of a check on a target.

    A HARD check got worse if it newly failed or was blocked, if it no longer passes, or if it passed or failed and has
    no result in a run of the same selection. A check without a result that is not in ``known``, the ids of the
    catalogue, is gone, which is not worse.
    """
    old, new = ({one.id: one for one in record.telling} for record in (before, after))
    waived = {name for name, one in new.items() if one.verdict is Verdict.WAIVED}
    same_selection = before.selection == after.selection
    for name in old.keys() - new.keys():
        was = old[name]
        if known is not None and name not in known:
            yield Change("gone", name, was.gate, f"{_words(was)}, now no longer a check")
        else:
            lost = was.verdict in BLOCKING | {Verdict.PASS} and same_selection and was.gate == "hard"
            yield Change("did not run", name, was.gate, f"{_words(was)}, now no result", lost)
    for name, now in new.items():
        if (earlier := old.get(name)) is None:
            yield Change("added", name, now.gate, _words(now), now.gate == "hard" and now.verdict in BAD)
        elif earlier.verdict != now.verdict or earlier.evidence != now.evidence:
            yield _other_verdict(earlier, now, waits=now.by in waived)
        else:
            if now.verdict in BAD:
                yield Change("still failing", name, now.gate, _with_message(_words(now), now))
            yield from _other_numbers(earlier, now, before, after, history)


def _with_course(changes: Iterable[Change], course: Course, after: Record) -> list[Change]:
    """The changes in ``after``, with the kinds that only the runs before it show: still failing, and flaky."""
    found, flaky = [], course.flaky()
    for one in changes:
        if one.id in flaky and one.kind in _TURNS:
            found.append(replace(one, kind="flaky", told=f"{one.told}; {_turned(flaky.pop(one.id))}"))
        elif one.kind == "newly failing" and (run_id := course.failed_before(one.id)):
            found.append(replace(one, kind="still failing", told=f"{one.told}; it did not pass in {run_id} either"))
        else:
            found.append(one)
    return [
        *found,
        *(Change("flaky", one.id, one.gate, _turned(flaky[one.id])) for one in after.telling if one.id in flaky),
    ]


def _turned(verdicts: str) -> str:
    return f"{verdicts} in the last runs of this subject"


def _other_verdict(was: CheckResult, now: CheckResult, *, waits: bool) -> Change:
    """A check with another verdict; ``waits`` says that a waived failure blocks it, which is no worse than waived."""
    if now.verdict in BAD and was.verdict not in BAD and not waits:
        kind = "newly failing"
    elif now.verdict is Verdict.PASS and was.verdict is not Verdict.PASS:
        kind = "newly passing"
    else:
        kind = "changed"
    told = _with_message(f"{_words(was)}, now {_words(now)}", now)
    lost = was.verdict is Verdict.PASS and now.verdict not in (Verdict.PASS, Verdict.WAIVED) and not waits
    return Change(kind, now.id, now.gate, told, now.gate == "hard" and (kind == "newly failing" or lost))


def _other_numbers(
    was: CheckResult, now: CheckResult, before: Record, after: Record, history: _History
) -> Iterator[Change]:
    """Measurements that use more of their allowance, and durations that grew, by more than the noise."""
    past = [
        one
        for one in history(now.id, after.target)
        if one.run_id != after.run_id and (one.verdict, one.evidence) == (now.verdict, now.evidence)
    ]
    old, new = _shares(was), _shares(now)
    for name in old.keys() & new.keys():
        known = [one.share for one in past if one.measure == name and one.share is not None]
        limit, why = _limit(old[name], known)
        if new[name] > limit:
            told = f"{name}: {new[name]:.3g} of what is allowed, {old[name]:.3g} before ({why})"
            yield Change("tighter", now.id, now.gate, told)
    if _machine(before) == _machine(after) and "compiled" not in (was.evidence, now.evidence):
        limit, why = _limit(was.duration_s, [one.duration_s for one in past])
        if now.duration_s > max(limit, was.duration_s + _SECONDS):
            yield Change("slower", now.id, now.gate, f"{now.duration_s:.1f} s, {was.duration_s:.1f} s before ({why})")


def _limit(before: float, past: Sequence[float]) -> tuple[float, str]:
    """The limit for a number that was ``before``, and its reason: the spread of ``past`` if it has enough values."""
    if len(past) < _ENOUGH:
        return before * _FACTOR, f"over {_FACTOR:g} times; {count(len(past), 'earlier run')}, too few to know the noise"
    middle = statistics.median(past)
    # the standard deviation of a normal distribution is 1.4826 median absolute deviations
    spread = 1.4826 * statistics.median(abs(one - middle) for one in past)
    limit = max(middle, before) + max(_DEVIATIONS * spread, _LEAST * middle)
    return limit, f"above the noise of {len(past)} earlier runs, {limit:.3g}"


def _shares(result: CheckResult) -> Mapping[str, float]:
    """The largest used share of the allowance, by the name of the measurement."""
    shares: dict[str, float] = {}
    for one in result.measurements:
        if not by_design(one) and (share := used_share(one.measured, one.allowed)) is not None:
            shares[one.name] = max(shares.get(one.name, 0), share)
    return shares


def _machine(record: Record) -> tuple[str, ...]:
    gpu, environment = record.environment.gpu, record.environment
    return (record.target, gpu.uuid_sha256 if gpu else "", environment.os)


def _words(result: CheckResult) -> str:
    known = KNOWN if result.deviation else f"({result.waiver.verdict})" if result.waiver else ""
    parts = (result.verdict, known, result.code, result.by and f"by {result.by}")
    return " ".join(filter(None, (*parts, result.evidence)))


def _with_message(words: str, result: CheckResult) -> str:
    return f"{words}: {result.message}" if result.message else words


def _history(points: Iterable[Point]) -> _History:
    """The results of one target, as ``compare`` asks for them."""
    found: dict[str, list[Point]] = {}
    for one in points:
        found.setdefault(one.id, []).append(one)
    return lambda check_id, _: found.get(check_id, ())


def _between(
    index: Index, names: Sequence[str], since: str | None, gpu: str | None, checks: Sequence[Check]
) -> tuple[Record, Record, list[Change]]:
    known = {check.id for check in checks}
    if since is None:
        if len(names) != 2 or gpu is not None:
            raise ConfigurationError("diff compares two runs: give both, or --since last-green, optionally with --gpu")
        before, after = (_record(index, name) for name in names)
        return before, after, [*compare(before, after, index.points, known)]
    if len(names) > 1:
        raise ConfigurationError("--since last-green takes at most one run; drop the other one")
    after = _record(index, names[0]) if names else _newest(index, gpu)
    index = index.about(after.subject)
    points = index.points(None, after.target)
    verdicts = verdicts_of(points) | {after.run_id: {one.id: one.verdict for one in after.telling}}
    course = Course.of(after, index.heads.values(), verdicts)
    if (green := course.last_green(checks)) is None:
        raise ConfigurationError(
            f"there is no green run on {after.target} before {after.run_id} that it can be compared with "
            f"({course.alone or 'none of the comparable ones is green'}); compare it with another run: "
            f"python -m verify diff RUN {after.run_id}"
        )
    before = _record(index, green.run_id)
    return before, after, _with_course(compare(before, after, _history(points), known), course, after)


def _record(index: Index, name: str) -> Record:
    if (found := index.find(name)) is not None:
        return found
    try:
        return read_record(locate(name)[0], unique=True)
    except UnreadableRecord as error:
        raise ConfigurationError(f"{error}; name another record") from error


def _newest(index: Index, gpu: str | None) -> Record:
    target = parse_target(gpu).target if gpu is not None else None
    runs = [head for head in index.heads.values() if head.on_target and target in (None, head.target)]
    if not runs:
        raise ConfigurationError(f"there is no run{f' on {target}' if target else ''} to compare; make one first")
    return _record(index, newest_first(runs)[0].run_id)
