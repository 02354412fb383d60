"""Starts the suite from a kit: installs its packages next to it, once, and runs ``python -m verify`` with them.

Standard library only, because it runs before anything is installed. Nothing outside the kit's folder is written.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
SITE, RECORDS, SOURCE = KIT / "site", KIT / "records", KIT / "source"

#: The verbs that write records, and those that read them, with the option that names the folder.
_FOLDERS = {"run": "--out", "compile": "--out", "simulate": "--out"}
_FOLDERS |= {"report": "--records", "diff": "--records", "history": "--records", "explain": "--records"}

_INSTALL_LIMIT_S = 900


class KitError(Exception):
    """The kit cannot be used here; the message is one sentence with the next step."""


def start(words: Sequence[str]) -> None:
    """Replace this process by the suite. Raises KitError if the kit cannot be used here."""
    about = json.loads((KIT / "kit.json").read_text("utf-8"))
    _must_fit(about)
    with (KIT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several jobs of one node may start at once
        _install(about)
    verb = [] if words and not words[0].startswith("-") else ["run"]
    words = [*verb, *words]
    option = _FOLDERS.get(words[0])
    if option and not any(word.partition("=")[0] == option for word in words):
        words += [option, str(RECORDS)]
    RECORDS.mkdir(exist_ok=True)
    # -P, because the current folder may be another checkout, with a suite of its own
    os.execve(sys.executable, [sys.executable, "-P", "-m", "verify", *words], _environment())


def _must_fit(about: dict[str, Any]) -> None:
    found = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if found != about["python"]:
        raise KitError(f"its packages are for Python {about['python']}, and {sys.executable} is {found}; call ./run")
    if platform.machine() != about["machine"]:
        here = platform.machine()
        raise KitError(f"its packages are for {about['machine']}, and this is {here}; make one with MACHINE={here}")
    if about["torch"] == "installed":
        for package in ("torch", "triton"):
            if importlib.util.find_spec(package) is None:
                raise KitError(
                    f"it has no {package}, and neither has {sys.executable}; name the Python that has it: "
                    "PYTHON=... ./run, or make a kit with TORCH=pinned"
                )


def _install(about: dict[str, Any]) -> None:
    """Install the kit's packages into its own folder, if that was not done before with the same interpreter."""
    stamp = json.dumps([about["wheels"], sys.executable], sort_keys=True)
    done = SITE / "complete"
    if done.is_file() and done.read_text("utf-8") == stamp:
        return
    for name, sha256 in about["wheels"].items():
        if not (KIT / "wheels" / name).is_file() or _sha256(KIT / "wheels" / name) != sha256:
            raise KitError(f"wheels/{name} is missing or damaged; carry the kit again, and join its parts in order")
    print("kit: installing its packages", file=sys.stderr, flush=True)
    partial = KIT / "site.partial"
    for folder in (partial, SITE):
        shutil.rmtree(folder, ignore_errors=True)
    wanted = [name for name in about["wheels"] if name not in (about["pip"], about["project"]) and not _has_own(name)]
    pip = [sys.executable, str(KIT / "wheels" / about["pip"] / "pip"), "--disable-pip-version-check", "install"]
    plain = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--no-warn-conflicts"]
    paths = [str(KIT / "wheels" / name) for name in wanted]
    try:
        done_so = subprocess.run(
            [*pip, *plain, "--target", str(partial), *paths],
            capture_output=True,
            text=True,
            timeout=_INSTALL_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise KitError(f"installing its packages took over {_INSTALL_LIMIT_S} s; call ./run again") from error
    if done_so.returncode:
        said = [line for line in done_so.stderr.splitlines() if line.strip()] or ["pip said nothing"]
        raise KitError(f"its packages cannot be installed: {said[-1]}; free some disk space, or make the kit again")
    _describe_project(KIT / "wheels" / about["project"], partial)
    (partial / "complete").write_text(stamp, "utf-8")
    partial.rename(SITE)


def _has_own(wheel: str) -> bool:
    """Whether the interpreter keeps a package of its own: a numpy 1, because what was built for it needs it."""
    if not wheel.startswith("numpy-"):
        return False
    try:
        return importlib.metadata.version("numpy").startswith("1.")
    except importlib.metadata.PackageNotFoundError:
        return False


def _describe_project(wheel: Path, site: Path) -> None:
    """Install the description of the project, whose source is in the kit: vLLM finds plugins by it."""
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site, [name for name in content.namelist() if ".dist-info/" in name])


def _environment() -> dict[str, str]:
    path = _joined([str(SOURCE), str(SITE), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    # the files may belong to another user than the one who runs them, and git then refuses to name the commit
    git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": str(SOURCE)}
    own = {"TRIATTENTION_CACHE": str(KIT / "cache"), "OMP_NUM_THREADS": "1"}
    return {**own, **os.environ, **git, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}


def _joined(folders: Iterable[str]) -> str:
    return os.pathsep.join(filter(None, folders))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    try:
        start(sys.argv[1:])
    except (KitError, OSError) as error:
        print(f"kit: {error}", file=sys.stderr)
        sys.exit(3)
