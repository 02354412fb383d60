"""The records of kernels built ahead of time, one for each GPU."""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from verify.build.builder import Order, failed
from verify.build.resources import Earlier
from verify.checks import DEFAULT_SEED, SKIP_CODES, Check, catalogue
from verify.files import repository_root
from verify.machine.environment import capture
from verify.record.builds import NOT_OFFERED, WRONG, BuildVerdict, Compilation
from verify.record.digest import instrument_sha256
from verify.record.grounds import Checkout
from verify.record.known_failures import KnownFailure, applying, waived
from verify.record.schema import FAILING, CheckResult, Record, SubjectInfo, Verdict
from verify.run.manifest import new_run_id, utc_now
from verify.subject.subject import Subject

#: The verdict of the check that launches a build, by the build's verdict; other builds decide nothing.
_VERDICTS = {
    BuildVerdict.OK: Verdict.PASS,
    BuildVerdict.COMPILE_ERROR: Verdict.FAIL,
    BuildVerdict.OUT_OF_RESOURCES: Verdict.FAIL,
    BuildVerdict.CRASH: Verdict.CRASH,
    BuildVerdict.TIMEOUT: Verdict.TIMEOUT,
}

#: What a record says of the model where none is run.
_NO_MODEL = "none"


def records_of(
    order: Order,
    info: SubjectInfo,
    compilations: Sequence[Compilation],
    words: str,
    out: Path | None,
    root: Path,
    imported: Iterable[Path],
    known_failures: Sequence[KnownFailure] = (),
) -> list[Record]:
    """A record for each GPU, with the results of the checks that a build can answer.

    ``words`` is the request as a command line, ``out`` a folder with earlier records besides the usual ones,
    ``imported`` the files imported to capture the launches. What ``known_failures`` list is WAIVED.
    """
    checkout = Checkout(root, order.subject.root, order.subject.folder)
    names = checkout.names_of(imported) | checkout.closure("verify/build/builder.py", "phases/p3_compile.py")
    sources = checkout.digests(names)
    environment = capture("cpu")
    checks = [check for check in catalogue() if check.phase == 3]
    digest, now, earlier = instrument_sha256(root), utc_now(), Earlier.load(out)

    def results_of(one: Compilation) -> list[CheckResult]:
        results = [] if one.gap else _results(order, one, checks, _last(one, info, earlier))
        own = applying(known_failures, (result.id for result in results), f"sm{one.sm}", environment, _NO_MODEL)
        return [waived(result, own, date.fromisoformat(now[:10])) for result in results]

    return [
        Record(
            run_id=new_run_id(f"sm{one.sm}-compiled"),
            time_utc=now,
            state="complete",
            target=f"sm{one.sm}",
            subject=info,
            instrument_sha256=digest,
            environment=environment,
            model=_NO_MODEL,
            seed=DEFAULT_SEED,
            selection=words,
            duration_s=sum(build.duration_s for build in one.builds),
            results=results_of(one),
            sources=sources,
            rests_on=[[*sources]],
            compilation=one,
        )
        for one in compilations
    ]


def failed_unwaived(compilations: Iterable[Compilation], records: Iterable[Record]) -> bool:
    """``failed``, without the builds of which every variant is a case of a check that is WAIVED."""
    left = []
    for one, record in zip(compilations, records, strict=True):
        spared, counted = (
            {result.id.rpartition(".")[2] for result in record.results if result.verdict in verdicts}
            for verdicts in ({Verdict.WAIVED}, FAILING)
        )
        spared -= counted
        builds = [build for build in one.builds if not spared.issuperset(build.variants)]
        unlaunched = {name: why for name, why in one.unlaunched.items() if name not in spared}
        left.append(one.model_copy(update={"builds": builds, "unlaunched": unlaunched}))
    return failed(left)


def _last(now: Compilation, info: SubjectInfo, earlier: Earlier) -> Compilation | None:
    return earlier.last_of(f"sm{now.sm}", info.source, info.content_sha256, toolchain=now.triton)


def _results(order: Order, now: Compilation, checks: Iterable[Check], last: Compilation | None) -> list[CheckResult]:
    """The results of the phase 3 checks whose case is a variant that was built, and of those that compare builds."""
    results = []
    for check in checks:
        if check.spec.ahead_of_time:
            if not order.kernels and any(build.resources for build in now.builds):
                results.append(_compared(order.subject, check, now, last))
        elif (found := _launched(order.subject, check, now, order.kernels)) is not None:
            results.append(found)
    return results


def _launched(subject: Subject, check: Check, now: Compilation, only: Sequence[str]) -> CheckResult | None:
    """The result of a check that launches a variant; None without builds, with ``only``, or if one is inconclusive."""
    if problem := now.unlaunched.get(check.case):
        absent = problem.startswith(NOT_OFFERED)
        return _result(subject, check, now, Verdict.ABSENT if absent else Verdict.FAIL, message=problem)
    builds = now.of(check.case)
    if not builds or only:
        return None
    worst = next((build for build in builds if build.verdict in WRONG), None)
    if worst is None and any(build.verdict not in _VERDICTS for build in builds):
        return None
    worst = worst or builds[0]
    message = f"{worst.kernel} on sm{now.sm}{worst.configuration}: {worst.message}" if worst.message else ""
    duration_s = sum(build.duration_s for build in builds)
    return _result(subject, check, now, _VERDICTS[worst.verdict], message=message, duration_s=duration_s)


def _compared(subject: Subject, check: Check, now: Compilation, last: Compilation | None) -> CheckResult:
    found = check.spec.cases[check.case](now, last)
    if not found:
        return _result(subject, check, now, Verdict.SKIP, code="NO_BASELINE", message=SKIP_CODES["NO_BASELINE"])
    outside = [one for one in found if not one.within]
    verdict, message = (Verdict.FAIL, outside[0].told) if outside else (Verdict.PASS, "")
    return _result(subject, check, now, verdict, measurements=found, message=message)


def _result(subject: Subject, check: Check, now: Compilation, verdict: Verdict, **fields: object) -> CheckResult:
    option = subject.option
    named = os.path.relpath(option, repository_root()) if Path(option).is_absolute() else option
    where = "" if named == "bundled" else f" --subject {shlex.quote(named)}"
    return CheckResult(
        id=check.id,
        gate=check.spec.gate,
        plan=check.spec.plan,
        verdict=verdict,
        evidence="compiled",
        seed=DEFAULT_SEED,
        repeat=f"python -m verify compile --sm {now.sm}{where} --fresh",
        rests_on=0,
        **({"duration_s": 0.0} | fields),
    )
