"""``python -m triattention.cluster``: ``run-sweep`` with its combinations on the nodes of a Ray cluster.

The files are those that ``run-sweep`` writes on one machine. Nodes hand over every finished batch, and only this
process writes. So an interrupted sweep is resumed by the same command, with or without a cluster, and a lost node costs
the batch that it was at.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import queue
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import triattention
from triattention.cli import extra_config, guarded, overrides, run_sweep
from triattention.cli.execution import dry
from triattention.cli.plan import Plan
from triattention.cli.results import Line, Results, summary_path, write_summary
from triattention.cli.summary import COLUMNS, settings_of, summarise, summary_line, table
from triattention.errors import TriAttentionError

_CONNECT_LIMIT_S, _INIT_LIMIT_S = 10.0, 60.0

#: How often the nodes are looked at while no batch arrives.
_POLL_S = 5.0

#: How many nodes may be lost with one combination, which may be what ends them.
_MOST_LOST = 3


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line and return its exit code, as ``triattention.cli.main`` does."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    return guarded(lambda: _run(sys.argv[1:] if argv is None else list(argv)))


def _run(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m triattention.cluster",
        description="Run every combination of a sweep on a node of a Ray cluster; the files are those of run-sweep.",
        epilog="Whoever reaches the address can run code on every node: use it in a trusted network only.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--address", required=True, metavar="HOST:PORT", help="of the cluster; run this on one of its nodes"
    )
    verbs = parser.add_subparsers(dest="verb", metavar="run-sweep", required=True)
    run_sweep.add_parser(verbs)
    if "run-sweep" in argv:
        place = argv.index("run-sweep") + 1
        words = extra_config.expand(overrides.joined(argv[place:]), verbs.choices["run-sweep"])
        argv = [*argv[:place], *words]
    args = parser.parse_args(argv)
    if args.workers is not None:
        raise TriAttentionError(f"--workers {args.workers} shares one machine, and the cluster has many; drop it")
    plans = plans_of(args)
    if args.dry_run:
        dry(plans)
    else:
        run_on(args.address, plans)


def plans_of(args: argparse.Namespace) -> list[Plan]:
    """The plan of every combination, as ``run-sweep`` makes them. The nodes have the device, not this machine.

    Raises TriAttentionError for ``--device auto``, which could mean another device on each node.
    """
    if args.device == "auto":
        raise TriAttentionError("--device auto could mean another one on each node; give --device cuda or cpu")
    plans: dict[str, Plan] = {}
    for dataset in args.datasets:
        for method in args.methods:
            for budget in args.budgets:
                own = {"dataset": dataset, "method": method, "budget": budget, "device": "cpu"}
                plan = Plan.of(argparse.Namespace(**{**vars(args), **own}))
                if plans.setdefault(plan.name, plan).questions != plan.questions:
                    raise TriAttentionError(f"two of the --datasets are called {plan.settings['dataset']}; rename one")
    return [_on(args.device, plan) for plan in plans.values()]


def _on(device: str, plan: Plan) -> Plan:
    options = {name: value for name, value in vars(plan.args).items() if name != "run"}
    args = argparse.Namespace(**{**options, "device": device})
    return replace(plan, args=args, settings={**plan.settings, "device": device})


@dataclass
class _Course:
    """One plan under way: its results here, the batches that are left, and the task that answers them."""

    plan: Plan
    results: Results
    left: list[int]
    task: Any = None
    lost: int = 0
    failure: str = ""


def run_on(address: str, plans: Sequence[Plan]) -> None:
    """Answer the unfinished batches of ``plans``, a plan on a node at a time, write their files, and print the table.

    Raises TriAttentionError if there is no cluster at ``address`` and, at the end, if any plan failed; the others are
    finished.
    """
    with ExitStack() as stack:
        courses = []
        for plan in plans:
            assert plan.path is not None  # run-sweep has a default for --out
            results = Results(plan, plan.path)
            stack.enter_context(results.open())
            done = results.done()
            left = [batch for batch in range(len(plan.batches)) if batch not in done]
            courses.append(_Course(plan, results, left))
            if left:
                summary_path(plan.path).unlink(missing_ok=True)  # a summary of lines that were removed since
        if any(course.left for course in courses):
            _follow(stack, address, [course for course in courses if course.left])
        rows = [["run", *COLUMNS], *(_finished(course) for course in courses)]
    print(table(rows))
    if failed := [course.plan.name for course in courses if course.failure]:
        raise TriAttentionError(
            f"{len(failed)} of {len(plans)} runs failed ({', '.join(failed)}); fix the cause and run the same command "
            "again: finished batches are kept"
        )


def _finished(course: _Course) -> list[str]:
    if course.failure:
        return [course.plan.name, "failed", *[""] * (len(COLUMNS) - 1)]
    lines = course.results.finish()
    summary = summarise(lines)
    write_summary(course.results.path, {**settings_of(lines), **summary})
    print(f"{course.plan.name}: {summary_line(summary)}")
    return [course.plan.name, *(cell(summary) for cell in COLUMNS.values())]


def _follow(stack: ExitStack, address: str, courses: list[_Course]) -> None:
    """Write each batch as it arrives, until every course has ended."""
    ray = _connected(address)
    stack.callback(ray.shutdown)  # which ends what still runs
    needs = {"GPU" if course.plan.settings["device"] == "cuda" else "CPU" for course in courses}
    asked = {"num_cpus": 1, "num_gpus": int("GPU" in needs), "max_retries": 0, "max_calls": 1}
    names = [name for name in ("OMP_NUM_THREADS", "HF_HUB_OFFLINE") if name in os.environ]
    asked["runtime_env"] = {"env_vars": {name: os.environ[name] for name in names}}
    remote = ray.remote(**asked)(_answered)
    for course in courses:
        course.task = remote.remote(_digest(), course.plan, course.left)
    while waiting := [course for course in courses if course.task is not None]:
        ready, _ = ray.wait([course.task for course in waiting], timeout=_POLL_S, fetch_local=False)
        for course in waiting:
            if course.task in ready and (why := _taken(ray, course)):
                print(f"note: {course.plan.name}: {why}; {len(course.left)} batches are tried again", file=sys.stderr)
                course.task = remote.remote(_digest(), course.plan, course.left)
        if not ready and not _any_node(ray, needs):
            for course in waiting:
                _fail(course, f"no node of the cluster has a {' or '.join(needs)}")


def _taken(ray: Any, course: _Course) -> str:
    """Take what the course's task has ready: a batch, its end or its failure; why it was lost, if it has to be tried
    again.
    """
    try:
        given = ray.get(next(course.task))
    except StopIteration:
        course.task = None
        if course.left:
            _fail(course, f"its node left out {len(course.left)} batches")
        return ""
    except ray.exceptions.RayTaskError as error:
        _fail(course, str(error).strip().splitlines()[-1])
        return ""
    except ray.exceptions.RayError as error:
        course.lost += 1
        if course.lost < _MOST_LOST:
            return f"its node was lost ({type(error).__name__})"
        _fail(course, f"{course.lost} nodes were lost with it, the last by {type(error).__name__}")
        return ""
    if isinstance(given, str):
        _fail(course, given)
        return ""
    course.results.append(given)
    course.left.remove(given[0]["batch"])
    total = len(course.plan.batches)
    print(f"{course.plan.name}: {total - len(course.left)} of {total} batches", flush=True)
    return ""


def _fail(course: _Course, why: str) -> None:
    course.task, course.failure = None, why
    print(f"note: {course.plan.name} failed: {why}", file=sys.stderr)


def _any_node(ray: Any, needs: set[str]) -> bool:
    return any(node["Alive"] and all(node["Resources"].get(name, 0) >= 1 for name in needs) for node in ray.nodes())


def _connected(address: str) -> Any:
    host, _, port = address.partition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise TriAttentionError(f"--address {address!r} is not HOST:PORT, such as 10.0.0.5:6379")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if host in ("127.0.0.1", "localhost"):
        # else Ray takes the address of a network card instead, where a cluster on loopback does not listen
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError as error:
        raise TriAttentionError("ray is not installed; run: pip install 'triattention-verify[fleet]'") from error
    if why := _refused(host, int(port), address):
        raise TriAttentionError(
            f"--address {address}: no Ray cluster can be used there ({why}); see `ray status` on its head"
        )
    ray.init(address=address, log_to_driver=False, configure_logging=False)
    return ray


def _refused(host: str, port: int, address: str) -> str:
    """Why there is no cluster to be used; empty if there is. Tried in a child, as Ray waits for minutes or ends it."""
    program = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)"
    try:
        socket.create_connection((host, port), _CONNECT_LIMIT_S).close()
        child = subprocess.run(
            [sys.executable, "-c", program, address], capture_output=True, text=True, timeout=_INIT_LIMIT_S, check=False
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {_INIT_LIMIT_S:g} s"
    except OSError as error:
        return str(error.strerror or error)
    lines = child.stderr.strip().splitlines() or [f"exit code {child.returncode}"]
    return " ".join(lines[-1].split())[:300] if child.returncode else ""


def _answered(digest: str, plan: Plan, batches: Sequence[int]) -> Iterator[Sequence[Line] | str]:
    """On a node, in a process of its own: the lines of one batch after another, or a sentence that ends the plan."""
    from triattention.cli.answering import answer_batches

    if _digest() != digest:
        yield "a node has another version of triattention; install the same one everywhere"
        return
    arrived: queue.SimpleQueue[Sequence[Line] | str | Exception | None] = queue.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        results = Results(plan, Path(folder) / "lines.jsonl")

        def answer() -> None:
            try:
                answer_batches(plan, batches, results, arrived.put)
                arrived.put(None)
            except TriAttentionError as error:
                arrived.put(str(error))
            except Exception as error:  # raised again below, in the task's own thread
                arrived.put(error)

        threading.Thread(target=answer, daemon=True).start()
        while (given := arrived.get()) is not None:
            if isinstance(given, Exception):
                raise given
            yield given
            if isinstance(given, str):
                return


def _digest() -> str:
    """The SHA-256 of this package's sources: what answers must be the same everywhere."""
    root, digest = Path(triattention.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if "tests" not in path.parts:
            digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
