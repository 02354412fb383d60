"""The course of a fleet run: which node tries which job, what happens when a node is lost, and what has been done.

A detached actor on the head of the cluster, which Ray carries there as code, holds it. So a run goes on if the command
that started it dies, and its records can be fetched later, as long as the head lives. Standard library only, as in
``node``; whatever calls Ray is in ``Nodes``.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

#: How often the actor looks at nodes and tasks.
_STEP_S = 0.5

#: A node with room has begun a job by then: Ray starts a process for it.
_BEGIN_S = 60.0

#: How long tasks that were cancelled may take to end their children.
_STOP_LIMIT_S = 60.0


class Cluster(Protocol):
    """What a course asks of a cluster. Nodes are named by their Ray id."""

    def offering(self, target: str) -> list[str]:
        """The nodes that are alive and have the resource ``target``."""

    def submit(self, job: Mapping[str, Any], node: str, attempt: int) -> Any:
        """Start a job on this node and no other."""

    def outcome(self, task: Any) -> dict[str, Any] | None:
        """What ``node.carry_out`` returned; ``{"lost": why}`` if it cannot return; None while it goes on."""

    def cancel(self, task: Any) -> None:
        """Ask a task to end."""


@dataclass
class Leg:
    """One job of a course: where it is tried, where it was, and how it ended."""

    job: Mapping[str, Any]
    since: float
    words: str = ""
    tried: dict[str, str] = field(default_factory=dict)  #: why each node did not do it
    arrived: bool = False  #: whether any attempt has begun
    node: str = ""
    task: Any = None
    attempt: int = 0
    begun: bool = False  #: whether the current attempt has
    result: dict[str, Any] | None = None


class Course:
    """Tries every job on one node after the other until one does it, and none twice on the same node.

    A job that no node begins within ``wait_s`` seconds ends with ``{"absent": "NO_RUNNER", "why": sentence}``, one that
    was begun and that no further node can take with ``NO_RECORD``, a stopped one with ``{"stopped": True}``, and any
    other with what ``node.carry_out`` returned.
    """

    def __init__(
        self,
        jobs: Sequence[Mapping[str, Any]],
        cluster: Cluster,
        wait_s: float,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        self._cluster, self._wait_s, self._now = cluster, wait_s, now
        self.legs = {job["target"]: Leg(job, now()) for job in jobs}
        self.notes: list[str] = []
        self._stopped: float | None = None

    @property
    def ended(self) -> bool:
        return all(leg.result is not None for leg in self.legs.values())

    def stop(self) -> None:
        """Cancel what goes on, and begin nothing more; finished jobs keep their results."""
        if self._stopped is None:
            self._stopped = self._now()
            for leg in self.legs.values():
                if leg.task is not None and leg.result is None:
                    self._cluster.cancel(leg.task)

    def told(self, target: str, attempt: int, words: str) -> None:
        """Note the progress of an attempt, if it is the current one."""
        leg = self.legs[target]
        if leg.attempt == attempt and leg.task is not None:
            leg.begun = leg.arrived = True
            leg.words = f"node {leg.node[:8]}: {words}" if words else f"node {leg.node[:8]} has begun"

    def step(self) -> None:
        """Look at every job once."""
        for target, leg in self.legs.items():
            if leg.result is not None:
                continue
            if leg.task is not None:
                self._look(target, leg)
            elif self._stopped is not None:
                leg.result = {"stopped": True}
            else:
                self._place(target, leg)

    def _running(self) -> list[Leg]:
        return [leg for leg in self.legs.values() if leg.task is not None and leg.result is None]

    def _place(self, target: str, leg: Leg) -> None:
        left = [node for node in self._cluster.offering(target) if node not in leg.tried]
        if left:
            # first where this run does the least
            node = min(left, key=lambda one: sum(other.node == one for other in self._running()))
            leg.attempt, leg.node, leg.begun, leg.since = leg.attempt + 1, node, False, self._now()
            leg.words = f"waits for node {node[:8]}"
            leg.task = self._cluster.submit(leg.job, node, leg.attempt)
            return
        leg.words = f"waits for {'another' if leg.tried else 'a'} node with {target}"
        if self._now() - leg.since >= self._wait_s:
            whys = "; ".join(f"node {node[:8]} {why}" for node, why in leg.tried.items())
            nobody = f"no {'other ' if leg.tried else ''}node with the resource {target} within {self._wait_s:g} s"
            kind = "NO_RECORD" if leg.arrived else "NO_RUNNER"
            leg.result = {"absent": kind, "why": "; ".join(filter(None, (whys, nobody)))}

    def _look(self, target: str, leg: Leg) -> None:
        outcome = self._cluster.outcome(leg.task)
        if outcome is None:
            if self._stopped is not None and self._now() - self._stopped > _STOP_LIMIT_S:
                leg.result = {"stopped": True}
            elif self._stopped is None and not leg.begun and self._now() - leg.since > (limit_s := self._patience_s()):
                self._cluster.cancel(leg.task)
                self._failed(target, leg, f"had no room for it within {limit_s:g} s")
            return
        if self._stopped is not None and "code" not in outcome:
            leg.result = {"stopped": True}
        elif why := outcome.get("lost") or outcome.get("refused"):
            self._failed(target, leg, why)
        elif outcome["code"] == 2 and self._stopped is None:
            self._failed(target, leg, "was asked to stop, and interrupted the run")
        else:
            leg.result, leg.words = outcome, f"node {leg.node[:8]} has ended"

    def _patience_s(self) -> float:
        return max(self._wait_s, _BEGIN_S)

    def _failed(self, target: str, leg: Leg, why: str) -> None:
        self.notes.append(f"{target}: node {leg.node[:8]} {why}")
        leg.tried[leg.node], leg.task, leg.since = why, None, self._now()


class Nodes:
    """The cluster as Ray shows it to the actor; ``carry_out`` is ``node.carry_out`` as a remote function."""

    def __init__(self, carry_out: Any, told: Callable[[], Any]) -> None:
        self._carry_out, self._told = carry_out, told

    def offering(self, target: str) -> list[str]:
        import ray

        found = [one for one in ray.nodes() if one["Alive"] and one["Resources"].get(target, 0) >= 1]
        return [str(one["NodeID"]) for one in found]

    def submit(self, job: Mapping[str, Any], node: str, attempt: int) -> Any:
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        where = NodeAffinitySchedulingStrategy(node_id=node, soft=False)
        asked = {"resources": {job["target"]: 1}, "num_gpus": job["gpus"], "num_cpus": 0, "max_retries": 0}
        return self._carry_out.options(scheduling_strategy=where, **asked).remote(dict(job), self._told(), attempt)

    def outcome(self, task: Any) -> dict[str, Any] | None:
        import ray
        from ray import exceptions

        if not ray.wait([task], timeout=0)[0]:
            return None
        try:
            return ray.get(task, timeout=_STOP_LIMIT_S)
        except exceptions.RayTaskError as error:
            return {"lost": f"could not carry it out ({str(error).strip().splitlines()[-1]})"}
        except exceptions.TaskUnschedulableError:
            return {"lost": "is gone, or has no GPU that Ray could give"}
        except exceptions.RayError as error:
            return {"lost": f"was lost ({type(error).__name__})"}

    def cancel(self, task: Any) -> None:
        import ray

        ray.cancel(task, force=False)


class Coordinator:
    """The actor. A thread of its own looks at the course, so that its methods answer at once."""

    def __init__(self, about: dict[str, Any], jobs: list[dict[str, Any]], carry_out: Any, wait_s: float) -> None:
        import ray

        me = ray.get_runtime_context().current_actor
        self._about, self._lock = about, threading.Lock()
        self._course = Course(jobs, Nodes(carry_out, lambda: me), wait_s)
        threading.Thread(target=self._go, daemon=True).start()

    def _go(self) -> None:
        while True:
            with self._lock:
                self._course.step()
                if self._course.ended:
                    return
            time.sleep(_STEP_S)

    def tell(self, target: str, attempt: int, words: str) -> None:
        with self._lock:
            self._course.told(target, attempt, words)

    def state(self) -> dict[str, Any]:
        """What the run is about, each target's progress in words, every note, and which targets have ended."""
        with self._lock:
            legs = self._course.legs
            words = {target: leg.words for target, leg in legs.items()}
            done = [target for target, leg in legs.items() if leg.result is not None]
            return {"about": self._about, "words": words, "notes": list(self._course.notes), "done": done}

    def result(self, target: str) -> dict[str, Any] | None:
        with self._lock:
            return self._course.legs[target].result

    def stop(self) -> None:
        with self._lock:
            self._course.stop()


def as_task(carry_out: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """``node.carry_out`` as a task that tells its progress to the actor."""

    def task(job: dict[str, Any], coordinator: Any, attempt: int) -> dict[str, Any]:
        return carry_out(job, lambda words: coordinator.tell.remote(job["target"], attempt, words))

    return task
