"""The instrument itself: which sources of ``verify/`` and ``phases/`` measured, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from verify.follow.sitecustomize import unnoticed
from verify.grounds import Checkout


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """The sha256 over the names below ``folder``, sizes and contents of ``files``, whatever their order."""
    digest = hashlib.sha256()
    with unnoticed():
        for file in sorted(files):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def instrument_sha256(root: Path) -> str:
    """A digest of what results rest on of this package and the phases of ``root`` (``verify/grounds.py``).

    Two runs are one measurement only where the same checks, budgets and rules made them.
    """
    found = Checkout(root).everything()
    return hashlib.sha256(json.dumps(sorted(found.items())).encode()).hexdigest()
