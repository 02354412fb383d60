"""The fixtures of checks: the subject, the device, the seed, and where to put numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from verify.architectures import parse_target
from verify.checks import Draw, Measure, derive_seed
from verify.errors import ConfigurationError, Wrong
from verify.machine.environment import localise
from verify.machine.processors import cores
from verify.record.builds import Build, Compilation
from verify.record.curves import Curve, clash
from verify.record.headroom import BY_DESIGN
from verify.record.schema import Measurement
from verify.run.recorder import CHOICE, CURVES, MEASUREMENTS, id_of
from verify.session import SESSION
from verify.subject.subject import Subject

#: Short enough for the time limit of the first check that asks for the builds, even if all of them hang. Launching a
#: kernel shows a failed build too.
_BUILD_LIMIT_S = 10.0


@pytest.fixture(scope="session")
def subject(pytestconfig: pytest.Config) -> Subject:
    """The implementation under test, importable in this process."""
    found = pytestconfig.stash[SESSION].subject
    found.activate()
    return found


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """``cpu`` (kernels run in the interpreter) or ``cuda``."""
    return pytestconfig.stash[SESSION].device.name


@pytest.fixture(scope="session")
def target(pytestconfig: pytest.Config) -> str:
    """``emulated``, or the GPU as ``sm90``; for checks only."""
    return pytestconfig.stash[SESSION].manifest.target


@pytest.fixture(scope="session")
def model_name(pytestconfig: pytest.Config) -> str:
    """The model that ``--model`` names."""
    return pytestconfig.stash[SESSION].model


@pytest.fixture(scope="session")
def compilation(pytestconfig: pytest.Config) -> Compilation | None:
    """The default kernels, built ahead of time for this run's GPU; None if the run has no GPU.

    Their resources are kept in a record next to the run's own.
    """
    session = pytestconfig.stash[SESSION]
    if session.device.name == "cpu":
        return None
    from verify.build.builder import Order, Progress, compile_ahead
    from verify.build.records import records_of
    from verify.judge.variants import DEFAULT
    from verify.record.reading import write_record

    manifest = session.manifest
    order = Order(
        session.subject,
        (parse_target(manifest.target),),
        DEFAULT,
        jobs=len(cores()),
        limit_s=_BUILD_LIMIT_S,
    )
    imported: list[Path] = []
    found = compile_ahead(order, Progress(imported.extend))
    (kept,) = records_of(order, manifest.subject_info, found, manifest.selection, None, session.root, imported)
    try:
        write_record(kept, session.run_dir / f"{manifest.target}.json")
    except OSError as error:
        raise ConfigurationError(
            f"the record of the builds cannot be written next to the run's ({error.strerror})"
        ) from error
    return found[0]


@pytest.fixture
def builds(request: pytest.FixtureRequest) -> list[Build]:
    """The builds for this run's GPU that the case (a variant) needs; none on a CPU, or if building was not possible."""
    try:
        compilation = request.getfixturevalue("compilation")
    except ConfigurationError:  # p3.resources reports it; a kernel that cannot be built ahead of time may still run
        return []
    return compilation.of(request.node.callspec.id) if compilation else []


@pytest.fixture(scope="session")
def last_compilation(pytestconfig: pytest.Config) -> Compilation | None:
    """The builds in the last record of this run's GPU that has builds of the subject."""
    from verify.build.resources import Earlier

    session = pytestconfig.stash[SESSION]
    manifest = session.manifest
    return Earlier.load().last_of(
        manifest.target,
        session.subject.source,
        manifest.subject_info.content_sha256,
        toolchain=manifest.environment.triton,
    )


@pytest.fixture
def seed(request: pytest.FixtureRequest) -> int:
    """A 32-bit seed that depends only on the run's seed and the check's id."""
    return derive_seed(request.config.stash[SESSION].seed, id_of(request.node))


@pytest.fixture
def measure(request: pytest.FixtureRequest) -> Measure:
    """``measure(name, measured, allowed, *, unit="", where="", cause="")``: record a number, fail outside its bound,
    for this ``cause`` if the check knows it.
    """
    session = request.config.stash[SESSION]
    repeat = session.manifest.repeat_command(request.node.nodeid, session.root)
    taken, family = request.node.stash[MEASUREMENTS], id_of(request.node).rpartition(".")[0]

    def measure(
        name: str, measured: float, allowed: float, *, unit: str = "", where: str = "", cause: str = ""
    ) -> None:
        __tracebackhide__ = True
        where = localise(where, session.root, session.manifest.places)
        numbers = {"measured": float(measured), "allowed": float(allowed)}
        found = Measurement(name=name, **numbers, unit=unit, where=where, by_design=family in BY_DESIGN)
        taken.append(found)
        if not found.within:
            raise Wrong(f"{found.told}; repeat with: {repeat}", cause)

    return measure


@pytest.fixture
def choose(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """``choose(words)``: record which of several lawful readings of the method the subject follows."""

    def choose(words: str) -> None:
        request.node.stash[CHOICE] = words

    return choose


@pytest.fixture
def curve(request: pytest.FixtureRequest) -> Draw:
    """``curve(name, points, *, x, y)``: record ``(x, y)`` pairs, thinned, for one plot with the check's other curves.

    Raises ValueError for points that do not form a curve, a name that is taken, or axes that differ from the first
    curve's.
    """
    drawn = request.node.stash[CURVES]

    def curve(name: str, points: Iterable[tuple[float, float]], *, x: str, y: str) -> None:
        found = Curve.of(name, points, x=x, y=y)
        if wrong := clash([*drawn, found]):
            raise ValueError(wrong)
        drawn.append(found)

    return curve
