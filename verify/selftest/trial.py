"""Runs checks against a copy of a subject, each phase in a process of its own, and caches the results."""

from __future__ import annotations

import re
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from verify.checks import Check
from verify.errors import ConfigurationError
from verify.files import cache_folder, keep, kept_place
from verify.record.digest import digest_of
from verify.record.grounds import PACKAGE
from verify.record.kills import Cell, Outcome, Row
from verify.record.schema import CheckResult, Verdict
from verify.record.strict import Strict
from verify.record.without_gpu import can_be_simulated
from verify.run import events, mutation
from verify.run.manifest import Selected, Surroundings, freeze
from verify.run.process import PhaseProcess
from verify.run.request import simulated_sm
from verify.selftest.faults import PTX_DEVICE, WRAPPERS, Fault
from verify.selftest.plant import copy_of
from verify.selftest.records import judge
from verify.subject.find import find_subject
from verify.subject.subject import Subject

#: The software that changes results, besides the suite and the subject.
_VERSIONS = ("python", "torch", "triton", "transformers", "vllm")


class Interrupted(Exception):
    """The user stopped the selftest; finished results are kept."""


class _Kept(Strict):
    """What the cache holds: the results of the checks against one copy, and how long they took."""

    results: list[CheckResult]
    duration_s: float


class _Quiet:
    """The progress of a phase whose results are read afterwards."""

    def started(self, check_id: str) -> None: ...

    def finished(self, result: CheckResult) -> None: ...

    def note(self, sentence: str) -> None: ...


@dataclass(frozen=True)
class Bench:
    """One subject, and how checks are run against copies of it, on the CPU or on a simulated GPU.

    ``stopping`` returns how often the user asked to stop; from then on everything raises Interrupted.
    """

    root: Path
    subject: Subject
    surroundings: Surroundings
    model: str
    seed: int
    stopping: Callable[[], int]
    device: str = "cpu"
    cache: Path = field(default_factory=lambda: cache_folder() / "selftest")

    @property
    def versions(self) -> dict[str, str]:
        return {name: getattr(self.surroundings.environment, name) for name in _VERSIONS}

    def device_of(self, fault: Fault | None) -> str:
        """The device that a fault is tried on."""
        return PTX_DEVICE if fault is not None and fault.ptx else self.device

    def baseline(self, checks: Sequence[Check], device: str) -> dict[str, Verdict]:
        """The verdict of each check without a fault; a kill counts only if it is PASS. Cached check by check."""
        there = [check for check in checks if simulated_sm(device) is None or can_be_simulated(check.spec)]
        places = {check.id: self._place(None, [check], device) for check in there}
        results = {name: kept.results[0] for name, place in places.items() if (kept := _read(place))}
        if missing := [check for check in there if check.id not in results]:
            for result in self._run(None, missing, device):
                results[result.id] = result
                if result.verdict is not Verdict.INFRA:
                    _write(places[result.id], _Kept(results=[result], duration_s=result.duration_s))
        return {check.id: results[check.id].verdict if check in there else Verdict.SKIP for check in checks}

    def row(self, fault: Fault, checks: Sequence[Check], baseline: dict[str, Verdict]) -> Row:
        """The outcome of the checks against one fault; those that do not pass without it are not run."""
        if fault.records:
            begun = time.monotonic()
            cells = judge(fault)
            return Row(id=fault.id, what=fault.what, cells=cells, duration_s=time.monotonic() - begun)
        sound = [check for check in checks if baseline.get(check.id) is Verdict.PASS]
        kept = self._tried(fault, sound) if sound else _Kept(results=[], duration_s=0.0)
        found = {result.id: result for result in kept.results}
        cells = [_cell(fault, check, found.get(check.id), baseline.get(check.id)) for check in checks]
        return Row(
            id=fault.id, what=fault.what, cells=cells, duration_s=kept.duration_s, right=fault.right,
            equivalent=fault.equivalent,
        )  # fmt: skip

    def _tried(self, fault: Fault, checks: Sequence[Check]) -> _Kept:
        device = self.device_of(fault)
        place = self._place(fault, checks, device)
        if (kept := _read(place)) is None:
            begun = time.monotonic()
            results = self._run(fault, checks, device)
            kept = _Kept(results=results, duration_s=time.monotonic() - begun)
            if all(result.verdict is not Verdict.INFRA for result in results):  # which says nothing about the fault
                _write(place, kept)
        return kept

    def _place(self, fault: Fault | None, checks: Iterable[Check], device: str) -> Path:
        """A file named after everything that results depend on: suite, subject, versions, device, seed, checks and
        fault.
        """
        planted = None
        if fault is not None:
            planted = fault.model_dump(mode="json", include={"bundled", "plain", "wrapper", "ptx"})
            if fault.wrapper is not None:
                planted["source"] = digest_of([WRAPPERS / f"{fault.wrapper.module}.py"], WRAPPERS)
            if fault.ptx:
                planted["source"] = digest_of([Path(mutation.__file__)], Path(mutation.__file__).parent)
        what = [
            self.surroundings.instrument_sha256, self.surroundings.subject_info.content_sha256, self.versions,
            self.model, self.seed, device, sorted(check.id for check in checks), planted,
        ]  # fmt: skip
        return kept_place(self.cache, *what)

    def _run(self, fault: Fault | None, checks: Sequence[Check], device: str) -> list[CheckResult]:
        """Run the checks on a fresh copy, phase by phase. Raises Interrupted, and ConfigurationError if a fault of
        compiled code applies to no kernel that was launched.
        """
        with tempfile.TemporaryDirectory(prefix="verify-selftest-") as name:
            folder = Path(name)
            copy = find_subject(str(copy_of(self.subject, folder / "subject", fault)), self.root)
            selected = tuple(
                Selected(id=c.id, node=c.node, gate=c.spec.gate, plan=c.spec.plan, timeout_s=c.spec.timeout_s)
                for c in checks
            )
            changed: dict[str, object] = {
                "subject_info": self.surroundings.subject_info.model_copy(
                    update={"content_sha256": copy.content_sha256()}
                )
            }
            if sm := simulated_sm(device):
                changed["target"] = f"sm{sm}"
            manifest = freeze(
                self.surroundings.model_copy(update=changed),
                device=device, subject=copy, model=self.model, seed=self.seed,
                selection=f"selftest {fault.id if fault else PACKAGE}", selected=selected,
                mutation=fault.mutation if fault else None,
            )  # fmt: skip
            run_dir = folder / "run"
            events.create(run_dir, manifest)
            with events.lock(run_dir) as held:
                for phase in sorted({check.phase for check in selected}):
                    part = [check for check in selected if check.phase == phase]
                    if not self.stopping():
                        PhaseProcess(
                            run_dir, self.root, manifest, part, stopping=self.stopping, held=held.fileno()
                        ).run(_Quiet())  # fmt: skip
            if self.stopping():
                raise Interrupted
            if fault is not None and fault.ptx and not events.read_mutated(run_dir):
                raise ConfigurationError(
                    f"fault {fault.id} applies to no kernel that its checks launch; edit its 'find' or 'nth' in "
                    f"faults/{fault.layer}.toml"
                )
            return list(events.read_results(run_dir).values())


def _read(place: Path) -> _Kept | None:
    with suppress(OSError, ValueError):  # missing or incomplete: run again
        return _Kept.model_validate_json(place.read_bytes())
    return None


def _write(place: Path, kept: _Kept) -> None:
    keep(place, kept.model_dump_json() + "\n")


def _cell(fault: Fault, check: Check, result: CheckResult | None, before: Verdict | None) -> Cell:
    if result is None:
        return Cell(check=check.id, outcome=Outcome.NOT_RUN, verdict=f"{before or 'not run'} without the fault")
    if result.verdict in (Verdict.SKIP, Verdict.BLOCKED):
        outcome = Outcome.NOT_RUN
    elif fault.harmless:
        outcome = Outcome.HARMLESS if result.verdict is Verdict.PASS else Outcome.FALSE_ALARM
    else:
        outcome = Outcome.KILLED if caught(fault, result.verdict, result.message) else Outcome.SURVIVED
    return Cell(check=check.id, outcome=outcome, verdict=result.verdict, message=result.message)


def caught(fault: Fault, verdict: Verdict, message: str) -> bool:
    """Whether a check with this result caught the fault: one of its verdicts, and a message that it ``says``."""
    return verdict in fault.verdicts and re.search(fault.says, message) is not None
