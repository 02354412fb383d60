"""What a result rests on: the sources and data of suite and subject that could have changed it.

A result counts as long as these are what they were when it was made. For a check they are the modules that its own file
imports, directly or not, and what its phase opened while its checks ran: in its process, and in every process that it
started. Of the subject they are everything that was opened.
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

#: Before the names of the subject's files, which lie below the directory that its package is imported from.
SUBJECT = "subject"

#: How a record names the source of the subject that is part of the checkout.
BUNDLED = "bundled"

#: The package that a subject is, unless it says otherwise.
PACKAGE = "triattention"

#: What only asks, runs, keeps or shows: a change of it changes no result. A folder stands for all that is in it.
NEUTRAL = frozenset(
    f"verify/{name}"
    for name in (
        *("__init__.py", "__main__.py", "cli.py", "plugin.py", "session.py", "explain.py", "sensitivity.py"),
        *(
            "files.py",
            "heartbeat.py",
            "machine/processors.py",
            "build/verb.py",
            "build/records.py",
            "build/terminal.py",
        ),
        *("record/__init__.py", "record/archive.py", "record/checker.py", "record/digest.py", "record/follow/"),
        *("record/grounds.py", "record/index.py", "record/kills.py", "record/staleness.py", "record/verdict.py"),
        *("report/", "run/", "selftest/", "examples/"),
        # what they decide stands in the record, and is decided again by whoever reads it
        *("fixtures.py", "record/schema.py", "record/strict.py"),
    )
)

#: What reaches every check by way of its fixtures: its seed, and how its device was made ready.
_FIXTURES = ("verify/machine/device.py",)

_MODULE = re.compile(r"(?:verify|phases)(?:\.\w+)+")


@dataclass(slots=True)
class Checkout:
    """The files that results rest on as they are now, by name: those of the suite and the phases in ``root``, and those
    of the subject's ``package``, which imports from the directory ``above``, where there is one to look at. ``suite``
    is the directory that this package imports from.
    """

    root: Path
    above: Path | None = None
    package: Path | None = None
    suite: Path = IMPORT_ROOT
    _known: dict[str, str | None] = field(default_factory=dict, repr=False)

    def sha256(self, name: str) -> str | None:
        """The digest of a file's content; None where it is not there, or cannot be read."""
        if name not in self._known:
            place = self.place(name)
            self._known[name] = place and _sha256(place)
        return self._known[name]

    def place(self, name: str) -> Path | None:
        top, _, rest = name.partition("/")
        if top == SUBJECT:
            return self.above and self.above / rest
        return (self.root if top == "phases" else self.suite) / name

    def name_of(self, path: Path) -> str | None:
        """The name of a file of the suite, of the phases or of the subject; None for any other.

        A module's compiled code goes by the name of its source.
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
        """The names of those of ``paths`` that a result may rest on."""
        return {name for path in paths if (name := self.name_of(path)) and not is_neutral(name)}

    def _folders(self) -> Iterator[tuple[Path, str]]:
        # the subject first: the plain one lies in the suite
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
        """The digests of those files that are there, by name."""
        return {name: digest for name in sorted(names) if (digest := self.sha256(name))}

    def closure(self, *names: str) -> set[str]:
        """The modules of suite and phases that these import, directly or not, and themselves.

        A module that is named in a string, to run in a process of its own, counts as imported. What a neutral module
        imports is not followed.
        """
        found: set[str] = set()
        waiting = [*names]
        while waiting:
            name = waiting.pop()
            if name in found or is_neutral(name):
                continue
            found.add(name)
            waiting += _imports(self.place(name), self)
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
    """Every dotted name that a module imports or names in a string, whatever it is of."""
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
    """What the results of this process rest on, by the log that it and its children write.

    Modules of the suite that were there before a phase began count where the check's file imports them, not because
    another phase did. Of the subject, whose ways of importing nobody knows, everything counts that was ever opened.
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
        """What every result of this phase rests on that no call has told yet; and what those of a ``file`` of checks
        rest on, the first time that it is asked for.
        """
        self._names |= self._new()
        opened = self._names - self._told
        imported = set() if file in self._told else self._checkout.closure(file, *_FIXTURES)
        self._told |= opened | {file}
        return opened, imported

    def _new(self) -> set[str]:
        """The names of what was opened since the last call, neutral files and those of other checks left out."""
        if not self._log.exists():
            return set()
        with self._log.open("rb") as stream:
            stream.seek(self._position)
            whole, newline, _ = stream.read().rpartition(b"\n")
        self._position += len(whole) + len(newline)
        names = self._checkout.names_of(Path(os.fsdecode(line)) for line in whole.splitlines())
        return {name for name in names if not name.startswith("phases/")}


def environment(log: Path, root: Path, package: Path, inherited: Mapping[str, str]) -> dict[str, str]:
    """The variables that make a Python child, and its children, note in ``log`` what they open of suite, phases and
    subject.
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
    """For children whose work is kept: what they open is known when it is kept, and told again when it is used."""
    with TemporaryDirectory() as folder:
        log = Path(folder) / "opened"
        yield Aside(environment(log, root, package, inherited), log, Checkout(root, above, package))


@dataclass(frozen=True, slots=True)
class Aside:
    """``environment`` is for the children; ``names`` are those of the files that they have opened so far."""

    environment: Mapping[str, str]
    log: Path
    checkout: Checkout

    def names(self) -> list[str]:
        lines = self.log.read_bytes().splitlines() if self.log.exists() else []
        return sorted(self.checkout.names_of(Path(os.fsdecode(line)) for line in lines))


def tell_again(names: Iterable[str], checkout: Checkout) -> None:
    """Note files as opened that somebody opened earlier to make what is used now."""
    if log := os.environ.get(follower.LOG):
        places = [place for name in names if (place := checkout.place(name))]
        with open(log, "ab", buffering=0) as stream:
            stream.write(b"".join(os.fsencode(place) + b"\n" for place in places))


def follow(log: Path, root: Path, package: Path) -> None:
    """``environment`` for this process from now on, and for the children that it starts."""
    os.environ |= environment(log, root, package, os.environ)
    follower.follow(str(log), tuple(os.environ[follower.PLACES].split(os.pathsep)))
