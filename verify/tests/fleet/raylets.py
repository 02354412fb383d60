"""A Ray cluster of several raylets on this machine, on loopback, for as long as standard input stays open.

``python -m verify.tests.fleet.raylets '[{"emulated": 1}, {"sm90": 1, "GPU": 1}]'`` prints one JSON line: the address,
and the process of each raylet. The first node is the head. GPU is how many GPUs Ray believes in.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import redirect_stdout

#: A lost node is noticed within a few of them, and not within half a minute.
_SETTINGS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # else Ray connects to the address of a network card
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}

_STORE_BYTES = 80 * 2**20


def main() -> None:
    os.environ |= _SETTINGS
    from ray.cluster_utils import Cluster

    with redirect_stdout(sys.stderr):
        cluster, nodes = Cluster(), []
        try:
            for resources in json.loads(sys.argv[1]):
                more = {"include_dashboard": False} if not nodes else {}
                nodes.append(
                    cluster.add_node(
                        node_ip_address="127.0.0.1", num_cpus=1, num_gpus=resources.pop("GPU", 0),
                        object_store_memory=_STORE_BYTES, resources=resources, **more,
                    )
                )  # fmt: skip
            pids = [node.all_processes["raylet"][0].process.pid for node in nodes]
            print(json.dumps({"address": cluster.address, "raylets": pids}), file=sys.__stdout__, flush=True)
            sys.stdin.read()
        finally:
            cluster.shutdown()


if __name__ == "__main__":
    main()
