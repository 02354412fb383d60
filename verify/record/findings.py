"""Findings: the failures of a run, grouped by what they have in common.

Failures share a cause if the subject raised the same exception in the same line, or if the check names the cause.
Others are compared by the properties of the calls they made: a property, or two, that each of several failing calls
has and no passing one. Each remaining failure is listed under the family of its check.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from verify.record.schema import FAILING, CheckResult, Finding, Verdict

#: A call of the subject: its properties as words, by name.
Call = Mapping[str, str]

#: Properties in words: a name, a value, and whether a call has this value or another one.
_Terms = Sequence[tuple[str, str, bool]]
_Rank = tuple[int, int, int, int]

#: A cause that is only the line which raised.
_LINE = re.compile(r"\w+ at \S+:\d+")


@dataclass(frozen=True, slots=True)
class Trail:
    """What one check asked of its subject: the call at which it failed, if it did, and the calls before it."""

    failed: Call | None
    passed: Sequence[Call]


def findings(results: Sequence[CheckResult], trails: Mapping[str, Trail]) -> list[Finding]:
    """The failures among ``results`` grouped by cause, those with the most checks first."""
    failing = [result for result in results if result.verdict in FAILING]
    by_cause: dict[str, str] = {result.id: result.cause for result in failing if result.cause}
    open_ = [one.id for one in failing if one.verdict is Verdict.FAIL and (not one.cause or _LINE.fullmatch(one.cause))]
    for words, members in _by_property(open_, trails):
        # failures that all come from one line keep that line as their cause
        if len({by_cause.get(name, "") for name in members}) > 1 or members[0] not in by_cause:
            by_cause |= dict.fromkeys(members, words)
    groups: dict[str, list[str]] = {}
    for result in failing:
        groups.setdefault(by_cause.get(result.id) or without_cause(result), []).append(result.id)
    blocked = [(result.id, result.by) for result in results if result.verdict is Verdict.BLOCKED]
    found = [
        Finding(cause=cause, checks=members, blocks=[name for name, by in blocked if by in members])
        for cause, members in groups.items()
    ]
    return sorted(found, key=lambda one: -len(one.checks) - len(one.blocks))


def without_cause(result: CheckResult) -> str:
    """The title of the finding of a failure whose cause is not known: its verdict and the family of the check."""
    return f"{result.verdict}: {result.id.rpartition('.')[0]}"


def _by_property(failing: Sequence[str], trails: Mapping[str, Trail]) -> Iterator[tuple[str, list[str]]]:
    """Groups of failing checks that a property explains: the property in words, and the ids; largest groups first.

    Calls of different kinds (scoring, the compressor, a live model) are never compared.
    """
    calls = {name: found for name in failing if name in trails and (found := trails[name].failed)}
    passed = [call for trail in trails.values() for call in trail.passed if call.get("class", "A") == "A"]
    passed = [call for call in passed if all(not _alike(call, failed) for failed in calls.values())]
    for kind in sorted({call.get("kind", "") for call in calls.values()}):
        own = {name: call for name, call in calls.items() if call.get("kind", "") == kind}
        passing = [call for call in passed if call.get("kind", "") == kind]
        while (best := max(_explanations(own, passing), key=lambda one: one[0], default=None)) is not None:
            _, terms, members = best
            yield _words(terms), members
            own = {name: call for name, call in own.items() if name not in members}


def _alike(one: Call, other: Call) -> bool:
    return {**one, "class": ""} == {**other, "class": ""}


def _explanations(calls: Mapping[str, Call], passing: Sequence[Call]) -> Iterator[tuple[_Rank, _Terms, list[str]]]:
    """Every property, or pair of properties, of failing calls that no passing call has, while a passing call has all
    but one of them: without such a contrast nothing is explained.

    With each come its rank (more checks, then fewer and plainer properties) and the ids it explains. A single check is
    explained by one property only.
    """
    # what a call does not have may explain it too: "dtype other than float32"
    terms = sorted({(name, value, True) for call in calls.values() for name, value in call.items()})
    terms += sorted({(name, value, False) for call in passing for name, value in call.items()})
    terms = [term for term in terms if term[0] not in ("class", "kind")]
    # the options of a patch are too few and too alike for pairs of them to mean anything
    scoring = all("path" in call for call in calls.values())
    for size in (1, 2) if scoring else (1,):
        for chosen in combinations(terms, size):
            if len({name for name, _, _ in chosen}) < size:
                continue
            members = [name for name, call in calls.items() if _has(call, chosen)]
            plain = sum(is_it for _, _, is_it in chosen)
            alone = len(members) == 1 and (size > 1 or not plain or not scoring)
            if not members or alone or (not scoring and not plain) or any(_has(call, chosen) for call in passing):
                continue
            if any(_differs(call, chosen) for call in passing):
                by_path = sum(name != "function" for name, _, _ in chosen)
                yield (len(members), -size, plain, by_path), chosen, members


def _has(call: Call, terms: _Terms) -> bool:
    return all(name in call and (call[name] == value) is is_it for name, value, is_it in terms)


def _differs(call: Call, terms: _Terms) -> bool:
    """Whether a call has all but one of the ``terms``, and the property of that one."""
    return all(name in call for name, _, _ in terms) and sum(_has(call, [term]) for term in terms) == len(terms) - 1


_NAMES = {
    "n": "keys", "b": "rows", "h": "KV heads", "g": "query heads per KV head", "d": "head dim", "style": "rope_style",
    "dtype": "dtype of keys", "low_norm": "E|q| below |E[q]|",
}  # fmt: skip


def _words(terms: _Terms) -> str:
    where = [f"on the {value} path" for name, value, is_it in terms if name == "path" and is_it]
    what = [
        f"{_NAMES.get(name, name)}{'=' if is_it else ' other than '}{value}"
        for name, value, is_it in terms
        if name != "path"
    ]
    what += [f"a path other than {value}" for name, value, is_it in terms if name == "path" and not is_it]
    told = [*where, *([f"with {' and '.join(what)}"] if what else [])]
    return f"only {' '.join(told)}"
