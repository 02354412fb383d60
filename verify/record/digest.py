"""The instrument itself: which sources of ``verify/`` and ``phases/`` measured, as one digest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from verify.record.follow.sitecustomize import unnoticed
from verify.record.grounds import SUBJECT, Checkout


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
    """A digest of what results rest on of this package and the phases of ``root`` (``verify/record/grounds.py``).

    Two runs are one measurement only where the same checks, budgets and rules made them.
    """
    return instrument_of(Checkout(root).everything())


def instrument_of(sources: Mapping[str, str]) -> str:
    """``instrument_sha256`` from the digests of all that results may rest on, of which the subject's are left out."""
    suite = sorted((name, digest) for name, digest in sources.items() if not name.startswith(f"{SUBJECT}/"))
    return hashlib.sha256(json.dumps(suite).encode()).hexdigest()
