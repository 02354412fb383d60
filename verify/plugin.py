"""The suite as a pytest plugin: its options, and which checks run in which order.

It serves ``pytest -m hard``, where one process runs every phase and writes the record, and the child processes of
``python -m verify run``, each of which runs its part of a frozen run.
"""

from __future__ import annotations

import faulthandler
import io
import json
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Generator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from verify.checks import DEFAULT_SEED, PHASES, PROFILES, catalogue, derive_seed
from verify.errors import ConfigurationError, Exit
from verify.files import IMPORT_ROOT, INSTALLED, RUNS
from verify.machine.device import Device, prepare, resolve
from verify.machine.environment import localise
from verify.machine.processors import RUN_VARIABLE, cores
from verify.machine.workers import end_with_parent
from verify.record.follow.sitecustomize import LOG
from verify.record.grounds import PACKAGE, Checkout, Grounds, follow
from verify.record.verdict import profile_of
from verify.record.without_gpu import can_be_simulated
from verify.run import events
from verify.run.conclusion import concluded
from verify.run.durations import Timekeeper, long_files
from verify.run.levels import GATE
from verify.run.manifest import Manifest, freeze, survey
from verify.run.probe import Probe
from verify.run.recorder import Recorder, id_of, in_phases, selected, spec_of
from verify.run.request import parse_device, parse_expect, parse_phases, simulated_sm
from verify.run.simulated import BRIEF, LEFT_OUT, Simulated
from verify.session import SESSION, Session
from verify.simulator.control import require
from verify.subject.deviations import read_deviations
from verify.subject.find import find_subject
from verify.subject.known_failures import read_known_failures

#: What determines where the record of a pytest session goes.
_PLACE = "folder" if INSTALLED else "checkout"

#: Phases whose checks share no set-up, and run in a random order.
_SHUFFLED = frozenset({4, 5})


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("verification", "the checks of phases/")
    group.addoption("--phase", action="append", default=[], help="run these phases only: 4, or 1,3-5; may be repeated")
    group.addoption("--subject", default="bundled", help="what to test: bundled, installed, module:NAME or =PATH")
    group.addoption("--profile", choices=tuple(PROFILES), help="what it must pass; by default what it offers")
    group.addoption(
        "--device", metavar="DEVICE", default="auto", help="auto (a GPU if torch can use one), cpu, cuda, or sim:sm120"
    )
    group.addoption("--model", default="embedded", help="the model of phase 6: embedded, or a local directory or name")
    group.addoption("--seed", type=int, default=DEFAULT_SEED, help="the run's seed; each check derives its own")
    group.addoption("--expect", metavar="SM", help="refuse to run on any other GPU: sm120")
    group.addoption("--sanitize", action="store_true", help="run the kernel checks under compute-sanitizer as well")
    group.addoption(
        "--durations-to", metavar="FILE", type=Path, help="write how long each test took; print the slowest"
    )
    group.addoption("--run-dir", type=Path, help="internal: the prepared run whose remaining checks this process runs")
    group.addoption("--select-to", type=Path, help="internal: with --collect-only, the file for the selected checks")
    group.addoption("--scratch", type=Path, help="internal: the directory of a run that leaves no record")
    group.addoption("--plant-error", type=float, help="internal: plant an error of so many tolerances; needs --scratch")
    group.addoption("--seeds", type=int, help="internal: repeat numeric checks with so many seeds; needs --scratch")


#: The files of checks, and the markers that they and their users may give.
_FILES = "p[1-8]_*.py"
_MARKERS = (
    "hard: a check whose failure means the GPU is not verified",
    "soft: a check whose failure is a warning",
    "check: the declaration of a check, put there by verify.checks.check",
    "slow: proofs with a recorded result, run with -m slow",
    "sanitize: a check under compute-sanitizer, run with --sanitize",
    "brief: some must-pass checks that launch every kind of variant of the scoring kernel, put there by the plugin",
    "gate: the few must-pass checks of `verify gate`, put there by the plugin",
)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("python_files", _FILES)
    for marker in _MARKERS:
        config.addinivalue_line("markers", marker)
    if INSTALLED or not (config.rootpath / "phases" / "__init__.py").is_file():
        # started with --pyargs in another folder: names of checks and files are relative to the folder above theirs.
        # pytest has no public way to say so here; it has already chosen the folder of its cache.
        config._rootpath = IMPORT_ROOT
    _one_process(config)
    try:
        config.stash[SESSION] = session = _session(config)
        prepare(session.device.name, session.model)
        if session.simulated and not config.option.collectonly:
            from verify.simulator.driver import install

            session.gpu = install(session.simulated)
            if session.manifest is not None and (mutation := session.manifest.mutation):
                note = partial(events.append_mutated, session.run_dir, mutation.fault)
                session.gpu.alter = mutation.alteration(note)
    except ConfigurationError as error:
        raise pytest.UsageError(str(error)) from error
    watched = config.getoption("run_dir") or config.getoption("scratch") or config.option.collectonly
    if not watched and not hasattr(config, "workerinput"):  # their parent process reports durations
        config.pluginmanager.register(Timekeeper(config.rootpath, config.getoption("durations_to")), "verify-durations")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """One process more than cores, because tests spend time waiting for hanging processes, servers and time limits."""
    return len(cores()) + 1


def _one_process(config: pytest.Config) -> None:
    """Raise UsageError if pytest-xdist would spread checks over processes, because each would write its own record."""
    phases = config.rootpath / "phases"
    named = [argument.partition("::")[0] for argument in config.args]
    places = [(config.invocation_params.dir / name).resolve() for name in named]
    checks = config.option.pyargs and any(name.partition(".")[0] == phases.name for name in named)
    checks = checks or any(place.is_relative_to(phases) or place in phases.parents for place in places)
    if config.getoption("dist", "no") != "no" and checks:
        raise pytest.UsageError(
            "-n would spread the checks of phases/ over processes, but a run is one process; drop it, or name other "
            "tests: pytest -n auto verify/tests triattention/tests"
        )


def _session(config: pytest.Config) -> Session:
    option, root = config.getoption, config.rootpath
    if option("scratch") is None and (option("plant_error") is not None or option("seeds") is not None):
        raise ConfigurationError("--plant-error and --seeds write no evidence; name a new directory with --scratch")
    if option("scratch"):
        end_with_parent()  # the parent may be a tool that holds the GPU as long as this process runs
    phases = frozenset(phase for text in option("phase") for phase in parse_phases(text)) or frozenset(PHASES)
    if run_dir := option("run_dir"):
        # when the runner's watchdog gives up on a phase, its log must show the stack of every thread
        faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
        frozen = events.read_manifest(run_dir)
        subject = find_subject(frozen.subject, root)
        simulated = simulated_sm(frozen.device)
        device = Device("cuda" if frozen.device == "cuda" else "cpu")
        return Session(root, device, subject, frozen.model, frozen.seed, phases, simulated, run_dir, frozen)
    subject = find_subject(option("subject"), root)
    subject = replace(subject, profile=option("profile") or subject.profile)
    simulated = simulated_sm(choice := parse_device(option("device")))
    if simulated and not config.option.collectonly:
        require(simulated)
    device = resolve("cpu" if simulated else choice)
    return Session(root, device, subject, option("model"), option("seed"), phases, simulated)


def pytest_report_header(config: pytest.Config) -> list[str]:
    session = config.stash[SESSION]
    where = f"{session.device.name} ({session.device.evidence})"
    notes = [session.device.note] if session.device.note else []
    if session.simulated:
        where, notes = f"sim:sm{session.simulated} (simulated)", [LEFT_OUT]
    line = f"verify: device {where}, subject {session.subject.source}, seed {session.seed}"
    return [line, *(f"verify: {note}" for note in notes)]


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    session = config.stash[SESSION]
    # the tests inside the bundled package import that package, which another subject replaces
    own = session.root / PACKAGE
    return True if session.subject.root != session.root and collection_path.is_relative_to(own) else None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    session = config.stash[SESSION]
    checks = [item for item in items if in_phases(item)]
    others = [item for item in items if not in_phases(item)]
    _lint(checks)
    if not config.getoption("scratch"):  # its parent sets a limit, for many seeds or a slow tool
        for item in checks:
            item.add_marker(pytest.mark.timeout(spec_of(item).timeout_s))
    for item in checks:
        if id_of(item) in BRIEF:
            item.add_marker(pytest.mark.brief)
        if id_of(item) in GATE:
            item.add_marker(pytest.mark.gate)
    wanted = {id_of(item) for item in checks if spec_of(item).phase in session.phases}
    if session.simulated:
        wanted &= {id_of(item) for item in checks if can_be_simulated(spec_of(item))}
    if session.manifest is None and not config.getoption("sanitize"):
        wanted -= {id_of(item) for item in checks if item.get_closest_marker("sanitize")}
    if session.manifest is not None:
        wanted &= {one.id for one in session.manifest.selected} - events.judged(events.read_results(session.run_dir))
    kept = [item for item in checks if id_of(item) in wanted]
    dropped = [item for item in checks if id_of(item) not in wanted]
    if hasattr(config, "workerinput"):
        places = long_files()
        others.sort(key=lambda item: places.get(item.nodeid.partition("::")[0], len(places)))
    if config.getoption("phase"):
        others, dropped = [], dropped + others
    if dropped:
        config.hook.pytest_deselected(items=dropped)
    items[:] = sorted(kept, key=lambda item: (spec_of(item).phase, *_turn(item, session.seed))) + others


def _turn(item: pytest.Item, seed: int) -> tuple[int, int]:
    """The sort key of a check within its phase. In phases 4 and 5 the files, and the checks in each file, are shuffled
    by the run's seed, so that no check can depend on another. In other phases they keep the order of declaration and
    may share expensive set-up.
    """
    if spec_of(item).phase not in _SHUFFLED:
        return 0, 0
    return derive_seed(seed, f"turn of {item.path.name}"), derive_seed(seed, f"turn of {id_of(item)}")


def _lint(checks: list[pytest.Item]) -> None:
    """Raise UsageError for the first test of ``phases/`` that is not a check with one gate and an id of its own."""
    seen: dict[str, str] = {}
    for item in checks:
        spec = spec_of(item)
        if spec is None:
            raise pytest.UsageError(f"{item.nodeid} has no gate; declare it with @verify.check")
        if not item.path.name.startswith(f"p{spec.phase}_"):
            raise pytest.UsageError(f"{item.nodeid} declares {spec.family}; move it to the file of phase {spec.phase}")
        gates = [gate for gate in ("hard", "soft") if item.get_closest_marker(gate)]
        if gates != [spec.gate]:
            raise pytest.UsageError(f"{item.nodeid} has the gates {' and '.join(gates)}; drop one")
        if spec.gate == "hard" and item.get_closest_marker("slow"):
            raise pytest.UsageError(
                f"{item.nodeid} is hard and slow, but a run leaves out slow checks; make it fast, or soft"
            )
        for mark in ("skip", "skipif", "xfail"):
            if item.get_closest_marker(mark):
                raise pytest.UsageError(f"{item.nodeid} is marked {mark}; use verify.skip with a code")
        if item.callspec.id not in spec.cases:
            raise pytest.UsageError(f"{item.nodeid} is parametrized outside its cases; list every combination in cases")
        if (other := seen.setdefault(id_of(item), item.nodeid)) != item.nodeid:
            raise pytest.UsageError(f"{item.nodeid} and {other} share the id {id_of(item)}; rename one")


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    # not in pytest_collection_finish, because that hook is called even after a usage error
    config, checks = session.config, [item for item in session.items if spec_of(item) is not None]
    if selection := config.getoption("select_to"):
        selection.write_text(json.dumps([selected(item).model_dump() for item in checks]))
    failed = session.testsfailed and not config.option.continue_on_collection_errors
    if config.option.collectonly or failed or not checks:
        return
    current = config.stash[SESSION]
    if current.manifest is None:
        try:
            manifest = _manifest(config, checks)
        except ConfigurationError as error:
            raise pytest.UsageError(str(error)) from error
        scratch = config.getoption("scratch")
        current.run_dir = scratch or current.root / RUNS / manifest.run_id
        try:
            events.create(current.run_dir, manifest)
        except OSError as error:
            raise pytest.UsageError(
                f"{current.run_dir} cannot be created ({error.strerror}); use a {_PLACE} that you may write to, or "
                "`python -m verify run --out DIR`"
            ) from error
        current.manifest = manifest
        if scratch:
            probe = Probe(scratch, config.getoption("plant_error") or 0.0, config.getoption("seeds"), current.seed)
            config.pluginmanager.register(probe, "verify-probe")
        config.add_cleanup(events.lock(current.run_dir).close)
    os.environ[RUN_VARIABLE] = current.manifest.run_id
    runner = os.getppid() if config.getoption("run_dir") else None
    recorder = Recorder(current.run_dir, current.manifest, current.root, current.subject, runner, _grounds(current))
    config.pluginmanager.register(recorder, "verify-recorder")
    if current.gpu is not None:
        config.pluginmanager.register(Simulated(current.gpu, current.run_dir), "verify-simulated")


def _grounds(session: Session) -> Grounds:
    """Tracks the files that results rest on; in a child of the runner this began at the start of its interpreter."""
    package = session.subject.folder
    if not (log := os.environ.get(LOG)):
        log = str(session.run_dir / "opened")
        follow(Path(log), session.root, package)
    return Grounds(Path(log), Checkout(session.root, session.subject.root, package))


def _manifest(config: pytest.Config, checks: list[pytest.Item]) -> Manifest:
    session, expect = config.stash[SESSION], config.getoption("expect")
    sm = parse_expect(expect) if expect else None
    known, source = list(catalogue()), session.subject.source
    return freeze(
        survey(session.device.name, session.subject, session.root, sm, session.simulated),
        device=f"sim:sm{session.simulated}" if session.simulated else session.device.name,
        subject=session.subject,
        model=session.model,
        seed=session.seed,
        selection=_words(config),
        selected=tuple(selected(item) for item in checks),
        deviations=read_deviations(session.subject, session.root, known),
        # what starts a scratch run asks how checks end, and decides for itself
        known_failures=() if config.getoption("scratch") else read_known_failures(source, session.root, known),
    )


def _words(config: pytest.Config) -> str:
    """The selection of checks as a command line, without the subject and the model, whose paths are local."""
    option = config.option
    chosen = {"-m": option.markexpr, "-k": option.keyword, "--phase": ",".join(option.phase)}
    paths = config.args if config.args_source is config.ArgsSource.ARGS else []
    words = [word for flag, value in chosen.items() if value for word in (flag, value)]
    words += ["--sanitize"] if option.sanitize else []
    words += ["--pyargs"] if option.pyargs else []
    if option.scratch:
        words += ["--scratch", *(["--plant-error", str(option.plant_error)] if option.plant_error else [])]
    return localise(shlex.join(["pytest", *words, *paths]), config.rootpath)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    try:
        return (yield)
    except OSError as error:  # what a check raises does not come here
        pytest.exit(f"{error.filename or 'the log of the run'} cannot be written ({error.strerror})", Exit.CANNOT)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    current = session.config.stash[SESSION]
    if current.manifest is None or session.config.getoption("run_dir"):
        return
    if session.config.getoption("scratch"):
        (current.run_dir / events.RECORD).unlink()
        return
    session.config.pluginmanager.get_plugin("verify-recorder").end_phase()
    events.append_elapsed(current.run_dir, time.perf_counter() - current.begun)
    finished = events.read_results(current.run_dir).keys() >= {check.id for check in current.manifest.selected}
    current.record = record = events.compose(current.run_dir, "complete" if finished else "interrupted")
    from verify.run.runner import exit_code

    code = exit_code(record.results, record.target, profile_of(record.subject))
    code, current.told = concluded(record, current.manifest, code)
    if code == Exit.CANNOT and session.exitstatus == pytest.ExitCode.OK:  # an entry of what is known must be changed
        session.exitstatus = pytest.ExitCode.USAGE_ERROR


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = config.stash[SESSION]
    if session.record is None:
        return
    from rich.console import Console

    from verify.report.verb import print_matrix
    from verify.run.runner import unjudged

    encoding = sys.stdout.encoding or "utf-8"
    text = io.TextIOWrapper(io.BytesIO(), encoding, errors="replace", write_through=True)
    console = Console(file=text, width=shutil.get_terminal_size().columns, force_terminal=terminalreporter.hasmarkup)
    print_matrix(session.record, console)
    terminalreporter.ensure_newline()
    terminalreporter.write(text.buffer.getvalue().decode(encoding))
    terminalreporter.write_line(f"record: {os.path.relpath(session.run_dir / events.RECORD)}")
    if told := unjudged(session.record, session.run_dir):
        terminalreporter.write_line(told)
    for told in (*session.manifest.told_before, *session.told):
        terminalreporter.write_line(told)
