"""Which folder may import which, that nothing imports in a circle, and that no module is too long."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from verify.tests.tree import REPOSITORY

_PACKAGES = ("verify", "phases", "triattention")

#: Tests, and what is a subject of its own, are not part of the layout.
_BESIDE = {"tests", "examples", "wrappers"}

#: The one way back up: the catalogue of checks is what ``phases/`` declares.
_CATALOGUE = ("verify.checks", "phases")

_DOORS = {"__main__", "arguments", "cli", "explain", "fixtures", "plugin", "sensitivity", "session"}
_LONG, _TOO_LONG = 300, 400
_ALLOWED = re.compile(r"^\| `(\w+)/` \|[^|]*\|([^|]*)\|$", re.MULTILINE)


def modules() -> dict[str, Path]:
    found = {}
    for package in _PACKAGES:
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            if not _BESIDE & {*parts}:
                found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def _imports(module: str) -> set[str]:
    """The modules of this repository that ``module`` imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module:
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & MODULES.keys() or {node.module} & MODULES.keys()
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names} & MODULES.keys()
    return found - {module}


IMPORTS = {module: _imports(module) for module in MODULES}
IMPORTS[_CATALOGUE[0]] -= {_CATALOGUE[1]}


def room(module: str) -> str:
    """The folder of a module of ``verify/``; of its top level, ``doors`` or ``vocabulary``; else the package."""
    package, *below = module.split(".")
    if package != "verify":
        return package
    if MODULES[module].parent.name != "verify":
        return below[0]
    return "doors" if below and below[0] in _DOORS else "vocabulary"


def _circles(arrows: Mapping[str, set[str]]) -> Iterator[list[str]]:
    """One way round each circle that a walk along the arrows meets."""
    done: set[str] = set()

    def walk(name: str, way: list[str]) -> Iterator[list[str]]:
        if name in way:
            yield [*way[way.index(name) :], name]
        elif name not in done:
            for other in sorted(arrows.get(name, ())):
                yield from walk(other, [*way, name])
            done.add(name)

    for name in arrows:
        yield from walk(name, [])


def test_a_circle_is_found() -> None:
    assert list(_circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}})) == [["b", "c", "b"]]


def test_no_modules_import_each_other_in_a_circle() -> None:
    assert [" -> ".join(circle) for circle in _circles(IMPORTS)] == []


def test_every_folder_imports_what_the_contributors_guide_allows() -> None:
    guide = (REPOSITORY / ".github" / "CONTRIBUTING.md").read_text("utf-8")
    table = {folder: set(re.findall(r"`(\w+)/`", allowed)) for folder, allowed in _ALLOWED.findall(guide)}
    rooms = {room(module) for module in MODULES} - {"vocabulary", "doors", "triattention"}
    assert table.keys() == rooms
    # each row may import from those above it, so the table has no circle
    rows = list(table)
    assert {row for row in rows if table[row] - {*rows[: rows.index(row)]}} == set()
    taken: dict[str, set[str]] = {folder: set() for folder in rows}
    for module, others in IMPORTS.items():
        here = room(module)
        away = {room(other) for other in others} - {here, "vocabulary"}
        if here == "vocabulary":
            assert not away, f"{module} imports {away}"
        elif here in taken:
            taken[here] |= away
    assert taken == table


def test_suite_and_subject_do_not_know_each_other() -> None:
    for module, others in IMPORTS.items():
        tops = {other.partition(".")[0] for other in others}
        assert tops <= ({"triattention"} if room(module) == "triattention" else {"verify", "phases"}), module


def test_the_vocabulary_needs_neither_torch_nor_pytest() -> None:
    program = "import verify, sys; print({'torch', 'pytest', 'triton', 'pydantic'} & {*sys.modules})"
    child = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert child.stdout.strip() == "set()", child.stderr


@pytest.mark.parametrize("folder", ["verify", "phases", "triattention", "ci"])
def test_long_modules_have_a_reason(folder: str) -> None:
    listed = tomllib.loads((REPOSITORY / "verify" / "tests" / "long_modules.toml").read_text("utf-8"))
    lengths = {
        path.relative_to(REPOSITORY).as_posix(): len(path.read_text("utf-8").splitlines())
        for path in (REPOSITORY / folder).rglob("*.py")
        if "tests" not in path.parts
    }
    long = {path for path, length in lengths.items() if length > _LONG}
    assert long == {path for path in listed if path.startswith(f"{folder}/")}
    assert {path for path in long if lengths[path] > _TOO_LONG} == set()
