"""Chooses the device of a run without a CUDA context, and sets what must be set before triton is imported."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from dataclasses import dataclass
from typing import Literal

from verify.errors import ConfigurationError
from verify.machine.processors import use_one_thread

DeviceName = Literal["cpu", "cuda"]

#: Importing torch from a cold disk takes most of a minute on small machines.
_TORCH_LIMIT_S = 180


@dataclass(frozen=True, slots=True)
class Device:
    """The device of a run; ``note`` is a sentence the user must see, or empty."""

    name: DeviceName
    note: str = ""

    @property
    def evidence(self) -> Literal["hardware", "emulated"]:
        return "hardware" if self.name == "cuda" else "emulated"


def resolve(choice: str) -> Device:
    """The device that ``choice`` (auto, cpu, cuda) means here: ``auto`` is cuda if torch can use a GPU, else cpu.

    torch is asked in a child process, and only if a CUDA driver is installed. Raises ConfigurationError when cuda is
    requested and torch cannot use it.
    """
    if choice == "cpu":
        return Device("cpu")
    if _driver_installed():
        finding = _ask_torch()
        if finding == "available":
            return Device("cuda")
        problem = f"a CUDA driver is installed, but {finding}"
        note = f"{problem}, so this run is emulated; see `python -m verify doctor`"
    else:
        problem, note = "there is no CUDA driver (libcuda.so.1) here", ""
    if choice == "cuda":
        raise ConfigurationError(f"--device cuda is not available: {problem}; see `python -m verify doctor`")
    return Device("cpu", note)


def prepare(device: DeviceName, model: str) -> None:
    """Set the environment variables that determine how kernels run, and on how many threads, here and in children.

    Call before triton or torch is imported. Raises ConfigurationError when TRITON_INTERPRET would turn a GPU run into
    an emulated one, or the reverse.
    """
    interpret = os.environ.get("TRITON_INTERPRET", "")
    if device == "cuda" and interpret not in ("", "0"):
        raise ConfigurationError(
            f"TRITON_INTERPRET={interpret} would emulate the kernels of a GPU run; unset it or use --device cpu"
        )
    if device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"
    # NVML counts GPUs in PCI order; CUDA's default order is its own guess at their speed
    os.environ.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    # triton 3.10 changes this default to off; setting it records which one a run used
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    if model == "embedded":
        os.environ["HF_HUB_OFFLINE"] = "1"
    use_one_thread()


def _driver_installed() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    return True


def _ask_torch() -> str:
    """``available``, or why torch cannot use a GPU."""
    program = "import torch; print('available' if torch.cuda.is_available() else 'torch cannot use it')"
    try:
        child = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_TORCH_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"torch did not answer within {_TORCH_LIMIT_S} s"
    if child.returncode:
        return "torch is not installed" if "No module named 'torch'" in child.stderr else "torch does not import"
    return child.stdout.strip().splitlines()[-1]
