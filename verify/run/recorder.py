"""Turns pytest's view of a check into its verdict, and records it the moment the check ends."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from traceback import walk_tb
from types import TracebackType

import pytest

from verify.checks import PROFILES, SKIP_CODES, CheckSpec
from verify.errors import InfraError, Refused, SubjectLacks, SubjectNeeds, Wrong, skip
from verify.files import IMPORT_ROOT
from verify.machine import processors
from verify.machine.environment import localise
from verify.record import pictures, trail
from verify.record.curves import Curve
from verify.record.grounds import Grounds
from verify.record.schema import BLOCKING, NOT_OFFERED, CheckResult, Evidence, Measurement, Verdict
from verify.record.verdict import profile_of
from verify.run import events
from verify.run.manifest import Manifest, Selected
from verify.subject.refusal import raised_in, refusal
from verify.subject.subject import Subject

#: The measurements of a check, from the ``measure`` fixture, until its result is made.
MEASUREMENTS = pytest.StashKey[list[Measurement]]()

#: Which of several lawful readings of the method its subject follows, from the ``choose`` fixture.
CHOICE = pytest.StashKey[str]()

#: How its result was obtained, where that is not the usual way of the run.
EVIDENCE = pytest.StashKey[Evidence]()

#: Its curves, from the ``curve`` fixture.
CURVES = pytest.StashKey[list[Curve]]()


_SUITE = IMPORT_ROOT / "verify"

#: The interval at which the processor time of a check's processes is sampled.
_LOOK_S = 5.0


def in_phases(item: pytest.Item) -> bool:
    return item.path.is_relative_to(item.config.rootpath / "phases")


def spec_of(item: pytest.Item) -> CheckSpec | None:
    """The declaration of a check, or None for a test that is not one; only ``phases/`` has checks."""
    marker = item.get_closest_marker("check") if in_phases(item) else None
    return marker.args[0] if marker else None


def _declared(item: pytest.Item) -> CheckSpec:
    """The declaration of a check. Raises ValueError for a test that is not one."""
    spec = spec_of(item)
    if spec is None:
        raise ValueError(f"{item.nodeid} is not a check")
    return spec


def id_of(item: pytest.Item) -> str:
    """The stable id of a check: its family and the name of its case. Raises ValueError for a test that is not one."""
    return _declared(item).id_of(_case(item))


def _case(item: pytest.Item) -> str:
    if not isinstance(item, pytest.Function):
        raise ValueError(f"{item.nodeid} is not a function, but a check must be one")
    return item.callspec.id


def selected(item: pytest.Item) -> Selected:
    """The entry of a check in a manifest."""
    spec = _declared(item)
    slow = item.get_closest_marker("slow") is not None
    return Selected(
        id=id_of(item), node=item.nodeid, gate=spec.gate, plan=spec.plan, timeout_s=spec.timeout_s, slow=slow
    )


@dataclass(frozen=True, slots=True)
class Ending:
    """How one of a check's three steps (setup, call, teardown) ended, if not well."""

    verdict: Verdict
    message: str
    code: str | None = None
    by: str | None = None
    aspect: str = ""
    cause: str = ""


def ending_of(
    excinfo: pytest.ExceptionInfo, when: str, root: Path, own: Mapping[Path, str], subject: Subject
) -> Ending:
    """The verdict for an exception from a step. One raised in the subject is a FAIL of the subject, unless it says that
    something is not implemented; a refusal counts only where the check has seen a plainer input accepted.
    """
    error = excinfo.value
    if isinstance(error, pytest.skip.Exception):
        if blocked_by := getattr(error, "by", None):
            return Ending(Verdict.BLOCKED, str(error), by=blocked_by)
        if code := getattr(error, "code", None):
            return Ending(Verdict.SKIP, localise(str(error), root, own), code=code)
        return Ending(Verdict.ERROR, f"skip without a code ({error}); use verify.skip with {', '.join(SKIP_CODES)}")
    if isinstance(error, pytest.xfail.Exception):
        return Ending(Verdict.ERROR, f"xfail in a check ({error}); a check passes, fails or skips with a code")
    if isinstance(error, InfraError):
        return Ending(Verdict.INFRA, localise(str(error), root, own))
    where = _place(excinfo, root)
    suite = (root / "phases", _SUITE)
    place = raised_in(error, subject, suite)
    stopped = isinstance(error, pytest.fail.Exception) and _passed_through(excinfo.tb, "pytest_timeout")
    if stopped or (not place and _waited(error, subject, suite)):
        return Ending(Verdict.TIMEOUT, localise(f"{where}{error}", root, own))
    failed = isinstance(error, Wrong) or (when == "call" and isinstance(error, AssertionError | pytest.fail.Exception))
    if isinstance(error, SubjectLacks):
        return Ending(Verdict.ABSENT, localise(str(error), root, own))
    if isinstance(error, SubjectNeeds):
        return Ending(Verdict.SKIP, localise(str(error), root, own), code="PKG_MISSING")
    if isinstance(error, Refused):
        return Ending(Verdict.REFUSED, localise(str(error), root, own), aspect=error.aspect)
    if failed and not place:
        # pytest appends the truncated values of the assertion to the message
        said = str(error).rpartition("\nassert ")[0] or str(error)
        cause = getattr(error, "cause", "")
        return Ending(Verdict.FAIL, localise(f"{where}{said}", root, own) or "assertion without a message", cause=cause)
    if isinstance(error, NotImplementedError) and refusal(error, subject):
        return Ending(Verdict.ABSENT, localise(f"not implemented ({place}: {error})", root, own))
    if place:
        return Ending(
            Verdict.FAIL,
            localise(f"{where}the subject raised {excinfo.typename} at {place}: {error}", root, own),
            cause=localise(f"{excinfo.typename} at {place}", root, own),
        )
    step = "" if when == "call" else f"{when}: "
    return Ending(Verdict.ERROR, localise(f"{where}{step}{excinfo.typename}: {error}", root, own))


def _waited(error: BaseException, subject: Subject, suite: tuple[Path, ...]) -> bool:
    """Whether a check ended because a process that the suite waited for took too long."""
    return any(
        isinstance(one, TimeoutError | subprocess.TimeoutExpired) and not raised_in(one, subject, suite)
        for one in (error, error.__cause__)
    )


def _passed_through(traceback: TracebackType | None, module: str) -> bool:
    # not excinfo.traceback, which pytest has filtered
    frames = (frame for frame, _ in walk_tb(traceback))
    return any(frame.f_globals.get("__name__") == module for frame in frames)


def _place(excinfo: pytest.ExceptionInfo, root: Path) -> str:
    """The innermost line of ``phases/`` that the exception passed through, as a message prefix."""
    for entry in reversed(excinfo.traceback):
        path = Path(entry.path)
        if path.is_relative_to(root / "phases"):
            return f"{path.relative_to(root)}:{entry.lineno + 1}: "
    return ""


@dataclass(slots=True, eq=False)  # pytest puts plugins into sets, and a dataclass with eq has no hash
class Recorder:
    """The pytest plugin of one run: blocks or skips checks before setup, times them, and appends their results.

    ``subject`` is the implementation under test. ``runner`` is the process that started this one for one
    phase and records how busy the machine is; None if this process runs every phase and records it itself. ``grounds``
    knows what results rest on; None if the run leaves no record.

    The record on disk is updated when a check fails and when the next phase begins, so that an aborted process leaves
    one with the results so far.
    """

    run_dir: Path
    manifest: Manifest
    root: Path
    subject: Subject
    runner: int | None = None
    grounds: Grounds | None = None
    _ending: Ending | None = field(default=None, init=False)
    _phase: int | None = field(default=None, init=False)
    _watch: processors.Watch | None = field(default=None, init=False)
    _results: dict[str, CheckResult] = field(init=False)

    def __post_init__(self) -> None:
        # of earlier phases; no check needs one of a phase that runs in parallel
        self._results = events.read_results(self.run_dir)
        threading.Thread(target=self._look, name="machine", daemon=True).start()

    def _look(self) -> None:
        """Sample the processes of the running check while they exist."""
        # signals belong to the main thread: one that it blocks must not be delivered to this one
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        while True:
            time.sleep(_LOOK_S)
            if self._watch is not None:
                self._watch.look()

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Generator[None, object, object]:
        spec = spec_of(item)
        if spec is None:
            return (yield)
        if self._phase != spec.phase:
            self.end_phase()
            if self.grounds is not None:
                self.grounds.begin_phase()
            for again in self._results.keys() - events.judged(self._results):
                if again.startswith(f"p{spec.phase}."):  # it is tried again here, and blocks nothing until then
                    del self._results[again]
            if self.runner is None:
                events.append_machine(self.run_dir, spec.phase, "start", processors.state())
        self._phase, self._ending = spec.phase, None
        item.stash[MEASUREMENTS], item.stash[CURVES], item.stash[CHOICE] = [], [], ""
        trail.CALLS.clear()
        pictures.begin()
        file = item.nodeid.partition("::")[0]
        self._note(spec.phase, file)  # before the check, which may end this process
        events.append_start(self.run_dir, id_of(item))
        self._watch = processors.Watch.begin(self.runner or os.getpid(), self.manifest.run_id)
        begun = time.perf_counter()
        handled = yield  # an interrupt is raised here, and the check then has no result
        result = self._result(item, time.perf_counter() - begun)
        self._results[result.id] = result
        events.append_trail(self.run_dir, result, trail.CALLS)
        events.append_result(self.run_dir, result)
        self._note(spec.phase, file)
        if result.verdict in BLOCKING:
            events.update(self.run_dir, self.manifest)
        return handled

    def _note(self, phase: int, file: str) -> None:
        """Append further files that the results of a phase, and of one of its files of checks, rest on."""
        if self.grounds is None:
            return
        opened, imported = self.grounds.news(file)
        if opened:
            events.append_grounds(self.run_dir, opened, phase=phase)
        if imported:
            events.append_grounds(self.run_dir, imported, file=file)

    def end_phase(self) -> None:
        """Update the record after the last check of a phase; do nothing before the first phase."""
        if self._phase is None:
            return
        if self.runner is None:
            events.append_machine(self.run_dir, self._phase, "end", processors.state())
        events.update(self.run_dir, self.manifest)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> None:
        spec = spec_of(item)
        if spec is None:
            return
        target = self.manifest.target
        if spec.needs_gpu and target == "emulated":
            skip("NO_GPU", SKIP_CODES["NO_GPU"])
        if by := events.blocker(spec.needs, self._results):
            blocked = pytest.skip.Exception(f"blocked by {by}")
            blocked.by = by  # type: ignore[attr-defined]  # pytest's exception takes it to ending_of
            raise blocked

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if spec_of(item) is not None and call.excinfo is not None:
            ending = ending_of(call.excinfo, call.when, self.root, self.manifest.places, self.subject)
            # asked before the fixtures end the processes that the check started
            busy = self._watch.busy() if self._watch is not None and ending.verdict is Verdict.TIMEOUT else None
            if busy:
                ending = replace(ending, verdict=Verdict.INFRA, message=f"{busy}; {ending.message}")
            if self._ending is None or self._ending.verdict in (Verdict.SKIP, Verdict.BLOCKED):
                self._ending = ending
            if report.skipped and ending.verdict is Verdict.ERROR:
                # pytest treats a skip without a code as harmless, but its exit code must be red
                report.outcome, report.longrepr = "failed", ending.message
                vars(report).pop("wasxfail", None)
            if report.failed and (known := self._known(item, ending.verdict)):
                # what pytest calls an expected failure: shown as one, and no reason for a red exit code
                report.outcome, report.wasxfail = "skipped", known
            if report.failed and ending.verdict in NOT_OFFERED | {Verdict.SKIP} and not self._required(item):
                report.outcome = "skipped"
                report.longrepr = (str(item.path), item.location[1] or 0, f"{ending.verdict}: {ending.message}")
        return report

    def _known(self, item: pytest.Item, verdict: Verdict) -> str:
        """Why a check that ended with ``verdict`` was known to fail, in words; empty if it was not."""
        if why := self.manifest.waiver_of(id_of(item), verdict):
            return str(why)
        deviation = self.manifest.deviation_of(id_of(item)) if verdict is Verdict.FAIL else None
        return f"known deviation: {deviation}" if deviation else ""

    def _required(self, item: pytest.Item) -> bool:
        """Whether the profile of the subject requires the check, whatever else the subject offers."""
        profile = profile_of(self.manifest.subject_info)
        spec = _declared(item)
        groups = PROFILES[profile] if profile else ()
        return spec.gate == "hard" and (spec.capability_of(_case(item)),) in groups

    def _result(self, item: pytest.Item, duration_s: float) -> CheckResult:
        spec = _declared(item)
        ending = self._ending or Ending(Verdict.PASS, "")
        measurements = item.stash[MEASUREMENTS]
        outside = [m.name for m in measurements if not m.within]
        if ending.verdict is Verdict.PASS and outside:
            ending = Ending(Verdict.ERROR, f"the check ignored the failure of its measurement {outside[0]!r}")
        return self.manifest.result(
            selected(item),
            ending.verdict,
            self.root,
            code=ending.code,
            by=ending.by,
            cause=ending.cause,
            aspect=ending.aspect,
            choice=item.stash[CHOICE],
            duration_s=duration_s,
            measurements=measurements,
            curves=item.stash[CURVES],
            kept=pictures.shown(ending.message),
            message=ending.message,
            **({"evidence": "compiled"} if spec.ahead_of_time else _evidence(item)),
        )


def _evidence(item: pytest.Item) -> dict[str, Evidence]:
    return {"evidence": item.stash[EVIDENCE]} if EVIDENCE in item.stash else {}
