"""The process that speaks to Ray for a fleet's command: it answers JSON lines (``verify/machine/workers.py``).

Ray ends its process where it loses a cluster, and may wait for one for minutes; here that costs the command nothing.
"""

from __future__ import annotations

import base64
import json
import os
import socket
import sys
from contextlib import redirect_stdout
from typing import Any

from verify.architectures import known_targets
from verify.errors import ConfigurationError
from verify.fleet import course, node
from verify.machine.workers import end_with_parent

#: Where this suite's actors have their names.
NAMESPACE = "triattention"

#: The value of ``--address`` that starts Ray on this machine, for as long as the command runs.
LOCAL = "local"

_CONNECT_LIMIT_S = 10.0

#: The port of a head's GCS, and that of its server for ``ray://``.
_PORT, _CLIENT_PORT = 6379, 10001

#: Records are small: Ray's own default takes a third of the machine's memory.
_STORE_BYTES = 200 * 2**20


def prepare(address: str) -> None:
    """Set what Ray reads from the environment when it is imported. ``local`` listens on this machine alone."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address == LOCAL or _place(address)[0] in ("127.0.0.1", "localhost"):
        # else Ray takes the address of a network card instead, where a cluster on loopback does not listen
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"


def connect(address: str) -> None:
    """Connect this process. Raises ConfigurationError if Ray is not installed, or the address is not a cluster."""
    prepare(address)
    try:
        import ray
    except ModuleNotFoundError as error:
        raise ConfigurationError("ray is not installed; run: pip install 'triattention-verify[fleet]'") from error
    options: dict[str, Any] = {"namespace": NAMESPACE, "log_to_driver": False, "configure_logging": False}
    if address == LOCAL:
        options |= {"resources": _own_resources(), "include_dashboard": False, "object_store_memory": _STORE_BYTES}
        options |= {"_node_ip_address": "127.0.0.1"}
    else:
        host, port = _place(address)
        try:
            socket.create_connection((host, port), _CONNECT_LIMIT_S).close()
        except OSError as error:
            raise ConfigurationError(
                f"--address {address}: nothing answers on port {port} of {host} ({error.strerror or error}); "
                "start Ray there (`ray start --head`), or correct the address"
            ) from error
        options["address"] = address if "://" in address else f"{host}:{port}"
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError, ImportError) as error:
        raise ConfigurationError(_refused(address, error)) from error


def disconnect() -> None:
    """Leave the cluster, and end it if it was started here."""
    import ray

    ray.shutdown()


def _refused(address: str, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return (
            f"--address {address} has another Ray or Python than this machine, install the same on both: {text[:300]}"
        )
    if "local Raylet" in text or "raylet" in text.lower():
        return (
            f"this machine is not a node of the cluster at {address}; run the command on a node, or use the cluster's "
            f"ray:// address (port {_CLIENT_PORT})"
        )
    if isinstance(error, ImportError) or "ray[client]" in text:
        return f"--address {address} needs Ray's client; run: pip install 'ray[client]'"
    return f"--address {address} cannot be used ({text[:300]}); see `ray status` on the head of the cluster"


def _place(address: str) -> tuple[str, int]:
    """Host and port of an address. Raises ConfigurationError if it has neither form."""
    client = address.startswith("ray://")
    host, _, port = address.removeprefix("ray://").partition(":")
    usual = _CLIENT_PORT if client else _PORT
    if not host or "/" in host or (port and not (port.isdigit() and 0 < int(port) < 65536)):
        raise ConfigurationError(
            f"--address {address!r} is not one; use HOST:PORT, ray://HOST:PORT, or {LOCAL} for this machine alone"
        )
    return host, int(port or usual)


def _own_resources() -> dict[str, int]:
    """A resource for each kind of GPU here, and one for a run without."""
    from verify.machine.nvml import NvmlUnavailable, query

    found = {"emulated": 1}
    try:
        for gpu in query().gpus:
            found[f"sm{gpu.sm}"] = found.get(f"sm{gpu.sm}", 0) + 1
    except NvmlUnavailable:
        pass  # a machine without a GPU
    return found


def nodes() -> list[dict[str, Any]]:
    """Every node that the cluster knows, with its targets: how many tasks each takes at a time."""
    import ray

    names = {one.target for one in known_targets()}
    return [
        {
            "id": str(one["NodeID"])[:8], "address": one["NodeManagerAddress"], "alive": bool(one["Alive"]),
            "targets": {name: int(many) for name, many in sorted(one["Resources"].items()) if name in names},
        }
        for one in ray.nodes()
    ]  # fmt: skip


def runs() -> dict[str, dict[str, Any]]:
    """The state of every fleet run that the cluster holds, by name."""
    import ray
    from ray.util import list_named_actors

    found = {}
    for name in sorted(list_named_actors()):
        found[name] = ray.get(ray.get_actor(name).state.remote(), timeout=_CONNECT_LIMIT_S)
    return found


def start(name: str, about: dict[str, Any], jobs: list[dict[str, Any]], wait_s: float) -> None:
    """Start a run as an actor on the head of the cluster, which outlives this process."""
    import ray
    from ray import cloudpickle

    for module in (course, node):
        cloudpickle.register_pickle_by_value(module)
    carry_out = ray.remote(max_calls=1)(course.as_task(node.carry_out))
    place = {"num_cpus": 0, "resources": {"node:__internal_head__": 0.001}, "max_concurrency": 16}
    actor = ray.remote(course.Coordinator).options(name=name, lifetime="detached", **place)
    ray.get(actor.remote(about, jobs, carry_out, wait_s).state.remote(), timeout=60)


def state(name: str) -> dict[str, Any]:
    return _ask(name, "state")


def result(name: str, target: str) -> dict[str, Any]:
    """How a job ended, with its files in base64."""
    found = _ask(name, "result", target)
    files = found.get("files", {})
    return {**found, "files": {one: base64.b64encode(content).decode() for one, content in files.items()}}


def stop(name: str) -> None:
    _ask(name, "stop")


def dismiss(name: str) -> None:
    """End the actor of a run whose results have been fetched."""
    import ray

    ray.kill(ray.get_actor(name))


def _ask(name: str, method: str, *arguments: Any) -> Any:
    import ray

    return ray.get(getattr(ray.get_actor(name), method).remote(*arguments), timeout=60)


_CALLS = {one.__name__: one for one in (connect, disconnect, nodes, runs, start, state, result, stop, dismiss)}


def answer(question: dict[str, Any]) -> dict[str, Any]:
    """``{"found": value}``, or ``{"wrong": sentence}`` for a question that the user has to change."""
    try:
        return {"found": _CALLS[question["call"]](*question["given"])}
    except ConfigurationError as error:
        return {"wrong": str(error)}


def main() -> None:
    """Answer questions until stdin ends. The first line says that the process has started."""
    end_with_parent()
    with os.fdopen(int(sys.argv[1]), "w") as answers, redirect_stdout(sys.stderr):
        print(json.dumps({"ready": True}), file=answers, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
