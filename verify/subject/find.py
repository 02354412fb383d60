"""Which implementation ``--subject`` means."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import replace
from importlib.machinery import PathFinder
from pathlib import Path

from verify.errors import ConfigurationError
from verify.files import expanded
from verify.record.grounds import PACKAGE
from verify.subject.subject import OnlyItsOwn, Subject
from verify.subject.toml import FILE, read

#: The values of ``--subject``, for error messages.
_KINDS = f"'bundled', 'installed', 'module:NAME', or the path of a checkout with a {PACKAGE}/ directory"


def find_subject(name: str, repository: Path) -> Subject:
    """The subject that ``--subject name`` means: ``bundled``, ``installed``, ``module:NAME``, or a checkout's path.

    ``installed`` is the package that an import finds outside ``repository``; ``module:NAME`` is another package in its
    role. ``subject.toml`` (verify/subject/toml.py) is in the root of a checkout, and in the package of the others.
    Imports nothing. Raises ConfigurationError for anything else, and for a subject file with a mistake.
    """
    if name == "bundled":
        return _with_file(Subject(name, _holding(repository, PACKAGE, name), "bundled"), None)
    if name == "installed":
        return _in_package(Subject(name, _installed(repository.resolve()), "installed"))
    kind, _, module = name.partition(":")
    if kind == "module":
        return _in_package(Subject(name, _importable(module, name), name, module))
    root = expanded(name).resolve()
    file = root / FILE if (root / FILE).is_file() else None
    package = (file and read(file).subject.package) or PACKAGE
    found = Subject(name, _holding(root, package, name), f"checkout:{root.name}", package)
    return _with_file(found, file)


def _in_package(subject: Subject) -> Subject:
    file = subject.folder / FILE
    return _with_file(subject, file if file.is_file() else None)


def _with_file(subject: Subject, file: Path | None) -> Subject:
    if file is None:
        return subject
    content = read(file)
    if content.subject.package not in (None, subject.package):
        raise ConfigurationError(
            f"{file} names the package {content.subject.package}, but --subject {subject.name} is {subject.package}; "
            "drop the line, or give the path of a checkout"
        )
    about = content.subject
    return replace(
        subject,
        file=file,
        names=content.names,
        arguments={
            name: {ours: theirs or None for ours, theirs in one.items()} for name, one in content.arguments.items()
        },
        sources=tuple(about.sources),
        profile=about.profile,
        plain_path=about.plain_path,
        narrowed=content.offers.narrowed(),
        patch_offers={name: tuple(values) for name, values in content.offers.patch.items()},
    )


def _holding(root: Path, package: str, name: str) -> Path:
    """``root``, which must hold the package's directory."""
    if not root.joinpath(*package.split(".")).is_dir():
        where = f"{root} has no {package}/ directory" if root.is_dir() else f"there is no directory {root}"
        raise ConfigurationError(f"subject {name!r}: {where}; use {_KINDS}")
    return root


def _installed(repository: Path) -> Path:
    """The directory from which an import would find the package if ``repository`` had none."""
    own = repository / PACKAGE
    importlib.invalidate_caches()
    specs = [PathFinder.find_spec(PACKAGE, [place for place in sys.path if (Path(place) / PACKAGE).resolve() != own])]
    # an editable installation may have its own finder
    others = (finder for finder in sys.meta_path if finder is not PathFinder and not isinstance(finder, OnlyItsOwn))
    specs += [finder.find_spec(PACKAGE, None) for finder in others if hasattr(finder, "find_spec")]
    places = [Path(place).resolve() for spec in specs if spec for place in spec.submodule_search_locations or ()]
    found = next((place for place in places if place != own), None)
    if found is None:
        raise ConfigurationError(
            f"subject 'installed': no {PACKAGE} is installed besides this repository's own, which is 'bundled' (an "
            f"editable installation of it is the same); install another, or use {_KINDS}"
        )
    return found.parent


def _importable(module: str, name: str) -> Path:
    """The directory from which the package ``module`` is imported; found without importing it."""
    if not all(part.isidentifier() for part in module.split(".")) or module == PACKAGE:
        problem = f"{PACKAGE} is the subject's own name" if module == PACKAGE else f"{module!r} is not a package name"
        raise ConfigurationError(f"subject {name!r}: {problem}; use {_KINDS}")
    top, *below = module.split(".")
    importlib.invalidate_caches()
    spec = importlib.util.find_spec(top)
    for place in (spec and spec.submodule_search_locations) or ():
        if Path(place).joinpath(*below).is_dir():
            return Path(place).resolve().parent
    problem = f"{module} is a module, not a package" if spec and not below else f"there is no package {module}"
    raise ConfigurationError(f"subject {name!r}: {problem} on sys.path; install it, or put its directory on PYTHONPATH")
