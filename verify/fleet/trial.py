"""The part of ``verify gate`` that may hang: it looks at the GPU, runs the checks of level 1, and judges the record.

``verify/fleet/gate.py`` runs this module as a child process, and stops it when its time is over.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from verify.errors import ConfigurationError, Exit
from verify.files import fault_of_the_machine, write_atomic
from verify.fleet.contracts import Answer, Outcome
from verify.machine.workers import end_with_parent
from verify.run.levels import GATE, LEVELS

if TYPE_CHECKING:
    from verify.machine.nvml import Driver
    from verify.record.schema import CheckResult, Gpu, Record

#: The files in a child's folder that have its answer, or the names of the GPUs that it found.
ANSWER, SEVERAL = "answer.json", "several.json"

#: What a note of ``verify/machine/nvml.py`` on a card that does not answer says.
UNANSWERING = "cannot be asked"

#: A process of NVIDIA's that holds a card for others, and computes nothing itself.
_SERVER = "nvidia-cuda-mps-server"


def examine(
    expect: int | None,
    folder: Path,
    *,
    driver: Callable[[], Driver],
    users: Callable[[Gpu], int],
    carry_out: Callable[[int | None, Path], tuple[int, Record | None]],
    whole: bool = True,
) -> Answer:
    """The answer on the first visible GPU, which must be an sm ``expect`` if that is given.

    ``driver`` asks for the GPUs, ``users`` how many other processes compute on one, and ``carry_out`` runs level 1 in
    ``folder`` and returns the exit code and the record. If the ``whole`` machine is meant, no card may be lost.
    """
    from verify.machine.nvml import NvmlUnavailable

    try:
        found = driver()
    except NvmlUnavailable as error:
        return Answer(Outcome.NO_GPU, f"no GPU: {error}")
    if not found.gpus:
        return Answer(Outcome.NO_GPU, f"no GPU: {'; '.join(found.notes) or 'the driver shows none'}")
    if whole and (gone := lost(found)):
        return Answer(Outcome.UNJUDGED, "; ".join(gone))
    gpu = found.gpus[0]
    about = {"gpu": gpu.name, "target": f"sm{gpu.sm}", "driver": gpu.driver}
    if expect is not None and gpu.sm != expect:
        return Answer(Outcome.WRONG_GPU, f"sm{expect} was expected, this is sm{gpu.sm} ({gpu.name})", about)
    if others := users(gpu):
        return Answer(Outcome.BUSY, f"{others} other processes compute on the sm{gpu.sm} ({gpu.name})", about)
    code, record = carry_out(expect, folder)
    if code == Exit.INTERRUPTED or record is None:
        return Answer(Outcome.INTERRUPTED, "the checks were interrupted", about)
    answer = judged(record)
    return Answer(answer.outcome, answer.words, about | answer.details)


def judged(record: Record) -> Answer:
    """What a record of level 1 says. Only hardware evidence counts, and every check of the level must have it."""
    from verify.record.schema import FAILING, NOT_OFFERED, Verdict

    details = {"checks": {one.id: str(one.verdict) for one in record.results}}
    if record.kind != "hardware":
        return Answer(Outcome.NO_GPU, f"the checks were not run on a GPU ({record.kind})", details)
    wrong = (FAILING | NOT_OFFERED) - {Verdict.INFRA, Verdict.ERROR}
    if failed := _failed(record.results, "hard", wrong):
        return Answer(Outcome.HARD, f"{record.target}: {_worst(failed)}", details)
    passed = {one.id for one in record.results if one.verdict is Verdict.PASS and one.evidence == "hardware"}
    if missing := sorted(GATE - passed):
        without = next((one for one in record.results if one.id in missing), None)
        why = _worst([without]) if without else f"{missing[0]} has no result"
        return Answer(Outcome.UNJUDGED, f"{record.target}: {why}", details)
    if failed := _failed(record.results, "soft", wrong):
        return Answer(Outcome.SOFT, f"{record.target}: {_worst(failed)}", details)
    assert record.environment.gpu is not None  # as the schema demands of hardware evidence
    words = f"{len(passed)} checks passed on {record.target} ({record.environment.gpu.name})"
    return Answer(Outcome.PASS, words, details)


def _failed(results: Iterable[CheckResult], gate: str, wrong: frozenset[Any]) -> list[CheckResult]:
    return [one for one in results if one.gate == gate and one.verdict in wrong]


def _worst(results: list[CheckResult]) -> str:
    """The first of the results in words."""
    first = results[0]
    more = f" and {len(results) - 1} more" if len(results) > 1 else ""
    return f"{first.id} {first.code or first.verdict}{more}: {first.said}".rstrip(": ")


def users_of(gpu: Gpu) -> int:
    """How many processes compute on a card, without this one; 0 where the driver does not tell."""
    import pynvml as nvml

    found = 0
    nvml.nvmlInit()
    try:
        with suppress(nvml.NVMLError):  # MIG slices and some virtual GPUs do not tell
            for index in range(nvml.nvmlDeviceGetCount()):
                card = nvml.nvmlDeviceGetHandleByIndex(index)
                if hashlib.sha256(str(nvml.nvmlDeviceGetUUID(card)).encode()).hexdigest() == gpu.uuid_sha256:
                    running = nvml.nvmlDeviceGetComputeRunningProcesses(card)
                    found = sum(not _serves(nvml, one.pid) for one in running)
    finally:
        nvml.nvmlShutdown()
    return found


def _serves(nvml: Any, pid: int) -> bool:
    with suppress(nvml.NVMLError):  # a process of another container has no name here
        return str(nvml.nvmlSystemGetProcessName(pid)).endswith(_SERVER)
    return False


def _level_one(expect: int | None, folder: Path) -> tuple[int, Record | None]:
    from rich.console import Console

    from verify.record.reading import read_record
    from verify.run.events import RECORD
    from verify.run.request import RunRequest
    from verify.run.runner import carry_out

    request = RunRequest(device="cuda", expect=expect, out=folder, **LEVELS[1])
    code, run_dir = carry_out(request, Console(file=sys.stderr, highlight=False), brief=True)
    return code, None if run_dir is None else read_record(run_dir / RECORD)


def main(words: list[str]) -> None:
    """Examine the GPU that CUDA_VISIBLE_DEVICES names, and write the answer; or write the names of several GPUs.

    ``words``: the folder, the SM that is expected (or ``any``), and ``one`` if no more than one GPU is meant.
    """
    from verify.machine.nvml import query

    folder, expect = Path(words[0]), None if words[1] == "any" else int(words[1])
    driver = cache(query)  # asked once; a driver that does not answer is asked again
    try:
        whole = words[2:] != ["one"]
        if whole and (names := several(driver)):
            write_atomic(folder / SEVERAL, json.dumps(names))
            return
        answer = examine(expect, folder, driver=driver, users=users_of, carry_out=_level_one, whole=whole)
    except ConfigurationError as error:  # about this machine: the options were right
        answer = Answer(Outcome.UNJUDGED, str(error))
    except (OSError, ModuleNotFoundError) as error:
        if not (sentence := fault_of_the_machine(error)):
            raise
        answer = Answer(Outcome.UNJUDGED, sentence)
    write_answer(folder, answer)


def several(driver: Callable[[], Driver]) -> list[str]:
    """The names, for CUDA_VISIBLE_DEVICES, of the GPUs if more than one is visible."""
    from verify.machine.nvml import NvmlUnavailable

    try:
        found = driver()
    except NvmlUnavailable:
        return []
    if len(found.gpus) < 2 or lost(found):
        return []
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return [str(index) for index in range(len(found.gpus))] if listed is None else listed.split(",")[: len(found.gpus)]


def lost(driver: Driver) -> list[str]:
    """What the driver says about cards that it cannot ask any more."""
    return [note for note in driver.notes if UNANSWERING in note]


def write_answer(folder: Path, answer: Answer) -> None:
    content = {"outcome": answer.outcome, "words": answer.words, "details": answer.details}
    write_atomic(folder / ANSWER, json.dumps(content))


def read_answer(folder: Path) -> Answer | None:
    """The answer in the child's folder; None if it ended without one."""
    with suppress(OSError, ValueError, KeyError):
        content = json.loads((folder / ANSWER).read_text("utf-8"))
        return Answer(Outcome(content["outcome"]), content["words"], content["details"])
    return None


def read_several(folder: Path) -> list[str]:
    """The names of the GPUs that the child found; none if it examined one itself."""
    with suppress(OSError, ValueError):
        return list(json.loads((folder / SEVERAL).read_text("utf-8")))
    return []


def alone(words: list[str]) -> None:
    """``main`` in a process that does not outlive the gate, whatever ended that, and then removes its folder."""
    gate = os.getppid()
    end_with_parent(signal.SIGTERM)  # a run then ends its phases
    try:
        main(words)
    finally:
        if os.getppid() != gate:
            shutil.rmtree(words[0], ignore_errors=True)


if __name__ == "__main__":
    if not os.environ.get("PATH"):
        os.environ["PATH"] = os.defpath  # a Slurm prolog has none, and Triton calls a C compiler
    alone(sys.argv[1:])
