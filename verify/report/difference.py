"""``python -m verify diff``: what changed between two runs, and whether a HARD check got worse."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from verify.architectures import Target, parse_target
from verify.checks import Check, catalogue
from verify.errors import ConfigurationError, Exit
from verify.record.archive import locate, newest_first
from verify.record.index import Index, Point, open_index
from verify.record.schema import FAILING, CheckResult, Record, UnreadableRecord, Verdict, read_record
from verify.record.verdict import TargetVerdict, assess, describe_subject, must_pass, profile_of
from verify.report.documents import dumps
from verify.report.matrix import KNOWN, count

#: Without a history, a number is reported only if it grew by more than this factor, and a duration also by a second.
_FACTOR, _SECONDS = 1.5, 1.0

#: With at least this many earlier runs, the noise is this many robust standard deviations, and at least this share.
_ENOUGH, _DEVIATIONS, _LEAST = 5, 4.0, 0.05

#: How many lines of one kind are printed; the rest is only counted.
_TOLD = 20

#: The kinds of change, worst first.
KINDS = ("newly failing", "changed", "removed", "tighter", "slower", "newly passing", "added")

_GREEN = (TargetVerdict.EMULATED_PASS, TargetVerdict.VERIFIED, TargetVerdict.CONFORMS)

_BAD = FAILING | {Verdict.BLOCKED}


@dataclass(frozen=True, slots=True)
class Change:
    """A change of one check; ``worse`` decides the exit code."""

    kind: str
    id: str
    gate: str
    told: str
    worse: bool = False


def diff(
    names: Sequence[str],
    since: str | None,
    gpu: str | None,
    folders: Sequence[Path],
    subject: str | None = None,
    *,
    as_json: bool,
) -> int:
    """Print what changed between two runs, without ``names`` those of one subject; 1 if a HARD check got worse, else 0.

    ``names`` are two runs, or, if ``since`` is ``last-green``, none or the later one. Raises ConfigurationError if a
    run does not exist or there is no earlier green run.
    """
    with open_index(folders, subject) as index:
        before, after = _chosen(index, names, since, gpu)
        changes = list(compare(before, after, index.points))
    if as_json:
        print(
            dumps({"before": before.run_id, "after": after.run_id, "changes": [asdict(one) for one in changes]}), end=""
        )
    else:
        _print(before, after, changes)
    return Exit.FAILED if any(one.worse for one in changes) else Exit.OK


def compare(before: Record, after: Record, history: Callable[[str, str], Iterable[Point]]) -> Iterator[Change]:
    """Every change between two records; ``history`` returns the results of a check on a target.

    A HARD check got worse if it newly failed or was blocked, if it no longer passes, or if it passed and is absent from
    a run of the same selection.
    """
    old, new = ({one.id: one for one in record.telling} for record in (before, after))
    same_selection = before.selection == after.selection
    for name in old.keys() - new.keys():
        lost = old[name].verdict is Verdict.PASS and same_selection and old[name].gate == "hard"
        yield Change("removed", name, old[name].gate, f"{_words(old[name])}, now no result", lost)
    for name, now in new.items():
        if (was := old.get(name)) is None:
            yield Change("added", name, now.gate, _words(now), now.gate == "hard" and now.verdict in _BAD)
        elif was.verdict != now.verdict or was.evidence != now.evidence:
            yield _other_verdict(was, now)
        else:
            yield from _other_numbers(was, now, before, after, history)


def _other_verdict(was: CheckResult, now: CheckResult) -> Change:
    if now.verdict in _BAD and was.verdict not in _BAD:
        kind = "newly failing"
    elif now.verdict is Verdict.PASS and was.verdict is not Verdict.PASS:
        kind = "newly passing"
    else:
        kind = "changed"
    told = f"{_words(was)}, now {_words(now)}" + (f": {now.message}" if now.message else "")
    lost = was.verdict is Verdict.PASS and now.verdict is not Verdict.PASS
    return Change(kind, now.id, now.gate, told, now.gate == "hard" and (kind == "newly failing" or lost))


def _other_numbers(
    was: CheckResult, now: CheckResult, before: Record, after: Record, history: Callable[[str, str], Iterable[Point]]
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
        if one.allowed > 0 and not math.isinf(one.allowed) and not math.isnan(one.measured):
            shares[one.name] = max(shares.get(one.name, -math.inf), one.measured / one.allowed)
    return shares


def _machine(record: Record) -> tuple[str, ...]:
    gpu, environment = record.environment.gpu, record.environment
    return (record.target, gpu.uuid_sha256 if gpu else "", environment.os)


def _words(result: CheckResult) -> str:
    parts = (result.verdict, KNOWN if result.deviation else "", result.code, result.by and f"by {result.by}")
    return " ".join(filter(None, (*parts, result.evidence)))


def _chosen(index: Index, names: Sequence[str], since: str | None, gpu: str | None) -> tuple[Record, Record]:
    if since is None:
        if len(names) != 2 or gpu is not None:
            raise ConfigurationError("diff compares two runs: give both, or --since last-green, optionally with --gpu")
        before, after = (_record(index, name) for name in names)
        return before, after
    if len(names) > 1:
        raise ConfigurationError("--since last-green takes at most one run; drop the other one")
    after = _record(index, names[0]) if names else _newest(index, gpu)
    return _last_green(index, after), after


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


def _last_green(index: Index, after: Record) -> Record:
    """The newest run before ``after`` that alone verifies its target, or passes every must-pass check on a CPU."""
    checks, target = list(catalogue()), parse_target(after.target)
    index = index.about(after.subject)
    earlier = newest_first([after, *(head for head in index.heads.values() if head.target == after.target)])
    for head in earlier[earlier.index(after) + 1 :]:
        if head.run_id != after.run_id and head.on_target and (found := _green(index, head, target, checks)):
            return found
    raise ConfigurationError(
        f"there is no green run on {after.target} before {after.run_id}; compare with another run: "
        f"python -m verify diff RUN {after.run_id}"
    )


def _green(index: Index, head: Record, target: Target, checks: Sequence[Check]) -> Record | None:
    full = profile_of(head.subject) == "full"
    if full and not {one.id for one in must_pass(checks, target)} <= index.passed(head.run_id):
        return None
    record = _record(index, head.run_id)
    return record if assess(target, [record], checks).verdict in _GREEN else None


def _print(before: Record, after: Record, changes: Sequence[Change]) -> None:
    from rich.text import Text

    from verify.report.terminal import PipeConsole

    console = PipeConsole()
    for word, record in (("from", before), ("to  ", after)):
        facts = (record.target, record.time_utc, describe_subject(record.subject), count(len(record.results), "result"))
        console.print(Text.assemble((f"{word} {record.run_id}", "bold"), f"  {', '.join(facts)}"), soft_wrap=True)
    for kind in KINDS:
        found = sorted((one for one in changes if one.kind == kind), key=lambda one: (one.gate != "hard", one.id))
        if not found:
            continue
        console.print()
        console.print(Text(f"{kind} ({len(found)})", style="bold"))
        for one in found[:_TOLD]:
            style = "bold red" if one.worse else "green" if kind == "newly passing" else "yellow"
            console.print(Text.assemble((f"  {one.gate.upper()} ", style), one.id, f"  {one.told}"), soft_wrap=True)
        if len(found) > _TOLD:
            console.print(f"  and {len(found) - _TOLD} more; --json lists them all")
    console.print()
    worse = sum(one.worse for one in changes)
    verdict = f"{count(worse, 'HARD check')} got worse." if worse else "No HARD check got worse."
    console.print(Text(verdict, style="bold red" if worse else "bold"))
