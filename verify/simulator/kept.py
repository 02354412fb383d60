"""Results of launches, kept on disk, so that equal code with equal inputs is simulated once.

Kernels for related architectures often differ in the name of their target alone.
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import astuple
from functools import cache
from pathlib import Path

import numpy as np

from verify.files import cache_folder
from verify.simulator.launch import Ran
from verify.simulator.memory import Buffer


@cache
def simulator_sha256() -> str:
    """The digest of the simulator's own sources: another simulator, other results."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


class KeptLaunches:
    """The folder of kept results; those of another simulator are removed."""

    def __init__(self) -> None:
        above = cache_folder() / "simulated"
        self._folder = above / simulator_sha256()[:16]
        with suppress(OSError):
            for other in above.iterdir() if above.is_dir() else ():
                if other != self._folder:
                    shutil.rmtree(other, ignore_errors=True)

    def place(self, code: str, buffers: Sequence[Buffer], *further: object) -> Path:
        """The file of one launch: its code, its memory with what may be touched of it, and ``further`` settings."""
        digest = hashlib.sha256(repr((code, further)).encode())
        for one in buffers:
            digest.update(repr(one.identity).encode())
            digest.update(one.content.tobytes())
            if one.allowed is not None:
                digest.update(one.allowed.tobytes())
        name = digest.hexdigest()
        return self._folder / name[:2] / name[2:]

    def read(self, place: Path, buffers: Sequence[Buffer]) -> Ran | None:
        """What an earlier launch did, with its stores put into the buffers; None if it is not kept."""
        with suppress(OSError, ValueError, KeyError, zipfile.BadZipFile):
            with np.load(place, allow_pickle=False) as kept:
                for number, one in enumerate(buffers):
                    if f"at{number}" in kept:
                        one.put(kept[f"at{number}"], kept[f"bytes{number}"])
                instructions, *flags = (int(value) for value in kept["ran"])
            return Ran(instructions, *map(bool, flags))
        return None

    def write(self, place: Path, ran: Ran, buffers: Sequence[Buffer]) -> None:
        """Keep what a launch did; if it cannot be written, it is simulated again the next time."""
        parts: dict[str, np.ndarray] = {}
        for number, one in enumerate(buffers):
            if (written := one.written) is not None:
                at = np.flatnonzero(written)
                parts |= {f"at{number}": at, f"bytes{number}": one.content[at]}
        parts["ran"] = np.array(astuple(ran), np.int64)
        stream = io.BytesIO()
        np.savez_compressed(stream, **parts)  # type: ignore[arg-type]  # its stub takes allow_pickle for an array
        with suppress(OSError):
            place.parent.mkdir(parents=True, exist_ok=True)
            temporary = place.with_name(f".{place.name}.{os.getpid()}")
            temporary.write_bytes(stream.getvalue())
            temporary.replace(place)
