"""The NVIDIA GPUs of this machine as the driver reports them (through nvidia-ml-py), without a CUDA context."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType

from verify.record.schema import Gpu

_GIB = 2**30


class NvmlUnavailable(Exception):
    """The driver could not be queried; the message says why."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What NVML says: the driver's version, the newest CUDA it supports, and the GPUs that CUDA programs will see."""

    version: str
    cuda: str
    gpus: tuple[Gpu, ...]


def query() -> Driver:
    """Query the driver once. Raises NvmlUnavailable if the driver or nvidia-ml-py is missing, or NVML fails."""
    with _session() as nvml:
        cuda = nvml.nvmlSystemGetCudaDriverVersion_v2()
        version = nvml.nvmlSystemGetDriverVersion()
        gpus = tuple(_gpu(nvml, handle, version) for handle in _visible(nvml))
    return Driver(version=version, cuda=f"{cuda // 1000}.{cuda % 1000 // 10}", gpus=gpus)


@contextmanager
def _session() -> Iterator[ModuleType]:
    try:
        import pynvml as nvml
    except ModuleNotFoundError as error:
        raise NvmlUnavailable("nvidia-ml-py is not installed") from error
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise NvmlUnavailable(str(error)) from error


def _visible(nvml: ModuleType) -> list[object]:
    """The handles in the order of CUDA_VISIBLE_DEVICES: indices, UUIDs or their prefixes, up to the first unknown one.

    Indices are the driver's. CUDA counts the same way under CUDA_DEVICE_ORDER=PCI_BUS_ID, which a run sets unless the
    user chose another order; if the two disagree, a check of phase 1 is INFRA.
    """
    cards = [nvml.nvmlDeviceGetHandleByIndex(index) for index in range(nvml.nvmlDeviceGetCount())]
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return cards
    handles: list[object] = []
    for name in (part.strip() for part in listed.split(",")):
        handle = _named(nvml, name, cards)
        if handle is None:
            break
        handles.append(handle)
    return handles


def _named(nvml: ModuleType, name: str, cards: list[object]) -> object | None:
    if name.isdigit():
        return cards[int(name)] if int(name) < len(cards) else None
    if name.startswith("GPU-"):
        return next((card for card in cards if nvml.nvmlDeviceGetUUID(card).startswith(name)), None)
    try:
        return nvml.nvmlDeviceGetHandleByUUID(name)
    except (nvml.NVMLError_InvalidArgument, nvml.NVMLError_NotFound):
        return None


def _gpu(nvml: ModuleType, handle: object, driver: str) -> Gpu:
    # a MIG slice has memory and a UUID of its own; its compute capability is the card's
    card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if _is_mig_slice(nvml, handle) else handle
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
    return Gpu(
        name=nvml.nvmlDeviceGetName(handle),
        uuid_sha256=hashlib.sha256(nvml.nvmlDeviceGetUUID(handle).encode()).hexdigest(),
        sm=10 * major + minor,
        memory_gib=round(_memory_bytes(nvml, handle) / _GIB, 2),
        driver=driver,
    )


def _is_mig_slice(nvml: ModuleType, handle: object) -> bool:
    try:
        return bool(nvml.nvmlDeviceIsMigDeviceHandle(handle))
    except nvml.NVMLError_NotSupported:
        return False


def _memory_bytes(nvml: ModuleType, handle: object) -> int:
    try:
        return nvml.nvmlDeviceGetMemoryInfo(handle).total
    except nvml.NVMLError_NotSupported:
        # unified memory (GB10, Jetson): the GPU has no memory of its own and uses the machine's
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
