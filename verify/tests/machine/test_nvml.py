"""NVML read through a stand-in for nvidia-ml-py, because few machines have MIG slices, unified memory and two GPUs."""

from __future__ import annotations

import hashlib
import sys
from ctypes import c_uint
from types import SimpleNamespace

import pynvml
import pytest

from verify.machine import nvml

CARDS = {"GPU-aaaa-1": (9, 0), "GPU-bbbb-2": (12, 1)}
SLICE = "MIG-cccc-3"


def stand_in() -> SimpleNamespace:
    """Two cards, the second with unified memory, and a MIG slice of the first; handles are UUIDs."""

    def memory(handle: str) -> SimpleNamespace:
        if handle == "GPU-bbbb-2":
            raise pynvml.NVMLError_NotSupported()
        return SimpleNamespace(total=16 * 2**30 if handle == SLICE else 141 * 2**30)

    def by_uuid(uuid: str) -> str:
        if uuid != SLICE:
            raise pynvml.NVMLError_NotFound()
        return SLICE

    return SimpleNamespace(
        NVMLError=pynvml.NVMLError,
        NVMLError_NotFound=pynvml.NVMLError_NotFound,
        NVMLError_InvalidArgument=pynvml.NVMLError_InvalidArgument,
        NVMLError_NotSupported=pynvml.NVMLError_NotSupported,
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlSystemGetCudaDriverVersion_v2=lambda: 13010,
        nvmlSystemGetDriverVersion=lambda: "590.1",
        nvmlDeviceGetCount=lambda: len(CARDS),
        nvmlDeviceGetHandleByIndex=lambda index: list(CARDS)[index],
        nvmlDeviceGetHandleByUUID=by_uuid,
        nvmlDeviceGetUUID=lambda handle: handle,
        nvmlDeviceGetName=lambda handle: f"card {handle}",
        nvmlDeviceIsMigDeviceHandle=lambda handle: c_uint(handle == SLICE),
        nvmlDeviceGetDeviceHandleFromMigDeviceHandle=lambda handle: "GPU-aaaa-1",
        nvmlDeviceGetCudaComputeCapability=lambda handle: CARDS[handle],
        nvmlDeviceGetMemoryInfo=memory,
    )


@pytest.fixture(autouse=True)
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)


def test_a_card_is_described_without_its_uuid() -> None:
    driver = nvml.query()
    assert (driver.version, driver.cuda) == ("590.1", "13.1")
    first = driver.gpus[0]
    assert (first.sm, first.memory_gib, first.driver) == (90, 141.0, "590.1")
    assert first.uuid_sha256 == hashlib.sha256(b"GPU-aaaa-1").hexdigest()


def test_a_gpu_with_unified_memory_has_the_machines() -> None:
    unified = nvml.query().gpus[1]
    assert unified.sm == 121
    assert unified.memory_gib > 0


@pytest.mark.parametrize(
    ("visible", "sms"),
    [
        ("", []),
        ("1,0", [121, 90]),
        ("GPU-bbbb", [121]),
        ("1, 7, 0", [121]),
        ("-1", []),
        (SLICE, [90]),
        ("MIG-none", []),
    ],
)
def test_only_visible_gpus_are_seen_and_in_their_order(
    visible: str, sms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.sm for gpu in nvml.query().gpus] == sms


def test_a_mig_slice_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SLICE)
    assert nvml.query().gpus[0].memory_gib == 16.0


def test_a_refusal_of_nvml_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise pynvml.NVMLError_NoPermission()

    monkeypatch.setattr(sys.modules["pynvml"], "nvmlInit", refuse)
    with pytest.raises(nvml.NvmlUnavailable, match="Insufficient Permissions"):
        nvml.query()


def test_an_absent_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlUnavailable, match="nvidia-ml-py is not installed"):
        nvml.query()
