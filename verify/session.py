"""What the pytest process of a run, or of one part of a run, was asked to do."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from verify.machine.device import Device
from verify.record.schema import Record
from verify.run.manifest import Manifest
from verify.subject.subject import Subject

if TYPE_CHECKING:
    from verify.simulator.driver import SimulatedGpu


@dataclass(slots=True)
class Session:
    """What this process was asked to do, and what it has found out since."""

    root: Path
    device: Device
    subject: Subject
    model: str
    seed: int
    phases: frozenset[int]
    simulated: int | None = None  #: the SM of a simulated GPU; the device is then a CPU
    run_dir: Path | None = None
    manifest: Manifest | None = None
    record: Record | None = None
    gpu: SimulatedGpu | None = None
    told: list[str] = field(default_factory=list)
    begun: float = field(default_factory=time.perf_counter)


SESSION = pytest.StashKey[Session]()
