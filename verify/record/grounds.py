"""The grounds of a result: the source and data files of the suite and the subject that could have changed it.

A result counts as long as these files are unchanged. Of the suite they are the modules that the check's own file
imports, directly or indirectly, and the files that its phase opened while its checks ran, in its process and in every
process it started. Of the subject they are all files that were opened.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from verify.files import IMPORT_ROOT
from verify.record.follow import sitecustomize as follower

#: Prefix of the names of the subject's files; the rest is relative to the directory its package is imported from.
SUBJECT = "subject"

#: The subject's source in a record, where the subject is part of the checkout.
BUNDLED = "bundled"

#: The name of a subject's package, unless it gives another.
PACKAGE = "triattention"

#: Modules that only ask, run, store or display: a change in them changes no result. A folder includes its contents.
NEUTRAL = frozenset(
    f"verify/{name}"
    for name in (
        *(
            "__init__.py",
            "__main__.py",
            "arguments.py",
            "cli.py",
            "plugin.py",
            "session.py",
            "explain.py",
            "sensitivity.py",
        ),
        *("files.py", "heartbeat.py", "machine/processors.py", "machine/conflicts.py"),
        *("build/verb.py", "build/records.py", "build/terminal.py"),
        *("record/__init__.py", "record/archive.py", "record/checker.py", "record/digest.py", "record/follow/"),
        *("record/absences.py", "record/grounds.py", "record/headroom.py", "record/index.py", "record/kills.py"),
        *("record/pictures.py", "record/reading.py", "record/rules.py", "record/staleness.py"),
        *("record/cells.py", "record/verdict.py", "record/without_gpu.py"),
        *("report/", "run/", "selftest/", "examples/", "fleet/", "data/"),
        *("subject/contract.py", "subject/meanings.py", "subject/scaffold.py", "subject/templates/"),
        *("subject/version.py", "record/capabilities.py", "record/findings.py", "record/trail.py"),
        *("record/deviations.py", "subject/deviations.py", "record/known_failures.py", "subject/known_failures.py"),
        # what they decide is in the record, and a reader decides it again
        *("fixtures.py", "record/schema.py", "record/strict.py"),
    )
)

#: The file that every check rests on through its fixtures: it prepares the device.
_FIXTURES = ("verify/machine/device.py",)

_MODULE = re.compile(r"(?:verify|phases)(?:\.\w+)+")


@dataclass(slots=True)
class Checkout:
    """The current files that results rest on, by name: those of the suite, of the phases in ``root``, and of the
    subject's ``package``, which is imported from the directory ``above``, if one is given. ``suite`` is the directory
    that this package is imported from.
    """

    root: Path
    above: Path | None = None
    package: Path | None = None
    suite: Path = IMPORT_ROOT
    _known: dict[str, str | None] = field(default_factory=dict, repr=False)

    def sha256(self, name: str) -> str | None:
        """The digest of a file's content; None if the file does not exist or cannot be read."""
        if name not in self._known:
            place = self.place(name)
            self._known[name] = None if place is None else _sha256(place)
        return self._known[name]

    def place(self, name: str) -> Path | None:
        top, _, rest = name.partition("/")
        if top == SUBJECT:
            return self.above and self.above / rest
        return self._place_in_suite(name)

    def _place_in_suite(self, name: str) -> Path:
        return (self.root if name.partition("/")[0] == "phases" else self.suite) / name

    def name_of(self, path: Path) -> str | None:
        """The name of a file of the suite, of the phases or of the subject; None for any other.

        A module's compiled code has the name of its source.
        """
        if path.parent.name == "__pycache__":
            path = path.parent.parent / f"{path.name.partition('.')[0]}.py"
        for folder, prefix in self._folders():
            for one in (path, path.resolve()):
                if one.is_relative_to(folder):
                    within = one.relative_to(folder)
                    return None if "tests" in within.parts else f"{prefix}/{within.as_posix()}"
        return None

    def names_of(self, paths: Iterable[Path]) -> set[str]:
        """The names of the ``paths`` that a result may rest on."""
        return {name for path in paths if (name := self.name_of(path)) and not is_neutral(name)}

    def _folders(self) -> Iterator[tuple[Path, str]]:
        # the subject first: verify/examples/plain is inside the suite
        if self.above is not None and self.package is not None:
            prefix = f"{SUBJECT}/{self.package.relative_to(self.above).as_posix()}"
            yield from ((self.package, prefix), (self.package.resolve(), prefix))
        for folder in (self.suite / "verify", self.root / "phases"):
            yield from ((folder, folder.name), (folder.resolve(), folder.name))

    def everything(self) -> dict[str, str]:
        """The digest of every file that a result may rest on."""
        files = (path for folder, _ in self._folders() for path in folder.rglob("*") if path.is_file())
        names = self.names_of(path for path in files if "__pycache__" not in path.parts)
        return self.digests(names)

    def digests(self, names: Iterable[str]) -> dict[str, str]:
        """The digests of the files that exist, by name."""
        return {name: digest for name in sorted(names) if (digest := self.sha256(name))}

    def closure(self, *names: str) -> set[str]:
        """These modules, and the modules of suite and phases that they import, directly or indirectly.

        A module named in a string, to run in its own process, counts as imported. The imports of a neutral module are
        not followed.
        """
        found: set[str] = set()
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name in found or is_neutral(name):
                continue
            found.add(name)
            waiting += _imports(self._place_in_suite(name), self)
        return found


def is_neutral(name: str) -> bool:
    return name in NEUTRAL or any(name.startswith(one) for one in NEUTRAL if one.endswith("/"))


def _sha256(path: Path) -> str | None:
    try:
        with follower.unnoticed():
            return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return None


@cache
def _modules(path: Path) -> tuple[str, ...]:
    """Every dotted name that a module imports or has as a string, of any package."""
    with follower.unnoticed():
        text = path.read_text("utf-8")
    found = []
    for node in ast.walk(ast.parse(text)):
        match node:
            case ast.Import(names=names):
                found += [alias.name for alias in names]
            case ast.ImportFrom(module=str(module), names=names):
                found += [module, *(f"{module}.{alias.name}" for alias in names)]
            case ast.Constant(value=str(text)) if _MODULE.fullmatch(text):
                found.append(text)
    return tuple(found)


def _imports(path: Path, checkout: Checkout) -> Iterator[str]:
    for module in _modules(path):
        parts = module.split(".")
        if parts[0] not in ("verify", "phases"):
            continue
        for name in (f"{'/'.join(parts)}.py", f"{'/'.join(parts)}/__init__.py"):
            if (place := checkout.place(name)) and place.is_file():
                yield name


class Grounds:
    """The files that the results of this process rest on, from the log that it and its children write.

    Suite modules opened before a phase began count only if the check's file imports them, not because another phase
    did. All subject files that were ever opened count, because how a subject imports is not known.
    """

    def __init__(self, log: Path, checkout: Checkout) -> None:
        self._log, self._checkout = log, checkout
        self._position = 0
        self._names: set[str] = set()
        self._told: set[str] = set()

    def begin_phase(self) -> None:
        self._names = {name for name in self._names | self._new() if name.startswith(f"{SUBJECT}/")}
        self._told = set()

    def news(self, file: str) -> tuple[set[str], set[str]]:
        """The names that every result of this phase rests on and that no earlier call returned; and those that the
        results of a ``file`` of checks rest on, returned by the first call for it.
        """
        self._names |= self._new()
        opened = self._names - self._told
        imported = set() if file in self._told else self._checkout.closure(file, *_FIXTURES)
        self._told |= opened | {file}
        return opened, imported

    def _new(self) -> set[str]:
        """The names of the files opened since the last call, without neutral files and files of checks."""
        if not self._log.exists():
            return set()
        with self._log.open("rb") as stream:
            stream.seek(self._position)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        names = self._checkout.names_of(Path(os.fsdecode(line)) for line in whole.splitlines())
        return {name for name in names if not name.startswith("phases/")}


def environment(log: Path, root: Path, package: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that make a Python child, and its children, log to ``log`` the files of the suite, the phases and
    the subject that they open.
    """
    folders = dict.fromkeys(str(form) for place in _watched(root, package) for form in (place, place.resolve()))
    path = [str(Path(follower.__file__).parent), *filter(None, [inherited.get("PYTHONPATH")])]
    return {
        follower.LOG: str(log),
        follower.PLACES: os.pathsep.join(f"{folder}{os.sep}" for folder in folders),
        "PYTHONPATH": os.pathsep.join(path),
    }


def _watched(root: Path, package: Path) -> tuple[Path, ...]:
    return IMPORT_ROOT / "verify", root / "phases", package


@contextmanager
def aside(root: Path, above: Path, package: Path, inherited: Mapping[str, str]) -> Iterator[Aside]:
    """For children whose work is cached: the files they open are cached with it, and noted again when it is used."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "opened"
        yield Aside(environment(log, root, package, inherited), log, Checkout(root, above, package))


@dataclass(frozen=True, slots=True)
class Aside:
    """``environment`` is for the children; ``names`` gives the names of the files they have opened so far."""

    environment: Mapping[str, str]
    log: Path
    checkout: Checkout

    def names(self) -> list[str]:
        lines = self.log.read_bytes().splitlines() if self.log.exists() else []
        return sorted(self.checkout.names_of(Path(os.fsdecode(line)) for line in lines))


def tell_again(names: Iterable[str], checkout: Checkout) -> None:
    """Note files as opened that were opened earlier to make a cached result that is used now."""
    if log := os.environ.get(follower.LOG):
        places = [place for name in names if (place := checkout.place(name))]
        with open(log, "ab", buffering=0) as stream:
            stream.write(b"".join(os.fsencode(place) + b"\n" for place in places))


def follow(log: Path, root: Path, package: Path) -> None:
    """Apply ``environment`` to this process from now on, and to the children it starts."""
    os.environ |= environment(log, root, package, os.environ)
    follower.follow(str(log), tuple(os.environ[follower.PLACES].split(os.pathsep)))
