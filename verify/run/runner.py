"""``python -m verify run``: one frozen request, one process per phase, one record, one exit code."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from threading import Event
from types import FrameType, TracebackType
from typing import TYPE_CHECKING, Any

from verify.architectures import parse_target
from verify.checks import PHASES, catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import default_out, repository_root
from verify.machine.device import DeviceName, prepare, resolve
from verify.machine.processors import cores
from verify.record.archive import newest_runs
from verify.record.schema import BLOCKING, FAILING, NOT_OFFERED, CheckResult, Record, Verdict
from verify.record.verdict import must_pass, profile_of
from verify.run import events
from verify.run.conclusion import concluded
from verify.run.confirm import confirming
from verify.run.manifest import Manifest, Selected, freeze, survey
from verify.run.process import PhaseProcess, pytest_command, pytest_environment
from verify.run.request import RunRequest, simulated_sm
from verify.run.simulated import LEFT_OUT
from verify.simulator.control import require
from verify.subject.deviations import read_deviations
from verify.subject.find import find_subject
from verify.subject.known_failures import read_known_failures

if TYPE_CHECKING:
    from rich.console import Console


_COLLECTION_LIMIT_S = 180

#: How many of the newest records are searched for the durations of checks on this machine.
_LOOKED_AT = 10

#: The phase whose checks others need, and the phases that run in parallel with the rest if there are enough cores.
_FIRST, _BESIDE = 1, frozenset({6})

#: The default marker expression on a CPU, where slow checks, which are all soft, take minutes each.
_ON_CPU = "not slow"


def run(request: RunRequest) -> int:
    """Carry out ``request`` and return the exit code of ``python -m verify run``.

    0 everything selected passed (soft failures are warnings; known deviations and waived failures do not count), 1 a
    HARD check failed or was blocked, 2 interrupted and resumable, 3 the machine is at fault, or what is listed as known
    no longer fails or has expired, 4 a SOFT failure under ``strict_soft``. Raises ConfigurationError, also exit code 3,
    if the request cannot be carried out; then nothing was run and no new run is left behind.
    """
    from rich.console import Console

    return carry_out(request, Console(highlight=False))[0]


def carry_out(request: RunRequest, console: Console, *, brief: bool = False) -> tuple[int, Path | None]:
    """The exit code of ``run``, and the directory of the run if there is one; ``brief`` leaves out the gate matrix."""
    root, run_dir = repository_root(), None
    try:
        run_dir = _find_run(request.out, request.resume) if request.resume else _new_run(request, root, console, brief)
        with events.lock(run_dir) as held:
            manifest = events.read_manifest(run_dir)
            if request.resume:
                _refuse_other_gpu(request, manifest)
                _check_resumable(manifest, run_dir, root, console)
            with Interruption() as interruption:
                finished = _run_phases(run_dir, root, manifest, interruption, held.fileno(), console)
                return _conclude(run_dir, finished, request.strict_soft, console, brief), run_dir
    except KeyboardInterrupt:  # while phases run, Interruption counts signals and none arrives here
        console.print("interrupted before the first check")
        return Exit.INTERRUPTED, run_dir


def exit_code(
    results: Iterable[CheckResult], target: str = "emulated", profile: str | None = "full", *, strict_soft: bool = False
) -> int:
    """The exit code for these results on ``target`` of a subject with ``profile``.

    Its must-pass checks must pass: one that is ABSENT, REFUSED or SKIP(PKG_MISSING) counts as failed, a blocked one
    like its blocker. A FAIL that is a known deviation does not count, whether it is HARD or SOFT, and neither does what
    is WAIVED. If any check, HARD or SOFT, has no verdict because of the machine, the run has no answer (exit code 3).
    """
    by_id = {result.id: result for result in results}
    verdicts_of = {name: result.verdict for name, result in by_id.items()}
    checks = list(catalogue())
    required = {check.id for check in must_pass(checks, parse_target(target), profile, verdicts_of)}
    spared = {check.id for check in checks} - required
    soft_failed = any(one.gate == "soft" and one.verdict in FAILING and not one.deviation for one in by_id.values())
    hard = [one for name, one in by_id.items() if name in required or (one.gate == "hard" and name not in spared)]
    failed = [_blocker(result, by_id) if result.verdict is Verdict.BLOCKED else result for result in hard]
    counted = {result.verdict for result in failed if not result.deviation}
    verdicts = counted & (FAILING | NOT_OFFERED | {Verdict.BLOCKED})
    if verdicts - {Verdict.INFRA} or any(result.code == "PKG_MISSING" for result in hard):
        return Exit.FAILED
    if any(result.verdict is Verdict.INFRA for result in by_id.values()):
        return Exit.CANNOT
    return Exit.SOFT if soft_failed and strict_soft else Exit.OK


def _blocker(blocked: CheckResult, by_id: Mapping[str, CheckResult]) -> CheckResult:
    """The blocker of a check, or the check itself if the blocker has not failed."""
    blocker = by_id.get(blocked.by or "", blocked)
    return blocker if blocker.verdict in BLOCKING else blocked


class Interruption:
    """Counts requests to stop (Ctrl-C, SIGTERM, a closed terminal) instead of raising during a write."""

    _SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def __init__(self) -> None:
        self._count = 0
        self._before: dict[signal.Signals, Callable[[int, FrameType | None], Any] | int | None] = {}

    def count(self) -> int:
        return self._count

    def __enter__(self) -> Interruption:
        for number in self._SIGNALS:
            before = signal.getsignal(number)
            if number is signal.SIGHUP and before is signal.SIG_IGN:
                continue  # started by nohup, to outlive its terminal
            self._before[number] = before
            signal.signal(number, self._note)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._count += 1


def _new_run(request: RunRequest, root: Path, console: Console, brief: bool) -> Path:
    """Check everything that could prevent the run, then create its directory."""
    chosen: tuple[Selected, ...] = ()
    if request.confirm:
        request, chosen = confirming(request, _find_run(request.out, request.confirm))
    subject = find_subject(request.subject, root)
    subject = replace(subject, profile=request.profile or subject.profile)
    checks = list(catalogue())
    deviations = read_deviations(subject, root, checks)
    known_failures = read_known_failures(subject.source, root, checks)
    simulated = simulated_sm(request.device)
    device = resolve("cpu" if simulated else request.device)
    if simulated:
        require(simulated)
    if device.name == "cpu" and request.expression is None:
        request = replace(request, expression=_ON_CPU)
    prepare(device.name, request.model)
    surroundings = survey(device.name, subject, root, request.expect, simulated)
    manifest = freeze(
        surroundings,
        device=request.device if simulated else device.name,
        subject=subject,
        model=request.model,
        seed=request.seed,
        selection=_words(request),
        selected=chosen or _select(request, root),
        deviations=deviations,
        known_failures=known_failures,
        confirms=request.confirm,
        beside=request.beside,
    )
    run_dir = request.out.resolve() / manifest.run_id
    try:
        events.create(run_dir, manifest)
    except OSError as error:
        raise ConfigurationError(f"{run_dir} cannot be created ({error.strerror}); choose another --out") from error
    if device.note:
        console.print(f"note: {device.note}", markup=False, soft_wrap=True)
    for sentence in manifest.told_before:
        console.print(f"note: {sentence}", markup=False, soft_wrap=True)
    where = f"{manifest.target}, simulated" if simulated else manifest.target
    console.print(f"run {manifest.run_id}: {len(manifest.selected)} checks on {where}", markup=False)
    if simulated and not brief:
        console.print(f"note: {LEFT_OUT}", markup=False, soft_wrap=True)
    return run_dir


def _words(request: RunRequest) -> str:
    """The selection as command-line options."""
    if request.confirm:
        return shlex.join(["--confirm", request.confirm])
    words = [] if request.phases == tuple(PHASES) else ["--phases", ",".join(map(str, request.phases))]
    words += ["-m", request.expression] if request.expression else []
    words += ["--sanitize"] if request.sanitize else []
    return shlex.join(words) or "everything"


def _select(request: RunRequest, root: Path) -> tuple[Selected, ...]:
    """The checks that the request selects, from a pytest that only collects and refuses tests that are not checks."""
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "selected.json"
        command = [*pytest_command(root), "phases", "--collect-only", "-q", f"--select-to={answer}"]
        command.append(f"--device={request.device if simulated_sm(request.device) else 'cpu'}")
        command += ["--phase", ",".join(map(str, request.phases))]
        command += ["-m", request.expression] if request.expression else []
        command += ["--sanitize"] if request.sanitize else []
        try:
            child = subprocess.run(
                command, cwd=root, env=pytest_environment(), stdin=subprocess.DEVNULL,
                capture_output=True, text=True, timeout=_COLLECTION_LIMIT_S,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            problem = f"pytest did not finish within {_COLLECTION_LIMIT_S} s; try `pytest phases --collect-only`"
            raise ConfigurationError(f"the checks cannot be collected: {problem}") from error
        if child.returncode not in (0, 5) or not answer.exists():
            raise ConfigurationError(f"the checks cannot be collected: {_complaint(child)}")
        selected = tuple(Selected.model_validate(check) for check in json.loads(answer.read_text()))
    if not selected:
        raise ConfigurationError(f"no check is selected by {_words(request)}; `python -m verify gates` lists them all")
    return selected


def _complaint(child: subprocess.CompletedProcess[str]) -> str:
    """The line in which pytest says what is wrong, else its last line."""
    lines = [line.strip() for line in (child.stderr + "\n" + child.stdout).splitlines() if line.strip()]
    for start in ("ERROR: ", "E  "):
        if said := [line.removeprefix(start).strip() for line in lines if line.startswith(start)]:
            return said[-1] if start == "E  " else said[0]
    return lines[-1] if lines else f"pytest ended with exit code {child.returncode} and said nothing"


def _find_run(out: Path, name: str) -> Path:
    """The directory of the run with this id or path. Raises ConfigurationError naming the latest run."""
    for candidate in (out / name, Path(name)):
        if (candidate / events.MANIFEST).is_file():
            return candidate.resolve()
    known = sorted(path.parent.name for path in out.glob(f"*/{events.MANIFEST}"))
    latest = f"the latest is {known[-1]}" if known else "there are no runs yet"
    raise ConfigurationError(f"there is no run {name!r} in {out}; {latest}")


def unjudged(record: Record, run_dir: Path) -> str:
    """A sentence on the checks without a verdict because of the machine, and how to repeat them; empty without any."""
    found = [result for result in record.results if result.verdict is Verdict.INFRA]
    if not found:
        return ""
    checks = f"{len(found)} checks have" if len(found) > 1 else "1 check has"
    return (
        f"INFRA: {checks} no verdict because of the machine, not the subject, the first of them {found[0].id}; "
        f"repeat {'them' if len(found) > 1 else 'it'} with: python -m verify run --resume {_resume_name(run_dir)}"
    )


def _resume_name(run_dir: Path) -> str:
    """The value for ``--resume``: the run's id, or its directory if that is not in the default folder of runs."""
    usual = run_dir.resolve().parent == default_out().resolve()
    return run_dir.name if usual else shlex.quote(os.path.relpath(run_dir))


def _refuse_other_gpu(request: RunRequest, manifest: Manifest) -> None:
    if request.expect is not None and manifest.target != f"sm{request.expect}":
        raise ConfigurationError(
            f"--expect sm{request.expect}, but run {manifest.run_id} is for {manifest.target}; "
            "resume another run, or drop --expect"
        )


def _check_resumable(manifest: Manifest, run_dir: Path, root: Path, console: Console) -> None:
    """Refuse to resume a run whose surroundings have changed; a complete run is never refused."""
    events.drop_torn_line(run_dir)
    missing = len(_missing(manifest, run_dir))
    if not missing:
        console.print(f"run {manifest.run_id} is complete; nothing is left to run", markup=False)
        return
    if manifest.device == "cuda":
        resolve("cuda")
    device: DeviceName = "cuda" if manifest.device == "cuda" else "cpu"
    prepare(device, manifest.model)
    now = survey(device, find_subject(manifest.subject, root), root, simulated=simulated_sm(manifest.device))
    manifest.refuse(now, manifest.run_id)
    console.print(f"run {manifest.run_id}: {missing} of {len(manifest.selected)} checks are left", markup=False)


def _missing(manifest: Manifest, run_dir: Path) -> list[Selected]:
    done = events.judged(events.read_results(run_dir))
    return [check for check in manifest.selected if check.id not in done]


def _run_phases(
    run_dir: Path, root: Path, manifest: Manifest, interruption: Interruption, held: int, console: Console
) -> bool:
    """Run the remaining checks, phase by phase in each lane; True if every selected check has been tried."""
    from verify.run.progress import RunProgress

    missing = _missing(manifest, run_dir)
    lanes = lanes_of(missing, manifest.device, len(cores()))
    begun, broken, may_begin = time.monotonic(), Event(), Event()

    def carry_out(lane: Sequence[int], progress: RunProgress) -> None:
        for phase in lane:
            checks = [check for check in missing if check.phase == phase]
            if phase != _FIRST:
                may_begin.wait()
            if stopping():
                break
            with progress.phase(phase, len(checks)) as shown:
                PhaseProcess(run_dir, root, manifest, checks, stopping=stopping, held=held).run(shown)
            events.compose(run_dir, "running")
            may_begin.set()
        may_begin.set()

    def stopping() -> int:
        return interruption.count() + 2 * broken.is_set()

    if all(check.phase != _FIRST for check in missing):
        may_begin.set()
    left = [[check for check in missing if check.phase in lane] for lane in lanes]
    with RunProgress(console, left, _earlier_durations(run_dir, manifest)) as progress:
        with ThreadPoolExecutor(max(len(lanes), 1)) as pool:
            running = [pool.submit(carry_out, lane, progress) for lane in lanes]
            for lane in as_completed(running):
                if lane.exception() is not None:  # if one cannot continue, the others end too
                    broken.set()
                    may_begin.set()
        for lane in running:
            lane.result()
    if missing:
        events.append_elapsed(run_dir, time.monotonic() - begun)
    return {check.id for check in missing} <= progress.finished


def lanes_of(checks: Sequence[Selected], device: str, cores: int) -> list[list[int]]:
    """The phases in lists: the phases of a list run one after another, and the lists run in parallel.

    On a CPU with several cores there are two lists, each with one single-threaded process at a time. Slow checks
    compare times, so nothing runs in parallel with them. Nothing shares a GPU, because checks measure its memory and
    time.
    """
    phases = sorted({check.phase for check in checks})
    alone = device == "cuda" or cores < 2 or any(check.slow for check in checks)
    beside = [] if alone else [phase for phase in phases if phase in _BESIDE]
    return [lane for lane in ([phase for phase in phases if phase not in beside], beside) if lane]


def _earlier_durations(run_dir: Path, manifest: Manifest) -> dict[str, float] | None:
    """The seconds of each check in the last complete run on this machine that had them all; None without such a run."""
    wanted = {check.id for check in manifest.selected}
    for record in islice(newest_runs(run_dir.parent), _LOOKED_AT):
        found = {result.id: result.duration_s for result in record.results}
        same = (record.state, record.target, record.model) == ("complete", manifest.target, manifest.model_id)
        if same and wanted <= found.keys():
            return found
    return None


def _conclude(run_dir: Path, finished: bool, strict_soft: bool, console: Console, brief: bool) -> int:
    """Write the record, and only then print: the terminal may be gone."""
    from verify.report.verb import print_matrix

    record = events.compose(run_dir, "complete" if finished else "interrupted")
    code = exit_code(record.results, record.target, profile_of(record.subject), strict_soft=strict_soft)
    code, told_known = concluded(record, events.read_manifest(run_dir), code)
    # a closed terminal may be why the run ended, and the record is written
    with suppress(OSError):
        if not brief:
            print_matrix(record, console)
        lines = [f"record: {os.path.relpath(run_dir / events.RECORD)}"]
        lines += [told] if (told := unjudged(record, run_dir)) else []
        lines += told_known if finished else []
        if not finished and not brief:
            lines.append(f"interrupted; resume with: python -m verify run --resume {_resume_name(run_dir)}")
        console.print("\n".join(lines), markup=False, soft_wrap=True)
    return code if finished else Exit.INTERRUPTED
