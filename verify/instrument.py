"""The instrument itself: which sources of ``verify/`` and ``phases/`` measured, as one digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """The sha256 over the names below ``folder``, sizes and contents of ``files``, whatever their order."""
    digest = hashlib.sha256()
    for file in sorted(files):
        content = file.read_bytes()
        digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def instrument_sha256(root: Path) -> str:
    """A digest of this package's modules and of the phases of ``root``, without their tests.

    Two results are comparable only where the same checks, budgets and rules made them.
    """
    package = Path(__file__).resolve().parent
    parts = [digest_of(folder.glob("*.py"), folder) for folder in (package, root / "phases")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()
