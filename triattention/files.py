"""Atomic file writes, and paths as users give them."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO


def write_atomic(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Let ``write`` fill a temporary file that then replaces ``path``; after an error nothing is left behind.

    Raises OSError for a device, pipe or folder at ``path``, which must not be replaced.
    """
    if path.exists() and not path.is_file():
        raise FileExistsError(errno.EEXIST, "it is there and is not a regular file", str(path))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def expanded(name: str | os.PathLike[str]) -> Path:
    """A path that a user gave, with ``~`` for a home directory; unchanged where there is no such home."""
    return Path(os.path.expanduser(name))


def write_text(path: Path, content: str) -> None:
    """``write_atomic`` for UTF-8 text."""
    write_atomic(path, lambda stream: stream.write(content.encode()))
