"""Which device a run gets, and what is set before triton is imported."""

from __future__ import annotations

import os

import pytest

from verify.checks import derive_seed
from verify.errors import ConfigurationError
from verify.machine import device


@pytest.fixture(autouse=True)
def _environment_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "HF_HUB_OFFLINE", "CUDA_DEVICE_ORDER"):
        monkeypatch.setenv(name, "x")  # so that whatever prepare() sets is undone
        monkeypatch.delenv(name)


def test_cuda_without_a_gpu_is_refused_and_auto_is_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_driver_installed", lambda: False)
    assert device.resolve("auto").name == "cpu"
    with pytest.raises(
        ConfigurationError, match=r"^--device cuda is not available: .*; see `python -m verify doctor`$"
    ):
        device.resolve("cuda")
    assert device.resolve("cpu").evidence == "emulated"


def test_a_cpu_run_is_interpreted_and_offline() -> None:
    device.prepare("cpu", "embedded")
    assert {os.environ[n] for n in ("TRITON_INTERPRET", "TRITON_DEFAULT_FP_FUSION", "HF_HUB_OFFLINE")} == {"1"}


def test_cuda_counts_the_cards_as_nvml_does(monkeypatch: pytest.MonkeyPatch) -> None:
    device.prepare("cuda", "embedded")
    assert os.environ["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "FASTEST_FIRST")
    device.prepare("cuda", "embedded")
    assert os.environ["CUDA_DEVICE_ORDER"] == "FASTEST_FIRST"


def test_what_the_user_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    device.prepare("cuda", "some/model")
    assert os.environ["TRITON_DEFAULT_FP_FUSION"] == "0"
    assert "HF_HUB_OFFLINE" not in os.environ


def test_a_gpu_run_is_not_secretly_emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    device.prepare("cuda", "embedded")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(ConfigurationError, match="TRITON_INTERPRET=1 would emulate the kernels of a GPU run; unset it"):
        device.prepare("cuda", "embedded")


def test_a_check_s_seed_depends_on_the_run_and_the_id_only() -> None:
    seeds = [derive_seed(0, "p1.a.x"), derive_seed(0, "p1.a.y"), derive_seed(1, "p1.a.x")]
    assert len(set(seeds)) == 3
    assert seeds[0] == derive_seed(0, "p1.a.x")
    assert all(0 <= seed < 2**32 for seed in seeds)
