"""One digest of the instrument: the sources in ``verify/`` and ``phases/`` that took a measurement."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path

from verify.record.follow.sitecustomize import unnoticed
from verify.record.grounds import SUBJECT, Checkout


def digest_of(files: Iterable[Path], folder: Path) -> str:
    """The SHA-256 of the names below ``folder``, sizes and contents of ``files``, in any order."""
    digest = hashlib.sha256()
    with unnoticed():
        for file in sorted(files):
            content = file.read_bytes()
            digest.update(f"{file.relative_to(folder).as_posix()}\0{len(content)}\0".encode())
            digest.update(content)
    return digest.hexdigest()


def instrument_sha256(root: Path) -> str:
    """A digest of the files of this package and of the phases in ``root`` that results rest on
    (``verify/record/grounds.py``).

    Two runs can be combined only if the same checks, budgets and rules made them.
    """
    return instrument_of(Checkout(root).everything())


def instrument_of(sources: Mapping[str, str]) -> str:
    """``instrument_sha256`` from the digests of every file that results may rest on, except the subject's."""
    suite = sorted((name, digest) for name, digest in sources.items() if not name.startswith(f"{SUBJECT}/"))
    return hashlib.sha256(json.dumps(suite).encode()).hexdigest()
