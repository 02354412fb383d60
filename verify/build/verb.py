"""``python -m verify compile``: what a compiler can show about GPUs that are not present."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from verify.architectures import parse_targets
from verify.build.builder import LIMIT_S, Order, Progress, compile_ahead, prepare
from verify.build.compiler import Answer
from verify.build.records import failed_unwaived, records_of
from verify.checks import catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import cache_folder, default_out, repository_root, require_writable, writable
from verify.judge.variants import DEFAULT, FULL
from verify.machine.processors import cores
from verify.record.builds import BuildVerdict, Compilation
from verify.record.known_failures import told_waived
from verify.record.reading import write_record
from verify.record.schema import Record
from verify.run.manifest import new_run_id
from verify.subject.find import find_subject
from verify.subject.known_failures import read_known_failures


def compile_verb(
    sm: str,
    *,
    kernels: str | None = None,
    full: bool = False,
    subject: str = "bundled",
    jobs: int | None = None,
    limit_s: float | None = None,
    fresh: bool = False,
    as_json: bool = False,
    out: Path | None = None,
) -> int:
    """Build, write a record for each GPU, print the table, and return the exit code of ``python -m verify compile``.

    0 everything that the toolchain can build was built (soft failures are warnings, known failures are waived), 1 a
    kernel was not built, 3 nothing can be built for any of the GPUs. Raises ConfigurationError when the request cannot
    be carried out or the records cannot be written.
    """
    root, out = repository_root(), (out or default_out()).resolve()
    order = _order(sm, kernels, full, subject, jobs, limit_s, fresh, root)
    if out.exists() and not out.is_dir():
        raise ConfigurationError(f"--out {out} is not a directory; name a directory for the records")
    require_writable(out)
    known_failures = read_known_failures(order.subject.source, root, catalogue())
    prepare()
    info = order.subject.info()
    with _interruptible():
        compilations, imported = _with_progress(order)
        words = _words(order, sm, full)
        records = records_of(order, info, compilations, words, out, root, imported, known_failures)
    folder, wrong = _write(records, out), failed_unwaived(compilations, records)
    if as_json:
        from verify.report.documents import compilations_json

        print(compilations_json(compilations), end="")
    else:
        from verify.build.terminal import print_compilations

        print_compilations(compilations, records, os.path.relpath(folder))
        for record in records:
            if told := told_waived(record.results, alone=not wrong):
                print(f"{record.target}: {told}")
    if wrong:
        return Exit.FAILED
    if not any(build.verdict is BuildVerdict.OK for one in compilations for build in one.builds):
        sys.stdout.flush()
        print("verify: nothing can be built for any of these GPUs, so nothing is known about them", file=sys.stderr)
        return Exit.CANNOT
    return Exit.OK


def _order(
    sm: str,
    kernels: str | None,
    full: bool,
    subject: str,
    jobs: int | None,
    limit_s: float | None,
    fresh: bool,
    root: Path,
) -> Order:
    architectures = parse_targets(sm)
    names = tuple(name.strip() for name in kernels.split(",")) if kernels is not None else ()
    if kernels is not None and not all(names):
        raise ConfigurationError(f"--kernels {kernels!r} has an empty name; give names such as score_kernel")
    if jobs is not None and jobs < 1:
        raise ConfigurationError(f"--jobs {jobs} builds nothing; give 1 or more")
    if limit_s is not None and not 0 < limit_s <= 3600:
        raise ConfigurationError(f"--timeout {limit_s:g} is out of range; give up to 3600 seconds")
    return Order(
        subject=find_subject(subject, root),
        architectures=architectures,
        variants=FULL if full else DEFAULT,
        kernels=names,
        jobs=jobs or len(cores()),
        limit_s=limit_s or LIMIT_S,
        fresh=fresh,
    )


def _words(order: Order, sm: str, full: bool) -> str:
    """The request as a command line, without local paths."""
    words = ["compile", "--sm", sm]
    words += ["--kernels", ",".join(order.kernels)] if order.kernels else []
    return shlex.join([*words, *(["--full"] if full else [])])


@contextmanager
def _interruptible() -> Iterator[None]:
    """Make SIGTERM and SIGHUP end the builds as Ctrl-C does, with no process left behind."""

    def stop(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    # nohup ignores SIGHUP, so that the process outlives its terminal
    wanted = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is not signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in wanted}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _with_progress(order: Order) -> tuple[list[Compilation], list[Path]]:
    """Compile, with progress on stderr: a bar on a terminal, elsewhere a heartbeat, and a line at the end.

    Returns what was built, and the files imported to capture the launches.
    """
    from rich.console import Console

    from verify.heartbeat import Heartbeat, bar

    console = Console(stderr=True, highlight=False)
    begun, made = time.monotonic(), 0

    def told() -> str:
        building = shown.tasks[task]
        total, last = building.total or "some", building.fields["last"]
        return f"{made} of {total} builds for {len(order.architectures)} GPUs, {last}"

    shown = bar(console, "last")
    with shown, Heartbeat(console, told):
        task = shown.add_task("building", total=None, last="capturing what the subject launches")

        def planned(number: int) -> None:
            shown.update(task, total=(shown.tasks[task].total or 0) + number, last="starting")

        def ended(what: str, answer: Answer) -> None:
            nonlocal made
            made += 1
            shown.update(task, advance=1, last=what)
            if answer.verdict in (BuildVerdict.CRASH, BuildVerdict.TIMEOUT):
                console.print(f"  {answer.verdict} {what}: {answer.message}", markup=False, soft_wrap=True)

        imported: list[Path] = []
        compilations = compile_ahead(order, Progress(imported.extend, planned, ended))
    kept = "" if made else "; everything was cached"
    console.print(f"{made} builds in {time.monotonic() - begun:.1f} s{kept}", markup=False)
    return compilations, imported


def _write(records: Sequence[Record], out: Path) -> Path:
    """Write one directory with a record for each GPU. Raises ConfigurationError, and leaves nothing, if that fails."""
    folder = out / new_run_id("compiled")
    try:
        for record in records:
            write_record(record, folder / f"{record.target}.json")
    except OSError as error:
        for file in folder.glob("*"):
            file.unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
        cached = "the builds are cached, so " if writable(cache_folder()) else ""
        raise ConfigurationError(
            f"the records cannot be written to {folder} ({error.strerror}); {cached}make room or choose another "
            "--out and run again"
        ) from error
    return folder
