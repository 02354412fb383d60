"""Builds the wheel: the packages, and in ``verify/data/`` copies of what a checkout has outside them.

``verify/files.py`` looks there where no checkout is (``COPIES``). So git has each file once.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]

#: What a run or a report reads of a checkout, as patterns of paths.
COPIED = (
    "ci/constraints.txt",
    "ci/known_failures.toml",
    "reports/quality/*.json",
    "reports/selftest/*.json",
    "reports/sensitivity/*.json",
    "reports/sensitivity/headroom/*.json",
)


def copied() -> list[Path]:
    """The files that are copied. Raises FileNotFoundError for a pattern that matches none."""
    found = []
    for pattern in COPIED:
        files = sorted(ROOT.glob(pattern))
        if not files:
            raise FileNotFoundError(f"{ROOT / pattern} is not there, but the wheel needs it")
        found += files
    return found


class BuildWithCopies(build_py):
    """``build_py`` of setuptools, with the copies. An editable installation needs none: it is the checkout."""

    editable_mode: bool

    def run(self) -> None:
        if self.editable_mode:
            return super().run()
        # an earlier build may have left files there that the source no longer has
        for package in {name.partition(".")[0] for name in self.packages or ()}:
            shutil.rmtree(Path(self.build_lib, package), ignore_errors=True)
        super().run()
        for source, place in self._copies():
            self.mkpath(str(place.parent))
            self.copy_file(str(source), str(place))

    def get_outputs(self, include_bytecode: Any = 1) -> list[str]:
        copies = [] if self.editable_mode else [str(place) for _, place in self._copies()]
        return [*super().get_outputs(include_bytecode), *copies]

    def _copies(self) -> list[tuple[Path, Path]]:
        data = Path(self.build_lib, "verify", "data")
        return [(source, data / source.relative_to(ROOT)) for source in copied()]
