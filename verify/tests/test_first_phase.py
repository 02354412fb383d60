"""Phase 1 on machines that are not what they say they are: the verdict is about the machine, never the subject."""

from __future__ import annotations

import hashlib
from types import SimpleNamespace

import pytest

from phases import p1_environment
from verify.errors import InfraError
from verify.machine import nvml
from verify.record.schema import Gpu

UUID = "12ab34cd-0000-1111-2222-333344445555"


def _card(**fields: object) -> Gpu:
    digest = hashlib.sha256(f"GPU-{UUID}".encode()).hexdigest()
    known = {"name": "Sample GPU", "uuid_sha256": digest, "sm": 90, "memory_gib": 80, "driver": "590.1"}
    return Gpu(**(known | fields))


@pytest.fixture
def nvml_shows(monkeypatch: pytest.MonkeyPatch):
    def show(*cards: Gpu) -> None:
        monkeypatch.setattr(nvml, "query", lambda: nvml.Driver("590.1", "13.1", cards))

    show(_card())
    return show


def test_a_driver_that_does_not_answer_is_infra(monkeypatch: pytest.MonkeyPatch, nvml_shows) -> None:
    p1_environment.test_driver("version", "sm90")
    nvml_shows()
    with pytest.raises(InfraError, match="NVML shows no GPU; check CUDA_VISIBLE_DEVICES"):
        p1_environment.test_driver("version", "sm90")

    def refuse() -> nvml.Driver:
        raise nvml.NvmlUnavailable("Unknown Error")

    monkeypatch.setattr(nvml, "query", refuse)
    with pytest.raises(InfraError, match=r"NVML does not answer \(Unknown Error\)"):
        p1_environment.test_driver("version", "sm90")


def test_another_gpu_is_infra_and_an_old_driver_a_failure(nvml_shows) -> None:
    nvml_shows(_card(sm=120))
    with pytest.raises(InfraError, match=r"NVML sees sm120 \(Sample GPU\), but the run's target is sm90"):
        p1_environment.test_driver("version", "sm90")
    nvml_shows(_card(sm=120, driver="1.0"))
    with pytest.raises(AssertionError, match=r"driver 1\.0 is older than"):
        p1_environment.test_driver("version", "sm120")


@pytest.mark.parametrize(
    ("seen", "problem"),
    [
        ({}, None),
        ({"uuid": None}, None),
        ({"uuid": "ffffffff" + UUID[8:]}, "NVML and torch use different cards"),
        ({"name": "Another GPU"}, "NVML's first GPU is Sample GPU and torch's is Another GPU"),
        ({"major": 8}, "but the tools report"),
    ],
)
def test_identity(monkeypatch: pytest.MonkeyPatch, nvml_shows, seen: dict, problem: str | None) -> None:
    torch, triton = pytest.importorskip("torch"), pytest.importorskip("triton")
    properties = SimpleNamespace(**({"name": "Sample GPU", "major": 9, "minor": 0, "uuid": UUID} | seen))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
    active = SimpleNamespace(get_current_target=lambda: SimpleNamespace(arch=90))
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    if problem is None:
        p1_environment.test_identity("nvml_torch_triton", "sm90")
    else:
        with pytest.raises(InfraError, match=problem):
            p1_environment.test_identity("nvml_torch_triton", "sm90")
