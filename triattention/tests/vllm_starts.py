"""Starts vLLM's API server as a command line does, several times, each in a fork of one process that imported it.

Importing vLLM takes ten seconds and a refused start less than one. What happens after the fork is the real thing:
plugins are found and loaded, arguments parsed, the engine configured.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

_SERVER = "vllm.entrypoints.openai.api_server"
_LIMIT_S = 240


@dataclass(frozen=True)
class Start:
    """One start: arguments of the server, variables added to the environment, and code that runs before it."""

    arguments: list[str]
    environment: dict[str, str] = field(default_factory=dict)
    before: str = ""


@dataclass(frozen=True)
class End:
    """How a start ended: its exit code and everything it printed."""

    code: int
    output: str


def ends_of(starts: dict[str, Start], directory: Path) -> dict[str, End]:
    """Carry out all starts and wait for their ends; one that serves instead of ending is a TimeoutExpired."""
    jobs = directory / "starts.json"
    jobs.write_text(json.dumps({name: asdict(start) for name, start in starts.items()}))
    quiet = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(
        [sys.executable, "-m", __name__, str(jobs)], env={**os.environ, **quiet}, timeout=_LIMIT_S, check=True,
        stdin=subprocess.DEVNULL, capture_output=True,
    )  # fmt: skip
    codes = json.loads((directory / "codes.json").read_text())
    return {name: End(code, (directory / f"{name}.log").read_text(errors="replace")) for name, code in codes.items()}


def _main(jobs: Path) -> None:
    import importlib

    importlib.import_module(_SERVER)
    gc.freeze()  # else every collection in a fork looks at all of vLLM again
    codes = {}
    for name, start in json.loads(jobs.read_text()).items():
        child = os.fork()
        if child == 0:
            _become(Start(**start), jobs.parent / f"{name}.log")
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (jobs.parent / "codes.json").write_text(json.dumps(codes))


def _become(start: Start, log: Path) -> None:
    """Run the server in this process, with its output in ``log``, and end it as the interpreter would."""
    with log.open("wb") as stream:
        for descriptor in (1, 2):
            os.dup2(stream.fileno(), descriptor)
    os.environ.update(start.environment)
    sys.argv = ["api_server", *start.arguments]
    code = 0
    try:
        exec(start.before, {})
        runpy.run_module(_SERVER, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
