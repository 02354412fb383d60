"""Findings: failures of a run that share a cause, and the words for them.

Failures share a cause if the subject raised the same exception in the same line, or if the check names the cause.
Others that show the same thing are compared by the properties of the calls they made: a property, or two, that all of
these failing calls have and no passing one. Each remaining failure is listed under the family of its check.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from verify.record.causes import INACCURATE, NOTHING, ONE_FOR_ALL, RANKED
from verify.record.schema import FAILING, CheckResult, Finding, Measurement, Verdict

#: A call of the subject: its properties as words, by name.
Call = Mapping[str, str]

#: Properties in words: a name, a value, and whether a call has this value or another one.
_Terms = Sequence[tuple[str, str, bool]]

#: A cause that ends with the line which raised.
_LINE = re.compile(r"\w+ at (\S+:\d+)$")

#: The most properties that one cause names.
_TOGETHER = 2

#: What every failed comparison of scores with a bound above 0 shows, whatever the check calls its measurement.
_ERROR = "error"


@dataclass(frozen=True, slots=True)
class Trail:
    """What one check asked of its subject: the call at which it failed, if it did, and the calls before it."""

    failed: Call | None
    passed: Sequence[Call]


@dataclass(frozen=True, slots=True)
class _Passed:
    """A call that passed, and what its check would have shown if it had failed; ``None`` if it may be anything."""

    call: Call
    judged: frozenset[str] | None


def findings(results: Sequence[CheckResult], trails: Mapping[str, Trail]) -> list[Finding]:
    """The failures among ``results`` grouped by cause, those with the most checks first."""
    failing = [result for result in results if result.verdict in FAILING]
    causes = {result.id: result.cause or without_cause(result) for result in failing}
    open_ = [result for result in failing if result.verdict is Verdict.FAIL and result.cause in ("", INACCURATE)]
    explained = [*_by_property(open_, results, trails)]
    times = Counter(words for _, words, _ in explained)
    for shown, words, members in explained:
        # two groups that show different things stay two findings, although the same property explains both
        causes |= dict.fromkeys(members, f"{shown}: {words}" if times[words] > 1 else words)
    groups: dict[str, list[str]] = {}
    for result in failing:
        groups.setdefault(causes[result.id], []).append(result.id)
    blocked = [(result.id, result.by) for result in results if result.verdict is Verdict.BLOCKED]
    found = [
        Finding(cause=cause, checks=members, blocks=[name for name, by in blocked if by in members])
        for cause, members in groups.items()
    ]
    return sorted(found, key=lambda one: -len(one.checks) - len(one.blocks))


def without_cause(result: CheckResult) -> str:
    """The cause of the finding of a failure whose cause is not known: its verdict and the family of the check."""
    return f"{result.verdict}: {_family(result)}"


_UNKNOWN = {
    Verdict.ERROR: "a fault of this suite, not of the implementation",
    Verdict.CRASH: "the process of the check died",
    Verdict.TIMEOUT: "the check did not end within its time limit",
    Verdict.INFRA: "the machine stopped the check",
}


def title(finding: Finding, result: CheckResult, claim: str | None) -> str:
    """The headline of a finding: its cause. If no cause is known: the family of the check, and what it measured.

    ``result`` is that of any check of the finding, ``claim`` what this check claims, None if it is not in the suite.
    """
    if finding.cause != without_cause(result):
        return finding.cause
    if result.verdict in _UNKNOWN:
        return f"{_family(result)}: {_UNKNOWN[result.verdict]}"
    if (wrong := _outside(result)) is not None:
        unit = wrong.unit and f" {wrong.unit}"
        return (
            f"{_family(result)}: {wrong.name}: measured {wrong.measured:.3g}{unit}, allowed {wrong.allowed:.3g}{unit}"
        )
    return f"{_family(result)} did not hold{f': {claim}' if claim else ''}"


#: What to do about a cause that lies before what its checks test.
STEPS = {
    NOTHING: (
        "Read what the implementation says. If it never takes some value, write the values that it takes into [offers] "
        "of subject.toml."
    ),
    INACCURATE: (
        "Find the error with p4.triton_oracle and p4.pytorch_oracle; what these checks test can only be judged then."
    ),
    RANKED: (
        "Find the error with p6.keep_set, or with p4.compressor where there is one; what these checks test can only be "
        "judged then."
    ),
    ONE_FOR_ALL: (
        "Rank the keys of each KV head by its own query heads, in the modes in which it has its own keep set."
    ),
}


def next_step(result: CheckResult, remedy: str) -> str:
    """What to do about a failure: what its cause or its verdict says or, if they say nothing, the ``remedy``."""
    if step := STEPS.get(result.cause):
        return step
    if line := _LINE.search(result.cause):
        return f"Look at {line[1]} first, which raised."
    return {
        Verdict.ERROR: "Report the message as a fault of this suite; it says nothing about the implementation.",
        Verdict.CRASH: "Repeat the check, and see at which call the process dies.",
        Verdict.TIMEOUT: "Repeat the check, and see at which call it waits.",
        Verdict.INFRA: "Correct what the message says about the machine, and repeat the check.",
    }.get(result.verdict, remedy)


def _family(result: CheckResult) -> str:
    return result.id.rpartition(".")[0]


def _outside(result: CheckResult) -> Measurement | None:
    return next((one for one in result.measurements if not one.within), None)


def _scores(call: Call) -> bool:
    return "path" in call


def _shown(result: CheckResult, call: Call) -> str:
    """What a failure shows: the failed measurement or, without one, the message without its numbers."""
    if (wrong := _outside(result)) is not None:
        return _ERROR if _scores(call) and wrong.allowed > 0 else wrong.name
    message = re.sub(r"^phases/\S+:\d+: ", "", result.message).partition("; ")[0]
    return re.sub(r"\d+(\.\d+)?", "N", message.rpartition(": ")[2])


def _by_property(
    failing: Iterable[CheckResult], results: Iterable[CheckResult], trails: Mapping[str, Trail]
) -> Iterator[tuple[str, str, list[str]]]:
    """Groups of failing checks that a property explains: what they show, the property in words, and the ids.

    Calls of different kinds (scoring, the compressor, a live model) are never compared. A property must explain every
    failure of its kind that shows the same thing or, for scores, every one on one path: where one such call fails
    without it, it is not the cause.
    """
    scopes: dict[tuple[str, str], dict[str, Call]] = {}
    for result in failing:
        if result.id in trails and (call := trails[result.id].failed):
            scopes.setdefault((call.get("kind", ""), _shown(result, call)), {})[result.id] = call
    wrong = [call for calls in scopes.values() for call in calls.values()]
    passed = [one for one in _passed(results, trails) if all(not _alike(one.call, call) for call in wrong)]
    for (kind, shown), calls in scopes.items():
        passing = [one for one in passed if one.call.get("kind", "") == kind]
        if terms := _explanation(calls, passing, shown):
            yield shown, _words(terms), [*calls]
            continue
        paths = {call.get("path", "") for call in calls.values()}
        for path in sorted(paths) if len(paths) > 1 else ():
            own = {name: call for name, call in calls.items() if call.get("path") == path}
            if terms := _explanation(own, [one for one in passing if one.call.get("path") == path], shown):
                yield shown, _words([("path", path, True), *terms]), [*own]


def _passed(results: Iterable[CheckResult], trails: Mapping[str, Trail]) -> Iterator[_Passed]:
    """The calls that are known to be right.

    Scores are compared call by call. Those that are far from exact (class B) count where the same path is seldom
    better: elsewhere they are bounded so widely that they excuse nothing. Other calls are right if their check passed.
    """
    by_id = {result.id: result for result in results}
    classes = Counter(
        (call["path"], call.get("class", "A")) for one in trails.values() for call in one.passed if _scores(call)
    )
    for name, trail in trails.items():
        for call in trail.passed:
            if _scores(call):
                found, path = call.get("class", "A"), call["path"]
                if found == "A" or (found == "B" and classes[path, "A"] < classes[path, "B"]):
                    yield _Passed(call, None)
            elif trail.failed is None:
                measured = by_id[name].measurements if name in by_id else ()
                yield _Passed(call, frozenset(one.name for one in measured))


def _alike(one: Call, other: Call) -> bool:
    return {**one, "class": ""} == {**other, "class": ""}


def _explanation(calls: Mapping[str, Call], passing: Sequence[_Passed], shown: str) -> _Terms:
    """The plainest property, or pair of properties, that all ``calls`` have and no passing call has, while a passing
    call that was judged alike has all but one of them: without such a contrast nothing is explained.

    Two properties that explain it equally well are both told. Empty if there is none, or if there are more. A single
    check is explained by single properties only.
    """
    # what a call does not have may explain it too: "dtype other than float32"
    terms = {(name, value, True) for call in calls.values() for name, value in call.items()}
    terms |= {(name, value, False) for one in passing for name, value in one.call.items()}
    common = sorted(
        one for one in terms if one[0] not in ("class", "kind") and all(_has(c, [one]) for c in calls.values())
    )
    # the options of a patch are too few and too alike for pairs of them to mean anything
    scoring = all(_scores(call) for call in calls.values())
    contrast = [one.call for one in passing if one.judged is None or shown in one.judged]
    found: list[tuple[tuple[int, int, int], _Terms]] = []
    for size in range(1, _TOGETHER + 1) if scoring and len(calls) > 1 else (1,):
        for chosen in combinations(common, size):
            plain = sum(is_it for _, _, is_it in chosen)
            if len({name for name, _, _ in chosen}) < size or (not plain and (not scoring or len(calls) == 1)):
                continue
            if any(_has(one.call, chosen) for one in passing) or not any(_differs(call, chosen) for call in contrast):
                continue
            found.append(((-size, plain, sum(name != "function" for name, _, _ in chosen)), chosen))
    best = max((rank for rank, _ in found), default=None)
    equal = [terms for rank, terms in found if rank == best]
    # as plain as each other, so any may be the cause: two single properties can be told together, more say nothing
    told = [one for terms in equal for one in terms]
    return told if len(told) <= _TOGETHER else ()


def _has(call: Call, terms: _Terms) -> bool:
    return all(name in call and (call[name] == value) is is_it for name, value, is_it in terms)


def _differs(call: Call, terms: _Terms) -> bool:
    """Whether a call has all but one of the ``terms``, and the property of that one."""
    return all(name in call for name, _, _ in terms) and sum(_has(call, [term]) for term in terms) == len(terms) - 1


_NAMES = {
    "n": "keys", "b": "rows", "h": "KV heads", "g": "query heads per KV head", "d": "head dim", "style": "rope_style",
    "dtype": "dtype of keys",
}  # fmt: skip

#: Properties that a call has or does not have, in words for each.
_EITHER = {
    "low_norm": ("E|q| below |E[q]|", "E|q| not below |E[q]|"),
    "cached": ("precomputed tables", "no precomputed tables"),
}


def _words(terms: _Terms) -> str:
    where = [f"on the {value} path" for name, value, is_it in terms if name == "path" and is_it]
    what = [_property(*term) for term in terms if term[0] != "path"]
    what += [f"a path other than {value}" for name, value, is_it in terms if name == "path" and not is_it]
    told = [*where, *([f"with {' and '.join(what)}"] if what else [])]
    return f"only {' '.join(told)}"


def _property(name: str, value: str, is_it: bool) -> str:
    if name in _EITHER:
        has, has_not = _EITHER[name]
        return has if (value == "True") is is_it else has_not
    return f"{_NAMES.get(name, name)}{'=' if is_it else ' other than '}{value}"
