"""What a node of the cluster does for a fleet run: it checks itself, runs ``verify run`` and hands over its files.

Ray carries this module to the node as code, so it uses the standard library alone: the node may have another version of
the suite, and has to be able to say so.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

#: The node's Python prints what it is: the digest of its suite, and the targets of the GPUs that Ray gave the task.
ARRIVAL = """
import json
from verify.files import repository_root
from verify.machine.nvml import NvmlUnavailable, query
from verify.record.digest import instrument_sha256
try:
    driver = query()
    gpus, why = [f"sm{gpu.sm}" for gpu in driver.gpus], "; ".join(driver.notes)
except NvmlUnavailable as error:
    gpus, why = [], str(error)
print(json.dumps({"instrument": instrument_sha256(repository_root()), "gpus": gpus, "why": why}))
"""

#: Runs a command that gets SIGTERM when the task's process ends, however that ended: a run then stops its phases.
_LEASH = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the task is gone")
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""

#: The first import of the suite, from a cold disk.
_ARRIVAL_LIMIT_S = 180.0

#: A run that is asked to stop ends its phases, and writes its record.
_STOP_LIMIT_S = 30.0

_POLL_S = 1.0
_TAIL_BYTES, _TAIL_LINES = 32_000, 20

#: What is handed over of a run's directory: all that ``verify check`` and ``--resume`` read.
_FILES = re.compile(r"(run|record|sm\d+)\.json|events\.jsonl")


def carry_out(job: Mapping[str, Any], tell: Callable[[str], object]) -> dict[str, Any]:
    """Run a job here. ``tell`` is given the progress in words, first an empty string when the job has arrived.

    The job: ``target`` (``sm90`` or ``emulated``), ``instrument`` (the digest that the suite must have), ``arrival``
    and ``command`` (words for this Python; the command is given ``--out``), ``limit_s`` (seconds for the command).

    Returns ``{"refused": sentence}`` if this node is not fit for the job. Else ``code``, the exit code or None if the
    time was over; ``files``, their contents by relative name; and ``tail``, the end of the output.
    """
    tell("")
    with tempfile.TemporaryDirectory(prefix="triattention-fleet-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        if why := _unfit(job, folder):
            return {"refused": why}
        log = folder / "log"
        words = [*job["command"], "--out", str(folder / "runs")]
        with log.open("wb") as stream, _child(words, folder, stream) as child:
            code = _followed(child, folder / "runs", job["limit_s"], tell)
        return {"code": code, "files": _files(folder / "runs"), "tail": _tail(log, folder)}


def _unfit(job: Mapping[str, Any], folder: Path) -> str:
    """Why this node cannot do the job; empty if it can."""
    log = folder / "arrival"
    with log.open("w+b") as stream:
        with _child(job["arrival"], folder, stream) as child:
            try:
                code = child.wait(_ARRIVAL_LIMIT_S)
            except subprocess.TimeoutExpired:
                return f"did not answer within {_ARRIVAL_LIMIT_S:g} s which suite it has"
        lines = _tail(log, folder).splitlines() or ["it printed nothing"]
    if code:
        return f"cannot run the suite with the Python of its Ray ({lines[-1].strip()})"
    found = json.loads(lines[-1])
    if found["instrument"] != job["instrument"]:
        return (
            f"has another version of the suite: its instrument is {found['instrument'][:12]}, "
            f"and this one's is {job['instrument'][:12]}"
        )
    if job["target"] == "emulated" or found["gpus"][:1] == [job["target"]]:
        return ""
    has = f"its GPU is an {found['gpus'][0]}" if found["gpus"] else f"it shows no GPU ({found['why'] or 'no reason'})"
    return f"offers {job['target']}, but {has}"


@contextmanager
def _child(words: Sequence[str], folder: Path, output: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A child of this Python in a session of its own; whatever happens, nothing of it is left at the end."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    own.pop("PYTHONBREAKPOINT", None)  # Ray's own debugger
    child = subprocess.Popen(
        [sys.executable, "-c", _LEASH, str(os.getpid()), *words], cwd=folder, env=own, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:
        yield child
    finally:
        _end(child)


def _end(child: subprocess.Popen[bytes]) -> None:
    if child.poll() is None:
        child.terminate()
        with suppress(subprocess.TimeoutExpired):
            child.wait(_STOP_LIMIT_S)
    # phases have sessions of their own; without their parent they could not be found any more
    for process in [*_descendants(child.pid), child.pid]:
        with suppress(ProcessLookupError, PermissionError):
            os.kill(process, signal.SIGKILL)
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _descendants(process: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        with suppress(OSError):
            for one in map(int, children.read_text().split()):
                found += [one, *_descendants(one)]
    return found


def _followed(child: subprocess.Popen[bytes], runs: Path, limit_s: float, tell: Callable[[str], object]) -> int | None:
    """Wait for the child, and tell its progress whenever that changes. Its exit code; None if it ran out of time."""
    deadline, told = time.monotonic() + limit_s, ""
    while time.monotonic() < deadline:
        with suppress(subprocess.TimeoutExpired):
            return child.wait(_POLL_S)
        if (now := progress(runs)) != told:
            told = now
            tell(now)
    return None


def progress(runs: Path) -> str:
    """Where the run in a folder of runs is, as ``phase 4, 120 of 342``; empty before there is one."""
    phase, done = "", set()
    for log in runs.glob("*/events.jsonl"):
        for line in log.read_bytes().splitlines():
            with suppress(ValueError, KeyError, TypeError):  # the line that is being written
                event = json.loads(line)
                if event["event"] == "start":
                    phase = event["id"][1]
                elif event["event"] == "result":
                    done.add(event["result"]["id"])
        with suppress(OSError, ValueError, KeyError):
            total = len(json.loads((log.parent / "run.json").read_bytes())["selected"])
            return f"phase {phase}, {len(done)} of {total}" if phase else f"{total} checks selected"
    return ""


def _files(runs: Path) -> dict[str, bytes]:
    found = (path for path in sorted(runs.glob("*/*")) if _FILES.fullmatch(path.name))
    return {path.relative_to(runs).as_posix(): path.read_bytes() for path in found}


def _tail(log: Path, folder: Path) -> str:
    """The last lines of a log, without the names of this machine and of the temporary folder."""
    with log.open("rb") as stream:
        stream.seek(max(0, stream.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = stream.read().decode(errors="replace")
    text = text.replace(str(folder), "<tmp>").replace(os.uname().nodename, "<host>")
    return "\n".join([line for line in text.splitlines() if line.strip()][-_TAIL_LINES:])
