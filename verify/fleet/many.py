"""``python -m verify fleet``: one run on many machines, a GPU each, by way of a Ray cluster."""

from __future__ import annotations

import argparse
import os
import secrets
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from verify.architectures import EMULATED, parse_target
from verify.checks import PHASES
from verify.errors import ConfigurationError, Exit
from verify.files import default_out, repository_root, require_writable
from verify.fleet.node import ARRIVAL
from verify.fleet.results import Ended, exit_code, print_matrix, taken
from verify.heartbeat import EVERY_S
from verify.machine.workers import Worker, WorkerDied, WorkerHung
from verify.record.digest import instrument_sha256
from verify.run.request import RunRequest, parse_phases

_LINK = "verify.fleet.link"

#: Ray needs so long to start on a machine that is busy, and to give up on what is not a cluster.
_CONNECT_LIMIT_S, _ANSWER_LIMIT_S = 60.0, 90.0

#: Ray that was started here ends its processes.
_DISCONNECT_LIMIT_S = 30.0

#: How often the state of a run is asked for.
_POLL_S = 1.0


@dataclass(frozen=True, slots=True)
class FleetRequest:
    """A requested fleet run. ``gpus`` are targets; empty: all that the cluster offers. ``run`` has the options of each
    node's ``verify run``; its ``out`` is the folder here. A job may wait ``wait_s`` seconds for a node, and takes
    ``limit_s`` at most.

    Raises ConfigurationError for an unknown target, for a subject that means nothing on another machine, and for limits
    below one second.
    """

    address: str
    run: RunRequest
    gpus: tuple[str, ...] = ()
    wait_s: float = 60.0
    limit_s: float = 6 * 3600.0

    def __post_init__(self) -> None:
        for name in self.gpus:
            if parse_target(name).target != name:
                raise ConfigurationError(f"--gpus {name} is not the name of a target; use {parse_target(name).target}")
        if self.run.subject not in ("bundled", "installed") and not self.run.subject.startswith("module:"):
            raise ConfigurationError(
                f"--subject {self.run.subject} is a path, which means nothing on another machine; install it on the "
                "nodes and use installed or module:NAME"
            )
        if self.limit_s < 1 or self.wait_s < 0:
            raise ConfigurationError(
                f"--wait {self.wait_s:g} and --limit {self.limit_s / 60:g} must be 0 seconds and 1/60 minute at least"
            )

    def command(self, target: str) -> list[str]:
        """The words for the node's Python."""
        run = self.run
        words = ["--device", "cpu"] if target == EMULATED.target else ["--expect", target]
        words += [] if run.phases == tuple(PHASES) else ["--phases", ",".join(map(str, run.phases))]
        words += ["-m", run.expression] if run.expression else []
        words += ["--profile", run.profile] if run.profile else []
        return ["-m", "verify", "run", *words, "--subject", run.subject, "--seed", str(run.seed)]

    def job(self, target: str) -> dict[str, Any]:
        """What ``node.carry_out`` is given."""
        return {
            "target": target, "gpus": int(target != EMULATED.target), "arrival": ["-c", ARRIVAL],
            "instrument": instrument_sha256(repository_root()), "command": self.command(target),
            "limit_s": self.limit_s,
        }  # fmt: skip


class Link:
    """The process that speaks to the cluster at ``address``; a context manager that leaves none behind."""

    def __init__(self, address: str) -> None:
        self._address = address
        self._folder = tempfile.TemporaryDirectory(prefix="verify-", ignore_cleanup_errors=True)
        path = os.pathsep.join(filter(None, [str(repository_root()), os.environ.get("PYTHONPATH")]))
        self._worker = Worker(_LINK, {**os.environ, "PYTHONPATH": path}, Path(self._folder.name))

    def __enter__(self) -> Link:
        try:
            self.ask("connect", self._address, limit_s=_CONNECT_LIMIT_S)
        except BaseException:
            self._worker.close()
            self._folder.cleanup()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(ConfigurationError):  # it may be lost already
            self.ask("disconnect", limit_s=_DISCONNECT_LIMIT_S)
        self._worker.close()
        self._folder.cleanup()

    def ask(self, call: str, *given: Any, limit_s: float = _ANSWER_LIMIT_S) -> Any:
        """What a function of ``verify/fleet/link.py`` returns. Raises ConfigurationError, also for a lost cluster."""
        try:
            answer = self._worker.ask({"call": call, "given": given}, limit_s)
        except WorkerHung as error:
            raise ConfigurationError(f"the cluster at {self._address} gave {error}; see `ray status` there") from error
        except WorkerDied as error:
            last = next((line for line in reversed(error.said.splitlines()) if line.strip()), "it printed nothing")
            raise ConfigurationError(
                f"the cluster at {self._address} cannot be reached, or was lost ({last.strip()[-200:]}); see "
                "`ray status` there"
            ) from error
        if "wrong" in answer:
            raise ConfigurationError(answer["wrong"])
        return answer["found"]


def run(request: FleetRequest, *, job: Callable[[FleetRequest, str], Mapping[str, Any]] = FleetRequest.job) -> int:
    """Carry out ``request``, print progress and one matrix, and return the exit code: 2 interrupted, else 1 if a HARD
    check failed on any target, else 3 if a target has no record or no verdict.

    ``job`` makes the job of a target. Tests give another one; the command line cannot.
    """
    require_writable(request.run.out)
    with Link(request.address) as link:
        offered = {name for node in link.ask("nodes") if node["alive"] for name in node["targets"]}
        targets = request.gpus or tuple(sorted(offered, key=_order))
        if not targets:
            raise ConfigurationError(
                f"no node of the cluster at {request.address} says which GPU it has; start its Ray with "
                "--resources '{\"sm90\": 1}', or name the --gpus"
            )
        name = f"fleet-{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(2)}"
        about = {"out": str(request.run.out), "subject": request.run.subject, "targets": list(targets)}
        link.ask("start", name, about, [dict(job(request, target)) for target in targets], request.wait_s)
        print(f"run {name}: {', '.join(targets)}", flush=True)
        return _attended(link, name, request.address, request.run.out, stop=True)


def _order(target: str) -> int:
    return int(target.removeprefix("sm")) if target != EMULATED.target else 0


def status(address: str) -> int:
    """Print the cluster's nodes with their targets, and the fleet runs that it holds."""
    with Link(address) as link:
        for node in link.ask("nodes"):
            offers = ", ".join(f"{many} {target}" for target, many in node["targets"].items()) or "no GPU named"
            print(f"node {node['id']} at {node['address']}: {'alive' if node['alive'] else 'lost'}, {offers}")
        runs = link.ask("runs")
        for name, state in runs.items():
            print(f"run {name}:")
            for target, words in state["words"].items():
                print(f"  {target}: {words}{' (ended)' if target in state['done'] else ''}")
        print("" if runs else "no fleet run\n", end="")
    return Exit.OK


def collect(address: str, name: str | None, out: Path | None) -> int:
    """Attend a run whose command died, as that would have done. Ctrl-C leaves the run alone."""
    with Link(address) as link:
        runs = link.ask("runs")
        if name is None and len(runs) == 1:
            (name,) = runs
        if name not in runs:
            known = f"it holds {', '.join(runs)}" if runs else "it holds none"
            which = "name one of the runs" if name is None and runs else f"there is no fleet run {name or ''}".rstrip()
            raise ConfigurationError(f"{which} of the cluster at {address}: {known}")
        folder = out or default_out()
        require_writable(folder)
        return _attended(link, name, address, folder, stop=False)


def _attended(link: Link, name: str, address: str, out: Path, *, stop: bool) -> int:
    """Follow a run to its end, write what it leaves, print the matrix, and return the exit code."""
    from verify.run.runner import Interruption

    ended: dict[str, Ended] = {}
    shown = Shown()
    with Interruption() as interruption:
        stopping = 0
        while True:
            try:
                state = link.ask("state", name)
                shown.show(state)
                for target in state["done"]:
                    if target not in ended:
                        ended[target] = taken(target, link.ask("result", name, target), out)
                        print(ended[target].said, flush=True)
            except ConfigurationError as error:
                again = (
                    "" if address == "local" else f"; go on: python -m verify fleet collect --address {address} {name}"
                )
                raise ConfigurationError(f"{error}{again}") from error
            if len(ended) == len(state["words"]):
                break
            if interruption.count() > stopping:
                stopping = interruption.count()
                if not stop or stopping > 1:
                    print(f"run {name} goes on; fetch it: python -m verify fleet collect --address {address} {name}")
                    return Exit.INTERRUPTED
                print("stopping the run on every node; Ctrl-C again leaves at once", flush=True)
                link.ask("stop", name)
            time.sleep(_POLL_S)
        with suppress(ConfigurationError):  # everything is here; the cluster may go
            link.ask("dismiss", name)
    print_matrix(ended, state["about"]["subject"])
    return exit_code(one.code for one in ended.values())


class Shown:
    """Prints notes at once, and the progress of a target when its phase changes or after half a minute."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._notes = 0
        self._last: dict[str, tuple[str, str, float]] = {}

    def show(self, state: Mapping[str, Any]) -> None:
        for note in state["notes"][self._notes :]:
            print(f"note: {note}", flush=True)
        self._notes = len(state["notes"])
        for target, words in state["words"].items():
            head, said, when = self._last.get(target, ("", "", 0.0))
            now = words.partition(",")[0]
            if (
                words
                and target not in state["done"]
                and words != said
                and (now != head or self._now() - when >= EVERY_S)
            ):
                print(f"{target}: {words}", flush=True)
                self._last[target] = (now, words, self._now())


def request_of(chosen: argparse.Namespace) -> FleetRequest:
    """The validated request of ``fleet run``. Raises ConfigurationError."""
    more = {} if chosen.phases is None else {"phases": parse_phases(chosen.phases)}
    asked = RunRequest(
        expression=chosen.expression, subject=chosen.subject, profile=chosen.profile, seed=chosen.seed,
        out=chosen.out or default_out(), **more,
    )  # fmt: skip
    names = [] if chosen.gpus is None else chosen.gpus.split(",")
    gpus = tuple(dict.fromkeys(parse_target(name).target for name in names))
    return FleetRequest(chosen.address, asked, gpus, chosen.wait, 60 * chosen.limit)
