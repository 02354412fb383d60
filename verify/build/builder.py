"""Builds a subject's kernels ahead of time, for architectures that need not be present.

``capture`` finds what the subject launches and ``compiler`` builds it, each in processes of their own. This module runs
them, caches their answers by source and toolchain, and combines the answers.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from verify.architectures import Architecture
from verify.build.capture import ANSWER, Captured, file_digest
from verify.build.compiler import Answer, Job
from verify.errors import ConfigurationError
from verify.files import IMPORT_ROOT, cache_folder, keep, kept_place, repository_root
from verify.judge.problems import Shape
from verify.judge.variants import widened
from verify.machine.environment import NOT_INSTALLED, localise, ptxas_versions, variables, version_of
from verify.machine.workers import Pool, Worker, WorkerDied, WorkerHung
from verify.record.builds import NOT_OFFERED, WRONG, Build, BuildVerdict, Compilation
from verify.record.digest import digest_of
from verify.record.strict import Strict
from verify.subject.launches import Exchanged, Launch, Tensor
from verify.subject.subject import Subject

#: Default time limit of one build; the slowest known build takes two seconds.
LIMIT_S = 60.0

_CAPTURE_LIMIT_S = 300
_SOURCES_LIMIT_S = 120.0

#: Files that determine how a launch is captured, built and read; a change of one invalidates the cache.
_OWN = (
    *(
        "architectures.py",
        "build/capture.py",
        "build/compiler.py",
        "build/control.py",
        "build/meanings.py",
        "build/registers.py",
        "build/sass.py",
        "build/warp.py",
    ),
    *("judge/offers.py", "judge/problems.py", "judge/variants.py", "record/builds.py", "record/strict.py"),
    *("subject/launches.py", "subject/offered.py", "subject/refusal.py", "subject/subject.py"),
)

_USEFUL = re.compile(r"error|fatal|assert|abort", re.IGNORECASE)

#: The suite's own kernel: a toolchain that cannot build it for an architecture can build nothing for it.
_CONTROL = Launch(
    module="verify.build.control",
    attribute="add_kernel",
    kernel="add_kernel",
    arguments={name: Tensor(element="fp32", aligned=True) for name in ("x_ptr", "y_ptr", "out_ptr")} | {"n": 128},
    grid=(1,),
    options={},
)


class Kept(Exchanged):
    """What a subject launches, by variant, and the source digest of each kernel, by ``Launch.place``.

    A kernel without a digest is rebuilt each time. ``files`` has the digests of the files imported to find this out.
    """

    captured: dict[str, Captured]
    sources: dict[str, str | None]
    files: dict[str, str]

    @property
    def current(self) -> bool:
        """Whether no file has changed since."""
        return all(file_digest(Path(name)) == digest for name, digest in self.files.items())


@dataclass(frozen=True, slots=True)
class Order:
    """What to build: the variants by name, for which architectures, and how.

    ``kernels`` names the only kernels to build; empty means all. ``jobs`` builds run in parallel, each for at most
    ``limit_s`` seconds. ``fresh`` ignores cached builds.
    """

    subject: Subject
    architectures: tuple[Architecture, ...]
    variants: Mapping[str, Shape]
    kernels: tuple[str, ...] = ()
    jobs: int = 1
    limit_s: float = LIMIT_S
    fresh: bool = False


@dataclass(frozen=True, slots=True)
class Progress:
    """Callbacks of a running order: ``imported`` gets the files imported to capture the launches, ``planned`` the
    number of builds to make, ``ended`` each build that has ended.
    """

    imported: Callable[[Iterable[Path]], None] = lambda files: None
    planned: Callable[[int], None] = lambda count: None
    ended: Callable[[str, Answer], None] = lambda what, answer: None


def prepare() -> None:
    """Set the environment variables that determine how kernels are built, in this process and its children.

    Raises ConfigurationError when a variable would build every architecture as another one.
    """
    if target := os.environ.get("TRITON_OVERRIDE_ARCH"):
        raise ConfigurationError(f"TRITON_OVERRIDE_ARCH={target} would build every architecture as that one; unset it")
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")


def compile_ahead(order: Order, progress: Progress = Progress()) -> list[Compilation]:
    """Carry out an order: one Compilation per architecture, in their order.

    A build that fails, crashes or hangs does not affect the others. Raises ConfigurationError when the subject's
    launches cannot be captured, the subject has no kernel of a name in ``kernels``, or Triton is not installed.
    """
    if version_of("triton") == NOT_INSTALLED:
        raise ConfigurationError("nothing can be built: triton is not installed; run `make setup`")
    try:
        with Pool("verify.build.compiler", _environment(order.subject), order.jobs) as pool:
            return _Compiling(order, progress, pool).run()
    except OSError as error:
        raise ConfigurationError(
            f"nothing can be built: {error}; free some space, or point TMPDIR elsewhere"
        ) from error


class _Compiling:
    """One order being carried out."""

    def __init__(self, order: Order, progress: Progress, pool: Pool) -> None:
        self._order, self._progress, self._pool = order, progress, pool
        self._toolchain = {
            "triton": version_of("triton"),
            "ptxas": ptxas_versions(),
            # neither the choice of GPU nor the number of threads changes what is built
            "variables": {name: os.environ.get(name) for name in variables() if not name.startswith(("CUDA_", "OMP_"))},
            "own": digest_of([IMPORT_ROOT / "verify" / name for name in _OWN], IMPORT_ROOT),
        }

    def run(self) -> list[Compilation]:
        kept = self._kept()
        self._progress.imported(Path(file) for file in kept.files)
        launches, unlaunched = self._chosen(kept)
        controls = {
            (sm, 0): Job(launch=_CONTROL, keys=128, sm=sm, limit_s=self._order.limit_s)
            for sm in (architecture.sm for architecture in self._order.architectures)
        }
        control = self._built(controls, kept.sources)
        known = [sm for sm, _ in controls if not _is_gap(control[sm, 0])]
        jobs = {
            (sm, place): Job(launch=launch, keys=keys, sm=sm, limit_s=self._order.limit_s)
            for sm in known
            for place, (launch, keys, _, _) in enumerate(launches)
        }
        answers = self._built(jobs, kept.sources)
        return [
            Compilation(
                sm=sm,
                triton=self._toolchain["triton"],
                ptxas=control[sm, 0].ptxas or "unknown",
                toolchain=BuildVerdict.OK if sm in known else control[sm, 0].verdict,
                gap="" if sm in known else self._without_places(control[sm, 0].message),
                builds=[
                    self._build(launch, names, answers[sm, place], tuned=tuned)
                    for place, (launch, _, names, tuned) in enumerate(launches)
                ] if sm in known else [],
                unlaunched=unlaunched,
            )
            for sm, _ in controls
        ]  # fmt: skip

    def _chosen(self, kept: Kept) -> tuple[list[tuple[Launch, int, list[str], bool]], dict[str, str]]:
        """The distinct launches, each with the number of keys it scores, its variants and whether it has alternatives;
        and, by name, why a variant launches nothing.
        """
        names = {launch.kernel for captured in kept.captured.values() for launch in chain(*captured.launches)}
        if unknown := [name for name in self._order.kernels if name not in names]:
            known = ", ".join(sorted(names)) or "none at all"
            raise ConfigurationError(f"the subject launches no kernel {unknown[0]!r}; it launches {known}")
        chosen: dict[tuple[str, int, bool], tuple[Launch, int, list[str], bool]] = {}
        for name, shape in self._order.variants.items():
            wide = widened(shape)
            keys = wide.b * wide.h * wide.n
            for alternatives in kept.captured[name].launches:
                tuned = len(alternatives) > 1
                for launch in alternatives:
                    if self._order.kernels and launch.kernel not in self._order.kernels:
                        continue
                    entry = chosen.setdefault((launch.model_dump_json(), keys, tuned), (launch, keys, [], tuned))
                    if name not in entry[2]:
                        entry[2].append(name)
        problems = {
            name: self._without_places(captured.problem) for name, captured in kept.captured.items() if captured.problem
        }
        return list(chosen.values()), problems

    def _kept(self) -> Kept:
        """What the subject launches, captured again only if the subject or the variants have changed."""
        subject = self._order.subject
        names = {name: asdict(shape) for name, shape in self._order.variants.items()}
        place = self._place("captured", subject.content_sha256(), names)
        if (kept := self._read(place, Kept)) is not None and kept.current:
            return kept
        captured, files = _ask(subject, names)
        launches = [_CONTROL, *(launch for one in captured.values() for launch in chain(*one.launches))]
        kernels = {launch.place: launch for launch in launches}
        question = {"sources": [launch.model_dump() for launch in kernels.values()]}
        try:
            answer = next(self._pool.each(lambda worker, job: worker.ask(job, _SOURCES_LIMIT_S), [question]))
        except (WorkerDied, WorkerHung) as error:
            said = _last(error.said) if isinstance(error, WorkerDied) else str(error)
            raise ConfigurationError(
                f"the kernels of subject {subject.name!r} cannot be imported in the compiler's process ({said}); "
                "define them at the top level of their module"
            ) from error
        kept = Kept(captured=captured, sources=dict(zip(kernels, answer["sources"], strict=True)), files=files)
        # a problem is not cached, because it may have been a shortage of memory
        if not any(one.problem for one in captured.values()):
            self._write(place, kept)
        return kept

    def _built(
        self, jobs: Mapping[tuple[int, int], Job], sources: Mapping[str, str | None]
    ) -> dict[tuple[int, int], Answer]:
        """The answers to ``jobs``, from the cache for the same kernel and toolchain."""
        places = {
            # the time limit does not change what is built
            key: self._place("built", source, job.model_dump(exclude={"limit_s"}))
            for key, job in jobs.items()
            if (source := sources[job.launch.place]) is not None
        }
        answers = {key: found for key, place in places.items() if (found := self._read(place, Answer)) is not None}
        missing = [key for key in jobs if key not in answers]
        self._progress.planned(len(missing))
        for key, answer in self._pool.each(lambda worker, key: (key, _answer(worker, jobs[key])), missing):
            answers[key] = answer
            if answer.lasting and key in places:
                self._write(places[key], answer)
            self._progress.ended(f"sm{key[0]} {jobs[key].launch.kernel}", answer)
        return answers

    def _build(self, launch: Launch, variants: Sequence[str], answer: Answer, *, tuned: bool) -> Build:
        known = answer.model_dump(exclude={"lasting", "passed_over", "ptxas", "message"})
        return Build(
            kernel=launch.kernel,
            variants=list(variants),
            options=launch.options,
            constants=launch.constants,
            alternative=tuned and (answer.verdict is BuildVerdict.OK or answer.passed_over),
            message=self._without_places(answer.message),
            **known,
        )

    def _without_places(self, message: str) -> str:
        return localise(message, repository_root(), {self._order.subject.root: "<subject>"})

    def _place(self, kind: str, *parts: Any) -> Path:
        return kept_place(cache_folder() / "compile" / kind, parts, self._toolchain)

    def _read(self, place: Path, kind: type[Any]) -> Any | None:
        """The cached value at ``place``; None if it is missing or unreadable, or the order is ``fresh``."""
        if self._order.fresh:
            return None
        try:
            return kind.model_validate_json(place.read_bytes())
        except (OSError, ValidationError):
            return None

    def _write(self, place: Path, value: Strict) -> None:
        keep(place, value.model_dump_json() + "\n")


def _environment(subject: Subject, **own: str) -> dict[str, str]:
    """The environment of a child process that imports the subject and this package."""
    inherited = subject.environment()
    inherited.pop("TRITON_INTERPRET", None)
    # the PTX is read as well as the cubin
    inherited.pop("TRITON_STORE_BINARY_ONLY", None)
    # the path of the source is not part of what is built, and would be in its digest
    inherited["TRITON_DISABLE_LINE_INFO"] = "1"
    path = os.pathsep.join([inherited["PYTHONPATH"], str(IMPORT_ROOT)])
    return {**inherited, "PYTHONPATH": path, **own}


def _ask(subject: Subject, names: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, Captured], dict[str, str]]:
    """What the subject launches, by variant, and the digests of the files imported to find out."""
    question = {"subject": subject.describe(), "variants": names}
    try:
        child = subprocess.run(
            [sys.executable, "-m", "verify.build.capture"], input=json.dumps(question),
            env=_environment(subject, TRITON_INTERPRET="1"), capture_output=True, text=True, timeout=_CAPTURE_LIMIT_S,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise ConfigurationError(
            f"subject {subject.name!r} did not say what it launches within {_CAPTURE_LIMIT_S} s; "
            "try `python -m verify run --phase 3`"
        ) from error
    # a subject may print too, even at interpreter exit
    answers = [line for line in child.stdout.splitlines() if line.startswith(ANSWER)]
    if child.returncode or not answers:
        raise ConfigurationError(
            f"subject {subject.name!r} cannot say what it launches ({_last(child.stderr)}); "
            "try `python -m verify run --phase 3`"
        )
    answer = json.loads(answers[-1].removeprefix(ANSWER))
    if "refused" in answer:
        raise ConfigurationError(answer["refused"])
    return {name: Captured.model_validate(one) for name, one in answer["captured"].items()}, answer["files"]


def _answer(worker: Worker, job: Job) -> Answer:
    """A worker's answer to a job: TIMEOUT if the worker hangs, CRASH if it dies."""
    try:
        return Answer.model_validate(worker.ask(job.model_dump(mode="json"), job.limit_s))
    except WorkerHung as error:
        return Answer(verdict=BuildVerdict.TIMEOUT, message=str(error), lasting=False, duration_s=job.limit_s)
    except WorkerDied as error:
        said = _last(error.said)
        message = f"the compiler's process {error.how}" + (f": {said}" if said else " and printed nothing")
        return Answer(verdict=BuildVerdict.CRASH, message=message, lasting=error.by_itself)
    except OSError as error:
        return Answer(verdict=BuildVerdict.CRASH, message=f"{type(error).__name__}: {error}", lasting=False)


def _last(text: str) -> str:
    """The last line of ``text`` that reports an error, else its last line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    complaints = [line for line in lines if _USEFUL.search(line)]
    return (complaints or lines or [""])[-1]


def _is_gap(control: Answer) -> bool:
    """Whether the toolchain cannot build for the architecture; a control that was killed or hung proves nothing."""
    return control.verdict is not BuildVerdict.OK and control.lasting


def failed(compilations: Iterable[Compilation]) -> bool:
    """Whether a kernel was not built although the toolchain supports the architecture, or a variant launches none."""
    return any(
        (not one.gap and any(not problem.startswith(NOT_OFFERED) for problem in one.unlaunched.values()))
        or any(build.verdict in WRONG for build in one.needed)
        for one in compilations
    )
