"""The NVIDIA GPUs of this machine as the driver reports them (through nvidia-ml-py), without a CUDA context."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import takewhile
from types import ModuleType
from typing import TypeVar

from verify.record.schema import Gpu

_GIB = 2**30

#: No GPU has so much memory; some drivers answer with all bits set where they have no answer.
_TOO_MUCH = 2**44

_T = TypeVar("_T")

#: What to do about an error of NVML, by the name of its exception.
_STEPS = {
    "NVMLError_LibraryNotFound": "install NVIDIA's driver; in a container, start it with --gpus all",
    "NVMLError_DriverNotLoaded": "load the driver (modprobe nvidia); in a container, start it with --gpus all",
    "NVMLError_LibRmVersionMismatch": "the driver was updated while loaded; reboot, or reload its modules",
    "NVMLError_NoPermission": "check who may open /dev/nvidia*, and which devices the container was given",
    "NVMLError_GpuIsLost": "reset the card (nvidia-smi --gpu-reset) or reboot",
    "NVMLError_ResetRequired": "reset the card: nvidia-smi --gpu-reset",
    "NVMLError_OperatingSystem": "look at the driver's messages in dmesg",
    "NVMLError_Unknown": "look at the driver's messages in dmesg; in a container, check that /dev/nvidia* are there",
}

#: Reasons for which a card runs slower than it could, and that are no idle state or setting, by NVML's name.
_THROTTLED = {
    "HwSlowdown": "slowed down by the hardware",
    "HwThermalSlowdown": "too hot (hardware)",
    "SwThermalSlowdown": "too hot (driver)",
    "HwPowerBrakeSlowdown": "braked by the power supply",
}


class NvmlUnavailable(Exception):
    """The driver could not be queried; the message says why, and what to do."""


@dataclass(frozen=True, slots=True)
class Driver:
    """What NVML says: the driver's version, the newest CUDA it supports, and the GPUs that CUDA programs will see.

    ``notes`` are sentences about cards that cannot be used, or not as fast as they could, each with what to do.
    """

    version: str
    cuda: str
    gpus: tuple[Gpu, ...]
    notes: tuple[str, ...] = ()


def query() -> Driver:
    """Query the driver once. Raises NvmlUnavailable if the driver or nvidia-ml-py is missing, or NVML fails."""
    with _session() as nvml:
        cuda = _or(nvml, nvml.nvmlSystemGetCudaDriverVersion_v2, 0)
        version = _or(nvml, nvml.nvmlSystemGetDriverVersion, UNKNOWN)
        cards = _Cards(nvml)
        gpus = tuple(gpu for handle in cards.visible() if (gpu := cards.described(handle, version)) is not None)
    return Driver(version, f"{cuda // 1000}.{cuda % 1000 // 10}" if cuda else UNKNOWN, gpus, tuple(cards.notes))


#: What the driver does not tell.
UNKNOWN = "unknown"


@contextmanager
def _session() -> Iterator[ModuleType]:
    try:
        import pynvml as nvml
    except ModuleNotFoundError as error:
        raise NvmlUnavailable("nvidia-ml-py is not installed; run `make setup`") from error
    if not hasattr(nvml, "nvmlSystemGetCudaDriverVersion_v2"):
        raise NvmlUnavailable(
            "the installed pynvml is not nvidia-ml-py; run `pip install --force-reinstall nvidia-ml-py`"
        )
    try:
        nvml.nvmlInit()
        try:
            yield nvml
        finally:
            with suppress(nvml.NVMLError):
                nvml.nvmlShutdown()
    except nvml.NVMLError as error:
        raise NvmlUnavailable(_told(error)) from error


def _told(error: Exception) -> str:
    """An error of NVML, and what to do about it."""
    step = _STEPS.get(type(error).__name__, "")
    return f"{error}{step and f': {step}'}"


def _or(nvml: ModuleType, ask: Callable[[], _T], otherwise: _T) -> _T:
    """What the driver answers; ``otherwise`` where it has no answer."""
    try:
        return ask()
    except nvml.NVMLError:
        return otherwise


@dataclass
class _Cards:
    """The cards of this machine, by the driver's index; None for one that cannot be asked."""

    nvml: ModuleType
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._errors: dict[int, str] = {}
        self._all = [self._card(index) for index in range(self.nvml.nvmlDeviceGetCount())]

    def _card(self, index: int) -> object | None:
        try:
            return self.nvml.nvmlDeviceGetHandleByIndex(index)
        except self.nvml.NVMLError as error:
            self._errors[index] = _told(error)
            return None

    def visible(self) -> list[object]:
        """The handles in the order of CUDA_VISIBLE_DEVICES: indices, UUIDs or their unique prefixes, up to the first
        unknown one; none if one is named twice. Of MIG slices, CUDA shows a process only the first.

        Indices are the driver's. CUDA counts the same way under CUDA_DEVICE_ORDER=PCI_BUS_ID, which a run sets unless
        the user chose another order; if the two disagree, a check of phase 1 is INFRA.
        """
        listed = os.environ.get("CUDA_VISIBLE_DEVICES")
        self.notes += [f"card {index} cannot be asked ({why})" for index, why in self._errors.items()]
        order = os.environ.get("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
        if order != "PCI_BUS_ID" and len(self._all) > 1:
            self.notes.append(f"CUDA_DEVICE_ORDER={order}: CUDA may count the cards in another order; unset it")
        handles = [card for card in self._all if card is not None] if listed is None else self._chosen(listed)
        found = [slice_ for handle in handles if (slice_ := self._slice_of(handle)) is not None]
        slices = [handle for handle in found if _is_mig_slice(self.nvml, handle)]
        return slices[:1] or found

    def _chosen(self, listed: str) -> list[object]:
        """The handles that a value of CUDA_VISIBLE_DEVICES names, up to the first unknown name."""
        nvml = self.nvml
        named = map(self._named, (part.strip() for part in listed.split(",")))
        handles = list(takewhile(lambda handle: handle is not None, named))
        identities = [_or(nvml, lambda one=handle: nvml.nvmlDeviceGetUUID(one), handle) for handle in handles]
        if len({*map(str, identities)}) == len(handles):
            return handles
        self.notes.append(f"CUDA_VISIBLE_DEVICES={listed} names a card twice, so CUDA shows none; name each once")
        return []

    def _named(self, name: str) -> object | None:
        nvml = self.nvml
        if re.fullmatch("[0-9]{1,9}", name):
            return self._all[int(name)] if int(name) < len(self._all) else None
        if name.startswith("GPU-"):
            known = (card for card in self._all if card is not None)
            fitting = [
                card for card in known if str(_or(nvml, lambda c=card: nvml.nvmlDeviceGetUUID(c), "")).startswith(name)
            ]
            return fitting[0] if len(fitting) == 1 else None
        if not name.startswith("MIG-"):
            return None
        try:
            return nvml.nvmlDeviceGetHandleByUUID(name)
        except nvml.NVMLError as error:
            if not isinstance(error, nvml.NVMLError_InvalidArgument | nvml.NVMLError_NotFound):
                self.notes.append(f"{name} cannot be asked ({_told(error)})")
        # the older form, MIG-GPU-<UUID>/<GPU instance>/<compute instance>
        parent, _, instances = name.removeprefix("MIG-").partition("/")
        for card in self._all:
            if card is not None and parent == _or(nvml, lambda c=card: nvml.nvmlDeviceGetUUID(c), ""):
                return next((one for one in self._slices(card) if instances == self._instances(one)), None)
        return None

    def _instances(self, handle: object) -> str:
        return f"{self.nvml.nvmlDeviceGetGpuInstanceId(handle)}/{self.nvml.nvmlDeviceGetComputeInstanceId(handle)}"

    def _slices(self, card: object) -> list[object]:
        """The MIG slices of a card."""
        nvml, found = self.nvml, []
        for index in range(_or(nvml, lambda: nvml.nvmlDeviceGetMaxMigDeviceCount(card), 0)):
            with suppress(nvml.NVMLError):  # a place without a slice
                found.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(card, index))
        return found

    def _slice_of(self, handle: object) -> object | None:
        """What CUDA shows of a card: the card itself or, in MIG mode, its first slice."""
        nvml = self.nvml
        mode, _ = _or(nvml, lambda: nvml.nvmlDeviceGetMigMode(handle), (0, 0))
        if not mode or _is_mig_slice(nvml, handle):
            return handle
        slices = self._slices(handle)
        if not slices:
            self.notes.append("a card is in MIG mode and has no instance; create one (nvidia-smi mig -cgi ... -C)")
        return slices[0] if slices else None

    def described(self, handle: object, driver: str) -> Gpu | None:
        """The GPU of a handle; None, and a note, if it does not tell its compute capability."""
        nvml = self.nvml
        name = _or(nvml, lambda: nvml.nvmlDeviceGetName(handle), "") or "a GPU without a name"
        try:
            # a MIG slice has memory and a UUID of its own; its compute capability is the card's
            slice_ = _is_mig_slice(nvml, handle)
            card = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle) if slice_ else handle
            major, minor = nvml.nvmlDeviceGetCudaComputeCapability(card)
            # without a UUID, its place in this machine tells it apart from the others
            uuid = _or(nvml, lambda: nvml.nvmlDeviceGetUUID(handle), "") or nvml.nvmlDeviceGetPciInfo(card).busId
        except nvml.NVMLError as error:
            self.notes.append(f"{name} cannot be asked ({_told(error)})")
            return None
        if not (0 < major < 100 and 0 <= minor < 10):
            self.notes.append(f"{name} says that its compute capability is {major}.{minor}, which no GPU has")
            return None
        self.notes += [f"{name} is {why}, so its times count for little" for why in self._throttled(card)]
        return Gpu(
            name=name,
            uuid_sha256=hashlib.sha256(str(uuid).encode()).hexdigest(),
            sm=10 * major + minor,
            memory_gib=round(self._memory_bytes(handle) / _GIB, 2),
            driver=driver,
        )

    def _throttled(self, card: object) -> list[str]:
        nvml = self.nvml
        ask = getattr(nvml, "nvmlDeviceGetCurrentClocksEventReasons", None)
        bits = 0 if ask is None else _or(nvml, lambda: ask(card), 0)
        return [why for name, why in _THROTTLED.items() if bits & getattr(nvml, f"nvmlClocksEventReason{name}", 0)]

    def _memory_bytes(self, handle: object) -> int:
        total = _or(self.nvml, lambda: self.nvml.nvmlDeviceGetMemoryInfo(handle).total, 0)
        # unified memory (GB10, Jetson): the GPU has no memory of its own and uses the machine's
        return total if 0 < total < _TOO_MUCH else os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _is_mig_slice(nvml: ModuleType, handle: object) -> bool:
    return bool(_or(nvml, lambda: nvml.nvmlDeviceIsMigDeviceHandle(handle), False))
