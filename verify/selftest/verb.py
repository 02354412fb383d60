"""Plants the chosen faults, several in parallel, and shows which of them the suite catches."""

from __future__ import annotations

import importlib
import random
import shlex
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path
from threading import Event, Lock
from typing import TypeVar

from verify.checks import Check, catalogue
from verify.errors import ConfigurationError, Exit
from verify.files import default_out, repository_root, require_writable
from verify.machine.device import prepare
from verify.machine.processors import cores
from verify.record.kills import FOLDER, Matrix, Outcome, Row, write
from verify.record.schema import Verdict
from verify.record.without_gpu import can_be_simulated
from verify.run.manifest import survey, utc_now
from verify.run.request import parse_device, simulated_sm
from verify.run.runner import Interruption
from verify.selftest.faults import LAYERS, PTX_DEVICE, Fault, load_faults
from verify.selftest.plant import subject_key
from verify.selftest.trial import Bench, Interrupted
from verify.simulator.control import require
from verify.subject.find import find_subject

_MODEL = "embedded"

#: The checks of these phases start several servers; two such faults in parallel would starve each other.
_ALONE = frozenset({7})

#: The layers that a sample is drawn from if none is named. A fault of the vLLM plugin needs servers with it and without
#: it, which takes the three minutes that a whole sample may.
_SAMPLED = tuple(layer for layer in LAYERS if layer != "vllm")

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """The request. ``full`` are the phases whose checks run against every fault; None runs those that claim it.

    ``device`` is ``cpu``, or a simulated GPU. Raises ConfigurationError for any other.
    """

    only: Sequence[str] = ()
    sample: int | None = None
    full: Sequence[int] | None = None
    seed: int = 0
    device: str = "cpu"

    def __post_init__(self) -> None:
        if parse_device(self.device) in ("auto", "cuda"):
            raise ConfigurationError(
                f"--device {self.device} does not fit: faults are tried on cpu, or on a simulated GPU such as sim:sm90"
            )

    @property
    def words(self) -> str:
        """The selection as a command line."""
        words = list(chain.from_iterable(("--only", name) for name in self.only))
        words += ["--sample", str(self.sample), "--seed", str(self.seed)] if self.sample is not None else []
        words += ["--full", ",".join(map(str, self.full))] if self.full is not None else []
        words += ["--device", self.device] if self.device != "cpu" else []
        return shlex.join(words) or "everything"

    @property
    def suffix(self) -> str:
        """What the name of the matrix says about the request."""
        sm = simulated_sm(self.device)
        return (f".sm{sm}" if sm else "") + (".full" if self.full is not None else "")

    @property
    def partial(self) -> bool:
        return bool(self.only) or self.sample is not None


def selftest(choice: Choice, subject_name: str, jobs: int | None, form: str, out: Path | None) -> int:
    """Try the chosen faults, write the matrix, print it, and return the exit code.

    0 every fault that could be tried was caught by all that claim it; 1 one was not, or a check that should catch it
    fails without it; 2 interrupted, finished results are kept. Raises ConfigurationError for a subject that cannot be
    copied, a selection without a fault, a fault that no longer applies, and an ``out`` that cannot be written.
    """
    from verify.selftest.terminal import false_claims, print_matrix

    if jobs is not None and jobs < 1:
        raise ConfigurationError(f"--jobs {jobs} tries nothing; give 1 or more")
    if out is not None and out.is_dir():
        raise ConfigurationError(f"--out {out} is a folder; name a file")
    root = repository_root()
    subject = find_subject(subject_name, root)
    if not (subject.name == "bundled" or subject.source.startswith("checkout:")):
        raise ConfigurationError(f"--subject {subject_name} cannot be copied; give bundled, or the path of a checkout")
    checks = list(catalogue())
    faults = chosen(choice, [fault for fault in load_faults() if fault.fits(subject_key(subject))])
    faults = _on_the_device(choice, faults, checks)
    plan = [(fault, _checks_for(fault, choice, checks)) for fault in faults]
    path = out or default_out().parent / FOLDER.name / f"{subject_key(subject)}{choice.suffix}.json"
    kept = out is not None or not choice.partial
    if kept:
        require_writable(path.parent)
    prepare("cpu", _MODEL)
    with Interruption() as interruption:
        bench = Bench(root, subject, survey("cpu", subject, root), _MODEL, 0, interruption.count, choice.device)
        for sm in sorted({sm for fault in faults if (sm := simulated_sm(bench.device_of(fault)))}):
            require(sm)
        try:
            rows = _tried(bench, plan, jobs or len(cores()))
        except Interrupted:
            print(
                "verify: interrupted; finished results are kept, and the same command continues from them",
                file=sys.stderr,
            )
            return Exit.INTERRUPTED
    if choice.full is not None:
        claims = [{check.id for check in fault.claimed(checks)} for fault, _ in plan]
        rows = [row.without_bystanders(claimed) for row, claimed in zip(rows, claims, strict=True)]
    matrix = Matrix(
        time_utc=utc_now(), subject=bench.surroundings.subject_info,
        instrument_sha256=bench.surroundings.instrument_sha256, versions=bench.versions, device=choice.device,
        selection=choice.words, seed=choice.seed, rows=rows, idle=_idle(choice, rows, checks),
    )  # fmt: skip
    if kept:
        write(matrix, path)
    print_matrix(matrix, form, path if kept else None)
    return Exit.FAILED if any(map(_uncaught, rows)) or false_claims(matrix) else Exit.OK


def _uncaught(row: Row) -> bool:
    """Whether nothing caught the fault, although not all of its checks are skipped here; or whether something objected
    to what is not a fault.
    """
    if row.outcome is Outcome.NOT_RUN:
        return any(cell.verdict != f"{Verdict.SKIP} without the fault" for cell in row.cells)
    return row.outcome in (Outcome.SURVIVED, Outcome.FALSE_ALARM)


def _on_the_device(choice: Choice, faults: Sequence[Fault], checks: Sequence[Check]) -> list[Fault]:
    """Those of the faults that have a check which runs on the device: on a CPU all of them.

    Raises ConfigurationError if there is none.
    """
    if simulated_sm(choice.device) is None:
        return [*faults]
    found = [
        fault for fault in faults if not fault.records and any(can_be_simulated(c.spec) for c in fault.claimed(checks))
    ]
    if not found:
        raise ConfigurationError(f"no check of these faults can run on {choice.device}; choose others, or --device cpu")
    return found


def chosen(choice: Choice, faults: Sequence[Fault]) -> list[Fault]:
    """The faults that ``only`` names by id or layer, or a seeded sample of them that is spread over the layers.

    A sample has faults of the vLLM plugin only if ``only`` names them. Raises ConfigurationError for a name that is
    neither, and for a selection without a fault.
    """
    known = {*LAYERS, *(fault.id for fault in faults)}
    if unknown := [name for name in choice.only if name not in known]:
        meant = "".join(f", such as {fault.id}" for fault in faults if fault.name == unknown[0])
        raise ConfigurationError(
            f"--only {unknown[0]} is not a planted fault of this subject; give an id{meant}, or a layer: "
            f"{', '.join(LAYERS)}"
        )
    if choice.sample is not None and choice.sample < 1:
        raise ConfigurationError(f"--sample {choice.sample} tries nothing; give 1 or more")
    wanted = {*(choice.only or (LAYERS if choice.sample is None else _SAMPLED))}
    found = [fault for fault in faults if {fault.id, fault.layer} & wanted]
    if not found:
        raise ConfigurationError("no fault can be planted in this subject; give it edits in verify/selftest/faults/")
    if choice.sample is None:
        return found
    draw = random.Random(choice.seed)
    by_layer = [[fault for fault in found if fault.layer == layer] for layer in LAYERS]
    for layer in by_layer:
        draw.shuffle(layer)
    draw.shuffle(by_layer)
    in_turn = [fault for turn in zip_longest(*by_layer) for fault in turn if fault is not None]
    taken = {fault.id for fault in in_turn[: choice.sample]}
    return [fault for fault in found if fault.id in taken]


def _checks_for(fault: Fault, choice: Choice, checks: Sequence[Check]) -> list[Check]:
    if fault.records:
        return []
    claimed = fault.claimed(checks)
    if choice.full is None:
        return claimed
    device = PTX_DEVICE if fault.ptx else choice.device
    more = {check.id for check in checks if check.phase in choice.full and _runs_on(device, check)}
    return [check for check in checks if check in claimed or check.id in more]


def _runs_on(device: str, check: Check) -> bool:
    """Whether a run on a CPU or on a simulated GPU includes the check: it needs no GPU, and it is not slow."""
    if simulated_sm(device) is not None and not can_be_simulated(check.spec):
        return False
    file, _, test = check.node.partition("::")
    function = getattr(importlib.import_module(f"phases.{Path(file).stem}"), test.partition("[")[0])
    slow = any(mark.name == "slow" for mark in getattr(function, "pytestmark", ()))
    return check.applies_to("emulated") and not slow


def _idle(choice: Choice, rows: Iterable[Row], checks: Iterable[Check]) -> list[str]:
    """The families of checks in a run on the device that killed nothing."""
    killed = {cell.check.rpartition(".")[0] for row in rows for cell in row.killers}
    families = dict.fromkeys(check.spec.family for check in checks if _runs_on(choice.device, check))
    return [family for family in families if family not in killed]


def _tried(bench: Bench, plan: Sequence[tuple[Fault, list[Check]]], jobs: int) -> list[Row]:
    """A row for each fault, in the order of the plan; first each check is run without a fault."""
    from verify.selftest.terminal import Progress

    needed = {(bench.device_of(fault), check.id): check for fault, checks in plan for check in checks}
    split: dict[tuple[str, int], list[Check]] = {}
    for (device, _), check in sorted(needed.items(), key=lambda one: one[1].phase):
        split.setdefault((device, check.phase), []).append(check)
    begun = time.monotonic()
    with Progress(len(plan)) as progress:
        progress.doing(f"running {len(needed)} checks without a fault")
        parts = [(part, device) for (device, _), part in split.items()]
        found = _side_by_side(bench.baseline, parts, jobs, [_alone(part) for part, _ in parts])
        baseline: dict[str, dict[str, Verdict]] = {}
        for (_, device), verdicts in zip(parts, found, strict=True):
            baseline.setdefault(device, {}).update(verdicts)
        progress.doing(f"planting {len(plan)} faults")
        calls = [(fault, checks, baseline.get(bench.device_of(fault), {})) for fault, checks in plan]
        rows = _side_by_side(bench.row, calls, jobs, [_alone(checks) for _, checks in plan], progress.finished)
    progress.note(f"{time.monotonic() - begun:.0f} s")
    return rows


def _alone(checks: Iterable[Check]) -> bool:
    return any(check.phase in _ALONE for check in checks)


def _side_by_side(
    function: Callable[..., T], calls: Sequence[tuple], jobs: int, alone: Sequence[bool],
    done: Callable[[T], None] = lambda result: None,
) -> list[T]:  # fmt: skip
    """The results of the calls in their order, ``jobs`` in parallel, but at most one of the ``alone`` ones at a time.

    Raises what a call raises, once the running ones are done; no other begins.
    """
    results: dict[int, T] = {}
    waiting = {kind: [number for number, lonely in enumerate(alone) if lonely is kind][::-1] for kind in (True, False)}
    telling, broken = Lock(), Event()

    def work(*kinds: bool) -> None:
        for kind in kinds:
            while not broken.is_set():
                try:
                    number = waiting[kind].pop()
                except IndexError:
                    break
                try:
                    result = function(*calls[number])
                except BaseException:
                    broken.set()
                    raise
                with telling:
                    results[number] = result
                    done(result)

    with ThreadPoolExecutor(jobs) as pool:
        workers = [pool.submit(work, True, False), *(pool.submit(work, False) for _ in range(jobs - 1))]
        for one in workers:
            one.result()
    return [results[number] for number in range(len(calls))]
