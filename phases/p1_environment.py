"""Phase 1: whether driver, torch and Triton agree on the GPU and work on it (plan 1.1 to 1.4)."""

from __future__ import annotations

import hashlib
import re
from typing import TYPE_CHECKING

from verify import Measure, check, skip
from verify.architectures import SUITE_MINIMUMS, find
from verify.errors import InfraError
from verify.judge.tolerance import matmul_error
from verify.machine.environment import at_least

if TYPE_CHECKING:
    from verify.record.schema import Gpu


def _card() -> Gpu:
    """The first GPU that NVML shows. Raises InfraError if NVML does not answer or shows no GPU."""
    from verify.machine import nvml

    try:
        driver = nvml.query()
    except nvml.NvmlUnavailable as error:
        raise InfraError(f"NVML does not answer ({error}); see `python -m verify doctor`") from error
    if not driver.gpus:
        why = "; ".join(driver.notes) or "check CUDA_VISIBLE_DEVICES and nvidia-smi, then run again"
        raise InfraError(f"NVML shows no GPU; {why}")
    return driver.gpus[0]


@check(
    "p1.driver", gate="hard", cases="version", plan="1.1", needs_gpu=True,
    claim="The driver answers through NVML and is new enough for this GPU.",
    reason="An old driver cannot load kernels built for a newer architecture, so every later check would fail too.",
    remedy="Install the driver version named in the message, or a newer one, and reboot.",
)  # fmt: skip
def test_driver(case: str, target: str) -> None:
    card = _card()
    known = find(card.sm)
    if known is None or f"sm{card.sm}" != target:
        raise InfraError(f"NVML sees sm{card.sm} ({card.name}), but the run's target is {target}; start a new run")
    minimum = known.minimums.driver
    assert minimum is None or at_least(card.driver, minimum), (
        f"driver {card.driver} is older than {minimum}, which {target} needs"
    )


@check(
    "p1.toolkit", gate="soft", cases="nvcc", plan="1.2",
    claim="The CUDA toolkit is installed and new enough for every architecture the suite covers.",
    reason="Only building flash-attn from source needs nvcc; Triton ships its own assembler.",
    remedy="Install the CUDA toolkit and put its bin directory on PATH.",
)  # fmt: skip
def test_toolkit(case: str) -> None:
    from verify.machine.environment import cuda_toolkit

    version = cuda_toolkit()
    if not re.match(r"\d", version):
        skip("PKG_MISSING", f"nvcc: {version}")
    minimum = SUITE_MINIMUMS.cuda
    assert minimum is None or at_least(version, minimum), f"nvcc is {version}; the suite requires {minimum}"


@check(
    "p1.torch", gate="hard", cases="sees_gpu", plan="1.3", needs_gpu=True,
    claim="torch sees the GPU, reports the target's compute capability and supports bf16.",
    reason="With a CPU build of torch, or a build without this architecture, none of the later checks runs on the GPU.",
    remedy="Install a CUDA build of torch for this driver; python -m verify doctor names the version.",
)  # fmt: skip
def test_torch_sees_gpu(case: str, target: str) -> None:
    import torch

    assert torch.cuda.is_available(), f"torch {torch.__version__} sees no GPU"
    major, minor = torch.cuda.get_device_capability(0)
    assert f"sm{10 * major + minor}" == target, f"torch sees compute capability {major}.{minor}; the target is {target}"
    assert torch.cuda.is_bf16_supported(), f"torch {torch.__version__} has no bf16 on {torch.cuda.get_device_name(0)}"


@check(
    "p1.bf16_matmul", gate="hard", cases="smoke", plan="1.3",
    claim="A bf16 matrix product on the device is correct.",
    reason="If basic arithmetic on the device is wrong, no later number means anything.",
    tolerance=(
        "One bf16 rounding of each output (2^-8 relative), and 128 x 2^-24 of the sum of absolute terms for fp32 "
        "accumulation."
    ),
    remedy="Suspect the driver or the card before any code: run a memory test.",
)  # fmt: skip
def test_bf16_matmul(case: str, device: str, seed: int, measure: Measure) -> None:
    import torch

    draw = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(128, 128, generator=draw).to(torch.bfloat16) for _ in range(2))
    got = (a.to(device) @ b.to(device)).double().cpu()
    measure("error", *matmul_error(got.numpy(), a.double().numpy(), b.double().numpy()))


@check(
    "p1.triton", gate="hard", cases="add_kernel", plan="1.4",
    claim="Triton compiles and launches the plan's add kernel, and the sum is bitwise correct.",
    reason="It separates a broken Triton installation from a broken scoring kernel.",
    tolerance="fp32 addition is correctly rounded on every device, so no element may differ.",
    remedy="Check that the versions of triton, torch and the driver are compatible (python -m verify doctor).",
)  # fmt: skip
def test_triton_add_kernel(case: str, device: str, seed: int, measure: Measure) -> None:
    import torch

    from verify.build.control import add_kernel

    draw = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(128, generator=draw).to(device) for _ in range(2))
    out = torch.full((128,), torch.nan, device=device)
    add_kernel[(1,)](x, y, out, 128)
    measure("elements that differ", int((out != x + y).sum()), 0, where="add_kernel, n = 128")


@check(
    "p1.identity", gate="hard", cases="nvml_torch_triton", needs_gpu=True,
    claim="NVML, torch and Triton refer to the same GPU.",
    reason="On a machine with several cards they can disagree, and the record would then name the wrong one.",
    remedy="Set CUDA_DEVICE_ORDER=PCI_BUS_ID, or CUDA_VISIBLE_DEVICES to one GPU.",
)  # fmt: skip
def test_identity(case: str, target: str) -> None:
    import torch
    import triton

    card, seen = _card(), torch.cuda.get_device_properties(0)
    names = {"NVML": f"sm{card.sm}", "torch": f"sm{10 * seen.major + seen.minor}"}
    names["triton"] = f"sm{triton.runtime.driver.active.get_current_target().arch}"
    if set(names.values()) != {target}:
        raise InfraError(f"the run's target is {target}, but the tools report {names}; set CUDA_VISIBLE_DEVICES")
    if card.name != seen.name:
        raise InfraError(f"NVML's first GPU is {card.name} and torch's is {seen.name}; set CUDA_VISIBLE_DEVICES")
    # torch has the UUID since 2.4, without the prefix that distinguishes a card from a MIG slice
    uuid = getattr(seen, "uuid", None)
    spelled = {hashlib.sha256(f"{prefix}{uuid}".encode()).hexdigest() for prefix in ("GPU-", "MIG-", "")}
    if uuid is not None and card.uuid_sha256 not in spelled:
        raise InfraError(f"NVML and torch use different cards named {card.name}; set CUDA_VISIBLE_DEVICES to one")
