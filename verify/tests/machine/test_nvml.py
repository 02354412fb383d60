"""NVML read through a stand-in for nvidia-ml-py, because few machines have MIG slices, unified memory and two GPUs."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Callable
from ctypes import c_uint
from types import SimpleNamespace
from typing import Never

import pynvml
import pytest

from verify.machine import nvml
from verify.report.doctor import examine, inspect_machine

CARDS = {"GPU-aaaa-1": (9, 0), "GPU-bbbb-2": (12, 1)}
SLICES = {"MIG-cccc-3": "GPU-aaaa-1", "MIG-dddd-4": "GPU-aaaa-1"}
SLICE = "MIG-cccc-3"


def fails(name: str) -> Callable[..., Never]:
    def ask(*_: object) -> Never:
        raise getattr(pynvml, f"NVMLError_{name}")()

    return ask


def stand_in(**changes: object) -> SimpleNamespace:
    """Two cards, the second with unified memory, and two MIG slices of the first; handles are UUIDs."""

    def memory(handle: str) -> SimpleNamespace:
        if handle == "GPU-bbbb-2":
            raise pynvml.NVMLError_NotSupported()
        return SimpleNamespace(total=16 * 2**30 if handle in SLICES else 141 * 2**30)

    def by_uuid(uuid: str) -> str:
        if uuid not in SLICES:
            raise pynvml.NVMLError_NotFound()
        return uuid

    def by_place(card: str, index: int) -> str:
        if card != "GPU-aaaa-1" or index not in (1, 2):
            raise pynvml.NVMLError_NotFound()
        return [*SLICES][index - 1]

    errors = {name: error for name, error in vars(pynvml).items() if name.startswith("NVMLError")}
    reasons = {name: value for name, value in vars(pynvml).items() if name.startswith("nvmlClocksEventReason")}
    answers = {
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetCudaDriverVersion_v2": lambda: 13010,
        "nvmlSystemGetDriverVersion": lambda: "590.1",
        "nvmlDeviceGetCount": lambda: len(CARDS),
        "nvmlDeviceGetHandleByIndex": lambda index: list(CARDS)[index],
        "nvmlDeviceGetHandleByUUID": by_uuid,
        "nvmlDeviceGetUUID": lambda handle: handle,
        "nvmlDeviceGetName": lambda handle: f"card {handle}",
        "nvmlDeviceIsMigDeviceHandle": lambda handle: c_uint(handle in SLICES),
        "nvmlDeviceGetDeviceHandleFromMigDeviceHandle": SLICES.get,
        "nvmlDeviceGetMigMode": lambda handle: [0, 0],
        "nvmlDeviceGetMaxMigDeviceCount": lambda card: 7,
        "nvmlDeviceGetMigDeviceHandleByIndex": by_place,
        "nvmlDeviceGetGpuInstanceId": lambda handle: 5 + [*SLICES].index(handle),
        "nvmlDeviceGetComputeInstanceId": lambda handle: 0,
        "nvmlDeviceGetCudaComputeCapability": lambda handle: CARDS[handle],
        "nvmlDeviceGetMemoryInfo": memory,
        "nvmlDeviceGetPciInfo": lambda card: SimpleNamespace(busId=f"bus of {card}"),
        "nvmlDeviceGetCurrentClocksEventReasons": lambda card: pynvml.nvmlClocksEventReasonGpuIdle,
    }
    return SimpleNamespace(**errors, **reasons, **answers | changes)


@pytest.fixture(autouse=True)
def two_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in())
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)


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
        (None, [90, 121]),
        ("", []),
        ("1,0", [121, 90]),
        ("0,-1,1", [90]),
        ("GPU-bbbb", [121]),
        ("GPU-bbbb,GPU-aaaa", [121, 90]),
        ("GPU-", []),  # of both cards
        ("GPU-none", []),
        ("GPU-bbbb,GPU-none,GPU-aaaa", [121]),
        ("1, 7, 0", [121]),
        (" 1 , 0 ", [121, 90]),
        ("-1", []),
        ("nonsense", []),
        ("1,1", []),  # twice
        ("0,GPU-aaaa", []),  # the same card
        (SLICE, [90]),
        ("MIG-cccc-3,MIG-dddd-4", [90]),  # CUDA shows the first slice only
        ("MIG-GPU-aaaa-1/6/0", [90]),
        ("MIG-GPU-aaaa-1/4/0", []),
        ("MIG-none", []),
    ],
)
def test_only_visible_gpus_are_seen_and_in_their_order(
    visible: str | None, sms: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [gpu.sm for gpu in nvml.query().gpus] == sms


def lost(index: int) -> Callable[[int], str]:
    return lambda asked: fails("GpuIsLost")() if asked == index else list(CARDS)[asked]


#: What a driver may answer: the changed answers, CUDA_VISIBLE_DEVICES, what is then seen, and what is said of it.
ANSWERS: dict[str, tuple[dict[str, object], str | None, list[int], str]] = {
    "another card is lost": (
        {"nvmlDeviceGetHandleByIndex": lost(0)}, "1", [121], "card 0 cannot be asked (GPU is lost: reset the card"
    ),
    "another card is lost, by UUID": ({"nvmlDeviceGetHandleByIndex": lost(0)}, "GPU-bbbb", [121], "card 0 cannot be"),
    "the first card is lost": ({"nvmlDeviceGetHandleByIndex": lost(0)}, None, [121], "card 0 cannot be asked"),
    "the chosen card is lost": ({"nvmlDeviceGetHandleByIndex": lost(1)}, "1", [], "card 1 cannot be asked"),
    "a card in the container's list only": (
        {"nvmlDeviceGetHandleByIndex": lambda index: fails("NoPermission")() if index == 0 else "GPU-bbbb-2"},
        "1", [121], "card 0 cannot be asked (Insufficient Permissions: check who may open /dev/nvidia*",
    ),
    "a card lost between two questions": (
        {"nvmlDeviceGetCudaComputeCapability": fails("GpuIsLost")}, None, [], "card GPU-aaaa-1 cannot be asked (GPU is",
    ),
    "no permission for a slice": (
        {"nvmlDeviceGetHandleByUUID": fails("NoPermission")}, SLICE, [], "MIG-cccc-3 cannot be asked (Insufficient",
    ),
    "MIG mode": ({"nvmlDeviceGetMigMode": lambda card: [card == "GPU-aaaa-1", 0]}, "0", [90], ""),
    "MIG mode without an instance": (
        {"nvmlDeviceGetMigMode": lambda _: [1, 1], "nvmlDeviceGetMaxMigDeviceCount": lambda _: 0},
        "0", [], "a card is in MIG mode and has no instance; create one",
    ),
    "an old library without MIG": (
        {"nvmlDeviceIsMigDeviceHandle": fails("FunctionNotFound"), "nvmlDeviceGetMigMode": fails("FunctionNotFound")},
        None, [90, 121], "",
    ),
    "no answer to the small questions": (
        {
            name: fails("NotSupported")
            for name in (
                "nvmlDeviceGetName", "nvmlDeviceGetUUID", "nvmlDeviceGetMemoryInfo", "nvmlDeviceGetMigMode",
                "nvmlDeviceIsMigDeviceHandle", "nvmlDeviceGetCurrentClocksEventReasons",
                "nvmlSystemGetCudaDriverVersion_v2", "nvmlSystemGetDriverVersion",
            )
        },
        None, [90, 121], "",
    ),
    "nonsense": (
        {
            "nvmlDeviceGetCudaComputeCapability": lambda _: (0, 0), "nvmlDeviceGetName": lambda _: "",
            "nvmlDeviceGetMemoryInfo": lambda _: SimpleNamespace(total=2**64 - 1),
        },
        None, [], "a GPU without a name says that its compute capability is 0.0, which no GPU has",
    ),
    "too hot": (
        {
            "nvmlDeviceGetCurrentClocksEventReasons": lambda card: (
                pynvml.nvmlClocksEventReasonHwThermalSlowdown if card == "GPU-aaaa-1" else 0
            )
        },
        None, [90, 121], "card GPU-aaaa-1 is too hot (hardware), so its times count for little",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ANSWERS)
def test_whatever_the_driver_answers_is_told_and_hides_no_other_card(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes, visible, sms, told = ANSWERS[name]
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(**changes))
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    driver = nvml.query()
    assert [gpu.sm for gpu in driver.gpus] == sms
    assert len({gpu.uuid_sha256 for gpu in driver.gpus}) == len(sms)
    assert all(0 < gpu.memory_gib < 2**14 for gpu in driver.gpus)
    assert bool(driver.notes) == bool(told)
    assert not told or any(note.startswith(told) for note in driver.notes)
    found = [one for one in examine(inspect_machine()) if one.what in ("GPU", "cards", "driver")]
    assert not told or any(told in one.step for one in found), found


@pytest.mark.parametrize(
    ("error", "told"),
    [
        ("NoPermission", r"^Insufficient Permissions: check who may open /dev/nvidia\*"),
        ("DriverNotLoaded", r"^Driver Not Loaded: load the driver \(modprobe nvidia\); in a container"),
        ("LibRmVersionMismatch", r"^.*: the driver was updated while loaded; reboot"),
        ("LibraryNotFound", r"^NVML Shared Library Not Found: install NVIDIA's driver; in a container, start it with"),
        ("Unknown", r"^Unknown Error: look at the driver's messages in dmesg; in a container"),
        ("Timeout", r"^Timeout$"),
    ],
)
def test_a_driver_that_does_not_answer_is_told_with_the_next_step(
    error: str, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(nvmlInit=fails(error)))
    with pytest.raises(nvml.NvmlUnavailable, match=told):
        nvml.query()
    assert re.search(
        told.lstrip("^").rstrip("$"), next(one for one in examine(inspect_machine()) if one.what == "GPU").step
    )
    monkeypatch.setitem(sys.modules, "pynvml", stand_in(nvmlDeviceGetCount=fails(error)))
    with pytest.raises(nvml.NvmlUnavailable, match=told):
        nvml.query()


def test_another_order_of_cards_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    (note,) = nvml.query().notes
    assert note == "CUDA_DEVICE_ORDER=FASTEST_FIRST: CUDA may count the cards in another order; unset it"


def test_another_package_of_the_same_name_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", SimpleNamespace())
    with pytest.raises(nvml.NvmlUnavailable, match="the installed pynvml is not nvidia-ml-py; run `pip install"):
        nvml.query()


def test_a_mig_slice_has_its_own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", SLICE)
    assert nvml.query().gpus[0].memory_gib == 16.0


def test_an_absent_package_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(nvml.NvmlUnavailable, match="nvidia-ml-py is not installed"):
        nvml.query()
