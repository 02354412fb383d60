"""The implementation under test: chosen with ``--subject``, imported lazily, and never named anywhere else."""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

from verify.errors import ConfigurationError, SubjectLacks, SubjectNeeds
from verify.record.digest import digest_of
from verify.record.grounds import PACKAGE
from verify.record.schema import PATCH, SubjectInfo
from verify.subject.published import Renamed, parameters_of
from verify.subject.toml import read
from verify.subject.version import declared_version

_IMPORT_LIMIT_S = 180
_GIT_LIMIT_S = 30
#: Converting, calibrating and answering two questions take a minute on two cores.
_COMMAND_LIMIT_S = 420

#: Prints where the package was found and its version; run in a child, so that this process imports nothing.
_ASK = """
import importlib, importlib.metadata, json
package = importlib.import_module({package!r})
version = getattr(package, "__version__", None)
if version is None:
    try:
        version = importlib.metadata.version({package!r})
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps({{"where": next(iter(package.__path__)), "version": version and str(version)}}))
"""


class OnlyItsOwn(MetaPathFinder):
    """Finds the package's modules only where the package is; no other finder is asked for them.

    Otherwise a finder of an editable installation of this project would lend its modules to a subject that lacks them.
    """

    def __init__(self, package: str) -> None:
        self.package = package

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not f"{fullname}.".startswith(f"{self.package}."):
            return None
        spec = PathFinder.find_spec(fullname, path)
        if spec is None:
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)
        return spec


@dataclass(frozen=True)
class Subject:
    """One implementation: ``root`` is the directory from which ``package`` is imported, ``source`` its name in records.

    ``name`` is the value of ``--subject``, and ``file`` its ``subject.toml`` if there is one, from which the rest comes
    (``verify/subject/toml.py``). ``arguments`` has None for a parameter that is not taken, ``narrowed`` the values that
    it takes by property of a problem, and ``patch_offers`` those by option of its patch.
    """

    name: str
    root: Path
    source: str
    package: str = PACKAGE
    file: Path | None = None
    names: Mapping[str, str] = field(default_factory=dict)
    arguments: Mapping[str, Mapping[str, str | None]] = field(default_factory=dict)
    sources: tuple[str, ...] = ()
    profile: str | None = None
    plain_path: str = "PyTorch"
    narrowed: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)
    patch_offers: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """This subject as JSON data, from which a child process makes it again with ``described``."""
        told = asdict(self)
        return told | {key: str(told[key]) for key in ("root", "file") if told[key]}

    @classmethod
    def described(cls, told: Mapping[str, Any]) -> Subject:
        tuples: dict[str, Any] = {"sources": tuple(told["sources"])}
        for table in ("narrowed", "patch_offers"):
            tuples[table] = {
                name: tuple(tuple(one) if isinstance(one, list) else one for one in values)
                for name, values in told[table].items()
            }
        return cls(**told | tuples | {key: Path(told[key]) for key in ("root", "file") if told[key]})

    def owns(self, file: Path) -> bool:
        """Whether a source file is the subject's own code."""
        return any(file.is_relative_to(folder) for folder in self._own_folders)

    @cached_property
    def _own_folders(self) -> tuple[Path, ...]:
        found = [self.folder, self.folder.resolve()]
        for name in self.sources:
            spec = importlib.util.find_spec(name)
            places = (spec and (spec.submodule_search_locations or [spec.origin])) or ()
            found += [Path(place).resolve() for place in places if place]
        return tuple(found)

    @property
    def option(self) -> str:
        """The value of ``--subject`` that means this subject in any directory."""
        return str(self.root) if self.source.startswith("checkout:") else self.name

    @property
    def folder(self) -> Path:
        """The directory of the package."""
        return self.root.joinpath(*self.package.split("."))

    def activate(self) -> None:
        """Make this process import the package from ``root``.

        Raises ConfigurationError when the package does not import, or comes from somewhere else.
        """
        if not any(isinstance(finder, OnlyItsOwn) and finder.package == self.package for finder in sys.meta_path):
            sys.meta_path.insert(0, OnlyItsOwn(self.package))
        if str(self.root) in sys.path:
            sys.path.remove(str(self.root))
        sys.path.insert(0, str(self.root))
        importlib.invalidate_caches()
        try:
            package = importlib.import_module(self.package)
        except Exception as error:  # a subject may raise anything at import; all of it means the same here
            raise self._not_importable(f"{type(error).__name__}: {error}") from error
        self._must_be_here(next(iter(package.__path__)))

    def module(self, path: str = "") -> ModuleType:
        """Import ``<package>.<path>``. Raises SubjectLacks if it does not exist, SubjectNeeds if it needs a package
        that is not installed, and whatever else its import raises.
        """
        __tracebackhide__ = True
        return self._import(self._inside(path))

    def offers(self, path: str, name: str) -> bool:
        """Whether the published name ``<path>.<name>`` exists in this subject and its module imports."""
        try:
            self.attribute(path, name)
        except (SubjectLacks, SubjectNeeds):
            return False
        return True

    def attribute(self, path: str, name: str) -> Any:
        """``<package>.<path>.<name>``, or what the subject file names instead. Raises SubjectLacks naming what is
        absent.
        """
        __tracebackhide__ = True
        where, attribute = self.place(path, name)
        module = self._import(where)
        try:
            found = getattr(module, attribute)
        except AttributeError as error:
            raise SubjectLacks(f"the subject has no {attribute} in {where}") from error
        renamed = self.arguments.get(f"{path}.{name}")
        return found if renamed is None else Renamed(found, parameters_of(path, name), renamed)

    def place(self, path: str, name: str) -> tuple[str, str]:
        """The module and the attribute of the published name ``<path>.<name>`` in this subject."""
        module, _, attribute = self.names.get(f"{path}.{name}", f"{self._inside(path)}:{name}").partition(":")
        return module, attribute

    def _inside(self, path: str) -> str:
        return f"{self.package}.{path}" if path else self.package

    def _import(self, name: str) -> ModuleType:
        __tracebackhide__ = True
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error.name or ""
            if missing and not any(f"{missing}.".startswith(f"{own}.") for own in (self.package, *self.sources)):
                raise SubjectNeeds(f"{name} needs the package {missing}, which is not installed") from error
            if missing and f"{name}.".startswith(f"{missing}."):  # the module itself, or a package that should hold it
                raise SubjectLacks(f"the subject has no module {name}") from error
            raise

    @property
    def calibration_script(self) -> Path:
        """Where a checkout has its script that calibrates, if it has one."""
        return self.root / "scripts" / "calibrate.py"

    def command(self, *arguments: str, script: Path | None = None) -> list[str]:
        """The command line that runs the subject's own CLI, or a script; use it with ``environment()``."""
        return [sys.executable, *([str(script)] if script else ["-m", self.package]), *arguments]

    def run(
        self, *arguments: str, limit_s: float = _COMMAND_LIMIT_S, environment: Mapping[str, str] | None = None,
        script: Path | None = None,
    ) -> str:  # fmt: skip
        """What its CLI or a script prints. Raises AssertionError, with the last line of stderr, if it fails."""
        __tracebackhide__ = True
        called = script.name if script else arguments[0]
        try:
            child = subprocess.run(
                self.command(*arguments, script=script),
                capture_output=True, text=True, timeout=limit_s, env=environment or self.environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{called} did not end within {limit_s:g} s") from error
        last = (child.stderr.strip().splitlines() or ["nothing on stderr"])[-1]
        assert child.returncode == 0, f"{called} ended with exit code {child.returncode}: {last}"
        return child.stdout

    def environment(self) -> dict[str, str]:
        """The environment in which a child process imports this subject, wherever the child is started."""
        inherited = os.environ.get("PYTHONPATH")
        path = os.pathsep.join([str(self.root), *([inherited] if inherited else [])])
        # without PYTHONSAFEPATH `python -m` would put the current directory, and another package in it, first
        return {**os.environ, "PYTHONPATH": path, "PYTHONSAFEPATH": "1"}

    def info(self) -> SubjectInfo:
        """What a record says about the subject, which is imported in a child process.

        Raises ConfigurationError if it does not import.
        """
        program = _ASK.format(package=self.package)
        try:
            child = subprocess.run(
                [sys.executable, "-c", program],
                capture_output=True, text=True, timeout=_IMPORT_LIMIT_S, env=self.environment(),
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise self._not_importable(f"no answer within {_IMPORT_LIMIT_S} s") from error
        if child.returncode:
            problem = (child.stderr.strip().splitlines() or [f"exit code {child.returncode}"])[-1]
            raise self._not_importable(problem)
        # a subject may print too, even at interpreter exit
        found = json.loads(next(line for line in child.stdout.splitlines() if line.startswith('{"where"')))
        self._must_be_here(found["where"])
        about = read(self.file).subject if self.file else None
        narrowed = {**self.narrowed, **{f"{PATCH}{name}": values for name, values in self.patch_offers.items()}}
        # a checkout that merely contains the package, for example in a virtual environment, says nothing about it
        sha = self._git("rev-parse", "HEAD") if self._git("ls-files", "--", str(self.folder)) else None
        return SubjectInfo(
            name=(about and about.name) or self.package,
            version=(about and about.version) or found["version"] or declared_version(self.root) or "unknown",
            source=self.source,
            git_sha=sha or "none",
            dirty=sha is None or not self._committed(),
            content_sha256=self.content_sha256(),
            profile=self.profile,
            narrowed={name: [str(value) for value in values] for name, values in narrowed.items()},
        )

    def content_sha256(self) -> str:
        """A digest of the package's files, without its tests, of the subject file and of the script that calibrates.
        It tells whether two runs test the same thing.
        """
        folder, beside = self.folder, {"__pycache__", "tests"}
        files = {
            path for path in folder.rglob("*") if path.is_file() and not beside & {*path.relative_to(folder).parts}
        }
        others = {one for one in (self.file, self.calibration_script) if one and one.is_file()} - files
        return digest_of(files | others, self.root if others else folder)

    def _committed(self) -> bool:
        """Whether every file of the package is committed and unchanged; ignored and untracked files do not count as
        committed.
        """
        tracked, place = self._git("ls-files", "--", str(self.folder)), str(self.folder)
        # file by file, because a folder shown as one entry could hold more than caches
        changes = self._git("status", "--porcelain", "--untracked-files=all", "--ignored=traditional", "--", place)
        if not tracked or changes is None:
            return False
        return all("__pycache__/" in line for line in changes.splitlines())

    def _not_importable(self, problem: str) -> ConfigurationError:
        return ConfigurationError(f"subject {self.name!r} does not import ({problem}); repair it or name another")

    def _must_be_here(self, where: str) -> None:
        if not Path(where).resolve().is_relative_to(self.root.resolve()):
            raise ConfigurationError(
                f"subject {self.name!r} should be {self.folder}, but {self.package} was imported from {where}; "
                "start a new process, or remove the other one from PYTHONPATH"
            )

    def _git(self, *arguments: str) -> str | None:
        """The output of git in ``root``; None if that is not a checkout with a commit, or git is missing."""
        command = ["git", "-C", str(self.root), *arguments]
        try:
            child = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_LIMIT_S)
        except (FileNotFoundError, subprocess.TimeoutExpired):
            return None
        return child.stdout.strip() if child.returncode == 0 else None
