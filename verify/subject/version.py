"""The version that a checkout declares, read without running anything in it."""

from __future__ import annotations

import ast
import tomllib
from collections.abc import Callable
from pathlib import Path

from verify.files import decoded


def declared_version(root: Path) -> str | None:
    """The version that ``pyproject.toml`` or ``setup.py`` has as a constant; None if neither has one."""
    readers: dict[str, Callable[[str], object]] = {"pyproject.toml": _of_project, "setup.py": _of_setup}
    for name, read in readers.items():
        try:
            found = read(decoded((root / name).read_bytes()))
        except (OSError, ValueError, SyntaxError, RecursionError):  # of TOML and of encodings too
            continue
        if isinstance(found, str) and found:
            return found
    return None


def _of_project(text: str) -> object:
    project = tomllib.loads(text).get("project")
    return project.get("version") if isinstance(project, dict) else None


def _of_setup(text: str) -> object:
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("setup", "setuptools.setup"):
            for keyword in node.keywords:
                if keyword.arg == "version" and isinstance(keyword.value, ast.Constant):
                    return keyword.value.value
    return None
