"""Starts the suite from a kit: installs its packages next to it, once, and runs ``python -m verify`` with them.

Standard library only, because it runs before anything is installed. Nothing outside the kit's folder is written, except
where a person names the place, and where the kit itself cannot be written.
"""

from __future__ import annotations

import contextlib
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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

KIT = Path(__file__).resolve().parent
RECORDS, SOURCE, CACHE = KIT / "records", KIT / "source", KIT / "cache"

#: The verbs that write records.
_WRITING = ("run", "compile", "simulate")

#: The verbs that read a folder of records; ``explain`` has something to say without one.
_READING = ("report", "diff", "history", "explain")

#: The verbs that take the id of a run where a file or a folder may stand.
_NAMING = ("check", "pack", "export", "diff")

#: Where torch, Triton, the driver and vLLM keep what can be made again, if the user has not named a place.
_CACHES = {
    "TRIATTENTION_CACHE": CACHE, "XDG_CACHE_HOME": CACHE / "xdg", "TRITON_CACHE_DIR": CACHE / "triton",
    "TORCHINDUCTOR_CACHE_DIR": CACHE / "inductor", "CUDA_CACHE_PATH": CACHE / "cuda",
}  # fmt: skip
_TEMPORARY = KIT / "tmp"

#: The longest path of a socket on Linux, less what torch, multiprocessing and vLLM add to that of the temporary folder.
_TEMPORARY_LENGTH = 107 - 38

#: What pip says, in lower case, and the next step; the first that fits.
_STEPS = {
    "no space left": "free some disk space",
    "quota exceeded": "free some disk space",
    "permission denied": "copy the kit to a folder that you can write",
    "read-only file system": "copy the kit to a folder that you can write",
    "not a supported wheel": "make a kit for this machine",
    "": "carry the kit again, or make it again",
}

_INSTALL_LIMIT_S = 900


class KitError(Exception):
    """The kit cannot be used here; the message is one sentence with the next step."""


def start(words: Sequence[str]) -> None:
    """Replace this process by the suite. Raises KitError if the kit cannot be used here."""
    try:
        about = json.loads((KIT / "kit.json").read_text("utf-8"))
    except ValueError as error:
        raise KitError("kit.json is damaged; carry the kit again, and join its parts in order") from error
    _must_fit(about)
    places = _places()
    site = _installed(about, places)
    if not places.keys() >= _CACHES.keys() - os.environ.keys():
        print(f"kit: {KIT} cannot be written, so your own caches are used", file=sys.stderr, flush=True)
    words = _with_records([*([] if words and not words[0].startswith("-") else ["run"]), *words])
    # -P, because the current folder may be another checkout, with a suite of its own
    os.execve(sys.executable, [sys.executable, "-P", "-m", "verify", *words], _environment(site, places))


def _with_records(words: Sequence[str]) -> list[str]:
    """``words`` with the kit's folder of records, for a verb that needs one and is given none.

    Raises KitError if that cannot be written, or has nothing to read yet.
    """
    verb, named = words[0], {word.partition("=")[0] for word in words}
    if named & {"-h", "--help"}:
        return list(words)
    added: list[str] = []
    if verb in _WRITING and "--out" not in named:
        with contextlib.suppress(OSError):
            RECORDS.mkdir(exist_ok=True)
        if not _writable(RECORDS):
            raise KitError(f"{RECORDS} cannot be written; name a folder of yours: ./run {verb} --out DIR ...")
        added = ["--out", str(RECORDS)]
    if verb in _READING and "--records" not in named:
        if RECORDS.is_dir():
            added = ["--records", str(RECORDS)]
        elif verb != "explain":
            raise KitError(f"{RECORDS} has no records yet; run the checks first, or name a folder: --records DIR")
    if verb in _NAMING:
        words = [verb, *map(_located, words[1:])]
    return [*words, *added]


def _located(word: str) -> str:
    """The folder of the kit's run ``word``; ``word`` itself if there is none, or something of that name here."""
    is_run = word and Path(word).name == word and not Path(word).exists() and (RECORDS / word).is_dir()
    return str(RECORDS / word) if is_run else word


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


def _places() -> dict[str, str]:
    """The variables that keep caches and temporary files in the kit, except those that the user has set.

    They are left out where the kit cannot be written, and TMPDIR where sockets in it would have too long a path.
    """
    places: dict[str, str] = {}
    for folder in (CACHE, _TEMPORARY):
        with contextlib.suppress(OSError):
            folder.mkdir(exist_ok=True)
    if _writable(CACHE):
        places |= {name: str(folder) for name, folder in _CACHES.items()}
    if _writable(_TEMPORARY) and len(os.fsencode(_TEMPORARY)) <= _TEMPORARY_LENGTH:
        places["TMPDIR"] = str(_TEMPORARY)
    return {name: folder for name, folder in places.items() if name not in os.environ}


def _writable(folder: Path) -> bool:
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


def _installed(about: Mapping[str, Any], places: Mapping[str, str]) -> Path:
    """The folder of the kit's packages for this interpreter, which are installed into it the first time."""
    wanted = {name: sha256 for name, sha256 in about["wheels"].items() if not _has_own(name)}
    stamp = json.dumps([wanted, sys.prefix], sort_keys=True)
    # one for each interpreter, so that the packages of a suite that runs are never replaced
    site = KIT / f"site-{hashlib.sha256(stamp.encode()).hexdigest()[:12]}"
    if not site.is_dir():
        with _lock(site.with_suffix(".lock")):
            if not site.is_dir():
                _install(about, list(wanted), site, places)
    return site


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock of one installation: several jobs of one node may start at once."""
    before = os.umask(0o022)  # another user may be the next who runs this kit
    try:
        try:
            file = path.open("w")
        except OSError as error:
            raise KitError(
                f"its packages are not installed for {sys.executable} yet, and {KIT} cannot be written "
                f"({error.strerror}); let its owner call ./run doctor once with this Python, or copy the kit to a "
                "folder of yours"
            ) from error
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield
    finally:
        os.umask(before)


def _install(about: Mapping[str, Any], wanted: Sequence[str], site: Path, places: Mapping[str, str]) -> None:
    """Install the wheels ``wanted`` into ``site``, which appears when it is complete."""
    for name, sha256 in about["wheels"].items():
        if not (KIT / "wheels" / name).is_file() or _sha256(KIT / "wheels" / name) != sha256:
            raise KitError(f"wheels/{name} is missing or damaged; carry the kit again, and join its parts in order")
    print("kit: installing its packages", file=sys.stderr, flush=True)
    partial = site.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    # the machine's settings are for its own installations: an index, constraints, --user
    settings = {"PIP_CONFIG_FILE": os.devnull}
    environment = {name: value for name, value in os.environ.items() if not name.upper().startswith("PIP_")}
    pip = [sys.executable, str(KIT / "wheels" / about["pip"] / "pip"), "--isolated", "--disable-pip-version-check"]
    plain = ["--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--no-warn-conflicts"]
    paths = [str(KIT / "wheels" / name) for name in wanted if name not in (about["pip"], about["project"])]
    try:
        child = subprocess.run(
            [*pip, "install", *plain, "--target", str(partial), *paths], env={**environment, **places, **settings},
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise KitError(f"installing its packages took over {_INSTALL_LIMIT_S} s; call ./run again") from error
    if child.returncode:
        raise KitError(_complaint(child.stderr))
    _describe_project(KIT / "wheels" / about["project"], partial)
    partial.rename(site)


def _complaint(said: str) -> str:
    """What pip printed, in a sentence with the next step."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["pip said nothing"]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    reason = (errors or lines)[-1]
    step = next(step for sign, step in _STEPS.items() if sign in said.lower())
    return f"its packages cannot be installed: {reason.rstrip('.')}; {step}"


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


def _environment(site: Path, places: Mapping[str, str]) -> dict[str, str]:
    path = _joined([str(SOURCE), str(site), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    # the files may belong to another user than the one who runs them, and git then refuses to name the commit
    git = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": str(SOURCE)}
    # neither the suite nor its children take anything from the current folder
    ours = {"PYTHONPATH": path, "PYTHONSAFEPATH": "1", "TRIATTENTION_ROOT": str(SOURCE)}
    return {"OMP_NUM_THREADS": "1", **os.environ, **places, **git, **ours, "HF_HUB_OFFLINE": "1"}


def _joined(folders: Iterable[str]) -> str:
    return os.pathsep.join(filter(None, folders))


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


if __name__ == "__main__":
    try:
        start(sys.argv[1:])
    except KitError as error:
        print(f"kit: {error}", file=sys.stderr)
        sys.exit(3)
    except OSError as error:
        file = error.filename or "a file"
        print(f"kit: {file} cannot be used ({error.strerror}); mend that, or carry the kit again", file=sys.stderr)
        sys.exit(3)
